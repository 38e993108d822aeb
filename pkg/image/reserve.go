package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/quarry-csi/quarry/pkg/layer"
)

// whole says that a slab has all the space that it needs.
type whole struct {
	slab string
	need int64 // bytes
}

// watchReserve finds the volumes whose layers have not all their space while their storage
// is nearly full: the nodes that write them let that wait (layer.Reserve), and refuse to begin.
// A domain without layers is not measured for it.
func (d *domain) watchReserve(ctx context.Context) error {
	d.mu.Lock()
	var written []*image
	for _, img := range d.images {
		if img.rec.Strong && img.rec.Mutable && img.rec.Chunk > 0 && img.broken == nil {
			written = append(written, img)
		} else {
			img.scarce = ""
		}
	}
	d.mu.Unlock()
	if len(written) == 0 || d.caps.Meter == nil {
		return nil
	}
	u, err := d.usage(ctx)
	if err != nil {
		return err
	}
	r := layer.ReserveOf(u.Total)
	d.mu.Lock()
	d.scarce = r.Scarce(u.Available, d.scarce)
	scarce := d.scarce
	d.mu.Unlock()
	var errs []error
	for _, img := range written {
		why := ""
		if scarce {
			whole, err := d.hasAll(ctx, img)
			if err != nil {
				errs = append(errs, err)
				continue // as it was
			}
			if !whole {
				why = fmt.Sprintf("its layer has not all its space, and domain %s has %s free, below the %s that it keeps for such layers: reads and writes of the volume wait until %s are free; delete something, or give the storage more space",
					d.id, bytesText(u.Available), bytesText(r.Low), bytesText(r.High))
			}
		}
		d.mu.Lock()
		img.scarce = why
		d.mu.Unlock()
	}
	return errors.Join(errs...)
}

// hasAll says whether an image's slab has all the space that it needs. One that has it keeps it as long as it is written.
func (d *domain) hasAll(ctx context.Context, img *image) (bool, error) {
	rec, slab := img.snapshot()
	now := whole{slab, rec.need()}
	d.mu.Lock()
	known := img.whole == now
	d.mu.Unlock()
	if known {
		return true, nil
	}
	n, known, err := d.allocated(ctx, rec, slab)
	if err != nil || !known || n < now.need {
		return false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	img.whole = now
	return true, nil
}
