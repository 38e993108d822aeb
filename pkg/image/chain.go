package image

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// link is where an image's slab stands in a chain.
type link struct {
	parent string // ID of the image whose slab lies below, or ""
	chunk  int64  // of the layer, in bytes; 0: the slab is raw
}

// need is how large the slab of an image must be, in bytes.
func (r *record) need() int64 {
	if r.Chunk > 0 {
		return layer.StoreSize(r.Size, r.Chunk)
	}
	return r.Size
}

// below is the ID of the image whose slab lies below img's, or "". An image
// that is being filled says so before its record does. The caller holds d.mu.
func (img *image) below() string {
	switch {
	case img.slabGone:
		return ""
	case img.rec.Parent != "":
		return img.rec.Parent
	}
	return img.filling.parent
}

// relink enters into the index over which slab img's slab lies. The caller holds d.mu.
func (d *domain) relink(img *image) {
	now := img.below()
	if d.images[img.id] != img {
		now = ""
	}
	if now == img.linked {
		return
	}
	if kids := d.children[img.linked]; kids != nil {
		if delete(kids, img); len(kids) == 0 {
			delete(d.children, img.linked)
		}
	}
	if img.linked = now; now != "" {
		if d.children[now] == nil {
			d.children[now] = map[*image]struct{}{}
		}
		d.children[now][img] = struct{}{}
	}
}

// kids are the images whose slabs lie directly over img's, by ID. The caller holds d.mu.
func (d *domain) kids(img *image) []*image {
	out := slices.Collect(maps.Keys(d.children[img.id]))
	slices.SortFunc(out, func(a, b *image) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	return out
}

// line is the images whose slabs make up img's chain, img first. It stops
// where it is broken: fault.Corrupt says how. The caller holds d.mu.
func (d *domain) line(img *image) ([]*image, error) {
	out := []*image{img}
	for at := img; at.below() != ""; {
		next := d.images[at.below()]
		switch {
		case next == nil:
			return out, fault.New(fault.Corrupt, "the record of image %s, whose slab lies below that of %s, is missing", at.below(), at.id)
		case next.slabGone:
			return out, fault.New(fault.Corrupt, "slab %s of image %s, which lies below that of %s, is missing", next.slab, next.id, at.id)
		case slices.Contains(out, next):
			return out, fault.New(fault.Corrupt, "its chain is a circle: the slab of %s lies over that of %s and below it", at.id, next.id)
		}
		out, at = append(out, next), next
	}
	return out, nil
}

// chain is the slabs of an image from head to base. The caller holds d.mu.
func (d *domain) chain(img *image) ([]SlabRef, error) {
	images, err := d.line(img)
	var out []SlabRef
	for _, i := range images {
		out = append(out, SlabRef{ID: i.slab, Size: i.rec.Size, Chunk: i.rec.Chunk, Replaces: d.replaces(i)})
	}
	return out, err
}

// family is img and every image whose chain holds img's slab. The caller holds d.mu.
func (d *domain) family(img *image) []*image {
	out := []*image{img}
	for i := 0; i < len(out); i++ {
		for _, k := range d.kids(out[i]) {
			if !slices.Contains(out, k) {
				out = append(out, k)
			}
		}
	}
	return out
}

// stagedOn are the nodes that may have the slab of img in use, through any
// image whose chain holds it, or for a merge, sorted.
func (d *domain) stagedOn(img *image) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for _, i := range d.family(img) {
		for n, a := range i.attached {
			if a.Staged {
				out = append(out, n)
			}
		}
		for n := range i.unsure {
			out = append(out, n)
		}
		if i.merging != nil { // it goes on where it was begun, whoever has left that node
			out = append(out, i.merging.node)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// staging is what a node needs to build a device for an image's present chain.
func (d *domain) staging(img *image, node string) (Staging, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	chain, err := d.chain(img)
	if err != nil {
		return Staging{}, err
	}
	rec := &img.rec
	st := Staging{Handle: d.handle(img), Domain: d.id, Epoch: int64(d.epoch), Layout: rec.layout(), Size: rec.Size, Crypt: rec.Crypt, Slabs: chain, ReadOnly: true,
		Fresh: rec.Mutable && !rec.Used && rec.layout() == LayoutImage, Filesystem: rec.FS, Cloned: rec.Cloned}
	if a := img.attached[node]; a != nil {
		st.ReadOnly, st.Block, st.Mode = a.ReadOnly, a.Block, a.Mode
	}
	return st, nil
}

// chainAgent is an agent that can work on an image's chain: that of the node
// where the image is attached, else any that reaches the domain.
// fault.Unsupported: none can; the error says why.
func (m *Manager) chainAgent(ctx context.Context, img *image) (node string, agent ChainAgent, err error) {
	attached := img.maybeNodes()
	switch len(attached) {
	case 0:
	case 1:
		agent, err = m.layerer(ctx, img, attached[0])
		return attached[0], agent, err
	default:
		return "", nil, fault.New(fault.Unsupported, "image %s is attached to several nodes (%s), which cannot share a chain that changes", img.id, strings.Join(attached, ", "))
	}
	nodes := m.cfg.Agents.Nodes()
	if img.d.cfg.Scope == ScopeNode {
		nodes = []string{img.d.cfg.Node}
	}
	err = fault.New(fault.Unsupported, "no node has an agent")
	for _, n := range nodes {
		if agent, err = m.layerer(ctx, img, n); err == nil {
			return n, agent, nil
		}
	}
	return "", nil, err
}

// layerer is the agent of a node if it can put a layer over img's slab.
func (m *Manager) layerer(ctx context.Context, img *image, node string) (ChainAgent, error) {
	a, err := m.cfg.Agents.Agent(node)
	if err != nil {
		return nil, err
	}
	agent, ok := a.(ChainAgent)
	if !ok {
		return nil, fault.New(fault.Unsupported, "node %s cannot build chains of layers", node)
	}
	for _, h := range img.d.handles(img) {
		if err := agent.Layers(ctx, h); err != nil {
			return nil, err
		}
	}
	return agent, nil
}

// compareChain says what is wrong with the slabs below an image's own, or nil.
// The caller holds d.mu.
func (d *domain) compareChain(img *image, bySlab map[string]engine.Slab) error {
	images, err := d.line(img)
	if err != nil {
		return err
	}
	for _, below := range images[1:] {
		s, have := bySlab[below.slab]
		if err := compareSlab(below, s, have); err != nil {
			return fault.New(fault.Corrupt, "slab %s of image %s, which lies below its own: %w", below.slab, below.id, err)
		}
	}
	return nil
}
