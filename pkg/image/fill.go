package image

import (
	"context"
	"errors"
	"fmt"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// The defaults of Tuning.
const (
	DefaultChainLimit   = 8
	DefaultQuiesceLimit = 10 * time.Second
)

// cut makes the content of a snapshot, as its source is at one moment. This is
// where the way is chosen, best first:
//
//  1. the storage's own snapshot, under a short freeze where there is one;
//  2. a layer over the source's slab, by the kernel's device-mapper;
//  3. a copy, while nobody writes: of a detached image, or of one whose
//     filesystem is frozen for at most its quiesceLimit, or an inexact one
//     where that is allowed.
//
// The caller holds the source's lock, so that nobody stages it meanwhile.
func (c *cutting) cut(ctx context.Context) (h how, isInexact bool, err error) {
	src := c.src
	rec, slab := src.snapshot()
	alloc, known, err := src.d.allocated(ctx, rec, slab)
	if err != nil {
		return how{}, false, err
	}
	if src.d.snapshots(&rec) {
		h, err := c.m.cutNative(ctx, c.op, src, c.spec())
		if !errors.Is(err, engine.ErrDeclined) {
			return h, false, err
		}
	}
	if src.d.now().NativeOnly {
		return how{}, false, src.d.nativeOnly("snapshot", rec.layout())
	}
	if !c.layer {
		err = c.m.canLayer(ctx, src)
	}
	if err == nil {
		return how{reason: "layer"}, false, c.cutLayer(ctx)
	}
	if !errors.Is(err, fault.Unsupported) {
		return how{}, false, err
	}
	if !known {
		alloc = rec.Size
	}
	h, isInexact, copyErr := c.m.cutCopy(ctx, c.op, src, c.img, c.spec(), alloc, c.inexact)
	if errors.Is(copyErr, fault.InUse) {
		copyErr = fault.New(fault.InUse, "%w (and no layer: %w)", copyErr, err)
	}
	return h, isInexact, copyErr
}

// snapshots says whether the storage can take a snapshot of an image by itself:
// of a layer it would have to do so for the whole chain.
func (d *domain) snapshots(rec *record) bool { return d.caps.Snapshotter != nil && rec.Chunk == 0 }

func (d *domain) nativeOnly(what string, l Layout) error {
	return fault.New(fault.Unsupported, "domain %s is native-only and its storage (%s) has no native %s for a %s", d.id, d.desc.Location, what, l)
}

// cutNative lets the storage make a snapshot. A freeze makes the filesystem
// inside clean; where that is not to be had the snapshot is still one moment.
func (m *Manager) cutNative(ctx context.Context, op *operation, src *image, spec engine.SlabSpec) (how, error) {
	op.stepf("taking a native snapshot of %s", src.id)
	_, slab := src.snapshot()
	q, err := m.quiesce(ctx, src)
	defer q.release(ctx)
	reason := "snapshot"
	switch {
	case err != nil:
		klog.FromContext(ctx).Info("Snapshot without a freeze: it is as after a power cut", "image", src.id, "err", err)
		reason = "snapshot, not frozen"
	case len(q.frozen) > 0:
		reason = "snapshot, frozen"
	}
	if err := src.d.caps.Snapshotter.SnapshotSlab(ctx, slab, spec); err != nil {
		return how{}, err
	}
	if err := q.release(ctx); err != nil {
		reason = "snapshot, not frozen"
	}
	return how{native: true, reason: reason}, nil
}

// cutCopy copies a slab while nobody writes it.
func (m *Manager) cutCopy(ctx context.Context, op *operation, src, dst *image, spec engine.SlabSpec, alloc int64, inexact bool) (how, bool, error) {
	rec, _ := src.snapshot()
	limit := src.quiesceLimit()
	if src.used() && src.d.tooSlow(alloc, limit) {
		return how{}, false, src.refuseCopy(alloc, limit)
	}
	q, err := m.quiesce(ctx, src)
	defer q.release(ctx)
	if err != nil {
		return how{}, false, fault.New(fault.Unavailable, "image %s is attached and its node cannot be asked to keep it still: %w", src.id, err)
	}
	if q.busy && (rec.layout() != LayoutDirectory || !inexact) {
		return how{}, false, fault.New(fault.InUse, "%s %s is in use on node %s, the storage (%s) has no native snapshot, and there is no filesystem inside to freeze%s",
			rec.layout(), src.id, q.busyNode, src.d.desc.Location, inexactHint(rec.layout()))
	}
	copyCtx := ctx
	if len(q.frozen) > 0 {
		var cancel context.CancelFunc
		copyCtx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	began := time.Now()
	err = m.copySlab(copyCtx, op, src, dst, spec, 0, nil)
	took := time.Since(began)
	if len(q.frozen) > 0 && copyCtx.Err() != nil && ctx.Err() == nil {
		src.d.learn(alloc, 2*took) // it needed at least that long
		return how{}, false, src.refuseCopy(alloc, limit)
	}
	if err != nil {
		return how{}, false, err
	}
	src.d.learn(alloc, took)
	if err := q.release(ctx); err != nil {
		return how{}, false, fault.New(fault.Pending, "the filesystem did not stay frozen during the copy, which therefore does not count: %w", err)
	}
	switch {
	case q.busy:
		return how{reason: "copy while written (inexact)"}, true, nil
	case len(q.frozen) > 0:
		return how{reason: fmt.Sprintf("copy, frozen for %s", took.Round(time.Millisecond))}, false, nil
	}
	return how{reason: "copy"}, false, nil
}

func inexactHint(l Layout) string {
	if l == LayoutDirectory {
		return "; detach it, or set inexact: allow in the snapshot class and get a copy that is no point in time"
	}
	return "; detach it first"
}

func (img *image) refuseCopy(alloc int64, limit time.Duration) error {
	return fault.New(fault.InUse, "image %s is in use and the storage (%s) has no native snapshot: its filesystem would have to stay frozen for longer than quiesceLimit (%s) to copy %s; detach it, or raise quiesceLimit",
		img.id, img.d.desc.Location, limit, bytesText(alloc))
}

// used says whether a node may be writing the image.
func (img *image) used() bool {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	for _, a := range img.attached {
		if !a.ReadOnly {
			return true
		}
	}
	return false
}

// rateKept is how long a measured rate is believed: a storage is not for ever as
// slow as it was in a bad minute.
const rateKept = 10 * time.Minute

// learn remembers how fast the domain copies; tooSlow uses it, so that a
// workload is not stopped again and again for a copy that cannot succeed.
func (d *domain) learn(bytes int64, took time.Duration) {
	if bytes < 64<<20 || took <= 0 {
		return // too small to tell
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.copyRate, d.learned = float64(bytes)/took.Seconds(), d.m.cfg.Now()
}

func (d *domain) tooSlow(bytes int64, limit time.Duration) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	known := d.copyRate > 0 && d.m.cfg.Now().Sub(d.learned) < rateKept
	return known && float64(bytes)/d.copyRate > limit.Seconds()
}

// copySlab creates the slab spec of dst and copies src's content into it.
// Nobody writes src meanwhile. checkpoint is told what is durable; nil: no checkpoints.
func (m *Manager) copySlab(ctx context.Context, op *operation, src, dst *image, spec engine.SlabSpec, from int64, checkpoint func(int64) error) error {
	defer src.read()()
	rec, _ := src.snapshot()
	if src.d == dst.d {
		op.stepf("copying inside %s", src.d.id)
	} else {
		op.stepf("copying from %s to %s", src.d.id, dst.d.id)
	}
	if err := dst.d.engine.CreateSlab(ctx, spec); err != nil {
		return err
	}
	in, err := m.content(ctx, src)
	if err != nil {
		return err
	}
	out := Place{dst.d.id, spec.ID}
	rate := int64(0)
	if made, _ := dst.snapshot(); made.Op == opFlatten { // nobody waits for it
		rate = dst.d.now().BackgroundRate
	} else if !rec.Mutable && src.d.cfg.Node != dst.d.cfg.Node { // over a network that others use, while no filesystem is frozen
		rate = lowest(src.d.now().BackgroundRate, dst.d.now().BackgroundRate)
	}
	if spec.Kind == engine.Tree {
		err = m.cfg.Worker.CopyTree(ctx, in, out, op.progress)
	} else {
		err = m.cfg.Worker.CopyBlock(ctx, in, out, BlockCopy{Size: rec.Size, From: from, Rate: rate,
			DstZeroed: dst.d.desc.ZeroedSpace, Progress: op.progress, Checkpoint: checkpoint})
	}
	if err != nil {
		return err
	}
	return dst.d.zero(ctx, op, spec.ID, spec.Kind, rec.Size, spec.Size)
}

// lowest of two rates, of which 0 is none.
func lowest(a, b int64) int64 {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}

// zero makes bytes from to to of a block slab read as zero, where new space of
// the domain does not do so anyway: users never see old bytes.
func (d *domain) zero(ctx context.Context, op *operation, slab string, kind engine.Kind, from, to int64) error {
	if d.desc.ZeroedSpace || kind != engine.Block || from >= to {
		return nil
	}
	op.stepf("zeroing %s", bytesText(to-from))
	return d.m.cfg.Worker.Zero(ctx, Place{d.id, slab}, from, to)
}

// errChanged is a source that was another one when it was cut than when the new
// volume was planned: it has grown, was formatted, or became a used raw device.
var errChanged = errors.New("the source has changed meanwhile")

// cloneVolume fills the slab of a new volume from another volume, which may be
// in use: natively straight into the new slab, else from a hidden snapshot, else
// by a copy that is itself the cut. planned is the source's record that the new
// one was made from: its node may have formatted and filled it since, and a clone
// that were taken for fresh would be formatted once more.
func (m *Manager) cloneVolume(ctx context.Context, op *operation, src *image, planned record, dst *image, spec engine.SlabSpec) (how, error) {
	op.stepf("waiting for %s", src.id)
	release, err := src.hold(ctx, op)
	if err != nil {
		return how{}, err
	}
	defer func() { release() }()
	if err := src.usable(); err != nil {
		return how{}, err
	}
	rec, slab := src.snapshot()
	if rec.Size > spec.Size || rec.Used != planned.Used || rec.FS != planned.FS { // a smaller clone would lack its end
		return how{}, fault.Wrap(fault.Conflict, errChanged)
	}
	alloc, known, err := src.d.allocated(ctx, rec, slab)
	if err != nil {
		return how{}, err
	}
	if src.d == dst.d && src.d.snapshots(&rec) {
		h, err := m.cutNative(ctx, op, src, spec)
		if !errors.Is(err, engine.ErrDeclined) {
			return h, err
		}
	}
	if src.d.now().NativeOnly && src.d == dst.d {
		return how{}, src.d.nativeOnly("snapshot", rec.layout())
	}
	hidden, err := m.hiddenSnapshot(ctx, op, src, src.d != dst.d && src.d.snapshots(&rec))
	if err == nil {
		release()
		release = func() {}
		defer src.d.sweepLater(ctx, hidden)
		return m.cloneSnapshot(ctx, op, hidden, dst, spec, 0)
	}
	if !errors.Is(err, engine.ErrDeclined) {
		return how{}, err
	}
	if src.d.now().NativeOnly {
		return how{}, src.d.nativeOnly("snapshot", rec.layout())
	}
	if !known {
		alloc = rec.Size
	}
	h, _, err := m.cutCopy(ctx, op, src, dst, spec, alloc, false)
	return h, err
}

// hiddenSnapshot takes a snapshot that only a running copy or a clone needs,
// natively if that is said, or by a layer. Its record stays weak: nobody sees it, and it is swept
// when the copy ends or dies; what lies over it keeps its slab.
// engine.ErrDeclined: neither can be done.
func (m *Manager) hiddenSnapshot(ctx context.Context, op *operation, src *image, native bool) (*image, error) {
	if !native {
		err := m.canLayer(ctx, src)
		if errors.Is(err, fault.Unsupported) || src.d.now().NativeOnly {
			return nil, engine.ErrDeclined
		}
		if err != nil {
			return nil, err
		}
	}
	target := op.view()
	c := cutting{m: m, op: op, src: src}
	err := c.intend(ctx, opHidden, "")
	op.at(target.Domain, target.Image)
	if err != nil {
		return nil, err
	}
	if native {
		_, err = m.cutNative(ctx, op, src, c.spec())
	} else {
		err = c.cutLayer(ctx)
	}
	if err != nil {
		src.d.sweepLater(ctx, c.img)
		return nil, err
	}
	return c.img, nil
}

// cloneSnapshot fills the slab of a new volume from an image that never
// changes: natively where the domain can, else by a layer, else by a copy inside the storage, else by one
// that can be resumed.
func (m *Manager) cloneSnapshot(ctx context.Context, op *operation, src, dst *image, spec engine.SlabSpec, from int64) (how, error) {
	defer src.read()()
	rec, slab := src.snapshot()
	if src.isFinished() {
		return how{}, fault.New(fault.NotFound, "source %s was deleted", src.id)
	}
	if _, _, err := src.d.allocated(ctx, rec, slab); err != nil {
		return how{}, err
	}
	if src.d != dst.d {
		if err := src.d.pin(ctx, src, dst); err != nil {
			return how{}, err
		}
	} else if from == 0 {
		if rec.Chunk == 0 {
			if h, err := m.cloneNative(ctx, op, src.d, slab, spec); !errors.Is(err, engine.ErrDeclined) {
				return h, err
			}
		}
		only := src.d.now().NativeOnly
		if !only { // before a copy in the storage: that takes the longer the more there is
			if err := m.canLayer(ctx, src); err == nil {
				return m.cloneLayer(ctx, op, src, dst, spec)
			} else if !errors.Is(err, fault.Unsupported) {
				return how{}, err
			}
		}
		if rec.Chunk == 0 {
			if h, err := m.copyNative(ctx, op, src.d, slab, spec); !errors.Is(err, engine.ErrDeclined) {
				return h, err
			}
		}
		if only {
			return how{}, src.d.nativeOnly("clone", rec.layout())
		}
	}
	checkpoint := dst.checkpoint(ctx)
	if !rec.Strong { // a hidden snapshot does not outlive this process
		checkpoint = nil
	}
	err := m.copySlab(ctx, op, src, dst, spec, from, checkpoint)
	h := how{reason: "copy"}
	if src.d != dst.d {
		h.reason = "copy from " + src.d.id
	}
	return h, err
}

// cloneNative clones a quiescent slab inside the storage. engine.ErrDeclined:
// take the next best way.
func (m *Manager) cloneNative(ctx context.Context, op *operation, d *domain, slab string, spec engine.SlabSpec) (how, error) {
	if d.caps.Cloner == nil {
		return how{}, engine.ErrDeclined
	}
	op.stepf("cloning natively")
	return how{native: true, reason: "clone"}, d.caps.Cloner.CloneSlab(ctx, slab, spec)
}

// copyNative lets the storage copy a quiescent slab. engine.ErrDeclined: take the default.
func (m *Manager) copyNative(ctx context.Context, op *operation, d *domain, slab string, spec engine.SlabSpec) (how, error) {
	if d.caps.Copier == nil {
		return how{}, engine.ErrDeclined
	}
	op.stepf("copying inside the storage")
	return how{native: true, reason: "copy in the storage"}, d.caps.Copier.CopySlab(ctx, slab, spec, func(done int64) { op.progress(done, spec.Size) })
}

// checkpoint returns a function that seals how far a copy into img is durable.
func (img *image) checkpoint(ctx context.Context) func(int64) error {
	return func(offset int64) error {
		rec, slab := img.snapshot()
		rec.Progress = offset
		return img.d.commit(ctx, img, rec, slab)
	}
}

// pin protects src, in its own domain, for as long as a copy into dst's
// domain runs. The pin outlives a crash; the collector removes it when dst's
// domain shows that the operation ended.
func (d *domain) pin(ctx context.Context, src, dst *image) error {
	body := pinRecord{Target: dst.d.handle(dst).String(), Nonce: nonce()}
	raw, err := marshal(body)
	if err != nil {
		return err
	}
	tag := engine.Tag{Name: pinTag(src.id, d.next()), Record: raw}
	if err := d.createTag(ctx, tag); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pins[tag.Name] = body
	if d.finished(src) {
		return fault.New(fault.NotFound, "source %s was deleted", src.id)
	}
	return nil
}
