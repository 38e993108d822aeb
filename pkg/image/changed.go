package image

import (
	"context"
	"errors"
	"slices"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Reader lists what slabs hold and compares images; it is a part of Mover.
// Nobody writes what it reads.
type Reader interface {
	// LayerExtents lists what the layer in a slab of at least size bytes
	// holds of its image, in whole chunks: the last may reach past the image's end.
	// fault.Corrupt: it is no layer, or the kernel gave it up.
	LayerExtents(ctx context.Context, p Place, size int64) ([]engine.Extent, error)
	// DataExtents lists where the first size bytes of a slab have data.
	// What cannot tell is data from begin to end.
	DataExtents(ctx context.Context, p Place, size int64) ([]engine.Extent, error)
	// Compare lists where in these ranges a and b differ, in blocks of 4 KiB. emit
	// is called from time to time; its error ends the comparison. fault.Corrupt: a
	// or b is shorter than its size.
	Compare(ctx context.Context, a, b Content, ranges []engine.Extent, emit func([]engine.Extent) error) error
}

// Allocated lists the parts of a snapshot that may hold something else than
// zeros, from byte `from` on. emit is called with extents in order, without
// overlaps, inside [from, size of the snapshot); its error ends the listing. Of
// an encrypted snapshot that is its payload, and what was never written reads as noise.
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
	from, emit = target.behindHeader(from, emit)
	return m.listing(ctx, "list allocated blocks", target, func(ctx context.Context, op *operation) error {
		defer target.read()()
		native := target.d.tells(target)
		if !native && target.d.now().NativeOnly {
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
// Where a storage tells natively, its blocks count. Else it is exact to 4 KiB: where base
// lies below target in a chain of layers, only the chunks are compared that were written
// between the two (32 KiB each up to 512 GiB), and listed whole where no node can read
// them now; else both are compared, where they have anything. The list never holds
// less than what changed.
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
	from, emit = t.behindHeader(from, emit)
	return m.listing(ctx, "list changed blocks", t, func(ctx context.Context, op *operation) error {
		defer b.read()()
		defer t.read()()
		return m.changes(ctx, op, b, t, from, emit)
	})
}

// changes chooses the way, best first:
//
//  1. the storage tells what differs between the two slabs;
//  2. base lies below target in one chain: what the layers between them hold, compared;
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
	if d.now().NativeOnly {
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
		return m.narrow(ctx, op, base, target, clip(list, from, size), emit)
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

// narrow lists what differs in these parts, which are whole chunks of layers. Where no
// node can read the chain now, all of them count.
func (m *Manager) narrow(ctx context.Context, op *operation, base, target *image, list []engine.Extent, emit func([]engine.Extent) error) error {
	if len(list) == 0 {
		return nil
	}
	told := false
	err := m.compare(ctx, op, base, target, list, func(part []engine.Extent) error {
		told = true
		return emit(part)
	})
	if k := fault.KindOf(err); err == nil || told || k != fault.Unavailable && k != fault.Unsupported {
		return err
	}
	klog.FromContext(ctx).Info("Changed blocks are listed in whole chunks: no node can compare the snapshots now", "base", base.id, "target", target.id, "err", err)
	return emit(list)
}

// compare reads both images and compares them in these ranges.
func (m *Manager) compare(ctx context.Context, op *operation, base, target *image, ranges []engine.Extent, emit func([]engine.Extent) error) (err error) {
	var sides [2]Content
	for i, img := range []*image{base, target} {
		if sides[i], err = m.content(ctx, img); err != nil {
			return err
		}
	}
	op.stepf("comparing %s with %s", target.id, base.id)
	return m.cfg.Worker.Compare(ctx, sides[0], sides[1], ranges, emit)
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
	case from < 0 || from > rec.payload():
		return nil, fault.New(fault.OutOfRange, "starting offset %d: 0 to %d, the size of snapshot %s, are allowed", from, rec.payload(), h)
	}
	return img, img.usable()
}

// behindHeader translates between offsets that users see and those of the slab,
// which an encrypted image's header comes first in.
func (img *image) behindHeader(from int64, emit func([]engine.Extent) error) (int64, func([]engine.Extent) error) {
	rec, _ := img.snapshot()
	if rec.Crypt == 0 {
		return from, emit
	}
	return from + rec.Crypt, func(list []engine.Extent) error {
		seen := slices.Clone(list)
		for i := range seen {
			seen[i].Offset -= rec.Crypt
		}
		return emit(seen)
	}
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
