package engine_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// able has methods for two capabilities and says which it really has.
type able struct {
	engine.Engine
	supports []engine.Capability
}

func (a able) SnapshotSlab(context.Context, string, engine.SlabSpec) error { return nil }
func (a able) CloneSlab(context.Context, string, engine.SlabSpec) error    { return nil }
func (a able) Supports(c engine.Capability) bool                           { return slices.Contains(a.supports, c) }

func TestDiscoverFindsOnlyWhatIsReallyThere(t *testing.T) {
	got := engine.Discover(able{supports: []engine.Capability{engine.CapClone, engine.CapMeter}})
	if got.Cloner == nil || got.Snapshotter != nil || got.Meter != nil {
		t.Errorf("found %v", got.List())
	}
	if list := got.List(); !slices.Equal(list, []engine.Capability{engine.CapClone}) {
		t.Errorf("listed %v", list)
	}
}

func TestMinimalHidesEverything(t *testing.T) {
	all := able{supports: []engine.Capability{engine.CapClone, engine.CapSnapshot}}
	if got := engine.Discover(engine.Minimal(all)).List(); len(got) > 0 {
		t.Errorf("found %v", got)
	}
}

func TestNames(t *testing.T) {
	for _, good := range []string{"a", "0", "a.b_c-d", strings.Repeat("x", engine.MaxName)} {
		if err := engine.CheckName("tag name", good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", ".", "..", ".a", "-a", "_a", "A", "a/b", "a b", "ä", "a\x00", "a\n", strings.Repeat("x", engine.MaxName+1)} {
		err := engine.CheckName("tag name", bad)
		if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "tag name") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestTagsAndSpecs(t *testing.T) {
	good := engine.Tag{Name: "i.a.1", Slab: "a", Record: make([]byte, engine.MaxRecord)}
	if err := engine.CheckTag(good); err != nil {
		t.Error(err)
	}
	for what, bad := range map[string]engine.Tag{
		"name": {Name: "I"}, "slab": {Name: "a", Slab: "/"}, "record": {Name: "a", Record: make([]byte, engine.MaxRecord+1)},
	} {
		if err := engine.CheckTag(bad); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, bad := range map[string]engine.SlabSpec{
		"id": {Kind: engine.Block, Size: 1}, "kind": {ID: "a", Size: 1}, "size": {ID: "a", Kind: engine.Tree}, "negative": {ID: "a", Kind: engine.Block, Size: -1},
	} {
		if err := engine.CheckSpec(bad); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := engine.CheckSpec(engine.SlabSpec{ID: "a", Kind: engine.Tree, Size: 1}); err != nil {
		t.Error(err)
	}
}
