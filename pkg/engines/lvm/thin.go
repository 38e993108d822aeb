package lvm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// openPool makes the thin pool active, so that it can be measured.
func (e *lvmEngine) openPool(ctx context.Context) error {
	pool, err := e.group.Pool(ctx, e.pool)
	if errors.Is(err, fault.NotFound) {
		return fault.New(fault.Invalid, "parameter \"thinPool\": %w: make it (lvcreate --type thin-pool), or leave the parameter out", err)
	} else if err != nil {
		return err
	}
	if !pool.Zero {
		// Bytes around the first write to a chunk would be another volume's.
		return fault.New(fault.Invalid, "thin pool %s/%s does not zero new space, so that a volume would show another's bytes: lvchange --zero y %s/%s", e.name, e.pool, e.name, e.pool)
	}
	if err := e.group.Activate(ctx, e.pool); err != nil {
		return err
	}
	if kernel, ok := e.group.ActivePool(ctx, e.uuid, e.pool); ok {
		if err := e.checkTransaction(ctx, kernel.Transaction, pool.Transaction); err != nil {
			return err
		}
	}
	e.desc.ZeroedSpace = true
	if pool.ErrorWhenFull {
		e.note("thin pool %s: when it is full, writes fail at once", e.pool)
	} else {
		e.note("thin pool %s: when it is full, writes wait for a minute and then fail (lvchange --errorwhenfull)", e.pool)
	}
	e.note("thin pool %s: at %d%% of its data, or %.0f%% of its metadata, no new slab is made; Quarry does not extend the pool", e.pool, lvm.Full, lvm.MetadataFull(pool.MetadataSize))
	if pool.Health != "" {
		e.note("thin pool %s is not healthy: %s (lvs -o lv_health_status, lvconvert --repair)", e.pool, pool.Health)
	}
	return nil
}

// checkTransaction refuses a pool of which the kernel knows more changes than LVM
// (Pool.Transaction of both): LVM would believe that the next one has been made
// already, and give a new volume the device of one that it has forgotten. The kernel
// is behind by one where a program was killed; further behind, LVM refuses it.
func (e *lvmEngine) checkTransaction(ctx context.Context, kernel, ours int64) error {
	if kernel <= ours {
		return nil
	}
	// Another process may have made a volume since LVM was asked. Now its number
	// cannot be below what the kernel's was before: it is raised first.
	pool, err := e.group.Pool(ctx, e.pool)
	if err != nil || kernel <= pool.Transaction {
		return err
	}
	return fault.New(fault.Corrupt, "thin pool %s/%s: its transaction ID is %d in the kernel and %d in LVM's metadata, which were restored from an older backup: a new volume would get a lost one's device, with its bytes. Restore the newest backup (vgcfgrestore --force); without one, docs/engines/lvm.md says what to do", e.name, e.pool, kernel, pool.Transaction)
}

// Supports implements engine.Narrower.
func (e *lvmEngine) Supports(c engine.Capability) bool {
	switch c {
	case engine.CapSnapshot, engine.CapClone:
		return e.pool != ""
	case engine.CapMeter, engine.CapImport:
		return true
	}
	return false
}

// SnapshotSlab implements engine.Snapshotter: a thin snapshot, which has the
// same standing as its origin. LVM suspends an active origin for it. Declined
// where that cannot be: a filesystem right on the origin's device is frozen.
func (e *lvmEngine) SnapshotSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	if err := engine.CheckName("source slab ID", source); err != nil {
		return err
	}
	size, err := e.check(spec)
	if err != nil {
		return err
	}
	origin, lv, half := volume(slabs, source), volume(slabs, spec.ID), volume(partial, spec.ID)
	found, err := e.find(ctx, origin, lv, half)
	if err != nil {
		return err
	}
	if same, err := e.compare(found, spec); same || err != nil {
		return err
	}
	from, there := found[origin]
	switch {
	case !there:
		return fault.New(fault.NotFound, "source slab %q does not exist", source)
	case from.Pool != e.pool || from.Size > size:
		return engine.ErrDeclined
	}
	if err := e.roomForSlab(ctx); err != nil {
		return err
	}
	if _, there := found[half]; there {
		if err := e.changed(ctx, e.group.Remove(ctx, e.uuid, half)); err != nil && !errors.Is(err, fault.NotFound) {
			return err
		}
	}
	err = e.changed(ctx, e.cut(ctx, origin, half, lv, from.Size, size, slabTag+spec.ID))
	switch {
	case errors.Is(err, fault.Exists):
		return e.taken(ctx, spec)
	case errors.Is(err, fault.InUse):
		return engine.ErrDeclined
	case errors.Is(err, fault.NotFound):
		return fault.New(fault.NotFound, "source slab %q does not exist", source)
	}
	return err
}

// cut makes a snapshot under another name, and gives it its own when all is done:
// a killed lvcreate may leave a volume that is cut when somebody next looks.
func (e *lvmEngine) cut(ctx context.Context, origin, half, lv string, from, size int64, tag string) error {
	if err := e.group.Snapshot(ctx, origin, half, tag); err != nil {
		return err
	}
	var err error
	if from != size {
		err = e.group.Extend(ctx, half, size)
	}
	if err == nil {
		err = e.group.Rename(ctx, half, lv)
	}
	if errors.Is(err, fault.NotFound) {
		return fault.New(fault.Conflict, "logical volume %s was removed by another while it was made", half)
	}
	if err != nil {
		if more := e.group.Remove(context.WithoutCancel(ctx), e.uuid, half); more != nil && !errors.Is(more, fault.NotFound) {
			return fault.New(fault.Unavailable, "%w; logical volume %s is left: %w", err, half, more)
		}
	}
	return err
}

// CloneSlab implements engine.Cloner.
func (e *lvmEngine) CloneSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return e.SnapshotSlab(ctx, source, spec)
}

// DomainUsage implements engine.Meter: the group's extents, or the pool's data.
// Nothing is available in a pool that takes no new slabs.
func (e *lvmEngine) DomainUsage(ctx context.Context) (engine.Usage, error) {
	if e.pool == "" {
		info, err := e.info(ctx)
		if err != nil {
			return engine.Usage{}, err
		}
		return engine.Usage{Total: info.Size, Used: info.Size - info.Free, Available: info.Free, Warning: e.areaWarning()}, nil
	}
	pool, err := e.poolNow(ctx)
	if err == nil && pool.DataPercent < 0 { // somebody deactivated it
		if err = e.group.Activate(ctx, e.pool); err == nil {
			pool, err = e.group.Pool(ctx, e.pool)
		}
	}
	if errors.Is(err, fault.NotFound) || err == nil && pool.DataPercent < 0 {
		return engine.Usage{}, fault.New(fault.Unavailable, "thin pool %s/%s is gone, or cannot be activated: %w", e.name, e.pool, errors.Join(err, errors.New("it has no usage")))
	} else if err != nil {
		return engine.Usage{}, err
	}
	u := engine.Usage{Total: pool.Size, Used: int64(float64(pool.Size) / 100 * pool.DataPercent), Warning: join(e.poolWarning(pool), e.areaWarning())}
	if pool.DataPercent < lvm.Full && pool.MetadataPercent < lvm.MetadataFull(pool.MetadataSize) {
		u.Available = u.Total - u.Used
	}
	return u, nil
}

// poolNow is the pool's state: the kernel's word where the group is there as a
// whole, else LVM's.
func (e *lvmEngine) poolNow(ctx context.Context) (lvm.Pool, error) {
	if _, there := e.now(ctx); there {
		if p, ok := e.group.ActivePool(ctx, e.uuid, e.pool); ok {
			return p, nil
		}
	}
	return e.group.Pool(ctx, e.pool)
}

// nearlyFull is from how many percent on the domain warns of the group's metadata
// area; early is how many percent before a pool is full it warns of that.
const nearlyFull, early = 80, 15

// poolWarning says what is going wrong with the pool; empty: nothing.
func (e *lvmEngine) poolWarning(p lvm.Pool) string {
	var out string
	for _, part := range []struct {
		what, grow string
		used, full float64
		size       int64
	}{
		{"data", "lvextend -L", p.DataPercent, lvm.Full, p.Size},
		{"metadata", "lvextend --poolmetadatasize", p.MetadataPercent, lvm.MetadataFull(p.MetadataSize), p.MetadataSize},
	} {
		then := fmt.Sprintf("at %.0f%% no new volume, snapshot or clone is made any more, and when it is full writing fails", part.full)
		switch {
		case part.used < part.full-early:
			continue
		case part.used >= part.full:
			then = "no new volume, snapshot or clone is made any more, and when it is full writing fails"
		}
		out = join(out, fmt.Sprintf("%.0f%% of the %s of thin pool %s/%s (%d MiB) is used: %s: delete something, or extend the pool (%s)",
			math.Floor(part.used), part.what, e.name, e.pool, part.size>>20, then, part.grow))
	}
	if p.Health != "" {
		out = join(out, fmt.Sprintf("thin pool %s/%s is not healthy, LVM says %q, and writing fails: docs/engines/lvm.md says what to do", e.name, e.pool, p.Health))
	}
	return out
}

// areaWarning is of the group's metadata area, as last seen.
func (e *lvmEngine) areaWarning() string {
	free := e.room.Load()
	if free*100 > e.area*(100-nearlyFull) {
		return ""
	}
	return fmt.Sprintf("%d of the %d KiB that volume group %s has for metadata are used, which hold a record for every image: when they are full nothing new is made: delete images, or move to a group with a larger area (vgcreate --metadatasize)",
		(e.area-free)>>10, e.area>>10, e.name)
}

func join(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "; " + b
}

// measuredFor is how long one report answers for slabs whose usage does not
// change by writing: the Image Manager asks for one slab after the other.
const measuredFor = time.Second

// SlabUsage implements engine.Meter. A thick slab has all of its space. Of a thin one only the kernel knows, while it is attached: else
// it is declined. It can still take what its pool still has.
func (e *lvmEngine) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	if err := engine.CheckName("slab ID", id); err != nil {
		return engine.Usage{}, err
	}
	all, pool, err := e.measure(ctx, id)
	if err != nil {
		return engine.Usage{}, err
	}
	v, there := all[id]
	switch {
	case !there:
		return engine.Usage{}, fault.New(fault.NotFound, "slab %q does not exist", id)
	case v.Pool == "":
		return engine.Usage{Total: v.Size, Used: v.Size}, nil
	case v.Used < 0:
		return engine.Usage{}, engine.ErrDeclined
	}
	u := engine.Usage{Total: v.Size, Used: v.Used, Available: v.Size - v.Used}
	if pool.Used >= 0 {
		u.Available = max(0, min(u.Available, pool.Size-pool.Used))
	}
	return u, nil
}

// measure lists the slabs by ID, and the pool; of the slab id it is not late.
func (e *lvmEngine) measure(ctx context.Context, id string) (map[string]lvm.Volume, lvm.Volume, error) {
	e.measuring.Lock()
	defer e.measuring.Unlock()
	at, now := e.changes.Load(), time.Now()
	if v, there := e.measured[id]; there && v.Used < 0 && e.at == at && now.Sub(e.as) < measuredFor {
		return e.measured, e.measuredPool, nil
	}
	var volumes []lvm.Volume
	var err error
	if e.pool == "" {
		volumes, err = e.ours(ctx, slabName)
	} else {
		var l lvm.Listing
		l, err = e.list(ctx, lvm.Names([]string{marker, e.pool}, []string{slabs + ".", slabs + "-"}), true)
		volumes = l.Volumes
	}
	if err != nil {
		return nil, lvm.Volume{}, err
	}
	all, pool := map[string]lvm.Volume{}, lvm.Volume{Used: -1}
	for _, v := range volumes {
		if v.Name == e.pool {
			pool = v
		} else if id := decodeSlab(v); id != "" {
			all[id] = v
		}
	}
	e.measured, e.measuredPool, e.at, e.as = all, pool, at, now
	return all, pool, nil
}
