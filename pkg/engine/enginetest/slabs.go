package enginetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// TestSlabIsIdempotent: rule 2.
func (s suite) TestSlabIsIdempotent(t *testing.T) {
	s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
		d := describe(t, e)
		spec := create(t, e, "a", k, 8*mib)
		path := attach(t, e, "a")
		put(t, path, k, 4096, []byte("kept"))
		ok(t, e.CreateSlab(t.Context(), spec))
		has(t, path, k, 4096, []byte("kept"))
		for _, size := range []int64{1, 8*mib + d.Granularity, 1 << 30} {
			other := spec
			other.Size = size
			fails(t, e.CreateSlab(t.Context(), other), fault.Exists)
		}
		for _, kind := range d.Kinds {
			if kind != k {
				fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: kind, Size: spec.Size}), fault.Exists)
			}
		}
		has(t, path, k, 4096, []byte("kept"))
		same(t, "slabs", slabIDs(t, e), []string{"a"})
		ok(t, e.DetachSlab(t.Context(), "a"))
		for range 2 {
			ok(t, e.DeleteSlab(t.Context(), "a"))
			same(t, "slabs after deletion", slabIDs(t, e), nil)
		}
		ok(t, e.DeleteSlab(t.Context(), "never-was"))
	})
}

// TestSlabSizes: the size is rounded up to the granularity, and what cannot be
// made is refused with nothing left.
func (s suite) TestSlabSizes(t *testing.T) {
	s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
		g := describe(t, e).Granularity
		for i, size := range []int64{1, g - 1, g, g + 1, 5*mib + 1} {
			id := fmt.Sprintf("s%d", i)
			spec := create(t, e, id, k, size)
			ok(t, e.CreateSlab(t.Context(), spec))
			have := slabsOf(t, e)[id]
			if have.Kind != k || k == engine.Tree && have.Size != size || k == engine.Block && (have.Size < size || have.Size%g != 0) {
				t.Errorf("a %s slab of %d bytes is listed as %+v", k, size, have)
			}
			if path := attach(t, e, id); k == engine.Block && sizeOf(t, path) < size {
				t.Errorf("a slab of %d bytes has a path of %d", size, sizeOf(t, path))
			}
			ok(t, e.DetachSlab(t.Context(), id))
			ok(t, e.DeleteSlab(t.Context(), id))
		}
		for _, size := range []int64{0, -1, math.MinInt64} {
			fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Kind: k, Size: size}), fault.Invalid)
		}
		if err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Kind: k, Size: math.MaxInt64}); err == nil {
			ok(t, e.DeleteSlab(t.Context(), "bad")) // a promise that no one checks
		} else {
			fails(t, err, fault.OutOfRange, fault.Exhausted, fault.Invalid)
		}
		fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Kind: "disk", Size: mib}), fault.Invalid)
		fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Size: mib}), fault.Invalid)
		params := map[string]string{"no-engine-has-this": "1"}
		fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Kind: k, Size: mib, Params: params}), fault.Invalid)
		same(t, "slabs", slabIDs(t, e), nil)
	})
}

// TestSlabUnknownIsNotFound: rule 7.
func (s suite) TestSlabUnknownIsNotFound(t *testing.T) {
	e := s.one(t)
	fails(t, e.ResizeSlab(t.Context(), "nothing", mib), fault.NotFound)
	_, err := e.AttachSlab(t.Context(), "nothing", engine.AttachOptions{})
	fails(t, err, fault.NotFound)
	ok(t, e.DetachSlab(t.Context(), "nothing"))
	same(t, "slabs", slabIDs(t, e), nil)
}

// TestSlabGrowsOnly: data is kept, new space is zero where that is promised.
func (s suite) TestSlabGrowsOnly(t *testing.T) {
	s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
		const size = 4 * mib
		create(t, e, "a", k, size)
		data := pattern(1, 64<<10)
		path := attach(t, e, "a")
		put(t, path, k, size-int64(len(data)), data)
		ok(t, e.DetachSlab(t.Context(), "a"))
		for _, ask := range []int64{size, 1, 0, 3 * size, 2 * size, 3 * size} {
			before := slabsOf(t, e)["a"].Size
			ok(t, e.ResizeSlab(t.Context(), "a", ask))
			if after := slabsOf(t, e)["a"].Size; after < ask || after < before || ask <= before && after != before {
				t.Errorf("resized from %d to %d: it has %d", before, ask, after)
			}
		}
		path = attach(t, e, "a")
		has(t, path, k, size-int64(len(data)), data)
		if k == engine.Block {
			if have := sizeOf(t, path); have < 3*size {
				t.Errorf("grown to %d, but its path has %d", 3*size, have)
			}
			if describe(t, e).ZeroedSpace {
				zero(t, path, size, 2*size)
			}
			put(t, path, k, 3*size-4096, pattern(2, 4096))
		}
	})
}

// TestSlabGrowthsRace: of several growths at once none undoes another.
func (s suite) TestSlabGrowthsRace(t *testing.T) {
	s.kinds(t, func(t *testing.T, _ engine.Engine, k engine.Kind) {
		es := s.several(t, 3)
		create(t, es[0], "a", k, mib)
		var g errgroup.Group
		for i := range 12 {
			g.Go(func() error { return es[i%len(es)].ResizeSlab(t.Context(), "a", int64(i+2)*mib) })
		}
		ok(t, g.Wait())
		if have := slabsOf(t, es[1])["a"].Size; have != 13*mib {
			t.Errorf("the largest growth was to %d, the slab has %d", 13*mib, have)
		}
	})
}

// TestSlabCreatorsRace: rules 1 and 2 with several processes.
func (s suite) TestSlabCreatorsRace(t *testing.T) {
	s.kinds(t, func(t *testing.T, _ engine.Engine, k engine.Kind) {
		es := s.several(t, 3)
		var g errgroup.Group
		errs := make([]error, 12)
		for i := range errs {
			g.Go(func() error {
				size := int64(1+i%2) * mib
				errs[i] = es[i%len(es)].CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: k, Size: size})
				return nil
			})
		}
		ok(t, g.Wait())
		slab, there := slabsOf(t, es[2])["a"]
		if !there {
			t.Fatalf("nobody made it: %v", errs)
		}
		for i, err := range errs {
			if int64(1+i%2)*mib == slab.Size {
				ok(t, err)
			} else {
				fails(t, err, fault.Exists)
			}
		}
	})
}

// TestAttachIsIdempotent: and what was written is there for whoever attaches next.
func (s suite) TestAttachIsIdempotent(t *testing.T) {
	s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
		create(t, e, "a", k, mib)
		path := attach(t, e, "a")
		if again := attach(t, e, "a"); again != path {
			t.Errorf("attached at %s, then at %s", path, again)
		}
		if !filepath.IsAbs(path) {
			t.Errorf("path %q is not absolute", path)
		}
		info, err := os.Lstat(path)
		ok(t, err)
		if k == engine.Tree {
			entries, err := os.ReadDir(path)
			ok(t, err)
			if len(entries) != 0 || info.Mode() != os.ModeDir|0o755 {
				t.Errorf("a new tree has mode %v and %d entries: want an empty directory of mode 0755", info.Mode(), len(entries))
			}
		} else if !info.Mode().IsRegular() && info.Mode()&os.ModeDevice == 0 {
			t.Errorf("%s is neither file nor device: %v", path, info.Mode())
		}
		put(t, path, k, 8192, pattern(3, 4096))
		ok(t, e.DetachSlab(t.Context(), "a"))
		ok(t, e.DetachSlab(t.Context(), "a"))
		a, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{ReadOnly: true})
		ok(t, err)
		has(t, a.Path, k, 8192, pattern(3, 4096))
	})
}

// TestReopen: everything is in the domain, nothing in the process.
func (s suite) TestReopen(t *testing.T) {
	s.kinds(t, func(t *testing.T, _ engine.Engine, k engine.Kind) {
		open := s.Domain(t)
		e := open(t)
		spec := create(t, e, "a", k, 2*mib)
		ok(t, e.ResizeSlab(t.Context(), "a", 4*mib))
		a, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
		ok(t, err)
		put(t, a.Path, k, mib, pattern(4, 4096))
		ok(t, e.DetachSlab(t.Context(), "a"))
		ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "a", Record: []byte("r")}))
		ok(t, e.Close())

		e = open(t)
		t.Cleanup(func() { ok(t, e.Close()) })
		if have := slabsOf(t, e)["a"]; have != (engine.Slab{ID: "a", Kind: k, Size: 4 * mib}) {
			t.Errorf("after reopening: %+v", have)
		}
		has(t, attach(t, e, "a"), k, mib, pattern(4, 4096))
		tags, err := e.ListTags(t.Context(), "i.")
		ok(t, err)
		if len(tags) != 1 || tags[0].Slab != "a" || string(tags[0].Record) != "r" {
			t.Errorf("after reopening: tags %v", tags)
		}
		fails(t, e.CreateSlab(t.Context(), spec), fault.Exists) // it has grown
	})
}

// TestNewSpaceIsZero: also where something was before.
func (s suite) TestNewSpaceIsZero(t *testing.T) {
	e := s.one(t)
	d := describe(t, e)
	if !slices.Contains(d.Kinds, engine.Block) || !d.ZeroedSpace {
		t.Log("nothing is promised")
		return
	}
	const size = 8 * mib
	for round := range 3 {
		id := fmt.Sprintf("s%d", round)
		create(t, e, id, engine.Block, size)
		path := attach(t, e, id)
		zero(t, path, 0, size)
		put(t, path, engine.Block, 0, pattern(5, size))
		ok(t, e.DetachSlab(t.Context(), id))
		ok(t, e.DeleteSlab(t.Context(), id))
	}
}

// TestTreeIsDeletedWithItsContent: whatever a user left in it, and nothing else.
func (s suite) TestTreeIsDeletedWithItsContent(t *testing.T) {
	e := s.one(t)
	if !slices.Contains(describe(t, e).Kinds, engine.Tree) {
		t.Log("there are no trees")
		return
	}
	outside := filepath.Join(t.TempDir(), "outside")
	ok(t, os.WriteFile(outside, []byte("stays"), 0o644))
	create(t, e, "a", engine.Tree, mib)
	create(t, e, "b", engine.Tree, mib)
	a := attach(t, e, "a")
	deep := filepath.Join(a, "one", "two", "three")
	ok(t, os.MkdirAll(deep, 0o755))
	ok(t, os.WriteFile(filepath.Join(deep, "file"), pattern(6, 4096), 0o400))
	ok(t, os.Link(filepath.Join(deep, "file"), filepath.Join(a, "hard")))
	ok(t, os.Symlink(filepath.Dir(outside), filepath.Join(a, "soft")))
	ok(t, unix.Mkfifo(filepath.Join(a, "pipe"), 0o600))
	ok(t, os.Chmod(deep, 0o500))
	ok(t, e.DetachSlab(t.Context(), "a"))
	ok(t, e.DeleteSlab(t.Context(), "a"))
	same(t, "slabs", slabIDs(t, e), []string{"b"})
	if _, err := os.Lstat(a); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", a, err)
	}
	if data, err := os.ReadFile(outside); err != nil || string(data) != "stays" {
		t.Errorf("a file outside was touched: %q, %v", data, err)
	}
}

// TestCanceledCallsSayso: a canceled call has happened, or fails as canceled.
func (s suite) TestCanceledCallsSayso(t *testing.T) {
	e := s.one(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	kind := describe(t, e).Kinds[0]
	_, tagsErr := e.ListTags(ctx, "")
	_, slabsErr := e.ListSlabs(ctx)
	for verb, err := range map[string]error{
		"CreateSlab": e.CreateSlab(ctx, engine.SlabSpec{ID: "a", Kind: kind, Size: mib}),
		"DeleteSlab": e.DeleteSlab(ctx, "b"),
		"CreateTag":  e.CreateTag(ctx, engine.Tag{Name: "a"}),
		"DeleteTag":  e.DeleteTag(ctx, "b"),
		"ListTags":   tagsErr,
		"ListSlabs":  slabsErr,
	} {
		if err != nil && !errors.Is(err, fault.Canceled) {
			t.Errorf("%s: %v (%v), want success or %v", verb, err, fault.KindOf(err), fault.Canceled)
		}
	}
}
