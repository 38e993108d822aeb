package block

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// step moves one top to another head.
type step struct {
	top    host.Mapped
	levels []level // the chain, head first
}

// Switch gives the tops of some owners other chains, all at one moment: with
// a new, empty layer on top, or without one that was merged. Filesystems on them
// are frozen, the old heads flushed. What is so already is left alone; owners
// without a device here are skipped, and each Spec's Use and ReadOnly.
//
// fault.Conflict: the moment was not one, or an owner has another chain than the given
// one continues; or some owners' tops are moved already and others' not, so that an
// earlier attempt was cut short and its cut is no one moment: then nothing is
// changed, each has to be switched by itself. fault.Unsupported and fault.InUse: a
// device was made without device-mapper.
func (d *Devices) Switch(ctx context.Context, specs []Spec) error {
	h, err := d.Hold(ctx, specs)
	if err != nil {
		return err
	}
	return h.Release()
}

// Held is a Switch half-way. Until Release other work on these domains' devices waits.
type Held struct {
	d       *Devices
	w       *world
	specs   []Spec
	steps   []step
	still   *host.Suspension // nil: nothing waits
	release func() error     // once
	unlock  func()
}

// Prepare is what a Switch can do while everything is in use: the new chains' devices
// are built, and most of what was written is flushed. Errors as Switch has them.
func (d *Devices) Prepare(ctx context.Context, specs []Spec) (*Held, error) {
	for _, s := range specs {
		if err := s.check(); err != nil {
			return nil, err
		}
	}
	unlock, err := d.lock(ctx, specs...)
	if err != nil {
		return nil, err
	}
	h, err := d.prepare(ctx, specs)
	if err != nil {
		unlock()
		return nil, err
	}
	h.unlock, h.release = unlock, sync.OnceValue(h.end)
	return h, nil
}

// Hold is Prepare and the moment that counts.
func (d *Devices) Hold(ctx context.Context, specs []Spec) (*Held, error) {
	h, err := d.Prepare(ctx, specs)
	if err != nil {
		return nil, err
	}
	if err := h.Hold(ctx); err != nil {
		return nil, errors.Join(err, h.Release())
	}
	return h, nil
}

func (d *Devices) prepare(ctx context.Context, specs []Spec) (*Held, error) {
	w, err := d.fresh(ctx, specs...)
	if err != nil {
		return nil, err
	}
	collect := func(err error) error {
		return errors.Join(err, d.collect(context.WithoutCancel(ctx), domainsOf(specs...)))
	}
	done := false
	var steps []step
	for _, s := range specs {
		more, here, err := d.steps(ctx, w, s)
		if err != nil {
			return nil, collect(err)
		}
		done = done || here && len(more) == 0
		steps = append(steps, more...)
	}
	if done && len(steps) > 0 {
		return nil, collect(fault.New(fault.Conflict, "some of %d images have their new chains already, and others not: an earlier attempt was cut short, and what it cut is no one point in time; switch each by itself", len(specs)))
	}
	for _, s := range steps {
		if err := d.continues(ctx, w, s); err != nil {
			return nil, collect(err)
		}
	}
	if err := d.flush(ctx, w.heads(steps)); err != nil { // most of it now, while nobody waits
		return nil, collect(err)
	}
	return &Held{d: d, w: w, specs: specs, steps: steps}, nil
}

// Hold lets I/O wait until Release, or for SuspendLimit: then the new tables are in
// force, too. They are loaded, and what was written before is durable. It is called
// once; after an error nothing waits, and Release changes nothing.
func (h *Held) Hold(ctx context.Context) (err error) {
	h.still, err = h.d.still(ctx, h.w, h.steps)
	return err
}

// Release lets I/O go on, through the new chains; without Hold, or when that failed, as
// if nothing had been prepared. Called again it returns the same.
//
// fault.Conflict: it had gone on before, on some devices or all: what was cut is no
// one moment. The chains are the new ones all the same, or read as they do.
func (h *Held) Release() error { return h.release() }

func (h *Held) end() error {
	defer h.unlock()
	ctx := context.Background() // what was begun goes to its end
	err := h.d.moved(ctx, h.w, h.steps, h.still)
	moved := h.still != nil || len(h.steps) == 0
	if err == nil && moved && !h.w.idle(domainsOf(h.specs...)) {
		return nil // a layer more: nothing has come free
	}
	return errors.Join(err, h.d.collect(ctx, domainsOf(h.specs...)))
}

// steps builds an owner's new chain and says which tops have to move to it.
// here: the owner has a top.
func (d *Devices) steps(ctx context.Context, w *world, s Spec) (_ []step, here bool, _ error) {
	var tops []host.Mapped
	for _, u := range uses {
		if m := w.uuid(topUUID(u, s.Owner)); m != nil && m.Targets != nil {
			m, err := d.awake(ctx, w, *m)
			if err != nil {
				return nil, true, err
			}
			tops = append(tops, m)
		}
	}
	if len(tops) == 0 {
		return nil, false, w.noLoops(s)
	}
	levels, err := d.build(ctx, w, s.Slabs)
	if err != nil {
		return nil, true, err
	}
	var out []step
	for _, m := range tops {
		t := read(m)
		switch {
		case t.kind != "linear":
			return nil, true, strange(m, "a linear device over the image's head")
		case t.under != levels[0].num:
			out = append(out, step{top: m, levels: levels})
		}
	}
	return out, true, nil
}

// noLoops refuses a chain for an owner that has a device without device-mapper.
func (w *world) noLoops(s Spec) error {
	if len(s.Slabs) == 1 {
		return nil
	}
	for _, lp := range w.tops {
		if use, _ := useOf(lp.Mark); use != View && lp.Mark == mark(use, s.Owner) {
			return fault.New(fault.InUse, "%s is attached as %s, without device-mapper: it can get no layer before it was unstaged from this node and staged again", s.Owner, lp.Path)
		}
	}
	return w.dumb // it may be one of that owner
}

// continues refuses a chain that would show other content than the top does:
// what lies above its present head must be empty layers.
func (d *Devices) continues(ctx context.Context, w *world, s step) error {
	now := read(s.top).under
	for _, l := range s.levels {
		if w.content(l.num) == w.content(now) {
			return nil
		}
		if l.store == "" {
			continue // it was merged: its parent is next
		}
		left, err := d.leftOf(ctx, w, l.num)
		if err != nil {
			return fault.New(fault.KindOf(err), "slab %s: %w", l.slab.ID, err)
		}
		if left > 0 {
			return fault.New(fault.Conflict, "%s is in use over device %s, and the layer %s, which should come over that, holds content already", s.top.Path, now, l.slab.ID)
		}
	}
	return fault.New(fault.Conflict, "%s is in use over device %s, which is not in the chain that it should get (head %s): unstage the volume and stage it again", s.top.Path, now, s.levels[0].slab.ID)
}

// move switches tops that are awake, all at one moment.
func (d *Devices) move(ctx context.Context, w *world, steps []step) error {
	for _, s := range steps {
		if err := d.continues(ctx, w, s); err != nil {
			return err
		}
	}
	if err := d.flush(ctx, w.heads(steps)); err != nil {
		return err
	}
	still, err := d.still(ctx, w, steps)
	if err != nil {
		return err
	}
	return d.moved(context.WithoutCancel(ctx), w, steps, still)
}

// heads are the paths of the devices over which some tops stand now.
func (w *world) heads(steps []step) []string {
	var out []string
	for _, s := range steps {
		if path := w.path(read(s.top).under); !slices.Contains(out, path) {
			out = append(out, path)
		}
	}
	return out
}

// still suspends tops whose new chains continue their present ones, flushes what is
// below them, and loads their new tables. nil: there are none.
func (d *Devices) still(ctx context.Context, w *world, steps []step) (*host.Suspension, error) {
	if len(steps) == 0 {
		return nil, nil
	}
	var devices []host.Mapped
	for _, s := range steps {
		devices = append(devices, s.top)
		for _, upper := range w.above(number(s.top.Major, s.top.Minor)) { // the filesystem is on these
			upper, err := d.awake(ctx, w, upper)
			if err != nil {
				return nil, err
			}
			devices = append(devices, upper)
		}
	}
	s, err := d.host().SuspendAll(ctx, devices, SuspendLimit)
	if err != nil {
		return nil, err
	}
	err = d.flush(ctx, w.heads(steps))
	for _, st := range steps {
		if err == nil {
			err = d.host().LoadMapped(ctx, st.top, st.top.ReadOnly, linear(st.levels[0].num, st.top.Size))
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.clearAll(context.WithoutCancel(ctx), steps), s.Resume())
	}
	return s, nil
}

// moved lets I/O go on through the new tables.
func (d *Devices) moved(ctx context.Context, w *world, steps []step, still *host.Suspension) error {
	if still == nil {
		return nil
	}
	if err := still.Resume(); err != nil {
		return errors.Join(err, d.clearAll(ctx, steps))
	}
	for _, st := range steps {
		if _, err := d.again(ctx, w, st.top); err != nil {
			return err
		}
	}
	return nil
}

func (d *Devices) clearAll(ctx context.Context, steps []step) error {
	var errs []error
	for _, s := range steps {
		errs = append(errs, d.host().ClearMapped(ctx, s.top))
	}
	return errors.Join(errs...)
}

func (d *Devices) flush(ctx context.Context, paths []string) error {
	for _, p := range paths {
		if err := d.host().FlushDevice(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// path is a device's node.
func (w *world) path(num string) string {
	if m := w.number(num); m != nil {
		return m.Path
	}
	if lp := w.loop(num); lp != nil {
		return lp.Path
	}
	path, _, _ := nodeOf(num)
	return path
}
