package node

import (
	"context"
	"errors"
	"strings"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// PublishRequest asks to show a staged image to a workload.
type PublishRequest struct {
	Handle      image.Handle
	StagingPath string
	// TargetPath is made by Publish: a directory, or a file for raw block.
	TargetPath string
	Access     image.Access
	ReadOnly   bool
	// MountFlags have been honoured by Stage; they are only checked here.
	MountFlags []string
}

// Publish makes a staged image visible at a target path. Once more in the same
// way is success; in another way fault.Exists. fault.InUse: it is not staged,
// or the mode allows one target and there is another.
func (n *Node) Publish(ctx context.Context, r PublishRequest) error {
	return fault.In(n.publish(ctx, r), "publish", r.Handle.Domain, r.Handle.Image)
}

func (n *Node) publish(ctx context.Context, r PublishRequest) error {
	target, err := n.realPath(ctx, "target path", r.TargetPath)
	if err != nil {
		return err
	}
	staging, err := n.realPath(ctx, "staging path", r.StagingPath)
	if err != nil {
		return err
	}
	r.TargetPath, r.StagingPath = target, staging
	if err := checkFlags(r.MountFlags, r.Access.Block); err != nil {
		return err
	}
	if r.TargetPath == r.StagingPath {
		return fault.New(fault.Invalid, "target path %q is the staging path", r.TargetPath)
	}
	unlock, err := n.lock(ctx, r.Handle)
	if err != nil {
		return err
	}
	defer unlock()
	ctx = context.WithoutCancel(ctx)

	s, err := n.find(ctx, r.Handle)
	if err != nil {
		return err
	}
	source, readOnly, err := s.source(r)
	if err != nil {
		return err
	}
	if m := s.at(r.TargetPath); m != nil {
		return samePublish(*m, s, r, readOnly)
	}
	if others := s.targets(r.StagingPath); len(others) > 0 && !severalTargets(r.Access.Mode) {
		return fault.New(fault.InUse, "it is published at %q, and %s allows one target: unpublish it there first", others[0], r.Access.Mode)
	}
	at, err := n.host.MountsAt(r.TargetPath)
	if err != nil {
		return err
	}
	if len(at) > 0 {
		return fault.New(fault.Exists, "target path %q has %s (%s) mounted on it already", r.TargetPath, at[len(at)-1].Source, at[len(at)-1].Type)
	}
	if err := makeTarget(r.TargetPath, r.Access.Block); err != nil {
		return err
	}
	var attr host.MountAttr
	if readOnly {
		attr = host.ReadOnly
	}
	if r.Access.Block && readOnly && !s.device(block.Raw).ReadOnly {
		// A read-only mount does not keep anybody from writing to a device node.
		if source, err = n.view(ctx, r.Handle, *s.device(block.Raw)); err != nil {
			return err
		}
	}
	return n.host.Bind(ctx, source, r.TargetPath, attr)
}

// source is what to bind, and whether it may only be read.
func (s state) source(r PublishRequest) (path string, readOnly bool, err error) {
	readOnly = r.ReadOnly || r.Access.Mode.ReadOnly()
	if r.Access.Block {
		if !s.raw() {
			return "", false, s.notStaged(r)
		}
		d := s.device(block.Raw)
		return d.Path, readOnly || d.ReadOnly, nil
	}
	m := s.at(r.StagingPath)
	if m == nil || s.raw() {
		return "", false, s.notStaged(r)
	}
	return r.StagingPath, readOnly || has(m.Options, "ro"), nil
}

func (s state) notStaged(r PublishRequest) error {
	switch {
	case s.raw():
		return fault.New(fault.InUse, "it is staged as a raw block device, and was asked for as a filesystem")
	case r.Access.Block && s.device(block.Raw) == nil && (s.anchor != nil || len(s.devices) > 0):
		return fault.New(fault.InUse, "it is staged as a filesystem, and was asked for as a raw block device")
	}
	return fault.New(fault.InUse, "it is not staged at %q on this node: stage it first", r.StagingPath)
}

// samePublish decides about a target that is there already.
func samePublish(m host.Mount, s state, r PublishRequest, readOnly bool) error {
	is := has(m.Options, "ro")
	if is != readOnly {
		return fault.New(fault.Exists, "it is published at %q with read-only=%t, and read-only=%t was asked for: unpublish it first", r.TargetPath, is, readOnly)
	}
	return nil
}

// targets are the mounts that Publish made.
func (s state) targets(staging string) []string {
	var out []string
	for _, p := range s.elsewhere(staging) {
		if s.anchor == nil || p != s.anchor.Point {
			out = append(out, p)
		}
	}
	return out
}

// severalTargets is the second table of NodePublishVolume in the CSI specification.
func severalTargets(m image.Mode) bool { return m.MultiNode() || m == image.SingleNodeMultiWriter }

// view returns a read-only device over a writable one.
func (n *Node) view(ctx context.Context, h image.Handle, dev block.Device) (string, error) {
	v, err := n.devices.Attach(ctx, block.Spec{Owner: h.String(), Use: block.View, Slabs: []block.Slab{{Path: dev.Path, Size: dev.Size}}, Size: dev.Size, ReadOnly: true})
	return v.Path, err
}

// Unpublish takes the image away from a target path and removes the target.
// What is not there is success. fault.InUse: a process still uses it, or the
// target holds files of its own, which stay.
func (n *Node) Unpublish(ctx context.Context, h image.Handle, target string) error {
	return fault.In(n.unpublish(ctx, h, target), "unpublish", h.Domain, h.Image)
}

func (n *Node) unpublish(ctx context.Context, h image.Handle, target string) error {
	target, err := n.realPath(ctx, "target path", target)
	if err != nil {
		return err
	}
	unlock, err := n.lock(ctx, h)
	if err != nil {
		return err
	}
	defer unlock()
	ctx = context.WithoutCancel(ctx)
	s, findErr := n.find(ctx, h)
	if findErr != nil && !errors.Is(findErr, fault.Unavailable) {
		return findErr
	}
	for {
		at, err := n.host.MountsAt(target)
		if err != nil {
			return err
		}
		if len(at) == 0 {
			break
		}
		if err := n.mayUnmount(ctx, h, s, at[len(at)-1]); err != nil {
			return err
		}
		if err := n.host.Unmount(ctx, target); err != nil {
			return err
		}
	}
	if err := n.dropView(ctx, h); err != nil {
		return err
	}
	return removeTarget(target)
}

// mayUnmount refuses to take down what belongs to somebody else. Where the
// kubelet's folder is not known, that is everything which is not this image's.
func (n *Node) mayUnmount(ctx context.Context, h image.Handle, s state, m host.Mount) error {
	if mine := s.at(m.Point); mine != nil && mine.ID == m.ID {
		if s.anchor != nil && s.anchor.Point == m.Point {
			return fault.New(fault.Invalid, "target path %q is the staging path", m.Point)
		}
		return nil
	}
	if strings.HasPrefix(m.Source, anchorPrefix) {
		return fault.New(fault.Invalid, "target path %q is the staging path of %s", m.Point, strings.TrimPrefix(m.Source, anchorPrefix))
	}
	all, err := n.devices.All(ctx)
	if err != nil && !errors.Is(err, fault.Unavailable) {
		return err
	}
	for _, d := range all {
		if shows(m, d) && !d.Owns(h.String()) {
			return fault.New(fault.Invalid, "target path %q has another volume mounted on it (%s)", m.Point, d.Path)
		}
	}
	if n.cfg.KubeletDir == "" {
		return fault.New(fault.Invalid, "target path %q has %s (%s) mounted on it, which is not this volume", m.Point, m.Source, m.Type)
	}
	return nil
}

// dropView detaches the read-only device when nobody has it mounted any more.
func (n *Node) dropView(ctx context.Context, h image.Handle) error {
	s, err := n.find(ctx, h)
	if errors.Is(err, fault.Unavailable) {
		return nil // unstaging will come back to it
	}
	if err != nil {
		return err
	}
	v := s.device(block.View)
	if v == nil {
		return nil
	}
	for _, m := range s.mounts {
		if shows(m, *v) {
			return nil
		}
	}
	return n.devices.Detach(ctx, *v)
}

func has(list []string, word string) bool {
	for _, w := range list {
		if w == word {
			return true
		}
	}
	return false
}
