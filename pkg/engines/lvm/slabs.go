package lvm

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// CreateSlab implements engine.Engine. What the disks held where a thick slab
// lies is in it: Describe promises no zeros.
func (e *lvmEngine) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	size, err := e.check(spec)
	if err != nil {
		return err
	}
	if err := e.roomForSlab(ctx); err != nil {
		return err
	}
	lv := volume(slabs, spec.ID)
	if e.pool == "" {
		err = e.follow(ctx, func() error { return e.changed(ctx, e.group.CreateLinear(ctx, lv, size, slabTag+spec.ID)) },
			&lvm.Volume{Name: lv, Size: size, Tags: []string{slabTag + spec.ID}, Used: -1})
	} else if err = e.changed(ctx, e.group.CreateThin(ctx, e.pool, lv, size, slabTag+spec.ID)); errors.Is(err, fault.NotFound) {
		err = fault.New(fault.Unavailable, "thin pool %s/%s is gone: %w", e.name, e.pool, err)
	}
	if errors.Is(err, fault.Exists) {
		return e.taken(ctx, spec)
	}
	return err
}

// check verifies a spec and returns the size that its slab is going to have.
func (e *lvmEngine) check(spec engine.SlabSpec) (int64, error) {
	if err := engine.CheckSpec(spec); err != nil {
		return 0, err
	}
	for name := range spec.Params {
		return 0, fault.New(fault.Invalid, "slab %q: parameter %q is unknown: none is allowed", spec.ID, name)
	}
	if spec.Kind != engine.Block {
		return 0, fault.New(fault.Unsupported, "slab %q: a volume group has block slabs only, not %s slabs", spec.ID, spec.Kind)
	}
	return e.round(spec.Size)
}

func (e *lvmEngine) round(size int64) (int64, error) {
	if size > e.desc.MaxSlabSize {
		return 0, fault.New(fault.OutOfRange, "size %d is more than the %d bytes that a volume of extents of %d bytes can have", size, e.desc.MaxSlabSize, e.extent)
	}
	return (max(size, 1) + e.extent - 1) / e.extent * e.extent, nil
}

// roomForSlab keeps slabs from taking the last of the metadata area: tags need
// it, also those that say that something is to be deleted.
func (e *lvmEngine) roomForSlab(ctx context.Context) error {
	if e.room.Load() >= e.reserve {
		return nil
	}
	info, err := e.group.Info(ctx) // what is known of the room is a guess after changes of our own
	if err != nil {
		return err
	}
	e.room.Store(info.MetadataFree)
	if info.MetadataFree < e.reserve {
		return fault.New(fault.Exhausted, "the metadata area of volume group %s is full (%d KiB are left, %d are kept for deleting): delete images, or move to a group with a larger one (vgcreate --metadatasize)", e.name, info.MetadataFree>>10, e.reserve>>10)
	}
	return nil
}

// taken says what it means that a slab's ID was taken a moment ago.
func (e *lvmEngine) taken(ctx context.Context, spec engine.SlabSpec) error {
	same, err := e.same(ctx, spec)
	if err == nil && !same {
		return fault.New(fault.Conflict, "slab %q was deleted by another while it was made", spec.ID)
	}
	return err
}

func (e *lvmEngine) same(ctx context.Context, spec engine.SlabSpec) (bool, error) {
	found, err := e.find(ctx, volume(slabs, spec.ID))
	if err != nil {
		return false, err
	}
	return e.compare(found, spec)
}

// compare says whether a slab of that spec is among volumes. The error is
// fault.Exists when the ID is taken by anything else.
func (e *lvmEngine) compare(found map[string]lvm.Volume, spec engine.SlabSpec) (bool, error) {
	size, err := e.check(spec)
	if err != nil {
		return false, err
	}
	lv := volume(slabs, spec.ID)
	v, there := found[lv]
	switch {
	case !there:
		return false, nil
	case decodeSlab(v) != spec.ID:
		return false, fault.New(fault.Exists, "slab %q: its name is taken by logical volume %s/%s, which is not ours", spec.ID, e.name, lv)
	case v.Size != size:
		return false, fault.New(fault.Exists, "slab %q exists with %d bytes, not with %d", spec.ID, v.Size, size)
	}
	return true, nil
}

// find reads volumes by name; those that are not there are left out.
func (e *lvmEngine) find(ctx context.Context, lvs ...string) (map[string]lvm.Volume, error) {
	volumes, err := e.ours(ctx, func(name string) bool { return slices.Contains(lvs, name) })
	found := map[string]lvm.Volume{}
	for _, v := range volumes {
		found[v.Name] = v
	}
	return found, err
}

// ResizeSlab implements engine.Engine.
func (e *lvmEngine) ResizeSlab(ctx context.Context, id string, size int64) error {
	if err := engine.CheckName("slab ID", id); err != nil {
		return err
	}
	size, err := e.round(size)
	if err != nil {
		return err
	}
	return notFound(id, e.changed(ctx, e.group.Extend(ctx, volume(slabs, id), size)))
}

func notFound(id string, err error) error {
	if errors.Is(err, fault.NotFound) {
		return fault.New(fault.NotFound, "slab %q does not exist", id)
	}
	return err
}

// DeleteSlab implements engine.Engine. What was imported and is not final has no LVM tag of
// a slab: LVM passes over it, and it goes back.
func (e *lvmEngine) DeleteSlab(ctx context.Context, id string) error {
	if err := engine.CheckName("slab ID", id); err != nil {
		return err
	}
	lv := volume(slabs, id)
	dev, err := e.group.Device(ctx, e.uuid, lv)
	if err != nil {
		return err
	}
	if dev != nil && dev.Open > 0 { // lvremove would try for seconds
		return fault.New(fault.InUse, "slab %q is in use: %d users have %s open", id, dev.Open, dev.Path)
	}
	all := []string{lv}
	if e.pool != "" {
		all = append(all, volume(partial, id))
	}
	err = e.follow(ctx, func() error { return e.changed(ctx, e.group.RemoveTagged(ctx, e.uuid, slabTag+id, all...)) }, nil, all...)
	switch {
	case errors.Is(err, fault.NotFound):
		return e.confirm(ctx)
	case errors.Is(err, lvm.ErrPassedOver):
		return e.giveBack(ctx, id, err)
	}
	return err
}

func slabName(lv string) bool {
	return strings.HasPrefix(lv, slabs+".") || strings.HasPrefix(lv, slabs+"-")
}

// ListSlabs implements engine.Engine: what the group had at one moment.
func (e *lvmEngine) ListSlabs(ctx context.Context) ([]engine.Slab, error) {
	volumes, err := e.ours(ctx, slabName)
	if err != nil {
		return nil, err
	}
	out := make([]engine.Slab, 0, len(volumes))
	for _, v := range volumes {
		if id := decodeSlab(v); id != "" {
			out = append(out, engine.Slab{ID: id, Kind: engine.Block, Size: v.Size})
		}
	}
	return out, nil
}

// AttachSlab implements engine.Engine. The path is the kernel's own, /dev/dm-3:
// it is there without udev, and no link can point elsewhere.
func (e *lvmEngine) AttachSlab(ctx context.Context, id string, opts engine.AttachOptions) (engine.Attachment, error) {
	if err := errors.Join(engine.CheckName("slab ID", id), engine.NoMountOptions(opts)); err != nil {
		return engine.Attachment{}, err
	}
	lv := volume(slabs, id)
	dev, err := e.group.Device(ctx, e.uuid, lv)
	if err != nil {
		return engine.Attachment{}, err
	}
	// LVM would find nothing to do for one that is active, and take its time.
	if dev == nil || dev.Suspended || dev.Inactive || len(dev.Targets) == 0 {
		if err := e.changed(ctx, e.group.Activate(ctx, lv)); err != nil {
			return engine.Attachment{}, notFound(id, err)
		}
		if dev, err = e.group.Device(ctx, e.uuid, lv); err != nil {
			return engine.Attachment{}, err
		}
	}
	if dev == nil {
		return engine.Attachment{}, fault.New(fault.Unavailable, "slab %q: LVM made no device of logical volume %s/%s: look at activation/volume_list in lvm.conf", id, e.name, lv)
	}
	for _, t := range dev.Targets {
		if t.Type == "error" || t.Type == "zero" {
			return engine.Attachment{}, fault.New(fault.Corrupt, "slab %q: logical volume %s/%s is not what was made: a part of it has device-mapper target %q", id, e.name, lv, t.Type)
		}
	}
	return engine.Attachment{Path: dev.Path}, nil
}

// DetachSlab implements engine.Engine. A slab that somebody on this host still
// has open stays: its last user's detaching ends it.
func (e *lvmEngine) DetachSlab(ctx context.Context, id string) error {
	if err := engine.CheckName("slab ID", id); err != nil {
		return err
	}
	lv := volume(slabs, id)
	dev, err := e.group.Device(ctx, e.uuid, lv)
	if err != nil || dev == nil || dev.Open > 0 {
		return err
	}
	err = e.changed(ctx, e.group.Deactivate(ctx, lv))
	if errors.Is(err, fault.NotFound) || errors.Is(err, fault.InUse) {
		return nil
	}
	return err
}
