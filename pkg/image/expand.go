package image

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
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
	if size, err = slabSizeFor(size, limit, 0, d.desc.Granularity, rec.FS, maxSlab, rec.Crypt); err != nil {
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
		err = d.allocate(ctx, slab, min(grown.need(), rec.need()+allocateAtOnce))
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

// allocateLayers takes the rest of the space of large layers that are written.
// What fails is tried again in the next round, and shown until then.
func (d *domain) allocateLayers(ctx context.Context) {
	d.mu.Lock()
	var due []*image
	for _, img := range d.images {
		if img.rec.Strong && img.rec.Mutable && img.rec.Chunk > 0 && img.broken == nil && img.full != img.slab && img.rec.need() > allocateAtOnce {
			due = append(due, img)
		}
	}
	d.mu.Unlock()
	for _, img := range due {
		rec, slab := img.snapshot()
		done := img.read() // the slab stays
		err := d.allocate(ctx, slab, rec.need())
		done()
		d.mu.Lock()
		if img.short = err; err == nil && img.rec.need() == rec.need() {
			img.full = slab
		}
		d.mu.Unlock()
	}
}

// allocate takes the space of a layer's slab: see Mover.Allocate.
func (d *domain) allocate(ctx context.Context, slab string, size int64) error {
	a, err := d.engine.AttachSlab(ctx, slab, engine.AttachOptions{})
	if err != nil {
		return fault.In(err, "attach", d.id, slab)
	}
	if err := d.m.cfg.Mover.Allocate(ctx, a.Path, size); err != nil {
		return err
	}
	return d.engine.DetachSlab(ctx, slab)
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
