package node

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Expand lets a staged image's device and filesystem fill what the Image
// Manager has grown, while it is in use. size is the least that is expected in
// bytes, or 0. It returns the image's size. A filesystem that is staged
// read-only grows when it is staged for writing next.
//
// fault.NotFound: the image is not at path. fault.OutOfRange: the image was not
// grown to size. fault.Exhausted: writes to it wait for space.
func (n *Node) Expand(ctx context.Context, h image.Handle, path string, size int64) (int64, error) {
	got, err := n.expand(ctx, h, path, size)
	return got, fault.In(err, "expand", h.Domain, h.Image)
}

func (n *Node) expand(ctx context.Context, h image.Handle, path string, size int64) (int64, error) {
	path, err := n.realPath(ctx, "volume path", path)
	if err != nil {
		return 0, err
	}
	unlock, err := n.lock(ctx, h)
	if err != nil {
		return 0, err
	}
	defer unlock()
	ctx = context.WithoutCancel(ctx)

	im, err := n.cfg.Manager.Outline(ctx, h, n.cfg.NodeID)
	if err != nil {
		return 0, err
	}
	s, err := n.find(ctx, h)
	if err != nil {
		return 0, err
	}
	// A raw block volume has nothing mounted at its staging path.
	if s.at(path) == nil && !s.raw() {
		return 0, fault.New(fault.NotFound, "it is not staged or published at %q on this node", path)
	}
	if im.Size < size {
		return 0, fault.New(fault.OutOfRange, "the image has %d bytes and %d were asked for: expand it with the controller first", im.Size, size)
	}
	if err := s.wait(); err != nil {
		return 0, err
	}
	if s.anchor != nil {
		return im.Size, nil // the engine enforces what size a directory has
	}
	// Below first: a view takes its size from the device.
	var dev block.Device
	for _, u := range []block.Use{block.Filesystem, block.Raw, block.View} {
		d := s.device(u)
		if d == nil {
			continue
		}
		if dev, err = n.devices.Grow(ctx, *d, im.Size); err != nil {
			return 0, err
		}
	}
	if s.device(block.Filesystem) == nil {
		return im.Size, nil
	}
	// The target may be read-only while the staged mount is not.
	for _, m := range s.mounts {
		if !m.ReadOnly() {
			return im.Size, n.fill(ctx, h, dev, m.Type, m.Point)
		}
	}
	return im.Size, nil
}

// Stats of an image in use.
type Stats struct {
	host.Usage
	// Block: only Total is known.
	Block bool
	// Conditions as of Health.
	Conditions []Condition
}

// Stats measures an image that is staged or published at path. It never waits
// long for storage that does not answer. fault.NotFound: it is not there.
func (n *Node) Stats(ctx context.Context, h image.Handle, path string) (Stats, error) {
	st, err := n.stats(ctx, h, path)
	return st, fault.In(err, "measure", h.Domain, h.Image)
}

func (n *Node) stats(ctx context.Context, h image.Handle, path string) (Stats, error) {
	path, err := n.realPath(ctx, "volume path", path)
	if err != nil {
		return Stats{}, err
	}
	s, err := n.find(ctx, h)
	if err != nil {
		return Stats{}, err
	}
	m := s.at(path)
	if m == nil {
		return Stats{}, fault.New(fault.NotFound, "it is not staged or published at %q on this node", path)
	}
	out := Stats{Conditions: n.examine(ctx, h, s)}
	if d := s.device(block.Raw); d != nil {
		out.Block = true
		out.Total = d.Size
		return out, nil
	}
	out.Usage, err = n.host.Usage(ctx, path)
	return out, err
}
