package agent

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Each verb runs on the node that Domain.on chooses.

var (
	_ engine.Snapshotter      = (*Domain)(nil)
	_ engine.Cloner           = (*Domain)(nil)
	_ engine.Copier           = (*Domain)(nil)
	_ engine.Meter            = (*Domain)(nil)
	_ engine.Quota            = (*Domain)(nil)
	_ engine.Differ           = (*Domain)(nil)
	_ engine.Fencer           = (*Domain)(nil)
	_ engine.GroupSnapshotter = (*Domain)(nil)
	_ engine.Modifier         = (*Domain)(nil)
	_ engine.Importer         = (*Domain)(nil)
)

// AttachSlab implements engine.Engine: nobody can use a path on an unknown node. Nodes
// attach what they use themselves, and so does a Worker.
func (d *Domain) AttachSlab(context.Context, string, engine.AttachOptions) (engine.Attachment, error) {
	return engine.Attachment{}, fault.New(fault.Internal, "domain %s: slabs are attached on nodes only", d.o.name)
}

// DetachSlab implements engine.Engine: see AttachSlab.
func (d *Domain) DetachSlab(context.Context, string) error {
	return fault.New(fault.Internal, "domain %s: slabs are detached on nodes only", d.o.name)
}

// ModifyParams implements engine.Modifier.
func (d *Domain) ModifyParams() map[string]string {
	if d.caps.Modifier == nil {
		return nil
	}
	return d.caps.Modifier.ModifyParams()
}

// do lets a verb run on a node.
func (d *Domain) do(ctx context.Context, verb func(context.Context, *remote.Engine) error) error {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return err
	}
	return verb(ctx, e)
}

// Describe runs on a node.
func (d *Domain) Describe(ctx context.Context) (engine.Description, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return engine.Description{}, err
	}
	return e.Describe(ctx)
}

// CreateSlab runs on a node.
func (d *Domain) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.CreateSlab(ctx, spec) })
}

// ResizeSlab runs on a node.
func (d *Domain) ResizeSlab(ctx context.Context, id string, size int64) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.ResizeSlab(ctx, id, size) })
}

// DeleteSlab runs on a node.
func (d *Domain) DeleteSlab(ctx context.Context, id string) error {
	err := d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.DeleteSlab(ctx, id) })
	if err == nil {
		d.hub.forget(d.o, id)
	}
	return err
}

// ListSlabs runs on a node.
func (d *Domain) ListSlabs(ctx context.Context) ([]engine.Slab, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return nil, err
	}
	return e.ListSlabs(ctx)
}

// CreateTag runs on a node.
func (d *Domain) CreateTag(ctx context.Context, tag engine.Tag) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.CreateTag(ctx, tag) })
}

// DeleteTag runs on a node.
func (d *Domain) DeleteTag(ctx context.Context, name string) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.DeleteTag(ctx, name) })
}

// ListTags runs on a node.
func (d *Domain) ListTags(ctx context.Context, prefix string) ([]engine.Tag, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return nil, err
	}
	return e.ListTags(ctx, prefix)
}

// SnapshotSlab runs on a node.
func (d *Domain) SnapshotSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.SnapshotSlab(ctx, source, spec) })
}

// CloneSlab runs on a node.
func (d *Domain) CloneSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.CloneSlab(ctx, source, spec) })
}

// CopySlab runs on a node.
func (d *Domain) CopySlab(ctx context.Context, source string, spec engine.SlabSpec, progress func(done int64)) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.CopySlab(ctx, source, spec, progress) })
}

// DomainUsage runs on a node.
func (d *Domain) DomainUsage(ctx context.Context) (engine.Usage, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return engine.Usage{}, err
	}
	return e.DomainUsage(ctx)
}

// SlabUsage runs on a node.
func (d *Domain) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return engine.Usage{}, err
	}
	return e.SlabUsage(ctx, id)
}

// SetQuota runs on a node.
func (d *Domain) SetQuota(ctx context.Context, id string, size int64) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.SetQuota(ctx, id, size) })
}

// DiffSlabs runs on a node.
func (d *Domain) DiffSlabs(ctx context.Context, from, to string) ([]engine.Extent, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return nil, err
	}
	return e.DiffSlabs(ctx, from, to)
}

// Fence runs on a node.
func (d *Domain) Fence(ctx context.Context, node, slab string) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.Fence(ctx, node, slab) })
}

// Unfence runs on a node.
func (d *Domain) Unfence(ctx context.Context, node, slab string) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.Unfence(ctx, node, slab) })
}

// SnapshotSlabs runs on a node.
func (d *Domain) SnapshotSlabs(ctx context.Context, sources []string, specs []engine.SlabSpec) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.SnapshotSlabs(ctx, sources, specs) })
}

// ModifySlab runs on a node.
func (d *Domain) ModifySlab(ctx context.Context, id string, params map[string]string) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.ModifySlab(ctx, id, params) })
}

// Importable runs on a node.
func (d *Domain) Importable(ctx context.Context, source string) (engine.Importable, error) {
	ctx, e, err := d.on(ctx)
	if err != nil {
		return engine.Importable{}, err
	}
	return e.Importable(ctx, source)
}

// ImportSlab runs on a node.
func (d *Domain) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.ImportSlab(ctx, source, spec) })
}

// KeepSlab runs on a node.
func (d *Domain) KeepSlab(ctx context.Context, source, id string) error {
	return d.do(ctx, func(ctx context.Context, e *remote.Engine) error { return e.KeepSlab(ctx, source, id) })
}
