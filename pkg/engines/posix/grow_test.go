package posix

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// TestAGrowthThatComesLateCutsNothing: what a dead server is still asked for may happen when the slab has grown
// further meanwhile, and is full of data.
func TestAGrowthThatComesLateCutsNothing(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			min := int64(32 << 20)
			if fstype == "xfs" {
				min = hosttest.MinXFS
			}
			d := open(t, hosttest.Filesystem(t, fstype, min))
			ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 1 << 20}))
			path := filepath.Join(d.Path(), "slabs", "a")
			ok(t, d.ResizeSlab(t.Context(), "a", 4<<20))
			if content, err := os.ReadFile(path); err != nil || !bytes.Equal(content, make([]byte, 4<<20)) {
				t.Fatalf("grown to 4 MiB of zeros it has %d bytes, %v, or some that are not zero", len(content), err)
			}
			if info, err := os.Stat(path); err != nil || info.Size() != 4<<20 {
				t.Fatal(info, err)
			}
			full := bytes.Repeat([]byte("data"), 1<<20)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			ok(t, err)
			defer f.Close()
			if _, err := f.WriteAt(full, 0); err != nil {
				t.Fatal(err)
			}
			ok(t, extend(f, 2<<20)) // late
			if content, err := os.ReadFile(path); err != nil || !bytes.Equal(content, full) {
				t.Errorf("after a growth to 2 MiB that came late it has %d bytes, %v, or other ones than were written", len(content), err)
			}
		})
	}
}

// TestGrowthsOfHostsThatShareNoLocks: none undoes another, and none is seen half made.
func TestGrowthsOfHostsThatShareNoLocks(t *testing.T) {
	path := t.TempDir()
	hosts := []*Directory{openWith(t, path, Options{NoLocks: true}), openWith(t, path, Options{NoLocks: true}), openWith(t, path, Options{NoLocks: true})}
	ok(t, hosts[0].CreateSlab(t.Context(), engine.SlabSpec{ID: "t", Kind: engine.Tree, Size: 1 << 20}))
	var g errgroup.Group
	for i := range 60 {
		g.Go(func() error { return hosts[i%len(hosts)].ResizeSlab(t.Context(), "t", int64(2+i)<<20) })
		g.Go(func() error { _, err := hosts[i%len(hosts)].ListSlabs(t.Context()); return err })
	}
	ok(t, g.Wait())
	if slabs, err := hosts[1].ListSlabs(t.Context()); err != nil || len(slabs) != 1 || slabs[0].Size != 61<<20 {
		t.Errorf("slabs %v, %v: the largest growth was to %d", slabs, err, 61<<20)
	}
}
