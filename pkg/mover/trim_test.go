package mover_test

import (
	"bytes"
	"context"
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

// endsAfter is a context that ends when it was looked at so many times.
type endsAfter struct {
	context.Context
	looks int
}

func (c *endsAfter) Err() error {
	if c.looks--; c.looks < 0 {
		return context.Canceled
	}
	return nil
}

// TestALayerThatWasGivenUpIsNotFormatted: somebody else may be writing it by then. Also when it was given
// up while its space was taken.
func TestALayerThatWasGivenUpIsNotFormatted(t *testing.T) {
	const chunk = 32 << 10
	size := layer.StoreSize(8<<20, chunk)
	path := filepath.Join(t.TempDir(), "layer")
	before := bytes.Repeat([]byte("another's"), int(size)/9+1)[:size]
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	for looks := range 2 {
		err := mover.New(mover.Options{}).FormatLayer(&endsAfter{t.Context(), looks}, path, size, chunk)
		if !errors.Is(err, fault.Canceled) {
			t.Errorf("after %d looks: %v", looks, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
			t.Fatalf("after %d looks it was written; %v", looks, err)
		}
	}
}
