package image

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Expand grows a volume to at least size bytes. A volume that is large enough
// is left alone. The slab grows before the record says so: sizes come from the
// record, so a slab that is larger after a crash is harmless.
// fault.OutOfRange: the size cannot be. fault.Exhausted: no room.
func (m *Manager) Expand(ctx context.Context, h Handle, size, limit int64) (Image, error) {
	img, err := m.volume(h)
	if err != nil {
		return Image{}, err
	}
	return do(ctx, m, "expand/"+h.String(), "expand volume", h.String(), fingerprint(size, limit), func(ctx context.Context, op *operation) (Image, error) {
		return m.expand(ctx, op, img, size, limit)
	})
}

func (m *Manager) expand(ctx context.Context, op *operation, img *image, size, limit int64) (Image, error) {
	d := img.d
	op.at(d.id, img.id)
	release, err := img.hold(ctx, op)
	if err != nil {
		return Image{}, err
	}
	defer release()
	if err := img.usable(); err != nil {
		return Image{}, err
	}
	if err := m.stopMerge(ctx, img); err != nil {
		return Image{}, err
	}
	rec, slab := img.snapshot()
	if size <= rec.payload() && size >= 0 {
		if limit > 0 && rec.payload() > limit {
			return Image{}, fault.New(fault.OutOfRange, "the volume has %d bytes, more than the limit %d: volumes never shrink", rec.payload(), limit)
		}
		return m.view(img), nil
	}
	maxSlab := d.desc.MaxSlabSize
	if rec.layout() == LayoutDirectory {
		maxSlab = 0
	}
	if size, err = slabSizeFor(size, limit, 0, d.unit(rec.layout(), rec.Chunk), rec.FS, maxSlab, rec.Crypt); err != nil {
		return Image{}, err
	}
	if _, _, err := d.allocated(ctx, rec, slab); err != nil { // a truncated slab is not grown over its hole
		return Image{}, err
	}
	grown := rec
	grown.Size = size
	give, err := d.reserve(ctx, grown.need()-rec.need())
	if err != nil {
		return Image{}, fault.New(fault.KindOf(err), "growing from %s to %s: %w", bytesText(rec.Size), bytesText(size), err)
	}
	defer give()
	op.stepf("growing the slab to %s", bytesText(size))
	if err := d.engine.ResizeSlab(ctx, slab, grown.need()); err != nil {
		return Image{}, err
	}
	if rec.Chunk == 0 {
		err = d.zero(ctx, op, slab, rec.layout().Kind(), rec.Size, size)
	} else { // what a layer does not hold reads as zero behind its parent's end
		err = d.allocate(ctx, slab, rec.taken(min(grown.need(), rec.need()+allocateAtOnce)))
		d.mu.Lock()
		img.full = ""
		d.mu.Unlock()
		defer d.collectSoon()
	}
	if err != nil {
		return Image{}, err
	}
	op.took(how{native: true, reason: "resize"})
	op.stepf("sealing")
	if err := d.commit(ctx, img, grown, slab); err != nil {
		return Image{}, err
	}
	return m.view(img), nil
}

// allocateSoon lets the collector take the space of large layers, when the
// snapshots have been made: before, the switch would wait for the storage.
func (d *domain) allocateSoon(made ...*cutting) {
	for _, c := range made {
		if rec, _ := c.src.snapshot(); rec.Chunk > 0 && rec.need() > allocateAtOnce {
			d.collectSoon()
		}
	}
}

// allocateLayers takes the rest of the space of large layers that are written, in
// the background. What fails is tried again in the next round, and shown until then.
func (d *domain) allocateLayers(ctx context.Context) {
	d.mu.Lock()
	var due []*image
	for _, img := range d.images {
		if img.rec.Strong && img.rec.Mutable && !img.rec.Thin && img.rec.Chunk > 0 && img.broken == nil && img.full != img.slab && img.rec.need() > allocateAtOnce {
			due = append(due, img)
		}
	}
	d.mu.Unlock()
	if len(due) == 0 {
		return
	}
	d.m.background(ctx, "allocate/"+d.id, "allocate layers", d.id, func(ctx context.Context, op *operation) error {
		var errs []error
		for _, img := range due {
			op.at(d.id, img.id)
			errs = append(errs, d.allocateLayer(ctx, op, img))
		}
		return errors.Join(errs...)
	})
}

// allocateLayer takes the space of an image's layer, as long as that is the one
// that is written.
func (d *domain) allocateLayer(ctx context.Context, op *operation, img *image) error {
	defer img.read()() // the slab stays
	rec, slab := img.snapshot()
	for size := int64(allocateAtOnce); size < rec.need(); {
		op.stepf("waiting for snapshots that are being made")
		if err := d.cuts.wait(ctx); err != nil {
			return err
		}
		op.stepf("taking the space of slab %s", slab)
		op.progress(size, rec.need())
		size = min(size+allocateStep, rec.need())
		err := d.allocate(ctx, slab, size)
		d.mu.Lock()
		stale := img.slab != slab || d.finished(img)
		if !stale {
			img.short = err
		}
		if err == nil && !stale && size >= img.rec.need() {
			img.full = slab
		}
		d.mu.Unlock()
		if stale {
			return nil
		}
		if err != nil {
			return fault.In(err, "take the space of a layer", d.id, slab)
		}
	}
	return nil
}

// trimLayers gives back the space that the layers of snapshots were given and
// do not need any more, since nothing is written to them. Before a deleted
// one is merged into, it gets its space again.
func (d *domain) trimLayers(ctx context.Context) error {
	d.mu.Lock()
	var due []*image
	for _, img := range d.images {
		if d.visible(img) && !img.rec.Mutable && img.rec.Chunk > 0 && img.broken == nil && img.trimmed != img.slab {
			due = append(due, img)
		}
	}
	d.mu.Unlock()
	var errs []error
	for _, img := range due {
		errs = append(errs, fault.In(d.trimLayer(ctx, img), "trim", d.id, img.id))
	}
	return errors.Join(errs...)
}

func (d *domain) trimLayer(ctx context.Context, img *image) error {
	if !img.lock.tryAcquire() {
		return nil // the next round
	}
	defer img.lock.release()
	if err := d.resolve(ctx, img); err != nil {
		return err
	}
	rec, slab := img.snapshot()
	d.mu.Lock()
	writable := !d.visible(img) || img.merging != nil // deleted: something may be merged into it
	d.mu.Unlock()
	if writable || rec.Chunk == 0 {
		return nil
	}
	err := d.m.cfg.Worker.TrimLayer(ctx, Place{d.id, slab}, rec.need())
	if errors.Is(err, fault.InUse) {
		klog.FromContext(ctx).V(2).Info("Trimming waits", "image", img.id, "why", err)
		return nil
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	img.trimmed = slab
	d.mu.Unlock()
	if n, known, err := d.allocated(ctx, rec, slab); err != nil || !known || n >= rec.Alloc {
		return err
	} else {
		rec.Alloc = max(n, 1)
	}
	return d.commit(ctx, img, rec, slab)
}

// allocate takes the space of a layer's slab: see Worker.Allocate.
func (d *domain) allocate(ctx context.Context, slab string, size int64) error {
	return d.m.cfg.Worker.Allocate(ctx, Place{d.id, slab}, size)
}

// Modify changes the parameters of a volume that may change: its Tuning (zero
// fields stay), and what the engine's Modifier takes. fault.Invalid names
// unknown ones.
func (m *Manager) Modify(ctx context.Context, h Handle, t Tuning, params map[string]string) error {
	img, err := m.volume(h)
	if err != nil {
		return err
	}
	_, err = do(ctx, m, "modify/"+h.String(), "modify volume", h.String(), fingerprint(t, params), func(ctx context.Context, op *operation) (struct{}, error) {
		return struct{}{}, m.modify(ctx, op, img, t, params)
	})
	return err
}

func (m *Manager) modify(ctx context.Context, op *operation, img *image, t Tuning, params map[string]string) error {
	d := img.d
	op.at(d.id, img.id)
	release, err := img.hold(ctx, op)
	if err != nil {
		return err
	}
	defer release()
	if err := img.usable(); err != nil {
		return err
	}
	rec, slab := img.snapshot()
	if err := d.modifyNatively(ctx, slab, params); err != nil {
		return err
	}
	now := Tuning{}
	if rec.Tuning != nil {
		now = *rec.Tuning
	}
	next := now
	if t.ChainLimit != 0 {
		next.ChainLimit = t.ChainLimit
	}
	if t.QuiesceLimit != 0 {
		next.QuiesceLimit = t.QuiesceLimit
	}
	if next == now {
		return nil
	}
	rec.Tuning = &next
	return d.commit(ctx, img, rec, slab)
}

func (d *domain) modifyNatively(ctx context.Context, slab string, params map[string]string) error {
	if len(params) == 0 {
		return nil
	}
	known := map[string]string{}
	if d.caps.Modifier != nil {
		known = d.caps.Modifier.ModifyParams()
	}
	for _, k := range slices.Sorted(maps.Keys(params)) {
		if _, ok := known[k]; !ok {
			all := append([]string{"chainLimit", "quiesceLimit"}, slices.Sorted(maps.Keys(known))...)
			return fault.New(fault.Invalid, "parameter %q cannot be changed in domain %s (engine %s): %s can", k, d.id, d.cfg.Engine, strings.Join(all, ", "))
		}
	}
	return d.caps.Modifier.ModifySlab(ctx, slab, params)
}
