package mover_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/pkg/mover"
)

// TestALayerThatIsLockedIsNotTrimmed: whoever attaches or writes a layer holds its lock.
func TestALayerThatIsLockedIsNotTrimmed(t *testing.T) {
	const content, chunk = 8 << 20, 32 << 10
	m, size := mover.New(mover.Options{}), layer.StoreSize(content, chunk)
	path := filepath.Join(t.TempDir(), "layer")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(f.Truncate(size))
	must(m.FormatLayer(t.Context(), path, size, chunk))
	allocated := func() int64 {
		var st unix.Stat_t
		must(unix.Fstat(int(f.Fd()), &st))
		return st.Blocks * 512
	}
	if allocated() < size {
		t.Fatal("this file system allocates nothing ahead")
	}
	must(unix.Flock(int(f.Fd()), unix.LOCK_EX))
	if err := m.TrimLayer(t.Context(), path, size); !errors.Is(err, fault.InUse) || allocated() < size {
		t.Errorf("a locked layer is trimmed: %v, %d bytes are left", err, allocated())
	}
	must(unix.Flock(int(f.Fd()), unix.LOCK_UN))
	must(m.TrimLayer(t.Context(), path, size))
	if allocated() >= size {
		t.Errorf("%d bytes are left", allocated())
	}
}
