package block

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// Grow lets a device show size bytes, while it is in use, of slabs that were
// grown before: a raw head to size, a layer's slab to its layer.StoreSize. What is new
// reads as zeros where the head is a layer. fault.Corrupt: the slab is shorter.
func (d *Devices) Grow(ctx context.Context, dev Device, size int64) (Device, error) {
	if dev.loop != nil {
		lp, err := d.host().GrowLoop(ctx, *dev.loop, size)
		if err != nil {
			return dev, err
		}
		return loopDevice(lp), nil
	}
	unlock, w, m, err := d.claim(ctx, dev)
	if err != nil {
		return dev, err
	}
	defer unlock()
	if m == nil {
		return dev, fault.New(fault.NotFound, "%s went away", dev.Path)
	}
	now, err := d.awake(ctx, w, *m)
	if err != nil {
		return dev, err
	}
	t := read(now)
	if t.kind != "linear" {
		return dev, strange(now, "a linear device over the image's head")
	}
	if sealed(now) {
		header, err := w.header(now)
		if err != nil {
			return dev, err
		}
		size += header
	}
	if now.Size < size {
		if err := d.growUnder(ctx, w, t.under, size); err != nil {
			return dev, err
		}
		if now, err = d.change(ctx, w, now, now.ReadOnly, linear(t.under, size)); err != nil {
			return dev, err
		}
	}
	if dev, _ = w.top(&now); dev.crypt != nil {
		return d.growCrypt(ctx, dev)
	}
	return dev, nil
}

// claim locks the domain of a top and looks at it: nil if it is gone.
func (d *Devices) claim(ctx context.Context, dev Device) (unlock func(), _ *world, _ *host.Mapped, _ error) {
	if dev.mapped == nil {
		return nil, nil, nil, fault.New(fault.Internal, "device %q was not made by this package", dev.Path)
	}
	w, err := d.look(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	if unlock, err = d.lockDomains(ctx, w.domains(*dev.mapped)); err != nil {
		return nil, nil, nil, err
	}
	if w, err = d.look(ctx); err != nil {
		unlock()
		return nil, nil, nil, err
	}
	m := w.uuid(dev.mapped.UUID)
	if m != nil && m.Targets == nil {
		m = nil
	}
	return unlock, w, m, nil
}

// domains are the hashes of the domains of what a top stands on.
func (w *world) domains(top host.Mapped) []string {
	under := read(top).under
	if m := w.number(under); m != nil {
		return []string{domainOf(m.UUID)}
	}
	if lp := w.loop(under); lp != nil {
		return []string{domainOf(lp.Mark)}
	}
	return nil // a block device of the engine's, and nothing else
}

// growUnder lets a head show size bytes.
func (d *Devices) growUnder(ctx context.Context, w *world, num string, size int64) error {
	if m := w.number(num); m != nil {
		now, err := d.awake(ctx, w, *m)
		if err == nil && now.Size < size {
			_, err = d.growLayer(ctx, w, now, size)
		}
		return err
	}
	if lp := w.loop(num); lp != nil {
		now, err := d.host().GrowLoop(ctx, *lp, size)
		if err == nil {
			w.putLoop(now)
		}
		return err
	}
	have, err := sizeOf(num)
	if err == nil && have < size {
		err = fault.New(fault.Corrupt, "%s has %d bytes and %d were recorded: its slab was not grown", w.path(num), have, size)
	}
	return err
}

// growLayer lets a layer's device show size bytes, over a pad: zeros follow
// where it ended before. A merge that is running ends.
func (d *Devices) growLayer(ctx context.Context, w *world, m host.Mapped, size int64) (host.Mapped, error) {
	t := read(m)
	switch t.kind {
	case "linear":
		if err := d.growUnder(ctx, w, t.under, size); err != nil {
			return m, err
		}
		return d.change(ctx, w, m, m.ReadOnly, linear(t.under, size))
	case "snapshot-merge":
		var err error
		if m, err = d.stopMerge(ctx, w, m); err != nil {
			return m, err
		}
	case "snapshot":
	default:
		return m, strange(m, "a layer")
	}
	if err := d.growUnder(ctx, w, t.store, layer.StoreSize(size, t.chunk)); err != nil {
		return m, err
	}
	origin := t.under
	if pad := w.uuid(padOf(m.UUID)); pad != nil && number(pad.Major, pad.Minor) == origin {
		now, err := d.awake(ctx, w, *pad)
		if err != nil {
			return m, err
		}
		if p := read(now); now.Size < size {
			if _, err := d.change(ctx, w, now, false, padded(p.under, p.length, size)); err != nil {
				return m, err
			}
		}
	} else {
		var err error
		if origin, err = d.pad(ctx, w, m.UUID, t.under, m.Size, size); err != nil {
			return m, err
		}
	}
	// With another origin the kernel reads the store when the table is loaded: so
	// it is suspended then.
	return d.reload(ctx, w, m, func() error { return d.usable(ctx, m) }, layered("snapshot", origin, t.store, t.chunk, size))
}
