package mover

import (
	"context"
	"errors"
	"io"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Files is the work of image.Worker on files, devices and directories of this
// host; *Mover does it.
type Files interface {
	CopyBlock(ctx context.Context, src, dst string, opts image.BlockCopy) error
	CopyTree(ctx context.Context, src, dst string, progress func(done, total int64)) error
	// A copy between two hosts: one half on each, with a connection between them.
	SendBlock(ctx context.Context, src string, opts image.BlockCopy, to io.Writer) error
	ReceiveBlock(ctx context.Context, dst string, opts image.BlockCopy, from io.Reader) error
	SendTree(ctx context.Context, src string, to io.Writer) error
	ReceiveTree(ctx context.Context, dst string, progress func(done, total int64), from io.Reader) error
	Zero(ctx context.Context, path string, from, to int64) error
	FormatLayer(ctx context.Context, path string, size, chunk int64) error
	Allocate(ctx context.Context, path string, size int64) error
	TrimLayer(ctx context.Context, path string, size int64) error
	CheckLayer(ctx context.Context, path string) error
	RepairLayer(ctx context.Context, path string, size int64) (chunks int64, err error)
	LayerExtents(ctx context.Context, path string, size int64) ([]engine.Extent, error)
	DataExtents(ctx context.Context, path string, size int64) ([]engine.Extent, error)
	Compare(ctx context.Context, a, b Side, ranges []engine.Extent, emit func([]engine.Extent) error) error
}

// Side is one of two files or devices that are compared: its first Size bytes
// count. Behind them it reads as zero, whatever is there.
type Side struct {
	Path string
	Size int64 // bytes
}

// Chains makes devices of chains; *node.Node does.
type Chains interface {
	// AttachImage gives the path of a private read-only device over a chain.
	// DetachImage takes it away.
	AttachImage(ctx context.Context, chain image.Staging) (path string, err error)
	DetachImage(ctx context.Context, h image.Handle, path string) error
}

// Local is image.Worker in the process that has the engines.
type Local struct {
	// Files does the work.
	Files Files
	// Engines finds the engine of an open domain, and who uses its slabs here.
	Engines func(domain string) (*engine.Users, error)
	// Agents find who makes devices of chains: an agent that is Chains.
	Agents image.Agents
}

var _ image.Worker = (*Local)(nil)

// attach makes a slab usable; release gives it back.
func (l *Local) attach(ctx context.Context, p image.Place, readOnly bool) (path string, release func() error, err error) {
	users, err := l.Engines(p.Domain)
	if err != nil {
		return "", nil, err
	}
	a, done, err := users.Attach(ctx, p.Slab, engine.AttachOptions{ReadOnly: readOnly})
	if err != nil {
		return "", nil, fault.In(err, "attach", p.Domain, p.Slab)
	}
	return a.Path, func() error { return done(context.WithoutCancel(ctx), true) }, nil
}

// with attaches a slab while work is done on it.
func (l *Local) with(ctx context.Context, p image.Place, readOnly bool, work func(path string) error) error {
	path, release, err := l.attach(ctx, p, readOnly)
	if err != nil {
		return err
	}
	return errors.Join(work(path), release())
}

// reading attaches what an image holds while it is read.
func (l *Local) reading(ctx context.Context, c image.Content, work func(path string) error) error {
	if c.Chain == nil {
		return l.with(ctx, c.Place, true, work)
	}
	agent, err := l.Agents.Agent(c.Node)
	if err != nil {
		return err
	}
	chains, ok := agent.(Chains)
	if !ok {
		return fault.New(fault.Unsupported, "node %s makes no devices of chains", c.Node)
	}
	path, err := chains.AttachImage(ctx, *c.Chain)
	if err != nil {
		return err
	}
	return errors.Join(work(path), chains.DetachImage(context.WithoutCancel(ctx), c.Chain.Handle, path))
}

// CopyBlock implements image.Worker.
func (l *Local) CopyBlock(ctx context.Context, src image.Content, dst image.Place, opts image.BlockCopy) error {
	return l.reading(ctx, src, func(from string) error {
		return l.with(ctx, dst, false, func(to string) error { return l.Files.CopyBlock(ctx, from, to, opts) })
	})
}

// CopyTree implements image.Worker.
func (l *Local) CopyTree(ctx context.Context, src image.Content, dst image.Place, progress func(done, total int64)) error {
	return l.reading(ctx, src, func(from string) error {
		return l.with(ctx, dst, false, func(to string) error { return l.Files.CopyTree(ctx, from, to, progress) })
	})
}

// SendBlock is the source's half of CopyBlock between two hosts, ReceiveBlock, with the
// same Size and From, the target's. What they write to and read from has to end with ctx.
func (l *Local) SendBlock(ctx context.Context, src image.Content, opts image.BlockCopy, to io.Writer) error {
	return l.reading(ctx, src, func(from string) error { return l.Files.SendBlock(ctx, from, opts, to) })
}

// ReceiveBlock is the other half of SendBlock.
func (l *Local) ReceiveBlock(ctx context.Context, dst image.Place, opts image.BlockCopy, from io.Reader) error {
	return l.with(ctx, dst, false, func(to string) error { return l.Files.ReceiveBlock(ctx, to, opts, from) })
}

// SendTree is the source's half of CopyTree between two hosts.
func (l *Local) SendTree(ctx context.Context, src image.Content, to io.Writer) error {
	return l.reading(ctx, src, func(from string) error { return l.Files.SendTree(ctx, from, to) })
}

// ReceiveTree is the other half of SendTree.
func (l *Local) ReceiveTree(ctx context.Context, dst image.Place, progress func(done, total int64), from io.Reader) error {
	return l.with(ctx, dst, false, func(to string) error { return l.Files.ReceiveTree(ctx, to, progress, from) })
}

// Zero implements image.Worker.
func (l *Local) Zero(ctx context.Context, p image.Place, from, to int64) error {
	return l.with(ctx, p, false, func(path string) error { return l.Files.Zero(ctx, path, from, to) })
}

// FormatLayer implements image.Worker.
func (l *Local) FormatLayer(ctx context.Context, p image.Place, size, chunk int64) error {
	err := l.with(ctx, p, false, func(path string) error { return l.Files.FormatLayer(ctx, path, size, chunk) })
	return fault.In(err, "make a layer", p.Domain, p.Slab)
}

// Allocate implements image.Worker.
func (l *Local) Allocate(ctx context.Context, p image.Place, size int64) error {
	err := l.with(ctx, p, false, func(path string) error { return l.Files.Allocate(ctx, path, size) })
	return fault.In(err, "take the space of slab", p.Domain, p.Slab)
}

// TrimLayer implements image.Worker.
func (l *Local) TrimLayer(ctx context.Context, p image.Place, size int64) error {
	return l.with(ctx, p, false, func(path string) error { return l.Files.TrimLayer(ctx, path, size) })
}

// CheckLayer implements image.Worker.
func (l *Local) CheckLayer(ctx context.Context, p image.Place) (looked bool, err error) {
	path, release, err := l.attach(ctx, p, true)
	if err != nil {
		return false, err
	}
	return true, errors.Join(l.Files.CheckLayer(ctx, path), release())
}

// RepairLayer implements image.Worker.
func (l *Local) RepairLayer(ctx context.Context, p image.Place, size int64) (chunks int64, err error) {
	err = l.with(ctx, p, false, func(path string) (err error) {
		chunks, err = l.Files.RepairLayer(ctx, path, size)
		return err
	})
	return chunks, err
}

// LayerExtents implements image.Worker.
func (l *Local) LayerExtents(ctx context.Context, p image.Place, size int64) (list []engine.Extent, err error) {
	err = l.with(ctx, p, true, func(path string) (err error) {
		list, err = l.Files.LayerExtents(ctx, path, size)
		return err
	})
	return list, err
}

// DataExtents implements image.Worker.
func (l *Local) DataExtents(ctx context.Context, p image.Place, size int64) (list []engine.Extent, err error) {
	err = l.with(ctx, p, true, func(path string) (err error) {
		list, err = l.Files.DataExtents(ctx, path, size)
		return err
	})
	return list, err
}

// Compare implements image.Worker.
func (l *Local) Compare(ctx context.Context, a, b image.Content, ranges []engine.Extent, emit func([]engine.Extent) error) error {
	return l.reading(ctx, a, func(left string) error {
		return l.reading(ctx, b, func(right string) error {
			return l.Files.Compare(ctx, Side{left, a.Size}, Side{right, b.Size}, ranges, emit)
		})
	})
}
