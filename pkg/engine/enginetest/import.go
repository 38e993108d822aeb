package enginetest

import (
	"slices"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// TestImport: what is imported has its content, goes back when its slab is deleted before the import
// is final, and only then.
func (s suite) TestImport(t *testing.T) {
	if !slices.Contains(s.Expect, engine.CapImport) {
		return
	}
	es := s.several(t, 2)
	e, ctx := es[0], t.Context()
	i := s.native(t, e, engine.CapImport).Importer
	const size = 4 * mib
	spec := engine.SlabSpec{ID: "imported", Kind: engine.Block, Size: size}
	_, err := i.Importable(ctx, "none")
	fails(t, err, fault.NotFound)
	fails(t, i.ImportSlab(ctx, "none", spec), fault.NotFound)
	fails(t, i.KeepSlab(ctx, "none", "imported"), fault.NotFound)
	same(t, "slabs", slabIDs(t, e), nil)
	if s.Foreign == nil {
		return
	}
	content := append(make([]byte, size-8192), pattern(7, 8192)...)
	source := s.Foreign(t, content)
	importable := func(holds string) {
		t.Helper()
		found, err := i.Importable(ctx, source)
		ok(t, err)
		if found.Size != size || found.Allocated < 0 || found.Holds != holds {
			t.Errorf("%q is importable as %+v, want %d bytes that hold %s", source, found, size, holds)
		}
	}
	importable("nothing")
	for range 2 { // an answer may be lost
		ok(t, i.ImportSlab(ctx, source, spec))
	}
	if have := slabsOf(t, es[1])["imported"]; have.Size != size || have.Kind != engine.Block {
		t.Errorf("listed as %+v", have)
	}
	has(t, attach(t, e, "imported"), engine.Block, size-8192, pattern(7, 8192))
	ok(t, e.DetachSlab(ctx, "imported"))
	ok(t, e.DeleteSlab(ctx, "imported"))
	same(t, "slabs after an import that was given back", slabIDs(t, e), nil)
	importable("nothing")

	ok(t, i.ImportSlab(ctx, source, spec))
	for range 2 {
		ok(t, i.KeepSlab(ctx, source, "imported"))
	}
	_, err = i.Importable(ctx, source)
	fails(t, err, fault.NotFound)
	other := attach(t, es[1], "imported")
	has(t, other, engine.Block, size-8192, pattern(7, 8192))
	put(t, other, engine.Block, 0, pattern(8, 4096))
	ok(t, es[1].DetachSlab(ctx, "imported"))
	ok(t, e.ResizeSlab(ctx, "imported", 2*size))
	ok(t, e.DeleteSlab(ctx, "imported"))
	_, err = i.Importable(ctx, source)
	fails(t, err, fault.NotFound)
}
