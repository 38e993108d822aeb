package csi

import (
	"cmp"
	"context"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

// NodeGetInfo names the node.
func (s *Server) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             s.cfg.NodeID,
		AccessibleTopology: &csi.Topology{Segments: map[string]string{TopologyKey: s.cfg.NodeID}},
	}, nil
}

// NodeGetCapabilities lists what the node can do.
func (s *Server) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	} {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{
			Rpc: &csi.NodeServiceCapability_RPC{Type: t},
		}})
	}
	return r, nil
}

// NodeStageVolume makes a volume's device or directory, with its filesystem,
// ready at the staging path.
func (s *Server) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	staging, err := pathOf("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := access("volume_capability", req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	gen, err := generation(req.GetPublishContext())
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Node.Stage(ctx, node.StageRequest{
		Handle: h, Generation: gen, StagingPath: staging, Access: a,
		MountFlags: req.GetVolumeCapability().GetMount().GetMountFlags(),
		Passphrase: node.Passphrase(req.GetSecrets()[node.PassphraseKey]),
	}); err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// NodeUnstageVolume undoes NodeStageVolume. What is not staged needs nothing.
func (s *Server) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	staging, err := pathOf("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err == nil {
		err = s.cfg.Node.Unstage(ctx, h, staging)
	}
	if err = ignoreAbsent(err); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume makes a staged volume appear where a workload sees it.
func (s *Server) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	target, err := pathOf("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	a, err := access("volume_capability", req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if req.GetStagingTargetPath() == "" { // the one missing field that is not INVALID_ARGUMENT
		return nil, fault.New(fault.InUse, "staging_target_path is missing: the volume must be staged first")
	}
	staging, err := pathOf("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Node.Publish(ctx, node.PublishRequest{
		Handle: h, StagingPath: staging, TargetPath: target, Access: a,
		ReadOnly:   req.GetReadonly() || a.Mode.ReadOnly(),
		MountFlags: req.GetVolumeCapability().GetMount().GetMountFlags(),
	}); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume undoes NodePublishVolume.
func (s *Server) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	target, err := pathOf("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err == nil {
		err = s.cfg.Node.Unpublish(ctx, h, target)
	}
	if err = ignoreAbsent(err); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats measures a volume in use.
func (s *Server) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	h, path, err := volumeAt(req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	st, err := s.cfg.Node.Stats(ctx, h, path)
	if err != nil {
		return nil, err
	}
	if st.Block {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: st.Total}}}, nil
	}
	r := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{
		Unit: csi.VolumeUsage_BYTES, Total: st.Total, Used: st.Used, Available: st.Available,
	}}}
	if st.Inodes > 0 { // btrfs counts none
		r.Usage = append(r.Usage, &csi.VolumeUsage{
			Unit: csi.VolumeUsage_INODES, Total: st.Inodes, Used: st.InodesUsed, Available: st.InodesFree,
		})
	}
	return r, nil
}

// volumeAt reads a volume ID and a path at which the volume should be. A path
// that cannot be one is a path where the volume is not.
func volumeAt(id, at string) (h image.Handle, path string, err error) {
	if err := required("volume_id", id); err != nil {
		return h, "", err
	}
	if err := required("volume_path", at); err != nil {
		return h, "", err
	}
	if h, err = handleOf("volume_id", id); err != nil {
		return h, "", err
	}
	if path, err = pathOf("volume_path", at); err != nil {
		return h, "", fault.New(fault.NotFound, "volume %q is not there: %w", h, err)
	}
	return h, path, nil
}

// NodeExpandVolume grows the device and the filesystem of a volume in use.
func (s *Server) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	h, path, err := volumeAt(req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	size, limit, err := sizes(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	if req.GetVolumeCapability() != nil {
		if _, err := access("volume_capability", req.GetVolumeCapability()); err != nil {
			return nil, err
		}
	}
	got, err := s.cfg.Node.Expand(ctx, h, path, size)
	if err != nil {
		return nil, err
	}
	if limit > 0 && got > limit {
		return nil, fault.New(fault.OutOfRange, "capacity_range.limit_bytes is %d: volume %q has %d bytes already", limit, h, got)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: got}, nil
}

// NodeGetVolumeHealth says what is wrong with a volume on this node.
func (s *Server) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	conditions, err := s.cfg.Node.Health(ctx, h)
	if err != nil {
		return nil, err
	}
	out := &csi.VolumeHealth{VolumeId: h.String()}
	for _, c := range conditions { // package node names the statuses as CSI does
		out.HealthStatuses = append(out.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status: csi.VolumeHealthErrorType(csi.VolumeHealthErrorType_value[string(c.Status)]), Reason: c.Reason, Message: c.Message,
		})
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: out}, nil
}

// NodeGetStorageHealth says which domains cannot be used from this node.
func (s *Server) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	var open, problems []string
	for _, d := range s.cfg.Domains.KnownDomains() {
		switch {
		case d.Config.Scope == image.ScopeNode && d.Config.Node != s.cfg.NodeID:
		case d.Open:
			open = append(open, d.ID)
		default:
			problems = append(problems, "domain "+cmp.Or(d.ID, d.Config.Name)+": "+d.Problem)
		}
	}
	conditions := s.cfg.Node.StorageHealth(ctx, open)
	if len(problems) > 0 { // one entry: a status and reason must not come twice
		conditions = append(conditions, node.Condition{Status: node.StorageUnreachable, Reason: "DomainNotOpen", Message: strings.Join(problems, "; ")})
	}
	r := &csi.NodeGetStorageHealthResponse{}
	for _, c := range conditions {
		r.BackendHealth = append(r.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: csi.StorageHealthErrorType(csi.StorageHealthErrorType_value[string(c.Status)]), Reason: c.Reason, Message: c.Message,
		})
	}
	return r, nil
}
