package image

import (
	"context"
	"errors"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// CreateSnapshot makes a snapshot of a volume, in the volume's domain. It is
// idempotent by name. It returns after the cut. fault.Exists: the name is taken
// by a snapshot of another volume. fault.InUse: the volume is in use and cannot
// be kept still. fault.Pending: the cut was not made yet.
func (m *Manager) CreateSnapshot(ctx context.Context, r SnapshotRequest) (Image, error) {
	if err := checkName("snapshot", r.Name); err != nil {
		return Image{}, err
	}
	r.Source = m.canonical(r.Source)
	return do(ctx, m, spaceSnapshot+"/"+r.Name, "create snapshot", r.Name, fingerprint(r.Source), func(ctx context.Context, op *operation) (Image, error) {
		return m.createSnapshot(ctx, op, r)
	})
}

func (m *Manager) createSnapshot(ctx context.Context, op *operation, r SnapshotRequest) (Image, error) {
	if img := m.byName(spaceSnapshot, r.Name); img != nil {
		done, err := m.existingSnapshot(ctx, op, img, r.Source.String())
		if done || err != nil {
			return m.view(img), err
		}
	}
	src, err := m.volume(r.Source)
	if err != nil {
		return Image{}, err
	}
	op.at(src.d.id, "")
	if err := src.d.checkNative(r.RequireNative); err != nil {
		return Image{}, err
	}
	op.stepf("waiting for %s", src.id)
	release, err := src.hold(ctx, op)
	if err != nil {
		return Image{}, err
	}
	defer release()
	defer src.d.cuts.begin()()
	op.about(m, Subject{Name: r.Name, Snapshot: true, Described: r.Described})
	c := cutting{m: m, op: op, src: src, name: r.Name, inexact: r.Inexact, described: r.Described}
	if err := c.intend(ctx, opSnapshot, ""); err != nil {
		return Image{}, err
	}
	if err := c.cutAndSeal(ctx); err != nil {
		if c.toFinish(err) {
			return Image{}, err
		}
		if err := src.d.abandon(ctx, c.img, err); err != nil {
			return Image{}, err
		}
	}
	m.tellCreated(c.img)
	return m.view(c.img), nil
}

// existingSnapshot deals with a snapshot that has the name already. What an
// earlier life left half made is finished if it was past its first seal, else swept.
func (m *Manager) existingSnapshot(ctx context.Context, op *operation, img *image, source string) (done bool, err error) {
	op.at(img.d.id, img.id)
	release, err := img.hold(ctx, op) // not held for long: snapshots are never written
	if err != nil {
		return false, err
	}
	defer release()
	img.d.mu.Lock()
	fenced, rec, broken := img.d.fenced, img.rec, img.broken
	img.d.mu.Unlock()
	switch {
	case fenced != nil:
		return false, fenced
	case rec.Strong && broken != nil:
		return false, fault.New(fault.Corrupt, "snapshot %s with this name exists and is broken: %w; see kubectl quarry check", img.d.handle(img), broken)
	case rec.Strong && !m.same(rec.Source, source):
		return false, fault.New(fault.Exists, "a snapshot with this name exists, of volume %s; asked for was one of %s", rec.Source, source)
	case rec.Strong:
		return true, nil
	case rec.dead():
		return false, nil
	}
	if done, err := m.finishCut(ctx, op, img); done || err != nil {
		return done, err
	}
	return false, img.d.sweep(ctx, img)
}

// volume finds a visible volume.
func (m *Manager) volume(h Handle) (*image, error) {
	img, err := m.find(h)
	if err != nil {
		return nil, err
	}
	if rec, _ := img.snapshot(); !rec.Mutable {
		return nil, fault.New(fault.NotFound, "%s is a snapshot, not a volume", h)
	}
	return img, nil
}

// cutting is a snapshot under way. Its source is locked.
type cutting struct {
	m         *Manager
	op        *operation
	src       *image
	name      string
	inexact   bool
	described Described

	img *image
	rec record
	// layer: it is going to be made by a layer, and the intent has the old slab.
	layer bool
}

// intend checks the source and writes the intent.
func (c *cutting) intend(ctx context.Context, verb, group string) error {
	d := c.src.d
	if err := c.src.usable(); err != nil {
		return err
	}
	if err := c.m.stopMerge(ctx, c.src); err != nil {
		return err
	}
	rec, slab := c.src.snapshot()
	alloc, known, err := d.allocated(ctx, rec, slab)
	if err != nil {
		return err
	}
	if !known {
		alloc = rec.Size
	}
	release, err := d.reserve(ctx, min(alloc, rec.Size))
	if err != nil {
		return err
	}
	defer release()
	c.rec = record{Name: c.name, Kind: rec.Kind, Op: verb, Size: rec.Size, Alloc: alloc, Source: d.handle(c.src).String(), SrcVol: true,
		Created: c.m.cfg.Now().UnixMilli(), Used: rec.Used, FS: rec.FS, Params: rec.Params, Group: group, Crypt: rec.Crypt, Thin: rec.Thin}
	own := ""
	// A group decides for all its members together.
	if verb != opMember && !d.snapshots(&rec) && !d.now().NativeOnly && c.m.canLayer(ctx, c.src) == nil {
		c.layer, own = true, slab
		c.rec.Parent, c.rec.Chunk = rec.Parent, rec.Chunk
	}
	c.img, err = d.intend(ctx, c.op, c.rec, own)
	return err
}

// toFinish says whether a failed snapshot is past its first seal, and leaves it
// to whoever repeats the request: see finishCut.
func (c *cutting) toFinish(cause error) bool {
	d := c.src.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if !uncertain(cause) || !c.img.layered() || c.src.below() != c.img.id || c.img.pending != nil || c.src.pending != nil {
		return false
	}
	c.img.op, c.img.found = nil, d.m.cfg.Now()
	return true
}

func (c *cutting) spec() engine.SlabSpec {
	return engine.SlabSpec{ID: c.img.id, Kind: engine.Kind(c.rec.Kind), Size: c.rec.Size, Params: c.rec.Params}
}

func (c *cutting) cutAndSeal(ctx context.Context) error {
	described := make(chan error, 1)
	go func() { described <- c.src.d.describe(ctx, c.img, c.described) }()
	h, inexact, err := c.cut(ctx)
	if err := errors.Join(err, <-described); err != nil {
		return err
	}
	return c.sealCut(ctx, h, inexact)
}
