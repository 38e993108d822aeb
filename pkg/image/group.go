package image

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// CreateGroup makes snapshots of several volumes of one domain at one moment:
// every member is quiesced before the first is cut. The group's record is the
// only seal; members are visible through it. It is idempotent by name.
func (m *Manager) CreateGroup(ctx context.Context, r GroupRequest) (Group, error) {
	if err := checkName("group snapshot", r.Name); err != nil {
		return Group{}, err
	}
	if len(r.Sources) == 0 {
		return Group{}, fault.New(fault.Invalid, "a group snapshot needs at least one source volume")
	}
	sources := slices.Clone(r.Sources)
	for i, h := range sources { // one volume under two names would wait for itself
		sources[i] = m.canonical(h)
	}
	slices.SortFunc(sources, func(a, b Handle) int { return cmp.Compare(a.String(), b.String()) })
	if len(slices.Compact(slices.Clone(sources))) != len(sources) {
		return Group{}, fault.New(fault.Invalid, "a source volume is named twice: %v", r.Sources)
	}
	r.Sources = sources // one order of locking for everybody
	return do(ctx, m, spaceGroup+"/"+r.Name, "create group snapshot", r.Name, fingerprint(sources), func(ctx context.Context, op *operation) (Group, error) {
		return m.createGroup(ctx, op, r)
	})
}

func (m *Manager) createGroup(ctx context.Context, op *operation, r GroupRequest) (Group, error) {
	if img := m.byName(spaceGroup, r.Name); img != nil {
		done, err := m.existingGroup(ctx, op, img, r.Sources)
		if err != nil {
			return Group{}, err
		}
		if done {
			return m.groupView(img), nil
		}
	}
	d, err := m.domain(r.Sources[0].Domain)
	if err != nil {
		return Group{}, err
	}
	op.at(d.id, "")
	if err := d.checkNative(r.RequireNative); err != nil {
		return Group{}, err
	}
	var members []*cutting
	for i, h := range r.Sources {
		src, err := m.volume(h)
		if err != nil {
			return Group{}, err
		}
		if src.d != d {
			return Group{}, fault.New(fault.InUse, "volumes %s and %s are in different domains: a group snapshot stays in one", r.Sources[0], h)
		}
		op.stepf("waiting for %s (%d of %d)", src.id, i+1, len(r.Sources))
		release, err := src.hold(ctx, op)
		if err != nil {
			return Group{}, err
		}
		defer release()
		members = append(members, &cutting{m: m, op: op, src: src, inexact: r.Inexact, described: r.Described})
	}
	defer d.cuts.begin()()
	g, err := d.intend(ctx, op, record{Name: r.Name, Kind: kindGroup, Op: opGroup, Created: m.cfg.Now().UnixMilli(), Members: len(members)}, "")
	if err != nil {
		return Group{}, err
	}
	if err := m.cutGroup(ctx, op, g, members); err != nil {
		if err = d.abandon(ctx, g, err); err != nil {
			if rec, _ := g.snapshot(); !rec.dead() {
				// Its seal may yet turn out to have happened: the collector finds out.
				d.release(members)
				return Group{}, err
			}
			for _, c := range members {
				if c.img != nil {
					d.sweepLater(ctx, c.img)
				}
			}
			return Group{}, err
		}
	}
	d.release(members)
	return m.groupView(g), nil
}

// release ends the work on a group's members: from now on the group's record decides.
func (d *domain) release(members []*cutting) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range members {
		if c.img != nil {
			c.img.op = nil
		}
	}
}

// cutGroup writes the members' intents, quiesces all, cuts all, and seals the group.
func (m *Manager) cutGroup(ctx context.Context, op *operation, g *image, members []*cutting) error {
	d := g.d
	for _, c := range members {
		if err := c.intend(ctx, opMember, g.id); err != nil {
			return err
		}
		if err := d.describe(ctx, c.img, c.described); err != nil {
			return err
		}
	}
	op.at(d.id, g.id)
	h, err := m.cutTogether(ctx, op, members)
	if err != nil {
		return err
	}
	defer d.allocateSoon(members...)
	op.took(h)
	op.stepf("sealing")
	for _, c := range members {
		rec, slab := c.img.snapshot()
		rec.How = h.String()
		d.measureAlloc(ctx, &rec, slab)
		if err := d.commit(ctx, c.img, rec, slab); err != nil {
			return err
		}
	}
	rec, _ := g.snapshot()
	rec.Strong, rec.Op, rec.Created, rec.How = true, "", m.cfg.Now().UnixMilli(), h.String()
	return d.commit(ctx, g, rec, "")
}

// cutTogether cuts all members while all of them are still.
func (m *Manager) cutTogether(ctx context.Context, op *operation, members []*cutting) (how, error) {
	d := members[0].src.d
	var quiets []*quiet
	thaw := func() (err error) {
		for _, q := range quiets {
			err = errors.Join(err, q.release(ctx))
		}
		return err
	}
	defer func() { _ = thaw() }() // for the ways out before the one that counts
	native := d.caps.Snapshotter != nil || d.caps.GroupSnapshotter != nil
	for _, c := range members {
		if rec, _ := c.src.snapshot(); rec.Chunk > 0 {
			native = false
		}
	}
	if !native && !d.now().NativeOnly {
		h, err := m.layTogether(ctx, op, members)
		if !errors.Is(err, engine.ErrDeclined) {
			return h, err
		}
	}
	limit, frozen, atOnce := DefaultQuiesceLimit, 0, native && d.caps.GroupSnapshotter != nil
	for i, c := range members {
		op.stepf("quiescing %s (%d of %d)", c.src.id, i+1, len(members))
		q, err := m.quiesce(ctx, c.src)
		quiets = append(quiets, q)
		if err != nil {
			return how{}, fault.New(fault.Unavailable, "volume %s is attached and its node cannot be asked to keep it still: %w", c.src.id, err)
		}
		if q.busy && !atOnce && !c.inexact {
			return how{}, fault.New(fault.InUse, "volume %s is in use on node %s without a filesystem of its own to freeze: it cannot be part of one moment; detach it first", c.src.id, q.busyNode)
		}
		frozen += len(q.frozen)
		limit = min(limit, c.src.quiesceLimit())
	}
	cutCtx, cancel := ctx, context.CancelFunc(func() {})
	if frozen > 0 {
		cutCtx, cancel = context.WithTimeout(ctx, limit)
	}
	defer cancel()
	h, err := m.cutEach(cutCtx, op, members)
	if frozen > 0 && cutCtx.Err() != nil && ctx.Err() == nil {
		return how{}, fault.New(fault.InUse, "the group's filesystems would have to stay frozen for longer than quiesceLimit (%s): detach them, or raise quiesceLimit", limit)
	}
	if err != nil {
		return how{}, err
	}
	if err := thaw(); err != nil {
		return how{}, fault.New(fault.Pending, "the group's filesystems did not stay frozen during the cuts, which therefore do not count: %w", err)
	}
	return h, nil
}

func (m *Manager) cutEach(ctx context.Context, op *operation, members []*cutting) (how, error) {
	d := members[0].src.d
	if d.caps.GroupSnapshotter != nil {
		var sources []string
		var specs []engine.SlabSpec
		for _, c := range members {
			_, slab := c.src.snapshot()
			sources, specs = append(sources, slab), append(specs, c.spec())
		}
		err := d.caps.GroupSnapshotter.SnapshotSlabs(ctx, sources, specs)
		if !errors.Is(err, engine.ErrDeclined) {
			return how{native: true, reason: "group snapshot"}, err
		}
	}
	h := how{native: true, reason: "snapshot"}
	for i, c := range members {
		op.stepf("cutting %s (%d of %d)", c.src.id, i+1, len(members))
		_, slab := c.src.snapshot()
		err := engine.ErrDeclined
		if d.caps.Snapshotter != nil {
			err = d.caps.Snapshotter.SnapshotSlab(ctx, slab, c.spec())
		}
		if errors.Is(err, engine.ErrDeclined) {
			if d.now().NativeOnly {
				return how{}, fault.New(fault.Unsupported, "domain %s is native-only and its storage (%s) has no native snapshot", d.id, d.desc.Location)
			}
			h = how{reason: "copy"}
			err = m.copySlab(ctx, op, c.src, c.img, c.spec(), 0, nil)
		}
		if err != nil {
			return how{}, err
		}
	}
	return h, nil
}

func (m *Manager) existingGroup(ctx context.Context, op *operation, g *image, sources []Handle) (done bool, err error) {
	release, err := g.hold(ctx, op)
	if err != nil {
		return false, err
	}
	defer release()
	rec, _ := g.snapshot()
	if rec.dead() {
		return false, nil
	}
	if !rec.Strong {
		return false, g.d.sweep(ctx, g)
	}
	var have []string
	for _, s := range m.groupView(g).Snapshots {
		have = append(have, s.Source)
	}
	var want []string
	for _, h := range sources {
		want = append(want, h.String())
	}
	slices.Sort(have)
	if !slices.EqualFunc(have, want, m.same) {
		return false, fault.New(fault.Exists, "a group snapshot with this name exists, of volumes %s; asked for was one of %s", strings.Join(have, ", "), strings.Join(want, ", "))
	}
	return true, nil
}

func (m *Manager) groupView(g *image) Group {
	d := g.d
	d.mu.Lock()
	out := Group{Handle: d.handle(g), Name: g.rec.Name, Created: g.rec.created(), Ready: true}
	var members []*image
	for _, img := range d.images {
		if img.rec.Group == g.id && d.visible(img) {
			members = append(members, img)
		}
	}
	d.mu.Unlock()
	slices.SortFunc(members, func(a, b *image) int { return cmp.Compare(a.id, b.id) })
	for _, img := range members {
		out.Snapshots = append(out.Snapshots, m.view(img))
	}
	return out
}

// group finds a sealed group. fault.NotFound.
func (m *Manager) group(h Handle) (*image, error) {
	d, err := m.domain(h.Domain)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fenced != nil {
		return nil, d.fenced
	}
	g := d.images[h.Image]
	if g == nil || g.rec.Kind != kindGroup || !g.rec.Strong {
		return nil, fault.New(fault.NotFound, "there is no group snapshot %s", h)
	}
	return g, nil
}

// GetGroup returns a group snapshot and its members. fault.NotFound.
func (m *Manager) GetGroup(_ context.Context, h Handle) (Group, error) {
	g, err := m.group(h)
	if err != nil {
		return Group{}, err
	}
	return m.groupView(g), nil
}

// DeleteGroup deletes a group snapshot with all its members, at one moment. A
// group that does not exist is success.
func (m *Manager) DeleteGroup(ctx context.Context, h Handle) error {
	g, err := m.group(h)
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = do(ctx, m, "delete/"+h.String(), "delete group snapshot", h.String(), "", func(ctx context.Context, op *operation) (struct{}, error) {
		return struct{}{}, m.deleteImage(ctx, op, g)
	})
	return err
}

// settleSource finds out whether the volume of a member of a group got its layer
// over the member, where that is uncertain. settled is false if somebody works on
// the volume.
func (d *domain) settleSource(ctx context.Context, member *image) (settled bool, err error) {
	d.mu.Lock()
	var src *image
	if h, err := ParseHandle(member.rec.Source); err == nil {
		src = d.images[h.Image]
	}
	d.mu.Unlock()
	if src == nil {
		return true, nil
	}
	if !src.lock.tryAcquire() {
		return false, nil
	}
	defer src.lock.release()
	return true, d.resolve(ctx, src)
}
