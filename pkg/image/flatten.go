package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// A chain gets longer with every snapshot that is kept, and every read of it a
// little dearer. One of more layers than its limit is made shorter by flattening an
// image in it that never changes: a raw slab is filled with what the image holds,
// and takes the place of its layer.
//
//	intent          flattening weak                          the raw slab is named after it
//	copy                                                     from a device of the chain, read-only
//	taking over     flattening weak, with the old layer      protects it under a name of its own
//	seal            image = raw slab                         what lies over it reads the same
//	switch          nodes read the raw slab                  see SlabRef.Replaces
//	sweep           flattening dead, the layer goes
//
// Both slabs hold the same until the last step, so it does not matter who reads which.

// flatAgain is the least time between two attempts to flatten an image: one that
// fails has copied in vain.
const flatAgain = 5 * time.Minute

// limit is how many layers an image's chain may have. A snapshot has that of its
// volume. The caller holds d.mu.
func (d *domain) limit(img *image) int {
	limit := DefaultChainLimit
	owners := []*image{img}
	if h, err := ParseHandle(img.rec.Source); err == nil && !img.rec.Mutable {
		owners = append(owners, d.images[h.Image])
	}
	for _, o := range owners {
		if o != nil && o.rec.Tuning != nil && o.rec.Tuning.ChainLimit > 0 {
			limit = o.rec.Tuning.ChainLimit
		}
	}
	return limit
}

// depth is how many layers a chain keeps when all that can be merged has been.
// The caller holds d.mu.
func (d *domain) depth(line []*image) int {
	n := 0
	for i, img := range line[:len(line)-1] {
		below := line[i+1]
		if !d.finished(below) || len(d.children[below.id]) != 1 || d.finished(img) && len(d.children[img.id]) == 0 {
			n++
		}
	}
	return n
}

// toFlatten is the image that has to be flattened to make img's chain short
// enough, or nil. A volume gets more snapshots, so that the highest image is the
// best; other chains do not grow, and one image can make many of them short. The
// caller holds d.mu.
func (d *domain) toFlatten(img *image) *image {
	if !d.visible(img) || img.broken != nil || img.rec.Kind == kindGroup {
		return nil
	}
	line, err := d.line(img)
	limit := d.limit(img)
	if err != nil || d.depth(line) <= limit {
		return nil
	}
	order := line[1 : len(line)-1]
	if !img.rec.Mutable {
		order = slices.Clone(line[:min(limit+1, len(line)-1)])
		slices.Reverse(order)
	}
	for _, i := range order {
		if d.flattens(i) == nil {
			return i
		}
	}
	return nil
}

// flattens says why an image cannot be flattened; nil: it can. The caller holds d.mu.
func (d *domain) flattens(img *image) error {
	switch {
	case img.rec.Chunk == 0 || img.rec.Parent == "":
		return fault.New(fault.NotFound, "its slab is raw")
	case img.rec.Mutable && !d.finished(img):
		return fault.New(fault.InUse, "it is a volume")
	case img.slabGone || img.broken != nil || img.op != nil || img.pending != nil || !d.visible(img) && !d.finished(img):
		return fault.New(fault.Pending, "it is being worked on, or damaged")
	case d.finished(img) && len(d.children[img.id]) == 0:
		return fault.New(fault.NotFound, "nobody needs it")
	case d.flattening(img) != nil:
		return fault.New(fault.Pending, "it is being flattened")
	}
	line, err := d.line(img)
	for _, i := range line {
		if i.merging != nil {
			err = fault.New(fault.Pending, "a layer of it is being merged")
		}
	}
	for k := range d.children[img.id] {
		if k.merging != nil {
			err = fault.New(fault.Pending, "a layer is being merged into it")
		}
	}
	return err
}

// flattening is the record of the flattening of img that is not over, or nil.
// The caller holds d.mu.
func (d *domain) flattening(img *image) *image {
	for _, f := range d.images {
		if f.rec.Op == opFlatten {
			if h, err := ParseHandle(f.rec.Source); err == nil && h.Image == img.id {
				return f
			}
		}
	}
	return nil
}

// replaces is the layer in whose place an image's raw slab came, as long as
// nodes may use that, or "". The caller holds d.mu.
func (d *domain) replaces(img *image) string {
	f := d.images[img.slab] // a flattening's slab has its name
	if f == nil || f == img || f.rec.Op != opFlatten || f.slabGone {
		return ""
	}
	return f.slab
}

// flattenSome starts the flattening that is due. Merges go first, and there is one
// of either at a time.
func (d *domain) flattenSome(ctx context.Context) {
	d.mu.Lock()
	var next *image
	for _, img := range d.images {
		if img.merging != nil || img.rec.Op == opFlatten {
			d.mu.Unlock()
			return
		}
		t := d.toFlatten(img)
		if t != nil && (next == nil || t.id < next.id) && d.m.cfg.Now().Sub(t.flatTried) >= flatAgain {
			next = t
		}
	}
	if next == nil {
		d.mu.Unlock()
		return
	}
	next.flatTried = d.m.cfg.Now()
	h := d.handle(next)
	d.mu.Unlock()
	d.m.background(ctx, "flatten/"+h.String(), "flatten", h.String(), func(ctx context.Context, op *operation) error {
		err := d.flatten(ctx, op, next)
		d.mu.Lock()
		next.flatErr = err
		d.mu.Unlock()
		return err
	})
}

// flatten gives an image that never changes a raw slab.
func (d *domain) flatten(ctx context.Context, op *operation, img *image) error {
	op.at(d.id, img.id)
	op.took(how{reason: "copy"})
	d.mu.Lock()
	line, err := d.line(img)
	if err != nil || d.flattens(img) != nil {
		d.mu.Unlock()
		return nil // it is not due any more
	}
	img.readers++ // so that nothing in its chain is merged from here on
	d.mu.Unlock()
	done := sync.OnceFunc(img.unread)
	defer done()
	rec, old := img.snapshot()
	size, err := d.content(ctx, line)
	if err != nil {
		return err
	}
	give, err := d.reserve(ctx, size)
	if err != nil {
		return err
	}
	defer give()
	made := record{Kind: rec.Kind, Op: opFlatten, Size: rec.Size, Alloc: size, Source: d.handle(img).String(), Created: d.m.cfg.Now().UnixMilli(), Params: rec.Params, Crypt: rec.Crypt}
	f, err := d.intend(ctx, op, made, "")
	op.at(d.id, img.id)
	if err != nil {
		return err
	}
	err = d.m.copySlab(ctx, op, img, f, engine.SlabSpec{ID: f.id, Kind: engine.Block, Size: rec.Size, Params: rec.Params}, 0, nil)
	if err == nil {
		err = d.sealFlat(ctx, op, img, f, rec, old)
	}
	done()
	// Whether it was sealed or not, the sweep takes away what is not needed.
	if left := d.sweep(ctx, f); left != nil {
		err = errors.Join(err, fault.New(fault.Unavailable, "flatten %s: cleaning up is left to the collector: %w", img.id, left))
	}
	d.mu.Lock()
	f.op = nil
	d.mu.Unlock()
	d.collectSoon()
	return err
}

// content is how many bytes the slabs of a chain hold together, at most the size
// of its image.
func (d *domain) content(ctx context.Context, line []*image) (int64, error) {
	sum, size := int64(0), line[0].size()
	for _, i := range line {
		rec, slab := i.snapshot()
		n, known, err := d.allocated(ctx, rec, slab)
		if err != nil {
			return 0, err
		}
		if !known {
			return size, nil
		}
		sum += n
	}
	return max(1, min(sum, size)), nil
}

// sealFlat makes the slab of f that of img, if img is still as it was.
func (d *domain) sealFlat(ctx context.Context, op *operation, img, f *image, was record, old string) error {
	release, err := img.hold(ctx, op)
	if err != nil {
		return err
	}
	defer release()
	rec, slab := img.snapshot()
	d.mu.Lock()
	needed := d.visible(img) || len(d.children[img.id]) > 0
	d.mu.Unlock()
	if !needed || slab != old || rec.Parent != was.Parent || rec.Chunk != was.Chunk || rec.Size != was.Size {
		return fault.New(fault.Pending, "image %s has changed meanwhile", img.id)
	}
	taking, _ := f.snapshot()
	taking.Parent, taking.Chunk = rec.Parent, rec.Chunk
	if err := d.commit(ctx, f, taking, slab); err != nil {
		return err
	}
	rec.Parent, rec.Chunk, rec.Alloc = "", 0, taking.Alloc
	d.measureAlloc(ctx, &rec, f.id)
	return d.commit(ctx, img, rec, f.id)
}

// settleFlat lets every node that may read a flattened image's old layer go over
// to its raw slab. Where the image did not get that, there is nothing to do. The
// caller works on f.
func (d *domain) settleFlat(ctx context.Context, f *image) error {
	d.mu.Lock()
	due := f.rec.Op == opFlatten && f.slab != f.id
	var src *image
	if h, err := ParseHandle(f.rec.Source); err == nil {
		src = d.images[h.Image]
	}
	d.mu.Unlock()
	if !due || src == nil {
		return nil
	}
	busy := func(i *image) error {
		return fault.New(fault.Pending, "the layer in slab %s, in whose place slab %s came, stays for now: image %s is being worked on", f.slab, f.id, i.id)
	}
	if !src.lock.tryAcquire() {
		return busy(src)
	}
	defer src.lock.release()
	if err := d.resolve(ctx, src); err != nil {
		return err
	}
	d.mu.Lock()
	family := d.family(src)
	sealed := src.slab == f.id
	d.mu.Unlock()
	if !sealed {
		return nil
	}
	users := []*image{src}
	for _, i := range family[1:] {
		if len(i.maybeNodes()) == 0 {
			continue
		}
		if !i.lock.tryAcquire() {
			return busy(i)
		}
		defer i.lock.release()
		users = append(users, i)
	}
	for _, i := range users { // each by itself: they need no common moment
		if err := d.m.switchChains(ctx, nil, i); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range d.family(src) {
		if i.readers > 0 || d.pinned(i.id) {
			return fault.New(fault.Pending, "the layer in slab %s stays for now: a copy of %s may be reading it", f.slab, i.id)
		}
	}
	return nil
}

// unflatten is untake for a flattening: done says that img is one. It keeps the layer
// in whose place its own slab came, which is not needed any more, or else its own.
func (d *domain) unflatten(img *image) (slab string, rec record, done bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	rec, slab = img.rec, img.slab
	if rec.Op != opFlatten || slab == img.id {
		return slab, rec, rec.Op == opFlatten
	}
	for _, o := range d.images {
		if o != img && o.slab == img.id && !o.slabGone {
			return slab, rec, true
		}
	}
	rec.Parent, rec.Chunk = "", 0
	return img.id, rec, true
}

// whyDegraded says why an image's chain is not as it should be, or "". The
// caller holds d.mu.
func (d *domain) whyDegraded(img *image) string {
	line, err := d.line(img)
	if err != nil {
		return err.Error()
	}
	if img.scarce != "" {
		return img.scarce
	}
	if img.short != nil {
		return fmt.Sprintf("its layer has not all the space that it may come to need: %v", img.short)
	}
	for _, i := range line[:len(line)-1] {
		if d.mergeable(i) == nil {
			return fmt.Sprintf("the layer in slab %s is going to be merged into slab %s, whose image was deleted", i.slab, d.images[i.below()].slab)
		}
	}
	limit := d.limit(img)
	if len(line) <= limit+1 {
		return ""
	}
	why := fmt.Sprintf("its chain has %d layers, more than chainLimit (%d)", len(line)-1, limit)
	if t := d.toFlatten(img); t != nil {
		why += fmt.Sprintf(": image %s is going to be flattened", t.id)
		if t.flatErr != nil {
			why += fmt.Sprintf("; the last attempt failed: %v", t.flatErr)
		}
	}
	return why
}
