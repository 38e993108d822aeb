package block

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// dead is a kernel with a storage that never answers.
type dead struct {
	kernel
	dir   string
	asked atomic.Int32
}

func (k *dead) Within(ctx context.Context, key string, limit time.Duration, f func() error) error {
	if strings.Contains(key, k.dir) {
		k.asked.Add(1)
		return fault.New(fault.Unavailable, "%s: no answer within %s", key, limit)
	}
	return f()
}

func TestAStorageThatDoesNotAnswerIsAskedForOneFile(t *testing.T) {
	k := &dead{dir: "/dead/"}
	d := &Devices{kernel: k}
	dir := t.TempDir()
	var files []host.Loop
	file := func(name string, blocks int) {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, blocks*unit), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 4*unit); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		files = append(files, host.Loop{Backing: path, Dev: st.Dev, Inode: st.Ino, Size: 4 * unit})
	}
	for range 50 {
		files = append(files, host.Loop{Backing: "/dead/file", Dev: 1 << 40, Size: unit})
	}
	file("thin", 1)
	files = append(files, host.Loop{Backing: filepath.Join(dir, "gone"), Dev: files[50].Dev, Size: unit})
	file("whole", 4)
	want := make([]bool, 53)
	want[52] = true
	if got := d.whole(t.Context(), files); !slices.Equal(got, want) {
		t.Errorf("whole are %v", got)
	}
	if n := k.asked.Load(); n != 1 {
		t.Errorf("what does not answer was asked %d times", n)
	}
}
