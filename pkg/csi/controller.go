package csi

import (
	"context"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// CreateVolume makes a volume: empty, from a snapshot or from a volume.
func (s *Server) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	r, err := s.createRequest(req)
	if err != nil {
		return nil, err
	}
	img, err := s.cfg.Manager.CreateVolume(ctx, r)
	if err != nil {
		return nil, err
	}
	v, err := s.volume(img)
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: v}, nil
}

func (s *Server) createRequest(req *csi.CreateVolumeRequest) (r image.CreateRequest, err error) {
	if err := checkName("name", req.GetName()); err != nil {
		return r, err
	}
	as, err := accesses(req.GetVolumeCapabilities())
	if err != nil {
		return r, err
	}
	size, limit, err := sizes(req.GetCapacityRange())
	if err != nil {
		return r, err
	}
	c, err := parseClass(req.GetParameters(), req.GetMutableParameters())
	if err != nil {
		return r, err
	}
	where, err := nodes(req.GetAccessibilityRequirements())
	if err != nil {
		return r, err
	}
	source, mutable, err := s.contentSource(req.GetVolumeContentSource())
	if err != nil {
		return r, err
	}
	for _, a := range as {
		if !slices.Contains(c.described.Modes, string(a.Mode)) {
			c.described.Modes = append(c.described.Modes, string(a.Mode))
		}
		c.described.Block = c.described.Block || a.Block
		if a.Filesystem != "" {
			c.described.Filesystem = a.Filesystem
		}
	}
	// Layout, filesystem, sizes and the engine's parameters are verified against
	// the domain by the Image Manager.
	return image.CreateRequest{
		Name: req.GetName(), Domains: c.domains, Layout: c.layout, Accesses: as, Size: size, Limit: limit,
		Source: source, SourceMutable: mutable, RequireNative: c.requireNative, RestoreToSource: c.restoreToSource, Encrypted: c.encrypted, ThinLayers: c.thinLayers,
		Params: c.engine, Tuning: c.tuning, Described: c.described, Nodes: where,
	}, nil
}

// contentSource reads the handle of the source, and whether it is a volume. The
// handle is canonical, so that a request that is repeated after the domain got
// another name is the same request.
func (s *Server) contentSource(src *csi.VolumeContentSource) (handle string, volume bool, err error) {
	var h image.Handle
	switch {
	case src == nil:
		return "", false, nil
	case src.GetSnapshot() != nil:
		h, err = handleOf("volume_content_source.snapshot.snapshot_id", src.GetSnapshot().GetSnapshotId())
	case src.GetVolume() != nil:
		volume = true
		h, err = handleOf("volume_content_source.volume.volume_id", src.GetVolume().GetVolumeId())
	default:
		err = fault.New(fault.Invalid, "volume_content_source is of an unknown type: known are snapshot and volume")
	}
	if err != nil {
		return "", false, err
	}
	return s.cfg.Manager.Canonical(h).String(), volume, nil
}

// DeleteVolume deletes. What does not exist is deleted already.
func (s *Server) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err == nil {
		err = s.cfg.Manager.DeleteVolume(ctx, h)
	}
	if err = ignoreAbsent(err); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// ignoreAbsent makes success of "does not exist", for calls that undo.
func ignoreAbsent(err error) error {
	if err != nil && fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// ControllerExpandVolume grows the image; the node then grows what is on it.
func (s *Server) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	size, limit, err := sizes(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	if size == 0 && limit == 0 {
		return nil, fault.New(fault.Invalid, "capacity_range is missing: say required_bytes")
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		a, err := access("volume_capability", req.GetVolumeCapability())
		if err != nil {
			return nil, err
		}
		if err := s.cfg.Manager.CheckAccess(ctx, h, []image.Access{a}); err != nil {
			return nil, err
		}
	}
	img, err := s.cfg.Manager.Expand(ctx, h, size, limit)
	if err != nil {
		return nil, err
	}
	// A directory has nothing on its node that could grow; an image has its
	// device's size, and its filesystem if there is one.
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: img.Size, NodeExpansionRequired: img.Layout == image.LayoutImage}, nil
}

// ControllerModifyVolume changes mutable parameters; what is not named stays.
func (s *Server) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetMutableParameters()) == 0 {
		return nil, fault.New(fault.Invalid, "mutable_parameters is empty: known are %s, %s and what the domain's engine adds", paramChainLimit, paramQuiesceLimit)
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	t, rest, err := parseTuning(req.GetMutableParameters())
	if err != nil {
		return nil, err
	}
	if _, err := s.volumeImage(ctx, h); err != nil {
		return nil, err
	}
	if err := s.cfg.Manager.Modify(ctx, h, t, rest); err != nil {
		return nil, err
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}

// GetCapacity says how much can still be promised to a class.
func (s *Server) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	c, err := parseClass(req.GetParameters(), nil)
	if err != nil {
		return nil, err
	}
	var as []image.Access
	if len(req.GetVolumeCapabilities()) > 0 {
		if as, err = accesses(req.GetVolumeCapabilities()); err != nil {
			return nil, err
		}
	}
	if err := s.checkEngineParams(c); err != nil {
		return nil, err
	}
	var node string
	if req.GetAccessibleTopology() != nil {
		if node, err = nodeOf("accessible_topology", req.GetAccessibleTopology()); err != nil {
			return nil, err
		}
	}
	kind, err := slabKind(c.layout, as)
	if err != nil {
		return nil, err
	}
	domains, none := s.suitable(c, kind)
	if none {
		return &csi.GetCapacityResponse{}, nil
	}
	room, err := s.measure(ctx, domains, node)
	if err != nil {
		return nil, err
	}
	if c.encrypted { // the header is not the user's
		room.available = max(0, room.available-image.EncryptionHeader)
		room.largest = max(0, room.largest-image.EncryptionHeader)
	}
	r := &csi.GetCapacityResponse{AvailableCapacity: room.available}
	if room.largest > 0 {
		r.MaximumVolumeSize = wrapperspb.Int64(room.largest)
	}
	if room.smallest > 0 {
		r.MinimumVolumeSize = wrapperspb.Int64(room.smallest)
	}
	return r, nil
}

// suitable narrows a class's domains to those that can hold its volumes; nil
// means every domain, none that there is not one.
func (s *Server) suitable(c class, kind engine.Kind) (domains []string, none bool) {
	narrowed := false
	known := map[string]bool{}
	for _, d := range s.cfg.Manager.KnownDomains() {
		for _, n := range append([]string{d.ID, d.Config.Name}, d.Config.Aliases...) {
			known[n] = true
		}
		if !c.places(d) {
			continue
		}
		fits := kind == "" || !d.Open || slices.Contains(d.Description.Kinds, kind)
		for _, n := range c.requireNative {
			fits = fits && (!d.Open || slices.Contains(d.Capabilities, n))
		}
		if fits {
			domains = append(domains, d.ID)
		} else {
			narrowed = true
		}
	}
	for _, n := range c.domains { // an unknown name is the Image Manager's to refuse
		if !known[n] {
			return c.domains, false
		}
	}
	if !narrowed {
		return c.domains, false
	}
	return domains, len(domains) == 0
}

// ControllerGetCapabilities lists what every domain gives. The Image Manager
// makes up for what a storage lacks, except where the administrator forbade it.
func (s *Server) ControllerGetCapabilities(ctx context.Context, _ *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	types := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_READONLY,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	}
	if s.somewhere(engine.CapSnapshot) {
		types = append(types, csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT)
	}
	if s.somewhere(engine.CapClone) {
		types = append(types, csi.ControllerServiceCapability_RPC_CLONE_VOLUME)
	}
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range types {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{
			Rpc: &csi.ControllerServiceCapability_RPC{Type: t},
		}})
	}
	return r, nil
}

// somewhere says whether at least one domain has a capability, natively or by
// its default. Without any domain, and for one that is not open, the default counts.
func (s *Server) somewhere(c engine.Capability) bool {
	domains := s.cfg.Manager.KnownDomains()
	return len(domains) == 0 || slices.ContainsFunc(domains, func(d image.DomainInfo) bool {
		return !d.Config.NativeOnly || !d.Open || slices.Contains(d.Capabilities, c)
	})
}

// ValidateVolumeCapabilities confirms what a volume can be used for. A volume
// that cannot be used so is an answer, not an error.
func (s *Server) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	as, err := accesses(req.GetVolumeCapabilities())
	if err != nil {
		return nil, err
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	img, err := s.volumeImage(ctx, h)
	if err != nil {
		return nil, err
	}
	switch err := s.validate(ctx, img, as, req); {
	case err == nil:
	case fault.KindOf(err) == fault.Invalid:
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	default:
		return nil, err
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters: req.GetParameters(), MutableParameters: req.GetMutableParameters(),
	}}, nil
}

func (s *Server) validate(ctx context.Context, img image.Image, as []image.Access, req *csi.ValidateVolumeCapabilitiesRequest) error {
	if err := s.cfg.Manager.CheckAccess(ctx, img.Handle, as); err != nil {
		return err
	}
	for k := range req.GetVolumeContext() {
		// Sidecars add keys of their own; Quarry gives none.
		if !strings.HasPrefix(k, metadataPrefix) && !strings.HasPrefix(k, "storage.kubernetes.io/") {
			return fault.New(fault.Invalid, "volume_context: key %q is not one of this volume", k)
		}
	}
	c, err := parseClass(req.GetParameters(), req.GetMutableParameters())
	if err != nil {
		return err
	}
	if err := s.checkEngineParams(c); err != nil {
		return err
	}
	if c.layout != "" && c.layout != img.Layout {
		return fault.New(fault.Invalid, "parameter %s=%q: the volume has layout %q", paramLayout, c.layout, img.Layout)
	}
	if v, said := req.GetParameters()[paramEncrypted]; said && c.encrypted != img.Encrypted {
		return fault.New(fault.Invalid, "parameter %s=%q: the volume has encrypted=%t", paramEncrypted, v, img.Encrypted)
	}
	if v, said := req.GetParameters()[paramThinLayers]; said && c.thinLayers != img.ThinLayers {
		return fault.New(fault.Invalid, "parameter %s=%q: the volume has thinLayers=%t", paramThinLayers, v, img.ThinLayers)
	}
	if len(c.domains) == 0 {
		return nil
	}
	for _, d := range s.cfg.Manager.KnownDomains() {
		if d.ID == img.Handle.Domain && !c.places(d) {
			return fault.New(fault.Invalid, "the volume is on domain %q, the parameters say %s", d.ID, strings.Join(c.domains, ", "))
		}
	}
	return nil
}

// volumeImage finds a volume. A snapshot's handle is not a volume's.
func (s *Server) volumeImage(ctx context.Context, h image.Handle) (image.Image, error) {
	img, err := s.cfg.Manager.Get(ctx, h)
	if err == nil && !img.Mutable {
		err = fault.New(fault.NotFound, "%q is a snapshot, not a volume", h)
	}
	return img, err
}

// volume translates an image.
func (s *Server) volume(img image.Image) (*csi.Volume, error) {
	t, err := s.topology(img.Handle.Domain)
	if err != nil {
		return nil, err
	}
	v := &csi.Volume{VolumeId: img.Handle.String(), CapacityBytes: img.Size, AccessibleTopology: t}
	switch {
	case img.Source == "":
	case img.SourceMutable:
		v.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: img.Source},
		}}
	default:
		v.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: img.Source},
		}}
	}
	return v, nil
}
