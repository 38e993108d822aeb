package serve

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
)

// page is how many tags, slabs or extents a message has: of tags, each below 1 KiB,
// a quarter of what gRPC takes by default.
const page = 1000

// progressEvery is how often a copy says how far it is, at most.
const progressEvery = 200 * time.Millisecond

// Describe implements the protocol.
func (s *Server) Describe(ctx context.Context, r *enginepb.DescribeRequest) (*enginepb.DescribeResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	d, err := o.engine.Describe(ctx)
	return enginepb.DescriptionOf(d), err
}

// CreateSlab implements the protocol.
func (s *Server) CreateSlab(ctx context.Context, r *enginepb.CreateSlabRequest) (*enginepb.CreateSlabResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.CreateSlabResponse{}, o.engine.CreateSlab(ctx, r.GetSpec().Go())
}

// ResizeSlab implements the protocol.
func (s *Server) ResizeSlab(ctx context.Context, r *enginepb.ResizeSlabRequest) (*enginepb.ResizeSlabResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.ResizeSlabResponse{}, o.engine.ResizeSlab(ctx, r.GetId(), r.GetSize())
}

// DeleteSlab implements the protocol.
func (s *Server) DeleteSlab(ctx context.Context, r *enginepb.DeleteSlabRequest) (*enginepb.DeleteSlabResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.DeleteSlabResponse{}, o.engine.DeleteSlab(ctx, r.GetId())
}

// ListSlabs implements the protocol.
func (s *Server) ListSlabs(r *enginepb.ListSlabsRequest, out grpc.ServerStreamingServer[enginepb.ListSlabsResponse]) error {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return err
	}
	defer done()
	slabs, err := o.engine.ListSlabs(out.Context())
	if err != nil {
		return err
	}
	for part := range slices.Chunk(slabs, page) {
		m := &enginepb.ListSlabsResponse{}
		for _, slab := range part {
			m.Slabs = append(m.Slabs, &enginepb.Slab{Id: slab.ID, Kind: enginepb.KindOf(slab.Kind), Size: slab.Size})
		}
		if err := out.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// CreateTag implements the protocol.
func (s *Server) CreateTag(ctx context.Context, r *enginepb.CreateTagRequest) (*enginepb.CreateTagResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	t := r.GetTag()
	return &enginepb.CreateTagResponse{}, o.engine.CreateTag(ctx, engine.Tag{Name: t.GetName(), Slab: t.GetSlab(), Record: t.GetRecord()})
}

// DeleteTag implements the protocol.
func (s *Server) DeleteTag(ctx context.Context, r *enginepb.DeleteTagRequest) (*enginepb.DeleteTagResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.DeleteTagResponse{}, o.engine.DeleteTag(ctx, r.GetName())
}

// ListTags implements the protocol.
func (s *Server) ListTags(r *enginepb.ListTagsRequest, out grpc.ServerStreamingServer[enginepb.ListTagsResponse]) error {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return err
	}
	defer done()
	tags, err := o.engine.ListTags(out.Context(), r.GetPrefix())
	if err != nil {
		return err
	}
	for part := range slices.Chunk(tags, page) {
		m := &enginepb.ListTagsResponse{}
		for _, t := range part {
			m.Tags = append(m.Tags, &enginepb.Tag{Name: t.Name, Slab: t.Slab, Record: t.Record, Unreadable: t.Record == nil})
		}
		if err := out.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// AttachSlab implements the protocol.
func (s *Server) AttachSlab(ctx context.Context, r *enginepb.AttachSlabRequest) (*enginepb.AttachSlabResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	a, err := o.engine.AttachSlab(ctx, r.GetId(), engine.AttachOptions{ReadOnly: r.GetReadOnly(), MountOptions: r.GetMountOptions()})
	return &enginepb.AttachSlabResponse{Path: a.Path}, err
}

// DetachSlab implements the protocol.
func (s *Server) DetachSlab(ctx context.Context, r *enginepb.DetachSlabRequest) (*enginepb.DetachSlabResponse, error) {
	o, done, err := s.domain(r.GetDomain())
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.DetachSlabResponse{}, o.engine.DetachSlab(ctx, r.GetId())
}

// SnapshotSlab implements the protocol.
func (s *Server) SnapshotSlab(ctx context.Context, r *enginepb.SnapshotSlabRequest) (*enginepb.SnapshotSlabResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapSnapshot, func(c engine.Capabilities) engine.Snapshotter { return c.Snapshotter })
	if err != nil {
		return nil, err
	}
	defer done()
	no, err := declined(c.SnapshotSlab(ctx, r.GetSource(), r.GetSpec().Go()))
	return &enginepb.SnapshotSlabResponse{Declined: no}, err
}

// CloneSlab implements the protocol.
func (s *Server) CloneSlab(ctx context.Context, r *enginepb.CloneSlabRequest) (*enginepb.CloneSlabResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapClone, func(c engine.Capabilities) engine.Cloner { return c.Cloner })
	if err != nil {
		return nil, err
	}
	defer done()
	no, err := declined(c.CloneSlab(ctx, r.GetSource(), r.GetSpec().Go()))
	return &enginepb.CloneSlabResponse{Declined: no}, err
}

// CopySlab implements the protocol.
func (s *Server) CopySlab(r *enginepb.CopySlabRequest, out grpc.ServerStreamingServer[enginepb.CopySlabResponse]) error {
	c, done, err := native(s, r.GetDomain(), engine.CapCopy, func(c engine.Capabilities) engine.Copier { return c.Copier })
	if err != nil {
		return err
	}
	defer done()
	var mu sync.Mutex // progress may be told by several at once, also after the end
	var last time.Time
	ended := false
	no, err := declined(c.CopySlab(out.Context(), r.GetSource(), r.GetSpec().Go(), func(done int64) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); !ended && now.Sub(last) >= progressEvery {
			last = now
			_ = out.Send(&enginepb.CopySlabResponse{Done: done}) // a client that has gone ends the context
		}
	}))
	mu.Lock()
	ended = true
	mu.Unlock()
	if no {
		return out.Send(&enginepb.CopySlabResponse{Declined: true})
	}
	return err
}

// DomainUsage implements the protocol.
func (s *Server) DomainUsage(ctx context.Context, r *enginepb.DomainUsageRequest) (*enginepb.UsageResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapMeter, func(c engine.Capabilities) engine.Meter { return c.Meter })
	if err != nil {
		return nil, err
	}
	defer done()
	u, err := c.DomainUsage(ctx)
	return usage(u, err)
}

// SlabUsage implements the protocol.
func (s *Server) SlabUsage(ctx context.Context, r *enginepb.SlabUsageRequest) (*enginepb.UsageResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapMeter, func(c engine.Capabilities) engine.Meter { return c.Meter })
	if err != nil {
		return nil, err
	}
	defer done()
	u, err := c.SlabUsage(ctx, r.GetId())
	return usage(u, err)
}

func usage(u engine.Usage, err error) (*enginepb.UsageResponse, error) {
	no, err := declined(err)
	r := enginepb.UsageOf(u)
	r.Declined = no
	return r, err
}

// SetQuota implements the protocol.
func (s *Server) SetQuota(ctx context.Context, r *enginepb.SetQuotaRequest) (*enginepb.SetQuotaResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapQuota, func(c engine.Capabilities) engine.Quota { return c.Quota })
	if err != nil {
		return nil, err
	}
	defer done()
	no, err := declined(c.SetQuota(ctx, r.GetId(), r.GetSize()))
	return &enginepb.SetQuotaResponse{Declined: no}, err
}

// DiffSlabs implements the protocol.
func (s *Server) DiffSlabs(r *enginepb.DiffSlabsRequest, out grpc.ServerStreamingServer[enginepb.DiffSlabsResponse]) error {
	c, done, err := native(s, r.GetDomain(), engine.CapDiff, func(c engine.Capabilities) engine.Differ { return c.Differ })
	if err != nil {
		return err
	}
	defer done()
	extents, err := c.DiffSlabs(out.Context(), r.GetFrom(), r.GetTo())
	no, err := declined(err)
	if no {
		return out.Send(&enginepb.DiffSlabsResponse{Declined: true})
	}
	if err != nil {
		return err
	}
	for part := range slices.Chunk(extents, page) {
		m := &enginepb.DiffSlabsResponse{}
		for _, e := range part {
			m.Extents = append(m.Extents, &enginepb.Extent{Offset: e.Offset, Length: e.Length})
		}
		if err := out.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// Fence implements the protocol.
func (s *Server) Fence(ctx context.Context, r *enginepb.FenceRequest) (*enginepb.FenceResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapFence, func(c engine.Capabilities) engine.Fencer { return c.Fencer })
	if err != nil {
		return nil, err
	}
	defer done()
	no, err := declined(c.Fence(ctx, r.GetNode(), r.GetSlab()))
	return &enginepb.FenceResponse{Declined: no}, err
}

// Unfence implements the protocol.
func (s *Server) Unfence(ctx context.Context, r *enginepb.UnfenceRequest) (*enginepb.UnfenceResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapFence, func(c engine.Capabilities) engine.Fencer { return c.Fencer })
	if err != nil {
		return nil, err
	}
	defer done()
	no, err := declined(c.Unfence(ctx, r.GetNode(), r.GetSlab()))
	return &enginepb.UnfenceResponse{Declined: no}, err
}

// SnapshotSlabs implements the protocol.
func (s *Server) SnapshotSlabs(ctx context.Context, r *enginepb.SnapshotSlabsRequest) (*enginepb.SnapshotSlabsResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapGroup, func(c engine.Capabilities) engine.GroupSnapshotter { return c.GroupSnapshotter })
	if err != nil {
		return nil, err
	}
	defer done()
	var specs []engine.SlabSpec
	for _, spec := range r.GetSpecs() {
		specs = append(specs, spec.Go())
	}
	no, err := declined(c.SnapshotSlabs(ctx, r.GetSources(), specs))
	return &enginepb.SnapshotSlabsResponse{Declined: no}, err
}

// ModifySlab implements the protocol.
func (s *Server) ModifySlab(ctx context.Context, r *enginepb.ModifySlabRequest) (*enginepb.ModifySlabResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapModify, func(c engine.Capabilities) engine.Modifier { return c.Modifier })
	if err != nil {
		return nil, err
	}
	defer done()
	no, err := declined(c.ModifySlab(ctx, r.GetId(), r.GetParams()))
	return &enginepb.ModifySlabResponse{Declined: no}, err
}

// Importable implements the protocol.
func (s *Server) Importable(ctx context.Context, r *enginepb.ImportableRequest) (*enginepb.ImportableResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapImport, func(c engine.Capabilities) engine.Importer { return c.Importer })
	if err != nil {
		return nil, err
	}
	defer done()
	i, err := c.Importable(ctx, r.GetSource())
	return &enginepb.ImportableResponse{Size: i.Size, Allocated: i.Allocated, Holds: i.Holds}, err
}

// ImportSlab implements the protocol.
func (s *Server) ImportSlab(ctx context.Context, r *enginepb.ImportSlabRequest) (*enginepb.ImportSlabResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapImport, func(c engine.Capabilities) engine.Importer { return c.Importer })
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.ImportSlabResponse{}, c.ImportSlab(ctx, r.GetSource(), r.GetSpec().Go())
}

// KeepSlab implements the protocol.
func (s *Server) KeepSlab(ctx context.Context, r *enginepb.KeepSlabRequest) (*enginepb.KeepSlabResponse, error) {
	c, done, err := native(s, r.GetDomain(), engine.CapImport, func(c engine.Capabilities) engine.Importer { return c.Importer })
	if err != nil {
		return nil, err
	}
	defer done()
	return &enginepb.KeepSlabResponse{}, c.KeepSlab(ctx, r.GetSource(), r.GetId())
}
