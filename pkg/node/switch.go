package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Switch implements image.ChainAgent.
func (n *Node) Switch(ctx context.Context, images []image.Staging, prepared string) error {
	h := n.taken(prepared)
	if h != nil && (h.held || !h.of(images)) { // what it is now ready for was not asked for
		if err := h.end(ctx); err != nil {
			return err
		}
		h = nil
	}
	if h == nil {
		var err error
		if h, err = n.ready(ctx, images); err != nil {
			return err
		}
	}
	return errors.Join(h.still(ctx), h.end(ctx))
}

// Prepare implements image.ChainAgent.
func (n *Node) Prepare(ctx context.Context, images []image.Staging) (string, error) {
	h, err := n.ready(ctx, images)
	if err != nil {
		return "", err
	}
	id := rand.Text()
	n.keep(ctx, id, h)
	return id, nil
}

// Hold implements image.ChainAgent.
func (n *Node) Hold(ctx context.Context, images []image.Staging, prepared string) error {
	h := n.taken(prepared)
	if h == nil || h.held || !h.of(images) {
		if h != nil {
			n.keep(ctx, prepared, h)
		}
		return fault.New(fault.Conflict, "node %s is not prepared to hold these images any more: for %s at most, and once", n.cfg.NodeID, n.holdLimit)
	}
	if err := h.still(ctx); err != nil {
		return errors.Join(err, h.end(ctx))
	}
	n.keep(ctx, prepared, h)
	return nil
}

// Release implements image.ChainAgent.
func (n *Node) Release(ctx context.Context, prepared string) error {
	h := n.taken(prepared)
	if h == nil {
		return fault.New(fault.Conflict, "node %s does not hold these images any more: at most for %s", n.cfg.NodeID, n.holdLimit)
	}
	return h.end(ctx)
}

// keep keeps a hold until it is taken, or for holdLimit.
func (n *Node) keep(ctx context.Context, id string, h *hold) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.holds[id] = h
	// The kernel goes on by itself then; the locks have to be given back as well.
	h.limit = time.AfterFunc(n.holdLimit, func() {
		if h := n.taken(id); h != nil {
			err := h.end(context.WithoutCancel(ctx))
			klog.FromContext(ctx).Info("A switch to new chains was begun, and nobody ended it in time", "images", len(h.images), "err", err)
		}
	})
}

// taken is a hold that nobody else will find again, or nil.
func (n *Node) taken(id string) *hold {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.holds[id]
	if h != nil {
		h.limit.Stop()
		delete(n.holds, id)
	}
	return h
}

// hold is a switch half-way: the images are locked, their new chains built. held: those that are
// staged here are still.
type hold struct {
	n       *Node
	images  []image.Staging
	staged  []image.Staging
	devices *block.Held // nil: none is staged here
	held    bool
	undo    []func() // locks and attached slabs to be given back
	limit   *time.Timer
}

func (n *Node) ready(ctx context.Context, images []image.Staging) (_ *hold, err error) {
	images = slices.Clone(images)
	slices.SortFunc(images, byHandle)
	ctx = context.WithoutCancel(ctx) // what was begun goes to its end
	h := &hold{n: n, images: images}
	defer func() {
		if err != nil {
			h.giveBack()
		}
	}()
	var specs []block.Spec
	for _, st := range images {
		if err := n.admit(st); err != nil {
			return nil, err
		}
		unlock, err := n.tryFor(st.Handle)
		if err != nil {
			return nil, fault.In(err, "switch", st.Handle.Domain, st.Handle.Image)
		}
		h.undo = append(h.undo, unlock)
		s, err := n.find(ctx, st.Handle)
		if err != nil {
			return nil, fault.In(err, "switch", st.Handle.Domain, st.Handle.Image)
		}
		i := slices.IndexFunc(s.devices, func(d block.Device) bool { return d.Use != block.View })
		if i < 0 {
			continue // not staged here
		}
		slabs, release, err := n.attachSlabs(ctx, st, engine.AttachOptions{})
		if err != nil {
			return nil, fault.In(err, "switch", st.Handle.Domain, st.Handle.Image)
		}
		h.undo = append(h.undo, release)
		dev := s.devices[i]
		specs = append(specs, block.Spec{Owner: st.Handle.String(), Use: dev.Use, Slabs: slabs, Size: st.Size, ReadOnly: dev.ReadOnly})
		h.staged = append(h.staged, st)
	}
	if len(specs) > 0 {
		h.devices, err = n.devices.Prepare(ctx, specs)
	}
	return h, err
}

func byHandle(a, b image.Staging) int { return cmp.Compare(a.Handle.String(), b.Handle.String()) }

// of says whether it is one of these images, with these chains.
func (h *hold) of(images []image.Staging) bool {
	images = slices.Clone(images)
	slices.SortFunc(images, byHandle)
	return slices.EqualFunc(h.images, images, func(a, b image.Staging) bool {
		return a.Handle == b.Handle && a.Domain == b.Domain && a.Epoch == b.Epoch && a.Size == b.Size && slices.Equal(a.Slabs, b.Slabs)
	})
}

// still lets I/O to the images wait. It is called once; end follows in any case.
func (h *hold) still(ctx context.Context) error {
	if h.devices == nil {
		h.held = true
		return nil
	}
	for _, st := range h.images { // another manager may have come meanwhile
		if err := h.n.admit(st); err != nil {
			return err
		}
	}
	err := h.devices.Hold(context.WithoutCancel(ctx))
	h.held = err == nil
	return err
}

func (h *hold) giveBack() {
	for _, undo := range slices.Backward(h.undo) {
		undo()
	}
}

// end lets I/O go on through the new chains, or as before if it was not still. It is called once.
func (h *hold) end(ctx context.Context) error {
	defer h.giveBack()
	if h.devices == nil {
		return nil
	}
	if err := h.devices.Release(); err != nil {
		return err
	}
	if !h.held {
		return nil
	}
	n := h.n
	ctx = context.WithoutCancel(ctx)
	for _, st := range h.staged {
		n.mu.Lock()
		before := n.slabs[st.Handle]
		n.slabs[st.Handle] = st.Slabs
		n.mu.Unlock()
		for _, old := range before {
			if !slices.ContainsFunc(st.Slabs, func(s image.SlabRef) bool { return s.ID == old.ID }) {
				n.letGo(ctx, st.Handle.Domain, old.ID)
			}
		}
	}
	return nil
}
