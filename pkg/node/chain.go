package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

var _ image.ChainAgent = (*Node)(nil)

// Layers implements image.ChainAgent.
func (n *Node) Layers(ctx context.Context, h image.Handle) error {
	return fault.In(n.layers(ctx, h), "look for", h.Domain, h.Image)
}

func (n *Node) layers(ctx context.Context, h image.Handle) error {
	if err := n.devices.Layers(ctx); err != nil {
		return err
	}
	unlock, err := n.tryFor(h)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := n.find(ctx, h)
	if err != nil {
		return err
	}
	for _, d := range s.devices {
		if d.Use != block.View && !d.Switchable() {
			return fault.New(fault.Unsupported, "it was staged without device-mapper, as %s: stage it again", d.Path)
		}
	}
	return nil
}

// admit refuses what a manager asks that another one has taken over from.
func (n *Node) admit(st image.Staging) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if st.Epoch < n.epochs[st.Domain] {
		return fault.New(fault.Unavailable, "domain %s has a newer manager (epoch %d, this one has %d): ask that one", st.Domain, n.epochs[st.Domain], st.Epoch)
	}
	n.epochs[st.Domain] = st.Epoch
	return nil
}

// tryFor is tryLock with an error: what the Image Manager asks for waits for no
// other operation, which may itself be waiting for the Image Manager.
func (n *Node) tryFor(h image.Handle) (unlock func(), err error) {
	unlock, held := n.tryLock(h)
	if held != nil {
		return nil, fault.New(fault.Pending, "another operation on %s is running on node %s", h, n.cfg.NodeID)
	}
	return unlock, nil
}

// attachSlabs attaches the slabs of a chain. A chain of layers is attached for
// writing: which of its slabs is written changes, and nothing below a head ever is.
// Until release is called, nobody detaches them; then a device must be over them.
func (n *Node) attachSlabs(ctx context.Context, st image.Staging, opts engine.AttachOptions) (out []block.Slab, release func(), err error) {
	e, err := n.cfg.Engines(st.Handle.Domain)
	if err != nil {
		return nil, nil, err
	}
	var all []func(context.Context, bool) error
	release = func() {
		for _, r := range all {
			if err := r(ctx, false); err != nil {
				klog.FromContext(ctx).Error(err, "Detaching a slab that another use of it gave back meanwhile", "image", st.Handle)
			}
		}
	}
	opts.ReadOnly = opts.ReadOnly && len(st.Slabs) == 1
	for _, s := range st.Slabs {
		err := n.take(ctx, st.Handle.Domain, s.ID)
		if err != nil {
			release()
			return nil, nil, err
		}
		a, r, err := e.Attach(ctx, s.ID, opts)
		if err != nil {
			release()
			return nil, nil, damaged(err)
		}
		all = append(all, r)
		slab := block.Slab{ID: st.Domain + "/" + s.ID, Path: a.Path, Size: s.Size, Chunk: s.Chunk}
		if s.Replaces != "" {
			slab.Replaces = st.Domain + "/" + s.Replaces
		}
		out = append(out, slab)
	}
	return out, release, nil
}

// letGo tells the engine that a slab is not used any more. One that another
// chain on this node still uses stays.
func (n *Node) letGo(ctx context.Context, domain, slab string) {
	e, err := n.cfg.Engines(domain)
	if err == nil {
		err = n.take(ctx, domain, slab)
	}
	if err == nil {
		err = e.Detach(ctx, slab)
	}
	if err != nil {
		klog.FromContext(ctx).Info("A slab that is not used any more stays attached", "domain", domain, "slab", slab, "err", err)
	}
}

// mergeOwner and readOwner own the devices that are made for a merge of what is
// not staged here, and for copies.
func mergeOwner(h image.Handle) string       { return h.String() + "#merge" }
func readOwner(h image.Handle, n int) string { return fmt.Sprintf("%s#read%d", h, n) }

// Merge implements image.ChainAgent.
func (n *Node) Merge(ctx context.Context, chain image.Staging) (image.Merging, error) {
	ctx = context.WithoutCancel(ctx)
	h := chain.Handle
	if err := n.admit(chain); err != nil {
		return image.Merging{}, err
	}
	if len(chain.Slabs) < 2 {
		return image.Merging{}, fault.New(fault.Internal, "merge %s: a chain of %d slabs", h, len(chain.Slabs))
	}
	slabs, release, err := n.attachSlabs(ctx, chain, engine.AttachOptions{})
	if err != nil {
		return image.Merging{}, fault.In(err, "merge", h.Domain, h.Image)
	}
	defer release()
	m, err := n.devices.Merge(ctx, slabs)
	if errors.Is(err, fault.NotFound) { // the image is not in use here
		if err := n.endReads(ctx, chain); err != nil {
			return image.Merging{}, fault.In(err, "merge", h.Domain, h.Image)
		}
		spec := block.Spec{Owner: mergeOwner(h), Use: block.Private, Slabs: slabs, Size: chain.Size, ReadOnly: true}
		if _, err = n.devices.Attach(ctx, spec); err == nil {
			m, err = n.devices.Merge(ctx, slabs)
		}
	}
	if err != nil {
		return image.Merging{}, fault.In(err, "merge", h.Domain, h.Image)
	}
	if m.Done {
		n.letGo(ctx, h.Domain, chain.Slabs[0].ID)
	}
	return image.Merging{Left: m.Left, Done: m.Done}, nil
}

// StopMerge implements image.ChainAgent.
func (n *Node) StopMerge(ctx context.Context, chain image.Staging) error {
	ctx = context.WithoutCancel(ctx)
	h := chain.Handle
	if err := n.admit(chain); err != nil {
		return err
	}
	if len(chain.Slabs) == 0 {
		return nil
	}
	if err := n.devices.StopMerge(ctx, chain.Domain+"/"+chain.Slabs[0].ID); err != nil {
		return fault.In(err, "stop the merge of", h.Domain, h.Image)
	}
	devices, err := n.devices.Find(ctx, mergeOwner(h))
	if err != nil {
		return fault.In(err, "stop the merge of", h.Domain, h.Image)
	}
	for _, d := range devices {
		if err := n.devices.Detach(ctx, d); err != nil {
			return fault.In(err, "stop the merge of", h.Domain, h.Image)
		}
		for _, s := range chain.Slabs {
			n.letGo(ctx, h.Domain, s.ID)
		}
	}
	return nil
}

// AttachImage implements image.ChainAgent.
func (n *Node) AttachImage(ctx context.Context, chain image.Staging) (string, error) {
	ctx = context.WithoutCancel(ctx)
	h := chain.Handle
	if err := n.endReads(ctx, chain); err != nil {
		return "", fault.In(err, "attach", h.Domain, h.Image)
	}
	slabs, release, err := n.attachSlabs(ctx, chain, engine.AttachOptions{})
	if err != nil {
		return "", fault.In(err, "attach", h.Domain, h.Image)
	}
	defer release()
	n.mu.Lock()
	n.reads++
	owner := readOwner(h, n.reads)
	n.mu.Unlock()
	dev, err := n.devices.Attach(ctx, block.Spec{Owner: owner, Use: block.Private, Slabs: slabs, Size: chain.Size, ReadOnly: true})
	if err != nil {
		return "", fault.In(err, "attach", h.Domain, h.Image)
	}
	n.mu.Lock()
	n.reading[dev.Path] = &reading{handle: h, dev: dev, slabs: chain.Slabs}
	n.mu.Unlock()
	return dev.Path, nil
}

// reading is a private device that a copy uses.
type reading struct {
	handle image.Handle
	dev    block.Device
	slabs  []image.SlabRef
	// ended: the copy has ended, and the device could not be taken down.
	ended bool
}

// DetachImage implements image.ChainAgent.
func (n *Node) DetachImage(ctx context.Context, h image.Handle, path string) error {
	ctx = context.WithoutCancel(ctx)
	n.mu.Lock()
	r, ok := n.reading[path]
	n.mu.Unlock()
	if !ok {
		return nil
	}
	return fault.In(n.endRead(ctx, r), "detach", h.Domain, h.Image)
}

func (n *Node) endRead(ctx context.Context, r *reading) error {
	if err := n.devices.Detach(ctx, r.dev); err != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		r.ended = true
		return err
	}
	n.mu.Lock()
	if n.reading[r.dev.Path] == r {
		delete(n.reading, r.dev.Path)
	}
	n.mu.Unlock()
	for _, s := range r.slabs {
		n.letGo(ctx, r.handle.Domain, s.ID)
	}
	return nil
}

// endReads takes down the devices of copies that have ended and held on to theirs.
// One that stays keeps the layers below as they were then: no new device may be put
// over those, since other nodes may have written to them. fault.InUse: such a one.
func (n *Node) endReads(ctx context.Context, chain image.Staging) error {
	n.mu.Lock()
	var due []*reading
	for _, r := range n.reading {
		if r.ended {
			due = append(due, r)
		}
	}
	n.mu.Unlock()
	for _, r := range due {
		err := n.endRead(ctx, r)
		shared := r.handle.Domain == chain.Handle.Domain && slices.ContainsFunc(r.slabs, func(s image.SlabRef) bool {
			return slices.ContainsFunc(chain.Slabs, func(o image.SlabRef) bool { return o.ID == s.ID })
		})
		if err != nil && shared && len(chain.Slabs) > 1 {
			return fault.New(fault.InUse, "a copy of %s has ended on this node, and its device %s, over slabs of the same chain, cannot be taken down: %w", r.handle, r.dev.Path, err)
		}
	}
	return nil
}

// dropPrivate takes down a device that a predecessor left, if it is a private one: copies
// begin again, and merges are begun again by the Image Manager.
func (n *Node) dropPrivate(ctx context.Context, d block.Device) {
	if d.Use != block.Private {
		return
	}
	if err := n.devices.Detach(ctx, d); err != nil && !errors.Is(err, fault.InUse) {
		klog.FromContext(ctx).Error(err, "Taking down a device of a predecessor", "device", d.Path)
	}
}
