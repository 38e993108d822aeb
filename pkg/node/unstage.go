package node

import (
	"context"
	"errors"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Unstage takes everything of an image on this node down, and then tells the
// Image Manager. What is down already is success. What is mounted comes down
// even when the manager cannot be reached or no longer knows the image.
//
// fault.InUse: it is still published, or a process uses it. fault.Unavailable: what waits to be written
// cannot be, because its storage is full.
func (n *Node) Unstage(ctx context.Context, h image.Handle, staging string) error {
	return fault.In(n.unstage(ctx, h, staging), "unstage", h.Domain, h.Image)
}

func (n *Node) unstage(ctx context.Context, h image.Handle, staging string) error {
	staging, err := n.realPath(ctx, "staging path", staging)
	if err != nil {
		return err
	}
	unlock, err := n.lock(ctx, h)
	if err != nil {
		return err
	}
	defer unlock()
	ctx = context.WithoutCancel(ctx)

	// Asked before anything is taken down; that is also done where nobody answers.
	outline, outlineErr := n.cfg.Manager.Outline(ctx, h, n.cfg.NodeID)
	s, err := n.find(ctx, h)
	if err != nil {
		return err
	}
	if targets := s.targets(staging); len(targets) > 0 {
		return fault.New(fault.InUse, "it is still published at %q: unpublish it there first", targets)
	}
	if len(s.parts) > 0 {
		return fault.New(fault.InUse, "a part of it is still mounted at %q: end the containers that use it, or unmount that", points(s.parts))
	}
	done, err := n.letGoOn(ctx, h, s)
	if err != nil {
		return err
	}
	defer done()
	if f := n.forgetFreeze(h); f != nil { // whoever relied on it will find it gone
		if err := f.Thaw(); err != nil && !errors.Is(err, fault.Conflict) {
			return err
		}
	}
	if err := n.unmountStaged(ctx, h, s, staging); err != nil {
		return err
	}
	for _, d := range s.devices {
		// A program that a predecessor began may not have finished with it: see host.Command.
		if err := n.host.Unclaimed(ctx, d.Path); err != nil && !errors.Is(err, fault.NotFound) {
			return err
		}
		if err := n.devices.Detach(ctx, d); err != nil {
			return err
		}
	}
	if len(s.devices) == 0 { // an attempt that failed may have got no further than that
		if err := n.devices.Collect(ctx, h.Domain); err != nil {
			return err
		}
	}
	if err := n.detachSlabs(ctx, h, outline.Slabs); err != nil {
		return err
	}
	if errors.Is(outlineErr, fault.NotFound) { // nobody is left to be told
		return nil
	}
	if outlineErr != nil {
		return outlineErr
	}
	err = n.cfg.Manager.Unstaged(ctx, h, n.cfg.NodeID, outline.Told)
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// unmountStaged takes the image's mount and anchor down.
func (n *Node) unmountStaged(ctx context.Context, h image.Handle, s state, staging string) error {
	if m := s.at(staging); m != nil && !m.ReadOnly() {
		// Unmounting writes everything out too, but keeps to itself what it could not.
		if err := n.host.Sync(ctx, staging); err != nil {
			klog.FromContext(ctx).Error(err, "Writing out before unstaging failed: data that was written last may be lost", "image", h)
		}
	}
	if s.anchor != nil {
		return n.host.UnmountAll(ctx, s.anchor.Point)
	}
	for s.at(staging) != nil {
		if err := n.host.Unmount(ctx, staging); err != nil {
			return err
		}
		var err error
		mounts, err := n.find(ctx, h)
		if err != nil {
			return err
		}
		s.mounts = mounts.mounts
	}
	return nil
}

// detachSlabs tells the engine that the slabs are no longer used here: those that
// this process attached, else, where another process staged the image, the recorded.
func (n *Node) detachSlabs(ctx context.Context, h image.Handle, recorded []image.SlabRef) error {
	n.mu.Lock()
	slabs := n.slabs[h]
	n.mu.Unlock()
	if slabs == nil {
		slabs = recorded
	}
	if len(slabs) > 0 {
		e, err := n.cfg.Engines(h.Domain)
		if err != nil {
			return err
		}
		for _, slab := range slabs {
			if err := n.take(ctx, h.Domain, slab.ID); err != nil {
				return err
			}
			if err := e.Detach(ctx, slab.ID); err != nil {
				return err
			}
		}
	}
	n.mu.Lock()
	delete(n.slabs, h)
	n.mu.Unlock()
	return nil
}
