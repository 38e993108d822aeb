package enginetest

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// TestListingsDuringChanges: rule 5: what lives is in every listing, also in
// other processes; what is listed is never half made.
func (s suite) TestListingsDuringChanges(t *testing.T) {
	es := s.several(t, 3)
	kinds := describe(t, es[0]).Kinds
	const size = mib
	stable, listings := s.pick(40, 8), s.pick(30, 5)
	record := func(name string) string { return "the record of " + name }
	var g errgroup.Group
	g.SetLimit(8)
	for i := range stable {
		name := fmt.Sprintf("e.stable.%d", i)
		g.Go(func() error {
			return es[0].CreateTag(t.Context(), engine.Tag{Name: name, Slab: name, Record: []byte(record(name))})
		})
		g.Go(func() error {
			return es[0].CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: kinds[i%len(kinds)], Size: size})
		})
	}
	ok(t, g.Wait())

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var changes atomic.Int64
	var churn errgroup.Group
	for w := range 3 {
		e := es[w%2]
		churn.Go(func() error {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("e.passing.%d.%d", w, i)
				if err := e.CreateTag(t.Context(), engine.Tag{Name: name, Slab: name, Record: []byte(record(name))}); err != nil {
					return err
				}
				if err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: kinds[i%len(kinds)], Size: size}); err != nil {
					return err
				}
				if err := e.DeleteSlab(t.Context(), name); err != nil {
					return err
				}
				if err := e.DeleteTag(t.Context(), name); err != nil {
					return err
				}
				changes.Add(1)
			}
			return nil
		})
	}
	check := func(e engine.Engine) error {
		tags, err := e.ListTags(t.Context(), "e.")
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, tag := range tags {
			if tag.Slab != tag.Name || string(tag.Record) != record(tag.Name) {
				return fmt.Errorf("tag %q is listed half made: %q %q", tag.Name, tag.Slab, tag.Record)
			}
			seen[tag.Name] = true
		}
		slabs, err := e.ListSlabs(t.Context())
		if err != nil {
			return err
		}
		seenSlab := map[string]bool{}
		for _, slab := range slabs {
			if slab.Size != size {
				return fmt.Errorf("slab %q is listed half made: %+v", slab.ID, slab)
			}
			seenSlab[slab.ID] = true
		}
		for i := range stable {
			if name := fmt.Sprintf("e.stable.%d", i); !seen[name] || !seenSlab[name] {
				return fmt.Errorf("%q lives, but a listing misses it: tag %v, slab %v", name, seen[name], seenSlab[name])
			}
		}
		return nil
	}
	// At least as many changes as listings, or the listings raced with nothing.
	for n := 0; n < listings || changes.Load() < int64(listings); n++ {
		if err := check(es[1+n%2]); err != nil {
			t.Error(err)
			break
		}
	}
	stop()
	ok(t, churn.Wait())
	if have := len(tagNames(t, es[2], "")); have != stable {
		t.Errorf("%d tags at the end, want %d", have, stable)
	}
}

// TestListingSeesWhatOthersDidBefore: rule 5, one change at a time.
func (s suite) TestListingSeesWhatOthersDidBefore(t *testing.T) {
	es := s.several(t, 2)
	kinds := describe(t, es[0]).Kinds
	for i := range s.pick(10, 3) {
		kind := kinds[i%len(kinds)]
		maker, lister := es[i%2], es[(i+1)%2]
		name := fmt.Sprintf("n.%d", i)
		ok(t, maker.CreateTag(t.Context(), engine.Tag{Name: name}))
		create(t, maker, name, kind, mib)
		same(t, "tags", tagNames(t, lister, ""), []string{name})
		same(t, "slabs", slabIDs(t, lister), []string{name})
		ok(t, maker.ResizeSlab(t.Context(), name, 2*mib))
		if have := slabsOf(t, lister)[name].Size; have < 2*mib {
			t.Errorf("another process has grown the %s slab to %d bytes, the listing says %d", kind, 2*mib, have)
		}
		ok(t, maker.DeleteTag(t.Context(), name))
		ok(t, maker.DeleteSlab(t.Context(), name))
		same(t, "tags after deletion", tagNames(t, lister, ""), nil)
		same(t, "slabs after deletion", slabIDs(t, lister), nil)
	}
}
