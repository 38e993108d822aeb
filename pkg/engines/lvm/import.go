package lvm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// An import is three commits: an LVM tag keeps the volume's own name, a new name makes it a slab, and
// another LVM tag makes it final. A program that is the last one leaves, after
//
//	the first   the user's volume under its own name, with an LVM tag more
//	the second  a slab that DeleteSlab gives back
//	the third   a slab like any other
//
// and the next call goes on from there. The LVM tag names the slab, too: of two who import one volume, each has its own,
// and neither takes the other's away. Giving back is a new name first, then the LVM tag.

var _ engine.Importer = (*lvmEngine)(nil)

// turn waits until nobody else of this process looks at what is to be imported, or imports it:
// that takes volumes out of use.
func (e *lvmEngine) turn(ctx context.Context) (done func(), err error) {
	select {
	case e.importing <- struct{}{}:
		return func() { <-e.importing }, nil
	case <-ctx.Done():
		return nil, fault.New(fault.KindOf(ctx.Err()), "volume group %s: something else is being imported: %w", e.name, ctx.Err())
	}
}

// Importable implements engine.Importer, for a logical volume of the group by its name. One that
// is not active is so while it is looked at.
func (e *lvmEngine) Importable(ctx context.Context, source string) (_ engine.Importable, err error) {
	done, err := e.turn(ctx)
	if err != nil {
		return engine.Importable{}, err
	}
	defer done()
	v, dev, err := e.source(ctx, source)
	if err != nil {
		return engine.Importable{}, err
	}
	if dev == nil {
		if dev, err = e.activate(ctx, source); err != nil {
			return engine.Importable{}, err
		}
		defer func() {
			ctx := context.WithoutCancel(ctx)
			err = errors.Join(err, e.changed(ctx, e.group.Deactivate(ctx, source)))
		}()
	}
	sig, err := e.host.Probe(ctx, dev.Path)
	if err != nil {
		return engine.Importable{}, err
	}
	found := engine.Importable{Size: v.Size, Allocated: v.Size, Holds: sig.String()}
	if e.pool != "" { // only the kernel knows it
		l, err := e.list(ctx, lvm.Names([]string{marker, source}, nil), true)
		if err != nil {
			return engine.Importable{}, err
		}
		for _, v := range l.Volumes {
			if v.Name == source {
				found.Allocated = max(0, v.Used)
			}
		}
	}
	return found, nil
}

func (e *lvmEngine) activate(ctx context.Context, lv string) (*host.Mapped, error) {
	if err := e.changed(ctx, e.group.Activate(ctx, lv)); err != nil {
		return nil, err
	}
	dev, err := e.group.Device(ctx, e.uuid, lv)
	if err == nil && dev == nil {
		err = fault.New(fault.Unavailable, "LVM made no device of logical volume %s/%s: look at activation/volume_list in lvm.conf", e.name, lv)
	}
	return dev, err
}

// source finds the volume of a name that can be imported, and its device: nil where it is not active.
func (e *lvmEngine) source(ctx context.Context, name string) (lvm.Details, *host.Mapped, error) {
	switch {
	case !lvmName(name):
		return lvm.Details{}, nil, fault.New(fault.Invalid, "source %q: the name of a logical volume of volume group %s is needed, without the group's", name, e.name)
	case reserved(name):
		return lvm.Details{}, nil, fault.New(fault.Invalid, "logical volume %s/%s is Quarry's own", e.name, name)
	}
	found, err := e.details(ctx, name)
	if err != nil {
		return lvm.Details{}, nil, err
	}
	v, there := found[name]
	if !there {
		return v, nil, fault.New(fault.NotFound, "volume group %s has no logical volume %s (lvs %s)", e.name, name, e.name)
	}
	why := e.unfit(v)
	if why == "" && v.Origin != "" { // of a thin snapshot; "external" where it is none of the pool's
		if found, err = e.details(ctx, v.Origin); err != nil {
			return v, nil, err
		}
		if found[v.Origin].Pool != e.pool {
			why = fmt.Sprintf("it shows logical volume %s where nothing was written to it, and that is not in thin pool %s", v.Origin, e.pool)
		}
	}
	if why != "" {
		return v, nil, fault.New(fault.Invalid, "logical volume %s/%s cannot be imported: %s", e.name, name, why)
	}
	dev, err := e.group.Device(ctx, e.uuid, name)
	if err != nil || dev == nil {
		return v, nil, err
	}
	if dev.Open > 0 || dev.Suspended {
		return v, nil, fault.New(fault.InUse, "logical volume %s/%s is in use, or suspended: %d users have %s open: unmount it, or end what uses it (lsblk, lsof)", e.name, name, dev.Open, dev.Path)
	}
	return v, dev, nil
}

// unfit says why a volume cannot be a slab; "": it can. What can is what CreateSlab makes, linear or thin as the
// domain's other slabs, or striped: what is measured, promised, cut and grown goes by that.
func (e *lvmEngine) unfit(v lvm.Details) string {
	other := func(words []string, allowed ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return !slices.Contains(allowed, w) })
	}
	thin := v.Pool != "" && slices.Contains(v.Layout, "thin")
	switch {
	case slices.Contains(v.Layout, "pool"): // its role is private, too
		return "it is a pool"
	case slices.Contains(v.Roles, "private"):
		return "it is a part of another one, of LVM's own"
	case v.ReadOnly:
		return fmt.Sprintf("it is read-only (lvchange --permission rw %s/%s)", e.name, v.Name)
	case e.pool == "" && thin:
		return fmt.Sprintf("it is a thin volume, and the slabs of this domain are thick: a domain with parameter \"thinPool\" takes those of its pool %s", v.Pool)
	case e.pool != "" && !thin:
		return fmt.Sprintf("it is no thin volume (its layout is %s), and the slabs of this domain are thin: a domain without parameter \"thinPool\" takes linear and striped ones", strings.Join(v.Layout, ","))
	case e.pool != "" && v.Pool != e.pool:
		return fmt.Sprintf("it is in thin pool %s, and the slabs of this domain are in %s", v.Pool, e.pool)
	case e.pool == "" && (other(v.Layout, "linear", "striped") || other(v.Segments, "linear", "striped")),
		e.pool != "" && (other(v.Layout, "thin", "sparse") || other(v.Segments, "thin")):
		return fmt.Sprintf("its layout is %s, with segments of type %s: linear, striped and thin ones are taken", strings.Join(v.Layout, ","), strings.Join(slices.Compact(slices.Sorted(slices.Values(v.Segments))), ","))
	case e.pool == "" && other(v.Roles, "public"),
		e.pool != "" && other(v.Roles, "public", "origin", "thinorigin", "multithinorigin", "snapshot", "thinsnapshot"):
		return fmt.Sprintf("it is a snapshot, or others depend on it (its roles are %s): merge or remove those first", strings.Join(v.Roles, ","))
	case v.Size%e.extent != 0:
		return fmt.Sprintf("it has %d bytes: a multiple of %d is needed (lvextend)", v.Size, e.extent)
	}
	return ""
}

// ImportSlab implements engine.Importer. The volume is not active afterwards: nobody can have it in use.
func (e *lvmEngine) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	size, err := e.check(spec)
	if err != nil {
		return err
	}
	done, err := e.turn(ctx)
	if err != nil {
		return err
	}
	defer done()
	lv, tag := volume(slabs, spec.ID), encodeImport(spec.ID, source)
	found, err := e.find(ctx, lv)
	if err != nil {
		return err
	}
	if v, there := found[lv]; there {
		if decodeImport(v, spec.ID) == source && v.Size == size {
			return nil // it was done before
		}
		return fault.New(fault.Exists, "slab %q exists and is not logical volume %s/%s of %d bytes", spec.ID, e.name, source, size)
	}
	v, dev, err := e.source(ctx, source)
	switch {
	case err != nil:
		return err
	case v.Size != size:
		return fault.New(fault.Conflict, "logical volume %s/%s has %d bytes, not %d as when it was looked at", e.name, source, v.Size, size)
	}
	if err := e.roomForSlab(ctx); err != nil {
		return err
	}
	if dev != nil {
		if err := e.changed(ctx, e.group.Deactivate(ctx, source)); err != nil {
			return err
		}
	}
	if err := e.changed(ctx, e.group.AddTag(ctx, e.uuid, source, v.UUID, tag)); err != nil {
		return e.noSource(source, err)
	}
	err = e.changed(ctx, e.group.Rename(ctx, source, lv))
	if errors.Is(err, fault.NotFound) || errors.Is(err, fault.Exists) { // it certainly has its own name, or another's
		if errors.Is(err, fault.Exists) {
			err = fault.New(fault.Exists, "slab %q exists and is not logical volume %s/%s", spec.ID, e.name, source)
		}
		return errors.Join(e.noSource(source, err), e.forget(ctx, source, tag))
	}
	if err != nil {
		return err
	}
	return e.verify(ctx, source, spec.ID, size)
}

// noSource is for a volume that was there a moment ago.
func (e *lvmEngine) noSource(source string, err error) error {
	if errors.Is(err, fault.NotFound) {
		return fault.New(fault.Conflict, "logical volume %s/%s has gone meanwhile: is it being imported twice?", e.name, source)
	}
	return err
}

// verify gives back at once what is not what was looked at: it may have been grown, or taken into use, before
// it got its new name, or another one may have got its old name.
func (e *lvmEngine) verify(ctx context.Context, source, id string, size int64) error {
	lv := volume(slabs, id)
	found, err := e.find(ctx, lv)
	if err != nil {
		return err
	}
	dev, err := e.group.Device(ctx, e.uuid, lv)
	if err != nil {
		return err
	}
	v, there := found[lv]
	switch {
	case there && decodeImport(v, id) == source && v.Size == size && (dev == nil || dev.Open == 0):
		return nil
	case !there:
		return fault.New(fault.Conflict, "slab %q was given back meanwhile", id)
	case dev != nil && dev.Open > 0:
		err = fault.New(fault.InUse, "logical volume %s/%s was taken into use meanwhile: %d users have %s open", e.name, source, dev.Open, dev.Path)
	default:
		err = fault.New(fault.Conflict, "logical volume %s/%s was changed meanwhile, and has %d bytes", e.name, source, v.Size)
	}
	if more := e.changed(ctx, e.group.Rename(ctx, lv, source)); more != nil {
		return fault.New(fault.KindOf(err), "%w; it is called %s now: %w", err, lv, more)
	}
	return errors.Join(err, e.forget(ctx, source, encodeImport(id, source)))
}

// forget takes an import's LVM tag from a volume that has its own name, where it still has both.
func (e *lvmEngine) forget(ctx context.Context, source, tag string) error {
	err := e.changed(ctx, e.group.RemoveTag(ctx, e.uuid, source, tag))
	if errors.Is(err, fault.NotFound) || errors.Is(err, fault.Conflict) {
		return nil
	}
	return err
}

// giveBack gives a slab the name that it had before its import. passed says why it was not removed.
func (e *lvmEngine) giveBack(ctx context.Context, id string, passed error) error {
	lv := volume(slabs, id)
	found, err := e.find(ctx, lv)
	if err != nil {
		return errors.Join(passed, err)
	}
	v, there := found[lv]
	own := decodeImport(v, id)
	switch {
	case !there, slices.Contains(v.Tags, slabTag+id):
		return passed
	case own == "":
		return fault.New(fault.Corrupt, "slab %q: logical volume %s/%s has no LVM tag that says that Quarry made it, so it is not removed: remove it (lvremove), or give it another name (lvrename)", id, e.name, lv)
	}
	dev, err := e.group.Device(ctx, e.uuid, lv)
	if err == nil && dev != nil {
		err = e.changed(ctx, e.group.Deactivate(ctx, lv))
	}
	if err != nil {
		return err
	}
	err = e.changed(ctx, e.group.Rename(ctx, lv, own))
	switch {
	case errors.Is(err, fault.Exists):
		return fault.New(fault.InUse, "slab %q was logical volume %s/%s before its import, which did not end, and another one has that name now: give that another name (lvrename), then this one gets it back", id, e.name, own)
	case errors.Is(err, fault.NotFound):
		return e.confirm(ctx)
	case err != nil:
		return err
	}
	return e.forget(ctx, own, encodeImport(id, own))
}

// KeepSlab implements engine.Importer.
func (e *lvmEngine) KeepSlab(ctx context.Context, source, id string) error {
	if err := engine.CheckName("slab ID", id); err != nil {
		return err
	}
	if !lvmName(source) {
		return fault.New(fault.Invalid, "source %q: the name of a logical volume of volume group %s is needed, without the group's", source, e.name)
	}
	lv, tag := volume(slabs, id), encodeImport(id, source)
	found, err := e.find(ctx, lv)
	if err != nil {
		return err
	}
	v, there := found[lv]
	switch {
	case !there:
		return fault.New(fault.NotFound, "slab %q does not exist", id)
	case slices.Contains(v.Tags, slabTag+id):
		return nil // it was done before
	case decodeImport(v, id) != source:
		return fault.New(fault.Invalid, "slab %q was not imported from logical volume %s/%s", id, e.name, source)
	}
	instead := []string{tag}
	for _, t := range v.Tags { // of imports that came to nothing
		if strings.HasPrefix(t, importTag) && t != tag {
			instead = append(instead, t)
		}
	}
	return notFound(id, e.changed(ctx, e.group.Adopt(ctx, e.uuid, lv, slabTag+id, instead...)))
}
