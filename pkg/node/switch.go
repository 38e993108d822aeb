package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Switch implements image.ChainAgent.
func (n *Node) Switch(ctx context.Context, images []image.Staging) error {
	h, err := n.hold(ctx, images)
	if err != nil {
		return err
	}
	return h.end(ctx)
}

// Hold implements image.ChainAgent.
func (n *Node) Hold(ctx context.Context, images []image.Staging) (string, error) {
	h, err := n.hold(ctx, images)
	if err != nil {
		return "", err
	}
	id := rand.Text()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.holds[id] = h
	// The kernel goes on by itself then; the locks have to be given back as well.
	h.limit = time.AfterFunc(n.holdLimit, func() {
		if err := n.Release(context.WithoutCancel(ctx), id); err != nil {
			klog.FromContext(ctx).Info("A switch to new chains was held, and nobody released it in time", "err", err)
		}
	})
	return id, nil
}

// Release implements image.ChainAgent.
func (n *Node) Release(ctx context.Context, id string) error {
	n.mu.Lock()
	h := n.holds[id]
	delete(n.holds, id)
	n.mu.Unlock()
	if h == nil {
		return fault.New(fault.Conflict, "node %s does not hold these images any more: at most for %s", n.cfg.NodeID, n.holdLimit)
	}
	h.limit.Stop()
	return h.end(ctx)
}

// hold is a switch half-way: the images are locked, and those that are staged here still.
type hold struct {
	n      *Node
	staged []image.Staging
	still  *block.Held // nil: none is staged here
	undo   []func()    // locks and attached slabs to be given back
	limit  *time.Timer
}

func (n *Node) hold(ctx context.Context, images []image.Staging) (_ *hold, err error) {
	images = slices.Clone(images)
	slices.SortFunc(images, func(a, b image.Staging) int { return cmp.Compare(a.Handle.String(), b.Handle.String()) })
	ctx = context.WithoutCancel(ctx) // what was begun goes to its end
	h := &hold{n: n}
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
		slabs, release, err := n.attachSlabs(ctx, st, false)
		if err != nil {
			return nil, fault.In(err, "switch", st.Handle.Domain, st.Handle.Image)
		}
		h.undo = append(h.undo, release)
		dev := s.devices[i]
		specs = append(specs, block.Spec{Owner: st.Handle.String(), Use: dev.Use, Slabs: slabs, Size: st.Size, ReadOnly: dev.ReadOnly})
		h.staged = append(h.staged, st)
	}
	if len(specs) > 0 {
		h.still, err = n.devices.Hold(ctx, specs)
	}
	return h, err
}

func (h *hold) giveBack() {
	for _, undo := range slices.Backward(h.undo) {
		undo()
	}
}

// end lets I/O go on through the new chains. It is called once.
func (h *hold) end(ctx context.Context) error {
	defer h.giveBack()
	if h.still == nil {
		return nil
	}
	if err := h.still.Release(); err != nil {
		return err
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
