package agent

import (
	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/image"
)

func toHandle(h image.Handle) *agentpb.Handle {
	return &agentpb.Handle{Domain: h.Domain, Image: h.Image}
}

func fromHandle(h *agentpb.Handle) image.Handle {
	return image.Handle{Domain: h.GetDomain(), Image: h.GetImage()}
}

func toSlabs(slabs []image.SlabRef) []*agentpb.SlabRef {
	var out []*agentpb.SlabRef
	for _, s := range slabs {
		out = append(out, &agentpb.SlabRef{Id: s.ID, Size: s.Size, Chunk: s.Chunk, Replaces: s.Replaces})
	}
	return out
}

func fromSlabs(slabs []*agentpb.SlabRef) []image.SlabRef {
	var out []image.SlabRef
	for _, s := range slabs {
		out = append(out, image.SlabRef{ID: s.GetId(), Size: s.GetSize(), Chunk: s.GetChunk(), Replaces: s.GetReplaces()})
	}
	return out
}

func toStaging(s image.Staging) *agentpb.Staging {
	return &agentpb.Staging{Handle: toHandle(s.Handle), Domain: s.Domain, Epoch: s.Epoch, Layout: string(s.Layout), Size: s.Size, Crypt: s.Crypt, Slabs: toSlabs(s.Slabs),
		ReadOnly: s.ReadOnly, Fresh: s.Fresh, Filesystem: s.Filesystem, Cloned: s.Cloned, Block: s.Block, Mode: string(s.Mode), Told: s.Told}
}

func fromStaging(s *agentpb.Staging) image.Staging {
	return image.Staging{Handle: fromHandle(s.GetHandle()), Domain: s.GetDomain(), Epoch: s.GetEpoch(), Layout: image.Layout(s.GetLayout()), Size: s.GetSize(), Crypt: s.GetCrypt(),
		Slabs: fromSlabs(s.GetSlabs()), ReadOnly: s.GetReadOnly(), Fresh: s.GetFresh(), Filesystem: s.GetFilesystem(), Cloned: s.GetCloned(), Block: s.GetBlock(),
		Mode: image.Mode(s.GetMode()), Told: s.GetTold()}
}

func toPlace(p image.Place) *agentpb.Place { return &agentpb.Place{Domain: p.Domain, Slab: p.Slab} }

func fromPlace(p *agentpb.Place) image.Place {
	return image.Place{Domain: p.GetDomain(), Slab: p.GetSlab()}
}

func toContent(c image.Content) *agentpb.Content {
	out := &agentpb.Content{Place: toPlace(c.Place), Node: c.Node, Size: c.Size}
	if c.Chain != nil {
		out.Chain = toStaging(*c.Chain)
	}
	return out
}

func fromContent(c *agentpb.Content) image.Content {
	out := image.Content{Place: fromPlace(c.GetPlace()), Node: c.GetNode(), Size: c.GetSize()}
	if c.GetChain() != nil {
		st := fromStaging(c.GetChain())
		out.Chain = &st
	}
	return out
}

func toExtents(list []engine.Extent) []*agentpb.Extent {
	var out []*agentpb.Extent
	for _, e := range list {
		out = append(out, &agentpb.Extent{Offset: e.Offset, Length: e.Length})
	}
	return out
}

func fromExtents(list []*agentpb.Extent) []engine.Extent {
	var out []engine.Extent
	for _, e := range list {
		out = append(out, engine.Extent{Offset: e.GetOffset(), Length: e.GetLength()})
	}
	return out
}
