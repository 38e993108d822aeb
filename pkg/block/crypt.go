package block

import (
	"context"
	"errors"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Crypt says how to open an encrypted image.
type Crypt struct {
	// Header is how many bytes of the image its LUKS2 header takes, as recorded.
	Header     int64
	Passphrase host.Secret
	// Format: the image is fresh. It gets a new header, with a new key, also if an
	// earlier attempt made one that was never sealed.
	Format bool
}

// Encrypts says whether encrypted images can be opened here: nil, or fault.Unsupported
// with what is missing.
func (d *Devices) Encrypts(ctx context.Context) error {
	d.mu.Lock()
	able := d.crypt
	d.mu.Unlock()
	if able {
		return nil
	}
	err := d.Layers(ctx)
	if err == nil {
		err = d.Host.Encryption(ctx)
	}
	if err != nil {
		return fault.New(fault.KindOf(err), "encrypted volumes cannot be opened on this node: %w", err)
	}
	d.mu.Lock()
	d.crypt = true
	d.mu.Unlock()
	return nil
}

// sealed says whether a top belongs to an encrypted image.
func sealed(top host.Mapped) bool { return strings.HasSuffix(top.Name, cryptEnd) }

// opened notes the device over the top, if it is complete.
func (dev *Device) opened(c *host.Mapped) {
	if c.Targets != nil {
		dev.crypt, dev.Locked, dev.Path, dev.Size, dev.ReadOnly = c, false, c.Path, c.Size, c.ReadOnly
	}
}

// attachCrypt builds a chain, and the device over it. The passphrase is checked,
// which takes a second, without the domain's lock; that of a device which is open is not.
func (d *Devices) attachCrypt(ctx context.Context, spec Spec) (Device, error) {
	if err := spec.check(); err != nil {
		return Device{}, err
	}
	c := *spec.Crypt
	switch {
	case spec.Use != Filesystem && spec.Use != Raw:
		return Device{}, fault.New(fault.Internal, "%s: a device for use %q shows ciphertext", spec.Owner, spec.Use)
	case c.Header <= 0 || c.Header%host.LUKSSector != 0 || spec.Size < c.Header+host.LUKSSector:
		return Device{}, fault.New(fault.Invalid, "%s has %d bytes with a header of %d: a multiple of %d, and less than the image, is allowed", spec.Owner, spec.Size, c.Header, host.LUKSSector)
	case c.Format && spec.ReadOnly:
		return Device{}, fault.New(fault.InUse, "%s has no LUKS2 header yet, and read-only access cannot make it: use it for writing once", spec.Owner)
	}
	if err := d.Encrypts(ctx); err != nil {
		return Device{}, err
	}
	dev, err := d.attachBelow(ctx, spec)
	if err != nil {
		return Device{}, err
	}
	if dev.crypt != nil {
		return d.growCrypt(ctx, dev)
	}
	if dev, err = d.open(ctx, dev, spec); err != nil {
		return Device{}, errors.Join(err, d.detach(context.WithoutCancel(ctx), dev))
	}
	return dev, nil
}

// attachBelow builds the chain. A device that stands over it already, as a killed
// agent may have left it, goes if nobody uses it and it cannot stay.
func (d *Devices) attachBelow(ctx context.Context, spec Spec) (Device, error) {
	unlock, err := d.lock(ctx, spec)
	if err != nil {
		return Device{}, err
	}
	defer unlock()
	w, err := d.look(ctx)
	if err != nil {
		return Device{}, err
	}
	uuid := topUUID(spec.Use, spec.Owner)
	if top := w.uuid(uuid); top != nil && top.Targets != nil {
		if _, err := d.awake(ctx, w, *top); err != nil {
			return Device{}, err
		}
	}
	if m := w.uuid(cryptOf(uuid)); m != nil && m.Targets != nil {
		now, err := d.awake(ctx, w, *m)
		if err != nil {
			return Device{}, err
		}
		if _, header, ok := now.LUKS(); !ok || header != spec.Crypt.Header {
			return Device{}, strange(now, "one target \"crypt\" for the image")
		}
		if spec.Crypt.Format || now.ReadOnly != spec.ReadOnly {
			if err := d.host().RemoveMapped(ctx, now); err != nil {
				return Device{}, fault.New(fault.KindOf(err), "%s is open with read-only=%t; asked for was read-only=%t, and a new header: %t; unstage it first: %w", now.Path, now.ReadOnly, spec.ReadOnly, spec.Crypt.Format, err)
			}
		}
	}
	return d.attach(ctx, spec)
}

// open puts the device over a top, which gets a header first if the image is fresh.
func (d *Devices) open(ctx context.Context, dev Device, spec Spec) (Device, error) {
	c := spec.Crypt
	if c.Format {
		found, err := d.Host.Probe(ctx, dev.Path)
		if err != nil {
			return dev, err
		}
		if !found.Empty() && (found.Type != "crypto_LUKS" || found.Partitions != "" || found.Ambivalent) {
			return dev, fault.New(fault.Corrupt, "the image was never formatted, but its device shows %s: nothing was written; if that is of no value, clear it with \"wipefs -a\" on the slab, else restore the image's record", found)
		}
		if err := d.Host.FormatLUKS(ctx, dev.Path, c.Header, c.Passphrase); err != nil {
			return dev, err
		}
	}
	uuid := cryptOf(dev.mapped.UUID)
	m, err := d.Host.OpenLUKS(ctx, nameOf(uuid), uuid, dev.Path, c.Header, spec.ReadOnly, c.Passphrase)
	if err != nil {
		return dev, err
	}
	dev.opened(&m)
	return dev, nil
}

// growCrypt lets the device show all that is below it.
func (d *Devices) growCrypt(ctx context.Context, dev Device) (Device, error) {
	m, err := d.Host.GrowLUKS(ctx, *dev.crypt)
	if err != nil {
		return dev, err
	}
	dev.opened(&m)
	return dev, nil
}

// header is how many bytes of a top the crypt device over it does not show.
func (w *world) header(top host.Mapped) (int64, error) {
	if c := w.uuid(cryptOf(top.UUID)); c != nil {
		if _, header, ok := c.LUKS(); ok {
			return header, nil
		}
	}
	return 0, fault.New(fault.InUse, "%s is encrypted and not open: stage it first", top.Name)
}
