package mover_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/pkg/mover"
)

// TestALayerWithoutAllItsSpaceNeedsTheReserve of its storage; one with all of it does not.
func TestALayerWithoutAllItsSpaceNeedsTheReserve(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 512<<20)
	const content, chunk = 8 << 20, 32 << 10
	m, size, ctx := mover.New(mover.Options{}), layer.StoreSize(content, chunk), t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	slab := func(name string) string {
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		must(err)
		must(errors.Join(f.Truncate(size), f.Close()))
		return path
	}
	measure := func() (free int64, r layer.Reserve) {
		var st unix.Statfs_t
		must(unix.Statfs(dir, &st))
		return int64(st.Bavail) * st.Bsize, layer.ReserveOf(int64(st.Blocks) * st.Bsize)
	}
	must(m.FormatLayer(ctx, slab("early"), 0, chunk))

	filler, err := os.Create(filepath.Join(dir, "filler"))
	must(err)
	defer filler.Close()
	free, r := measure()
	end := free - r.Low + size/2
	must(unix.Fallocate(int(filler.Fd()), 0, 0, end))
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), "thinLayers") {
			t.Errorf("%s: %v", what, err)
		}
	}
	thin := slab("thin")
	refused("a thin layer", m.FormatLayer(ctx, thin, 0, chunk))
	refused("a layer with half its space", m.FormatLayer(ctx, thin, size/2, chunk))
	if err := m.CheckLayer(ctx, thin); !errors.Is(err, fault.Corrupt) {
		t.Errorf("what was refused is a layer: %v", err)
	}
	refused("the space of none", m.Allocate(ctx, filepath.Join(dir, "early"), 0))
	must(m.FormatLayer(ctx, slab("whole"), size, chunk))
	must(m.Allocate(ctx, filepath.Join(dir, "early"), size))

	// A layer with all its space may have what the storage can spare, and no byte more.
	if free, _ = measure(); free < r.Floor {
		t.Fatalf("%d bytes are free", free)
	}
	must(unix.Fallocate(int(filler.Fd()), 0, end, free-r.Floor-size/2))
	for what, err := range map[string]error{"new": m.FormatLayer(ctx, slab("more"), size, chunk), "old": m.Allocate(ctx, slab("most"), size)} {
		if !errors.Is(err, fault.Exhausted) || !strings.Contains(err.Error(), "have to stay") {
			t.Errorf("a whole layer that leaves too little, %s: %v", what, err)
		}
	}
	must(m.Allocate(ctx, filepath.Join(dir, "whole"), size)) // has its space
	if free, _ := measure(); free < r.Floor {
		t.Errorf("%d bytes are free", free)
	}

	must(filler.Truncate(0))
	must(filler.Sync()) // the space comes back with the journal
	if free, _ := measure(); free < r.Low {
		t.Fatalf("%d bytes are free", free)
	}
	must(m.FormatLayer(ctx, thin, 0, chunk))
	must(m.CheckLayer(ctx, thin))
}
