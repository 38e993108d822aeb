package image

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// tells says whether the storage can tell what an image's slab holds: of a layer
// that would not be the image's content.
func (d *domain) tells(img *image) bool {
	rec, _ := img.snapshot()
	return d.caps.Differ != nil && rec.Chunk == 0
}

// allocation lists where an image may hold something. The caller counts as its reader.
func (m *Manager) allocation(ctx context.Context, img *image) ([]engine.Extent, error) {
	line, err := m.still(ctx, img)
	if err != nil {
		return nil, err
	}
	n := len(line) - 1
	list, err := m.layers(ctx, line[:n])
	if err != nil {
		return nil, err
	}
	data, err := m.data(ctx, line[n])
	return union(list, data), err
}

// layers lists what these layers hold.
func (m *Manager) layers(ctx context.Context, images []*image) ([]engine.Extent, error) {
	var lists [][]engine.Extent
	for _, img := range images {
		list, err := m.inSlab(ctx, img, m.cfg.Worker.LayerExtents)
		if err != nil {
			return nil, err
		}
		lists = append(lists, list)
	}
	return union(lists...), nil
}

// data lists what a raw slab holds.
func (m *Manager) data(ctx context.Context, img *image) ([]engine.Extent, error) {
	_, slab := img.snapshot()
	if img.d.tells(img) {
		list, err := img.d.caps.Differ.DiffSlabs(ctx, "", slab)
		if !errors.Is(err, engine.ErrDeclined) {
			return clip(union(list), 0, img.size()), fault.In(err, "list the extents of", img.d.id, slab)
		}
	}
	return m.inSlab(ctx, img, m.cfg.Worker.DataExtents)
}

// inSlab asks about an image's own slab. The answer is cut to the image's size.
func (m *Manager) inSlab(ctx context.Context, img *image, ask func(context.Context, Place, int64) ([]engine.Extent, error)) ([]engine.Extent, error) {
	rec, slab := img.snapshot()
	list, err := ask(ctx, Place{img.d.id, slab}, rec.need())
	return clip(list, 0, rec.Size), fault.In(err, "list the extents of", img.d.id, slab)
}

// still is the images whose slabs make up img's chain, img first, none of which
// is being merged, nor will be while the caller counts as a reader of img.
func (m *Manager) still(ctx context.Context, img *image) ([]*image, error) {
	d := img.d
	if err := img.usable(); err != nil {
		return nil, err
	}
	if err := m.stopMergesBelow(ctx, img, "", false); err != nil {
		return nil, fault.In(err, "read the chain of", d.id, img.id)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.line(img) // one that had ended made it shorter
}

// size of the image's slab, in bytes.
func (img *image) size() int64 {
	rec, _ := img.snapshot()
	return rec.Size
}

// send gives the part of list that lies in [from, to) to emit.
func send(list []engine.Extent, from, to int64, emit func([]engine.Extent) error) error {
	if list = clip(union(list), from, to); len(list) == 0 {
		return nil
	}
	return emit(list)
}

// union is what at least one of the lists holds, in order, without overlaps or
// touching parts. The lists may be in any order.
func union(lists ...[]engine.Extent) []engine.Extent {
	all := slices.Concat(lists...)
	byOffset := func(a, b engine.Extent) int { return cmp.Compare(a.Offset, b.Offset) }
	if !slices.IsSortedFunc(all, byOffset) {
		slices.SortFunc(all, byOffset)
	}
	out := all[:0]
	for _, e := range all {
		if n := len(out); n > 0 && e.Offset <= out[n-1].Offset+out[n-1].Length {
			out[n-1].Length = max(out[n-1].Length, e.Offset+e.Length-out[n-1].Offset)
		} else if e.Length > 0 {
			out = append(out, e)
		}
	}
	return out
}

// clip is the part of an ordered list that lies in [from, to).
func clip(list []engine.Extent, from, to int64) []engine.Extent {
	var out []engine.Extent
	for _, e := range list {
		start, end := max(e.Offset, from), min(e.Offset+e.Length, to)
		if start < end {
			out = append(out, engine.Extent{Offset: start, Length: end - start})
		}
	}
	return out
}
