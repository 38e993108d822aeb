package image

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Reader lists what slabs hold and compares images; it is a part of Mover.
// Nobody writes what it reads.
type Reader interface {
	// LayerExtents lists what the layer in a file or device of at least size bytes
	// holds of its image, in whole chunks: the last may reach past the image's end.
	// fault.Corrupt: it is no layer, or the kernel gave it up.
	LayerExtents(ctx context.Context, path string, size int64) ([]engine.Extent, error)
	// DataExtents lists where the first size bytes of a file or device have data.
	// What cannot tell is data from begin to end.
	DataExtents(ctx context.Context, path string, size int64) ([]engine.Extent, error)
	// Compare lists where in these ranges a and b differ, in blocks of 4 KiB. emit
	// is called from time to time; its error ends the comparison. fault.Corrupt: a
	// or b is shorter than its size.
	Compare(ctx context.Context, a, b Content, ranges []engine.Extent, emit func([]engine.Extent) error) error
}

// Content is what an image holds: a file or device whose first Size bytes
// count. Behind them it reads as zero, whatever is there.
type Content struct {
	Path string
	Size int64 // bytes
}

// Allocated lists the parts of a snapshot that may hold something else than
// zeros, from byte `from` on. emit is called with extents in order, without
// overlaps, inside [from, size of the snapshot); its error ends the listing.
//
// The list may hold more than was ever written: a storage or a file system allocates
// whole blocks, a layer whole chunks, and a device that cannot tell counts from
// begin to end. It never holds less.
//
// fault.NotFound: there is no such snapshot. fault.OutOfRange: from is negative
// or behind the end. fault.Unsupported: it is a directory, or its domain is
// native-only and cannot tell.
func (m *Manager) Allocated(ctx context.Context, h Handle, from int64, emit func([]engine.Extent) error) error {
	target, err := m.blocksOf(h, from)
	if err != nil {
		return err
	}
	return m.listing(ctx, "list allocated blocks", target, func(ctx context.Context, op *operation) error {
		defer target.read()()
		native := target.d.tells(target)
		if !native && target.d.cfg.NativeOnly {
			return target.d.nativeOnly("list of allocated blocks", LayoutImage)
		}
		list, err := m.allocation(ctx, target)
		if err != nil {
			return err
		}
		op.took(how{native: native, reason: "extents"})
		return send(list, from, target.size(), emit)
	})
}

// Changed lists where the content of the snapshot target differs from that of
// base, as Allocated does. base must be an earlier state of target: a snapshot
// of the same volume, or of one that it was cloned from, made before.
//
// Where base lies below target in a chain of layers the list is what was written
// between the two, in whole chunks (4 KiB up to 64 GiB): it may hold what was
// written with what was there before, and what lies beside a smaller write. Where
// a storage tells natively, its blocks count. Else both are compared, to 4 KiB.
// The list never holds less than what changed.
//
// fault.Invalid: base is no earlier state of target. Otherwise as Allocated.
func (m *Manager) Changed(ctx context.Context, base, target Handle, from int64, emit func([]engine.Extent) error) error {
	b, err := m.blocksOf(base, 0)
	if err != nil {
		return fault.In(err, "find the base", base.Domain, base.Image)
	}
	t, err := m.blocksOf(target, from)
	if err != nil {
		return err
	}
	if !m.descends(b, t) {
		source, _ := t.snapshot()
		return fault.New(fault.Invalid, "snapshot %s is no earlier state of snapshot %s: the base must be a snapshot of volume %s, or of one that it was cloned from, made before", base, target, source.Source)
	}
	return m.listing(ctx, "list changed blocks", t, func(ctx context.Context, op *operation) error {
		defer b.read()()
		defer t.read()()
		return m.changes(ctx, op, b, t, from, emit)
	})
}

// changes chooses the way, best first:
//
//  1. the storage tells what differs between the two slabs;
//  2. base lies below target in one chain: what the layers between them hold;
//  3. both are read and compared, where at least one has anything.
//
// The caller counts as a reader of both.
func (m *Manager) changes(ctx context.Context, op *operation, base, target *image, from int64, emit func([]engine.Extent) error) error {
	d, size := target.d, target.size()
	if base.d == d && d.tells(base) && d.tells(target) {
		_, a := base.snapshot()
		_, b := target.snapshot()
		list, err := d.caps.Differ.DiffSlabs(ctx, a, b)
		if err == nil {
			op.took(how{native: true, reason: "diff"})
			return send(list, from, size, emit)
		}
		if !errors.Is(err, engine.ErrDeclined) {
			return err
		}
	}
	if d.cfg.NativeOnly {
		return d.nativeOnly("list of changed blocks", LayoutImage)
	}
	line, err := m.still(ctx, target)
	if err != nil {
		return err
	}
	if i := slices.Index(line, base); i > 0 {
		op.took(how{reason: "layers"})
		list, err := m.layers(ctx, line[:i])
		if err != nil {
			return err
		}
		return send(list, from, size, emit)
	}
	op.took(how{reason: "comparison"})
	a, err := m.allocation(ctx, base)
	if err != nil {
		return err
	}
	b, err := m.allocation(ctx, target)
	if err != nil {
		return err
	}
	return m.compare(ctx, op, base, target, clip(union(a, b), from, size), emit)
}

// compare reads both images and compares them in these ranges.
func (m *Manager) compare(ctx context.Context, op *operation, base, target *image, ranges []engine.Extent, emit func([]engine.Extent) error) (err error) {
	var sides [2]Content
	for i, img := range []*image{base, target} {
		path, release, err := m.attachForReading(ctx, img)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()
		sides[i] = Content{Path: path, Size: img.size()}
	}
	op.stepf("comparing %s with %s", target.id, base.id)
	return m.cfg.Mover.Compare(ctx, sides[0], sides[1], ranges, emit)
}

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
		list, err := m.inSlab(ctx, img, m.cfg.Mover.LayerExtents)
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
	return m.inSlab(ctx, img, m.cfg.Mover.DataExtents)
}

// inSlab asks about an image's own slab. The answer is cut to the image's size.
func (m *Manager) inSlab(ctx context.Context, img *image, ask func(context.Context, string, int64) ([]engine.Extent, error)) (list []engine.Extent, err error) {
	rec, slab := img.snapshot()
	a, err := img.d.engine.AttachSlab(ctx, slab, engine.AttachOptions{ReadOnly: true})
	if err == nil {
		list, err = ask(ctx, a.Path, rec.need())
		err = errors.Join(err, img.d.engine.DetachSlab(context.WithoutCancel(ctx), slab))
	}
	return clip(list, 0, rec.Size), fault.In(err, "list the extents of", img.d.id, slab)
}

// still is the images whose slabs make up img's chain, img first, none of which
// is being merged, nor will be while the caller counts as a reader of img.
func (m *Manager) still(ctx context.Context, img *image) ([]*image, error) {
	d := img.d
	if err := img.usable(); err != nil {
		return nil, err
	}
	d.mu.Lock()
	line, err := d.line(img)
	d.mu.Unlock()
	for _, i := range line {
		if err == nil {
			err = m.endMerges(ctx, i)
		}
	}
	if err != nil {
		return nil, fault.In(err, "read the chain of", d.id, img.id)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.line(img) // one that had ended made it shorter
}

// endMerges stops every merge of img's layer that may be running, also one that
// an earlier manager began.
func (m *Manager) endMerges(ctx context.Context, img *image) error {
	d := img.d
	d.mu.Lock()
	below := d.images[img.below()]
	due := below != nil && d.finished(below)
	d.mu.Unlock()
	if !due {
		return nil
	}
	release, err := img.hold(ctx, nil) // nobody is in the middle of a step
	if err != nil {
		return err
	}
	defer release()
	for _, n := range d.stagedOn(img) {
		if err := m.stopMergeOn(ctx, img, n); err != nil {
			return err
		}
	}
	return m.stopMerge(ctx, img)
}

// blocksOf finds a snapshot whose blocks can be listed from byte `from` on.
func (m *Manager) blocksOf(h Handle, from int64) (*image, error) {
	img, err := m.find(h)
	if err != nil {
		return nil, err
	}
	rec, _ := img.snapshot()
	switch {
	case rec.Mutable:
		return nil, fault.New(fault.NotFound, "%s is a volume, not a snapshot", h)
	case rec.Kind != string(engine.Block):
		return nil, fault.New(fault.Unsupported, "snapshot %s is a %s: only that of a block device or of a filesystem on one has blocks", h, rec.layout())
	case from < 0 || from > rec.Size:
		return nil, fault.New(fault.OutOfRange, "starting offset %d: 0 to %d, the size of snapshot %s, are allowed", from, rec.Size, h)
	}
	return img, img.usable()
}

// descends says whether target is a later state of what base is a state of.
func (m *Manager) descends(base, target *image) bool {
	if base == target {
		return false
	}
	if base.d == target.d {
		base.d.mu.Lock()
		line, _ := base.d.line(target)
		base.d.mu.Unlock()
		if slices.Contains(line, base) {
			return true
		}
	}
	of, _ := base.snapshot()
	seen := map[*image]bool{}
	for at := target; at != nil && !seen[at]; at = m.recorded(at) {
		seen[at] = true
		rec, _ := at.snapshot()
		switch {
		case at == base:
			return true
		case rec.SrcVol && m.same(rec.Source, of.Source): // at was cut from base's volume
			return base.before(at)
		}
	}
	return false
}

// recorded is the source of an image while its domain still has a record of it, or nil.
func (m *Manager) recorded(img *image) *image {
	rec, _ := img.snapshot()
	h, err := ParseHandle(rec.Source)
	if err != nil {
		return nil
	}
	d, err := m.domain(h.Domain)
	if err != nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.images[h.Image]
}

// before says whether img was asked for before other: by their intents, which no
// clock can disturb, or by the clock in two domains.
func (img *image) before(other *image) bool {
	if img.d == other.d {
		return born(img.id) < born(other.id)
	}
	a, _ := img.snapshot()
	b, _ := other.snapshot()
	return a.Created < b.Created
}

func (img *image) size() int64 {
	rec, _ := img.snapshot()
	return rec.Size
}

// listing runs fn in the caller's context as an operation that operators see.
func (m *Manager) listing(ctx context.Context, verb string, img *image, fn func(context.Context, *operation) error) error {
	h := img.d.handle(img).String()
	op, _, err := m.ops.start(m, verb+"/"+h+"/"+nonce(), verb, h, "")
	if err != nil {
		return err
	}
	defer m.ops.wg.Done()
	op.at(img.d.id, img.id)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)() // when the manager closes
	m.finish(ctx, op, nil, fn(ctx, op))
	return op.err
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
