package block

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Merge is how far a merge is.
type Merge struct {
	Left int64 // bytes that are still in the layer
	// Done: the layer is empty, and its device shows the parent's.
	Done bool
}

// Merge moves the content of a chain's first layer down into the second slab, while
// the layer may be in use, as a head or further down: it starts that, or goes on with it, says how far it is and does not
// wait. The kernel does the work until all is moved, StopMerge, or the device goes;
// the call that finds it finished puts the parent's device in place of the layer's
// (same number). The parent must be as large as the layer, and nobody but the
// layer may stand on it.
//
// fault.NotFound: the layer has no device here: attach its image. fault.InUse:
// somebody else reads the parent. fault.Invalid: the parent is too small. fault.Exhausted:
// the layer is paused.
// fault.Corrupt: the layer's store is invalid, or moving failed: the
// content is still right, in the layer and its parent together.
func (d *Devices) Merge(ctx context.Context, chain []Slab) (Merge, error) {
	if len(chain) < 2 {
		return Merge{}, fault.New(fault.Internal, "a merge in a chain of %d slabs", len(chain))
	}
	child, parent := chain[0], chain[1]
	spec := Spec{Slabs: chain}
	unlock, err := d.lock(ctx, spec)
	if err != nil {
		return Merge{}, err
	}
	defer unlock()
	w, err := d.fresh(ctx, spec)
	if err != nil {
		return Merge{}, err
	}
	old := w.uuid(slabUUID(child.ID))
	if old == nil || old.Targets == nil {
		return Merge{}, fault.New(fault.NotFound, "merge %s into %s: the layer has no device on this node", child.ID, parent.ID)
	}
	m, err := d.awake(ctx, w, *old)
	if err != nil {
		return Merge{}, err
	}
	under, err := d.parent(ctx, w, m, child, parent)
	if err != nil {
		return Merge{}, err
	}
	switch read(m).kind {
	case "linear":
		return Merge{Done: true}, d.collect(context.WithoutCancel(ctx), []string{domainOf(m.UUID)})
	case "snapshot":
		if m, err = d.startMerge(ctx, w, m, under, parent); err != nil {
			return Merge{}, err
		}
	}
	left, err := d.left(ctx, m)
	if err != nil || left > 0 {
		return Merge{Left: left}, err
	}
	return d.endMerge(ctx, w, m, under)
}

// parent returns the number of the parent's own device, and refuses one that
// is not below the child, or that anybody else stands on.
func (d *Devices) parent(ctx context.Context, w *world, m host.Mapped, child, parent Slab) (string, error) {
	t := read(m)
	var num string
	if p := w.uuid(slabUUID(parent.ID)); p != nil && p.Targets != nil {
		num = number(p.Major, p.Minor)
	} else if parent.Chunk == 0 {
		var err error
		if num, _, err = d.slab(ctx, w, parent, parent.Size); err != nil { // grows it, too
			return "", fault.New(fault.KindOf(err), "slab %s: %w", parent.ID, err)
		}
	}
	if num == "" || t.kind == "?" || w.content(t.under) != w.content(num) {
		return "", strange(m, "a layer over "+parent.ID)
	}
	if t.kind == "linear" {
		return num, nil
	}
	content := w.content(num)
	shows := func(num string) bool { return num != "" && w.content(num) == content }
	for _, o := range w.mapped {
		passes := (isSlab(o.UUID) || isPad(o.UUID)) && shows(number(o.Major, o.Minor))
		if o.UUID != m.UUID && !passes && shows(read(o).under) {
			return "", fault.New(fault.InUse, "merge %s into %s: %s (%s) reads the parent, and would see it change", child.ID, parent.ID, o.Name, o.Path)
		}
	}
	return num, nil
}

// startMerge makes room in the parent and turns the layer's device round.
func (d *Devices) startMerge(ctx context.Context, w *world, m host.Mapped, under string, parent Slab) (host.Mapped, error) {
	if parent.Size < m.Size {
		return m, fault.New(fault.Invalid, "merge %s: the parent %s has %d bytes: it has to be grown to the %d of the layer first", m.Name, parent.ID, parent.Size, m.Size)
	}
	if err := d.growUnder(ctx, w, under, m.Size); err != nil {
		return m, err
	}
	t := read(m)
	if pad := w.uuid(padOf(m.UUID)); pad != nil && number(pad.Major, pad.Minor) == t.under {
		now, err := d.awake(ctx, w, *pad)
		if err != nil {
			return m, err
		}
		if want := linear(read(now).under, now.Size); !slices.Equal(now.Targets, want) {
			// It may stand on the device of a layer that was merged into the parent before.
			if err := d.growUnder(ctx, w, read(now).under, now.Size); err != nil {
				return m, err
			}
			if _, err := d.change(ctx, w, now, false, want); err != nil {
				return m, err
			}
		}
	}
	return d.reload(ctx, w, m, func() error { return d.usable(ctx, m) }, layered("snapshot-merge", t.under, t.store, t.chunk, m.Size))
}

func (d *Devices) leftOf(ctx context.Context, w *world, num string) (int64, error) {
	m := w.number(num)
	if m == nil {
		return 0, fault.New(fault.Internal, "device %s is not known", num)
	}
	return d.left(ctx, *m)
}

// left is what a layer holds of its image, in bytes: of one that is merging, still.
func (d *Devices) left(ctx context.Context, m host.Mapped) (int64, error) {
	status, err := d.status(ctx, m)
	if err != nil {
		return 0, err
	}
	switch status {
	case "Invalid":
		return 0, invalidStore(m)
	case host.MergeFailed:
		return 0, mergeFailed(m)
	case "Overflow": // hides how much there is: the store tells
		empty, err := d.emptyStore(ctx, m)
		if err != nil || empty {
			return 0, err
		}
		return read(m).chunk, nil
	}
	var used, total, metadata int64
	if _, err := fmt.Sscanf(status, "%d/%d %d", &used, &total, &metadata); err != nil {
		return 0, fault.New(fault.Internal, "layer %s: the kernel says %q of it, which is not known", m.Name, status)
	}
	return max(used-metadata, 0) * sector, nil
}

func mergeFailed(m host.Mapped) error {
	return fault.New(fault.Corrupt, "merging the layer %s stopped after a read or write error: its content is still right; mend the storage, unstage the volume from this node and stage it again, and the merge goes on", m.Name)
}

func (d *Devices) emptyStore(ctx context.Context, m host.Mapped) (bool, error) {
	path, _, _ := nodeOf(read(m).store)
	return d.empty(ctx, path)
}

// endMerge puts the parent's device in place of a layer that is empty on disk.
func (d *Devices) endMerge(ctx context.Context, w *world, m host.Mapped, under string) (Merge, error) {
	more := false
	_, err := d.reload(ctx, w, m, func() error {
		left, err := d.left(ctx, m)
		if err != nil {
			return err
		}
		if more = left > 0; more {
			return fault.New(fault.Conflict, "layer %s is not merged yet", m.Name)
		}
		empty, err := d.emptyStore(ctx, m)
		if err == nil && !empty {
			err = fault.New(fault.Corrupt, "layer %s: the kernel says that it is merged, and its store still holds exceptions: nothing is changed", m.Name)
		}
		return err
	}, linear(under, m.Size))
	if more {
		return Merge{Left: read(m).chunk}, nil
	}
	if err != nil {
		return Merge{}, err
	}
	return Merge{Done: true}, d.collect(context.WithoutCancel(ctx), []string{domainOf(m.UUID)})
}

// StopMerge lets a layer, given by its slab's ID, be a layer again, with what is not moved yet. One that
// is not merging, was merged, or has no device here is success. fault.Corrupt: as of Merge.
// fault.Unavailable: as of Let.
func (d *Devices) StopMerge(ctx context.Context, slab string) error {
	unlock, err := d.lock(ctx, Spec{Slabs: []Slab{{ID: slab}}})
	if err != nil {
		return err
	}
	defer unlock()
	w, err := d.look(ctx)
	if err != nil {
		return err
	}
	old := w.uuid(slabUUID(slab))
	if old == nil || old.Targets == nil {
		return nil
	}
	// To stop writes nothing but what is under way.
	done, err := d.let(w.below(*old))
	defer done()
	if err != nil {
		return err
	}
	if err := d.stopPaused(ctx, w, *old); err != nil {
		return err
	}
	goneOn, err := d.let([]string{old.UUID})
	defer goneOn()
	if err != nil {
		return err
	}
	if old, err = d.host().MappedByUUID(ctx, old.UUID); err != nil || old == nil {
		return err
	}
	m, err := d.awake(ctx, w, *old)
	if err == nil && read(m).kind == "snapshot-merge" {
		_, err = d.stopMerge(ctx, w, m)
	}
	return err
}

// stopPaused lets a merge that is paused go on as a layer, when it does.
func (d *Devices) stopPaused(ctx context.Context, w *world, m host.Mapped) error {
	d.mu.Lock()
	p := d.paused[m.UUID]
	stays := p == nil || p.atOnce
	d.mu.Unlock()
	t := read(m)
	if t.kind != "snapshot-merge" || !m.Suspended || stays {
		return nil
	}
	if err := d.flush(ctx, []string{w.path(t.under)}); err != nil { // as stopMerge does
		return err
	}
	return d.host().LoadMapped(ctx, m, m.ReadOnly, layered("snapshot", t.under, t.store, t.chunk, t.length))
}

// endFailed gives a suspended device on which a merge has failed the table of a layer, for
// the next resume: over another device with the same content, so that the kernel reads the
// store from disk, and does not hand on what it remembers of it.
func (d *Devices) endFailed(ctx context.Context, w *world, m host.Mapped) error {
	t := read(m)
	if t.kind != "snapshot-merge" || m.Inactive {
		return nil
	}
	if status, err := d.status(ctx, m); err != nil || status != host.MergeFailed {
		return err
	}
	under, err := "", error(nil)
	if pad := w.uuid(padOf(m.UUID)); pad != nil && number(pad.Major, pad.Minor) == t.under {
		under = read(*pad).under // a pad is all parent while it merges
	} else if under, err = d.pad(ctx, w, m.UUID, t.under, m.Size, m.Size); err != nil {
		return err
	}
	if err := d.flush(ctx, []string{w.path(t.under)}); err != nil { // as stopMerge does
		return err
	}
	d.changes.Add(1)
	return d.host().LoadMapped(ctx, m, m.ReadOnly, layered("snapshot", under, t.store, t.chunk, t.length))
}

// goOn ends the suspension of a device. Where a merge has failed it goes on as a layer.
func (d *Devices) goOn(ctx context.Context, still *host.Suspension, m host.Mapped) error {
	err := still.Resume()
	if errors.Is(err, fault.Corrupt) {
		return d.wake(ctx, m)
	}
	return err
}

func (d *Devices) wake(ctx context.Context, m host.Mapped) error {
	w, err := d.look(ctx)
	if err != nil {
		return err
	}
	now, err := d.again(ctx, w, m)
	if err == nil {
		_, err = d.awake(ctx, w, now)
	}
	return err
}

// stopMerge does not touch a merge that failed, not even to suspend it: the
// kernel's memory of the store may differ from the disk then. Every resume goes on
// from there, and may take the store's header for the image's first chunk.
func (d *Devices) stopMerge(ctx context.Context, w *world, m host.Mapped) (host.Mapped, error) {
	failed := func() error {
		_, err := d.left(ctx, m)
		return err
	}
	if err := failed(); err != nil {
		return m, err
	}
	// What was written during the merge to chunks that the layer does not hold went to
	// the parent, and so did flushes. Those of a layer do not.
	t := read(m)
	parent := []string{w.path(t.under)}
	if err := d.flush(ctx, parent); err != nil { // most of it now, while nobody waits
		return m, err
	}
	ready := func() error {
		if err := failed(); err != nil {
			return err
		}
		return d.flush(ctx, parent)
	}
	return d.reload(ctx, w, m, ready, layered("snapshot", t.under, t.store, t.chunk, t.length))
}
