package image

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// A deleted image whose slab only one other image still needs is merged with it:
// what that image's layer holds is written into the slab below, the nodes let go
// of the layer, and then the record says so. Until it does, layer over slab reads
// the same as the slab alone, however far the merge has come.

// ModeMerging is the mode of the attachment that a merge of an image that nobody
// uses holds on the node that works: a manager that comes later knows of it.
const ModeMerging Mode = "MERGE"

// merge of an image's layer into the slab below that is under way.
type merge struct {
	node  string
	agent ChainAgent
	total int64 // bytes, as first told
	// It rests until then, to keep to the domain's BackgroundRate; began is when it
	// was first told how far it is.
	rests, began time.Time
	// waits: all is merged, and only a moment is missing in which nobody builds a
	// chain with the layer.
	waits bool
	// dropped: nobody looks after it any more, and it could not be stopped. The
	// collector tries again. Guarded by the domain's mu.
	dropped bool
}

// The pauses between two looks at a running merge.
// One that must keep to a rate is looked at often, because it goes at its own speed
// between two looks.
const mergeFirstLook, mergeLastLook, mergeRateLook = 50 * time.Millisecond, 2 * time.Second, 200 * time.Millisecond

// mergeable says why the layer of img cannot be merged into the slab below;
// nil: it can. The caller holds d.mu.
func (d *domain) mergeable(img *image) error {
	below := d.images[img.below()]
	switch {
	case below == nil || img.rec.Chunk == 0:
		return fault.New(fault.NotFound, "nothing lies below it")
	case img.rec.Op == opFlatten && !img.rec.dead():
		return fault.New(fault.Pending, "not every node knows that it was flattened")
	case img.rec.Parent == "" || img.slabGone || img.broken != nil:
		return fault.New(fault.Pending, "it is not complete")
	case !d.finished(below):
		return fault.New(fault.InUse, "%s is still there", below.id)
	case len(d.children[below.id]) != 1:
		return fault.New(fault.InUse, "several images lie over %s", below.id)
	case d.finished(img) && len(d.children[img.id]) == 0:
		return fault.New(fault.NotFound, "it is deleted itself")
	case below.op != nil || img.op != nil || below.pending != nil || img.pending != nil || below.readers > 0 || d.pinned(below.id):
		return fault.New(fault.Pending, "it is being worked on")
	case d.replaces(below) != "":
		return fault.New(fault.Pending, "%s was flattened, and not every node knows", below.id)
	}
	for _, i := range d.family(img) {
		if i.readers > 0 || i.op != nil || d.pinned(i.id) {
			return fault.New(fault.Pending, "a copy of %s is running", i.id)
		}
	}
	return nil
}

// mergeSome starts the merge that is due, one at a time. What was not tried goes first,
// of that the lowest in a chain: what is merged into a raw slab is not moved again.
func (d *domain) mergeSome(ctx context.Context) {
	d.mu.Lock()
	var next *image
	lowest := 0
	for _, img := range d.images {
		if img.merging != nil {
			d.mu.Unlock()
			return
		}
		if d.mergeable(img) != nil || d.m.cfg.Now().Sub(img.mergeTried) < mergeAgain {
			continue
		}
		line, _ := d.line(img) // of a broken one, as far as it goes
		n := len(line)
		// One that cannot begin keeps no other back.
		if next == nil || cmp.Or(img.mergeTried.Compare(next.mergeTried), cmp.Compare(n, lowest), cmp.Compare(img.id, next.id)) < 0 {
			next, lowest = img, n
		}
	}
	if next == nil {
		d.mu.Unlock()
		return
	}
	next.mergeTried = d.m.cfg.Now()
	h := d.handle(next)
	d.mu.Unlock()
	d.m.background(ctx, "merge/"+h.String(), "merge", h.String(), func(ctx context.Context, op *operation) error {
		return d.merge(ctx, op, next)
	})
}

// mergeAgain is the least time between two attempts to merge an image; each waits for its
// moment so many times.
const mergeAgain, mergeTries = 10 * time.Second, 10

// errUsed: just now somebody works on a volume that stands on what is to be merged.
var errUsed = errors.New("a volume above it is being worked on")

// merge merges the layer of img into the slab below.
func (d *domain) merge(ctx context.Context, op *operation, img *image) error {
	op.at(d.id, img.id)
	op.took(how{reason: "merge"})
	first, tries, pause, last := true, 0, mergeFirstLook, mergeLastLook
	if d.now().BackgroundRate > 0 {
		last = mergeRateLook
	}
	if d.m.cfg.LookEvery > 0 {
		pause, last = d.m.cfg.LookEvery, d.m.cfg.LookEvery
	}
	for ; ; pause = min(2*pause, last) {
		done, err := d.mergeStep(ctx, op, img, first)
		if tries++; first && errors.Is(err, errUsed) && tries < mergeTries {
			err = nil
		} else {
			first = false
		}
		if done || err != nil {
			if err != nil {
				d.dropMerge(ctx, img)
			}
			return err
		}
		select {
		case <-ctx.Done():
			d.dropMerge(context.WithoutCancel(ctx), img)
			return fault.New(fault.Canceled, "merge %s: %w", img.id, ctx.Err())
		case <-time.After(d.mergePause(img, pause)):
		}
	}
}

// mergePause is short where the merge only waits for its moment: others use the
// image all the time.
func (d *domain) mergePause(img *image, pause time.Duration) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if img.merging != nil && img.merging.waits {
		return min(pause, mergeFirstLook)
	}
	return pause
}

// dropMerge stops a merge that is not going to be looked after any more; what
// fails is left to whoever needs the image next, and to the collector.
func (d *domain) dropMerge(ctx context.Context, img *image) {
	err := img.lock.acquire(ctx, nil)
	if err == nil {
		defer img.lock.release()
		err = d.m.stopMerge(ctx, img)
	}
	if err != nil {
		klog.FromContext(ctx).Info("A merge may still be running", "image", img.id, "err", err)
		d.mu.Lock()
		defer d.mu.Unlock()
		if img.merging != nil {
			img.merging.dropped = true
		}
	}
}

// mergeStep begins a merge, or looks how far it is and ends it. It holds the
// locks only for a moment, so that others can stop the merge in between.
func (d *domain) mergeStep(ctx context.Context, op *operation, img *image, first bool) (done bool, err error) {
	release, err := img.hold(ctx, op)
	if err != nil {
		return false, err
	}
	defer release()
	d.mu.Lock()
	err = d.mergeable(img)
	below, running := d.images[img.below()], img.merging
	d.mu.Unlock()
	switch {
	case err != nil && (first || running == nil):
		return true, nil // what was due is not any more
	case errors.Is(err, fault.Pending): // it goes on, and ends when nobody reads
		err = nil
		if running == nil {
			return false, nil
		}
	case err != nil:
		return true, errors.Join(err, d.m.stopMerge(ctx, img))
	case !first && running == nil:
		return true, nil // somebody stopped it
	}
	if below.lock.tryAcquire() {
		defer below.lock.release()
	} else {
		return false, nil
	}
	if err := d.current(ctx); err != nil {
		return false, err
	}
	if first {
		if running, err = d.beginMerge(ctx, op, img, below); err != nil {
			return false, err
		}
	}
	now := d.m.cfg.Now()
	if now.Before(running.rests) {
		return false, nil
	}
	st, err := d.staging(img, running.node)
	if err != nil {
		return false, err
	}
	state, err := running.agent.Merge(ctx, st)
	if err != nil {
		return false, err
	}
	running.total = max(running.total, state.Left)
	op.progress(running.total-state.Left, running.total)
	if running.began.IsZero() {
		running.began = now
	}
	if due := running.due(d.now().BackgroundRate, state.Left); !state.Done && due.After(now) {
		running.rests = due
		return false, d.m.stopMergeOn(ctx, img, running.node)
	}
	d.mu.Lock()
	busy := d.mergeable(img)
	d.mu.Unlock()
	if !state.Done || busy != nil {
		return false, nil
	}
	letGo, held, err := d.holdAbove(ctx, img)
	if err != nil || !held {
		d.mu.Lock()
		running.waits = err == nil
		d.mu.Unlock()
		return false, err
	}
	defer letGo()
	return true, d.endMerge(ctx, op, img, below, running, st)
}

// holdAbove locks the volumes that stand on img, so that no node is told their
// chains while these change, and looks whether a node is still building what it was
// told before. held is false where either has to wait. The caller holds img's lock.
func (d *domain) holdAbove(ctx context.Context, img *image) (release func(), held bool, err error) {
	unlock, locked := d.lockAbove(img)
	if !locked {
		return nil, false, nil
	}
	defer func() {
		if !held {
			unlock()
		}
	}()
	d.mu.Lock()
	family := d.family(img)
	d.mu.Unlock()
	for _, i := range family {
		for _, n := range i.building() {
			if built, err := d.built(ctx, i, n); err != nil || !built {
				return nil, false, err
			}
		}
	}
	return unlock, true, nil
}

// lockAbove locks all images that stand on img, but img, which the caller holds. It
// waits for nobody: locked is false if one of them is being worked on.
func (d *domain) lockAbove(img *image) (release func(), locked bool) {
	var held []*image
	release = func() {
		for _, i := range held {
			i.lock.release()
		}
	}
	d.mu.Lock()
	family := d.family(img)
	d.mu.Unlock()
	for _, i := range family {
		if i == img {
			continue
		}
		if !i.lock.tryAcquire() {
			release()
			return nil, false
		}
		held = append(held, i)
	}
	return release, true
}

// building are the nodes that may not have built the chain that they were told last.
func (img *image) building() (out []string) {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	for n, a := range img.attached {
		if a.building {
			out = append(out, n)
		}
	}
	return out
}

// built asks a node that has not said so. The caller holds img's lock.
func (d *domain) built(ctx context.Context, img *image, node string) (bool, error) {
	agent, err := d.m.cfg.Agents.Agent(node)
	if err != nil {
		return false, err
	}
	for _, h := range d.handles(img) {
		if _, err := agent.Staged(ctx, h); errors.Is(err, fault.Pending) {
			return false, nil
		} else if err != nil {
			return false, fault.New(fault.Unavailable, "node %s does not tell whether it is staging image %s: %w", node, img.id, err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := img.attached[node]; a != nil {
		a.building = false
	}
	return true, nil
}

// due is when so much could have been merged at a rate in bytes per second; with
// none, long ago.
func (run *merge) due(rate, left int64) time.Time {
	if rate == 0 {
		return run.began
	}
	return run.began.Add(time.Duration(float64(run.total-left) / float64(rate) * float64(time.Second)))
}

// beginMerge makes everything ready: the node's chain is that of the record,
// the slab below is as large as the layer's image and has all its space, and
// where nobody uses the chain a node is chosen and held.
func (d *domain) beginMerge(ctx context.Context, op *operation, img, below *image) (*merge, error) {
	op.stepf("preparing to merge slab %s into %s", img.slab, below.slab)
	nodes := d.stagedOn(img)
	run := &merge{}
	var err error
	switch len(nodes) {
	case 0:
		// To hold it for the merge would replace the attachment by which its node is
		// going to stage it.
		if at := img.maybeNodes(); len(at) > 0 && img.heldForMerge() == "" {
			err = fault.New(fault.Pending, "the layer of %s can be merged when it is in use on node %s, to which it is attached, or detached", img.id, at[0])
			break
		}
		run.node, run.agent, err = d.m.chainAgent(ctx, img)
	case 1:
		run.node = nodes[0]
		run.agent, err = d.m.layerer(ctx, img, nodes[0])
	default:
		err = fault.New(fault.Pending, "the layer of %s is in use on several nodes (%v): it can be merged when one is left", img.id, nodes)
	}
	if err != nil {
		return nil, err
	}
	if err := d.raise(ctx, op, img, below); err != nil {
		return nil, err
	}
	if err := d.m.switchChains(ctx, nil, img); err != nil {
		return nil, err
	}
	if len(img.maybeNodes()) == 0 {
		if _, err := d.m.attachAs(ctx, img, Attachment{Node: run.node, Mode: ModeMerging, Staged: true}, ""); err != nil {
			return nil, err
		}
	}
	// Whoever is about to use the chain elsewhere has looked for merges, or is going to.
	release, locked := d.lockAbove(img)
	if !locked {
		return nil, fault.Wrap(fault.Pending, errUsed)
	}
	defer release()
	for _, n := range d.stagedOn(img) {
		if n != run.node {
			return nil, fault.New(fault.Pending, "the layer of %s came into use on node %s", img.id, n)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.mergeable(img); err != nil { // a copy of it, or a flattening, has begun meanwhile
		return nil, err
	}
	img.merging = run
	op.stepf("merging slab %s into %s", img.slab, below.slab)
	return run, nil
}

// raise brings the slab below to the size of the layer's image, and takes all
// its space, so that no write of the merge finds the storage full; or there has to be a reserve.
func (d *domain) raise(ctx context.Context, op *operation, img, below *image) error {
	rec, _ := img.snapshot()
	old, slab := below.snapshot()
	grown := old
	grown.Size, grown.Alloc = max(old.Size, rec.Size), 0
	d.mu.Lock()
	more := grown.need() - below.promise
	d.mu.Unlock()
	give, err := d.reserve(ctx, max(0, more))
	if err != nil {
		return fault.New(fault.KindOf(err), "merging slab %s: %w", img.slab, err)
	}
	defer give()
	if grown.Size > old.Size {
		if err := d.engine.ResizeSlab(ctx, slab, grown.need()); err != nil {
			return err
		}
		if old.Chunk == 0 {
			if err := d.zero(ctx, op, slab, engine.Block, old.Size, grown.Size); err != nil {
				return err
			}
		}
	}
	if err := d.allocate(ctx, slab, rec.taken(grown.need())); err != nil {
		return err
	}
	if grown.Size == old.Size && old.Alloc == 0 {
		return nil
	}
	return d.commit(ctx, below, grown, slab)
}

// endMerge lets the node go over to the slab below, seals it as the image's, and
// leaves the empty layer to the deleted image, whose slab goes next.
func (d *domain) endMerge(ctx context.Context, op *operation, img, below *image, run *merge, st Staging) error {
	op.stepf("taking slab %s away", img.slab)
	st.Slabs = st.Slabs[1:]
	if slices.Contains(img.stagedNodes(), run.node) {
		for _, h := range d.handles(img) {
			st.Handle = h
			if err := run.agent.Switch(ctx, []Staging{st}, ""); err != nil {
				return err
			}
		}
	}
	if err := d.m.stopMergeOn(ctx, img, run.node); err != nil { // it lets go of what it had made for itself
		return err
	}
	held := img.heldForMerge() != ""
	rec, layerSlab := img.snapshot()
	old, slab := below.snapshot()
	rec.Parent, rec.Chunk = old.Parent, old.Chunk
	if !rec.Mutable {
		rec.Alloc = 0 // of its former layer
		d.measureAlloc(ctx, &rec, slab)
	}
	if err := d.commit(ctx, img, rec, slab); err != nil {
		return err
	}
	d.mu.Lock()
	img.merging = nil
	d.mu.Unlock()
	old.Parent, old.Chunk, old.Alloc = "", 0, 0
	old.Size = rec.Size
	if err := d.commit(ctx, below, old, layerSlab); err != nil {
		return err
	}
	if held {
		if err := d.m.detach(ctx, img, run.node); err != nil {
			return err
		}
	}
	if err := d.dispose(ctx, below); err != nil {
		return err
	}
	d.collectSoon() // the next one
	return nil
}
