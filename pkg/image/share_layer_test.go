package image_test

import (
	"context"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// onShare is an engine whose domain other hosts may open as well.
type onShare struct{ engine.Engine }

func (e onShare) Describe(ctx context.Context) (engine.Description, error) {
	d, err := e.Engine.Describe(ctx)
	d.SharedAccess = true
	return d, err
}

// A chunk of several pages on a share would destroy memory of the node: see package layer.
func TestALayerOnAShareHasChunksOfOnePage(t *testing.T) {
	r := newRig(t, "a")
	r.wrap = func(e engine.Engine) engine.Engine { return onShare{engine.Minimal(e)} }
	r.mapAgents = &layering{agents: r.agents, merging: map[string]bool{}}
	r.start()
	chain := func(of image.Image, layers int) {
		t.Helper()
		now, err := r.Get(r.ctx, of.Handle)
		r.must(err)
		if len(now.Chain) != layers+1 {
			t.Fatalf("%s has %d layers, want %d", now.Name, len(now.Chain)-1, layers)
		}
		for _, s := range now.Chain[:layers] {
			if s.Chunk != layer.ShareChunk {
				t.Errorf("%s: slab %s has chunks of %d bytes, want %d", now.Name, s.ID, s.Chunk, layer.ShareChunk)
			}
		}
	}
	v := r.volume("v", "a", 32*mib)
	s := r.snapshot("s", v)
	chain(v, 1)
	chain(r.from("clone", "a", s, 64*mib), 1)

	large := r.volume("large", "a", layer.ShareLimit+mib)
	r.snapshot("of large", large) // a copy, of a hole
	chain(large, 0)
}

// copying is an engine whose storage copies slabs, of which there is only emptiness, and does nothing else natively.
type copying struct{ engine.Engine }

func (e copying) CopySlab(ctx context.Context, _ string, spec engine.SlabSpec, _ func(int64)) error {
	return e.CreateSlab(ctx, spec)
}

// A copy inside the storage takes the longer the more there is, and a layer does not.
func TestACloneIsALayerBeforeACopyInTheStorage(t *testing.T) {
	for want, layers := range map[string]bool{"default: layer": true, "native: copy in the storage": false} {
		t.Run(want, func(t *testing.T) {
			r := newRig(t, "a")
			r.wrap = func(e engine.Engine) engine.Engine { return copying{engine.Minimal(e)} }
			if layers {
				r.mapAgents = &layering{agents: r.agents, merging: map[string]bool{}}
			}
			r.start()
			v := r.volume("v", "a", 32*mib)
			if got := r.from("clone", "a", r.snapshot("s", v), 64*mib); got.How != want {
				t.Errorf("the clone was made as %q", got.How)
			}
		})
	}
}
