package enginepb

import (
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// Version of the protocol that this package is.
const Version = 1

// KindOf translates a slab's kind; one that is unknown becomes KIND_UNSPECIFIED.
func KindOf(k engine.Kind) Kind {
	switch k {
	case engine.Block:
		return Kind_KIND_BLOCK
	case engine.Tree:
		return Kind_KIND_TREE
	}
	return Kind_KIND_UNSPECIFIED
}

// Go translates back; what is unknown becomes "".
func (k Kind) Go() engine.Kind {
	switch k {
	case Kind_KIND_BLOCK:
		return engine.Block
	case Kind_KIND_TREE:
		return engine.Tree
	}
	return ""
}

// SpecOf translates a slab's spec.
func SpecOf(s engine.SlabSpec) *SlabSpec {
	return &SlabSpec{Id: s.ID, Kind: KindOf(s.Kind), Size: s.Size, Params: s.Params}
}

// Go translates back; no spec is an empty one.
func (s *SlabSpec) Go() engine.SlabSpec {
	return engine.SlabSpec{ID: s.GetId(), Kind: s.GetKind().Go(), Size: s.GetSize(), Params: s.GetParams()}
}

// UsageOf translates what was measured.
func UsageOf(u engine.Usage) *UsageResponse {
	return &UsageResponse{Total: u.Total, Used: u.Used, Available: u.Available, InodesTotal: u.InodesTotal, InodesFree: u.InodesFree, Warning: Text(u.Warning)}
}

// Go translates back.
func (u *UsageResponse) Go() engine.Usage {
	return engine.Usage{Total: u.GetTotal(), Used: u.GetUsed(), Available: u.GetAvailable(), InodesTotal: u.GetInodesTotal(), InodesFree: u.GetInodesFree(), Warning: u.GetWarning()}
}

// DescriptionOf translates what a domain says of itself.
func DescriptionOf(d engine.Description) *DescribeResponse {
	r := &DescribeResponse{Granularity: d.Granularity, MaxSlabSize: d.MaxSlabSize, MaxTags: d.MaxTags, ZeroedSpace: d.ZeroedSpace, AtomicListing: d.AtomicListing,
		SharedAccess: d.SharedAccess, MultiWriterBlock: d.MultiWriterBlock, Location: Text(d.Location), Params: d.Params, ParamValues: d.ParamValues, TreeParams: d.TreeParams, MountOptions: d.MountOptions}
	for _, k := range d.Kinds {
		r.Kinds = append(r.Kinds, KindOf(k))
	}
	for _, n := range d.Notes {
		r.Notes = append(r.Notes, Text(n))
	}
	return r
}

// Go translates back.
func (r *DescribeResponse) Go() engine.Description {
	d := engine.Description{Granularity: r.GetGranularity(), MaxSlabSize: r.GetMaxSlabSize(), MaxTags: r.GetMaxTags(), ZeroedSpace: r.GetZeroedSpace(), AtomicListing: r.GetAtomicListing(),
		SharedAccess: r.GetSharedAccess(), MultiWriterBlock: r.GetMultiWriterBlock(), Location: r.GetLocation(), Params: r.GetParams(), ParamValues: r.GetParamValues(), TreeParams: r.GetTreeParams(), MountOptions: r.GetMountOptions(), Notes: r.GetNotes()}
	for _, k := range r.GetKinds() {
		d.Kinds = append(d.Kinds, k.Go())
	}
	return d
}

// Text makes text for people fit for a message: protocol buffers take valid UTF-8 only.
func Text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
