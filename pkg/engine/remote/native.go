package remote

import (
	"context"
	"maps"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
)

// declined is a capability's "take the default", where the process said so.
func (e *Engine) declined(said bool, err error) error {
	if said && err == nil {
		return engine.ErrDeclined
	}
	return e.failed(err)
}

// usage checks what was measured.
func (e *Engine) usage(call string, r *enginepb.UsageResponse, err error) (engine.Usage, error) {
	if err = e.declined(r.GetDeclined(), err); err != nil {
		return engine.Usage{}, err
	}
	if u := r.Go(); min(u.Total, u.Used, u.Available, u.InodesTotal, u.InodesFree) >= 0 {
		return u, nil
	}
	return engine.Usage{}, garbage(call, "a negative number: %v", r)
}

// from is domain for a call that makes a slab of another one.
func (e *Engine) from(ctx context.Context, source string, spec engine.SlabSpec) (string, error) {
	if err := engine.CheckSpec(spec); err != nil {
		return "", err
	}
	return e.on(ctx, source)
}

// SnapshotSlab implements engine.Snapshotter.
func (e *Engine) SnapshotSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	id, err := e.from(ctx, source, spec)
	if err != nil {
		return err
	}
	r, err := enginepb.NewSnapshotterClient(e.conn).SnapshotSlab(ctx, &enginepb.SnapshotSlabRequest{Domain: id, Source: source, Spec: enginepb.SpecOf(spec)})
	return e.declined(r.GetDeclined(), err)
}

// CloneSlab implements engine.Cloner.
func (e *Engine) CloneSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	id, err := e.from(ctx, source, spec)
	if err != nil {
		return err
	}
	r, err := enginepb.NewClonerClient(e.conn).CloneSlab(ctx, &enginepb.CloneSlabRequest{Domain: id, Source: source, Spec: enginepb.SpecOf(spec)})
	return e.declined(r.GetDeclined(), err)
}

// CopySlab implements engine.Copier.
func (e *Engine) CopySlab(ctx context.Context, source string, spec engine.SlabSpec, progress func(done int64)) error {
	id, err := e.from(ctx, source, spec)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := enginepb.NewCopierClient(e.conn).CopySlab(ctx, &enginepb.CopySlabRequest{Domain: id, Source: source, Spec: enginepb.SpecOf(spec)})
	said := false
	err = drain(e, stream, err, func(r *enginepb.CopySlabResponse) error {
		said = r.GetDeclined()
		if progress != nil && !said {
			progress(r.GetDone())
		}
		return nil
	})
	return e.declined(said, err)
}

// DomainUsage implements engine.Meter.
func (e *Engine) DomainUsage(ctx context.Context) (engine.Usage, error) {
	id, err := e.domain(ctx)
	if err != nil {
		return engine.Usage{}, err
	}
	r, err := enginepb.NewMeterClient(e.conn).DomainUsage(ctx, &enginepb.DomainUsageRequest{Domain: id})
	return e.usage("DomainUsage", r, err)
}

// SlabUsage implements engine.Meter.
func (e *Engine) SlabUsage(ctx context.Context, slab string) (engine.Usage, error) {
	id, err := e.on(ctx, slab)
	if err != nil {
		return engine.Usage{}, err
	}
	r, err := enginepb.NewMeterClient(e.conn).SlabUsage(ctx, &enginepb.SlabUsageRequest{Domain: id, Id: slab})
	return e.usage("SlabUsage", r, err)
}

// SetQuota implements engine.Quota.
func (e *Engine) SetQuota(ctx context.Context, slab string, size int64) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	r, err := enginepb.NewQuotaClient(e.conn).SetQuota(ctx, &enginepb.SetQuotaRequest{Domain: id, Id: slab, Size: size})
	return e.declined(r.GetDeclined(), err)
}

// DiffSlabs implements engine.Differ.
func (e *Engine) DiffSlabs(ctx context.Context, from, to string) ([]engine.Extent, error) {
	id, err := e.on(ctx, to)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := enginepb.NewDifferClient(e.conn).DiffSlabs(ctx, &enginepb.DiffSlabsRequest{Domain: id, From: from, To: to})
	var out []engine.Extent
	var end int64
	said := false
	err = drain(e, stream, err, func(r *enginepb.DiffSlabsResponse) error {
		said = r.GetDeclined()
		for _, x := range r.GetExtents() {
			if x.GetOffset() < end || x.GetLength() <= 0 {
				return garbage("DiffSlabs", "%d bytes at %d after those up to %d: they must be in order and not overlap", x.GetLength(), x.GetOffset(), end)
			}
			end = x.GetOffset() + x.GetLength()
			out = append(out, engine.Extent{Offset: x.GetOffset(), Length: x.GetLength()})
		}
		return nil
	})
	return out, e.declined(said, err)
}

// Fence implements engine.Fencer.
func (e *Engine) Fence(ctx context.Context, node, slab string) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	r, err := enginepb.NewFencerClient(e.conn).Fence(ctx, &enginepb.FenceRequest{Domain: id, Node: node, Slab: slab})
	return e.declined(r.GetDeclined(), err)
}

// Unfence implements engine.Fencer.
func (e *Engine) Unfence(ctx context.Context, node, slab string) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	r, err := enginepb.NewFencerClient(e.conn).Unfence(ctx, &enginepb.UnfenceRequest{Domain: id, Node: node, Slab: slab})
	return e.declined(r.GetDeclined(), err)
}

// SnapshotSlabs implements engine.GroupSnapshotter.
func (e *Engine) SnapshotSlabs(ctx context.Context, sources []string, specs []engine.SlabSpec) error {
	r := &enginepb.SnapshotSlabsRequest{Sources: sources}
	for i, s := range specs {
		if _, err := e.from(ctx, sources[i], s); err != nil {
			return err
		}
		r.Specs = append(r.Specs, enginepb.SpecOf(s))
	}
	var err error
	if r.Domain, err = e.domain(ctx); err != nil {
		return err
	}
	a, err := enginepb.NewGroupSnapshotterClient(e.conn).SnapshotSlabs(ctx, r)
	return e.declined(a.GetDeclined(), err)
}

// ModifyParams implements engine.Modifier.
func (e *Engine) ModifyParams() map[string]string { return maps.Clone(e.modifyText) }

// ModifySlab implements engine.Modifier.
func (e *Engine) ModifySlab(ctx context.Context, slab string, params map[string]string) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	r, err := enginepb.NewModifierClient(e.conn).ModifySlab(ctx, &enginepb.ModifySlabRequest{Domain: id, Id: slab, Params: params})
	return e.declined(r.GetDeclined(), err)
}

// Importable implements engine.Importer.
func (e *Engine) Importable(ctx context.Context, source string) (engine.Importable, error) {
	id, err := e.domain(ctx)
	if err != nil {
		return engine.Importable{}, err
	}
	r, err := enginepb.NewImporterClient(e.conn).Importable(ctx, &enginepb.ImportableRequest{Domain: id, Source: source})
	if err != nil {
		return engine.Importable{}, e.failed(err)
	}
	if r.GetSize() <= 0 || r.GetAllocated() < 0 || r.GetHolds() == "" {
		return engine.Importable{}, garbage("Importable", "%v: a size above 0 and what it holds were expected", r)
	}
	return engine.Importable{Size: r.GetSize(), Allocated: r.GetAllocated(), Holds: r.GetHolds()}, nil
}

// ImportSlab implements engine.Importer.
func (e *Engine) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	if err := engine.CheckSpec(spec); err != nil {
		return err
	}
	id, err := e.domain(ctx)
	if err != nil {
		return err
	}
	_, err = enginepb.NewImporterClient(e.conn).ImportSlab(ctx, &enginepb.ImportSlabRequest{Domain: id, Source: source, Spec: enginepb.SpecOf(spec)})
	return e.failed(err)
}

// KeepSlab implements engine.Importer.
func (e *Engine) KeepSlab(ctx context.Context, source, slab string) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	_, err = enginepb.NewImporterClient(e.conn).KeepSlab(ctx, &enginepb.KeepSlabRequest{Domain: id, Source: source, Id: slab})
	return e.failed(err)
}
