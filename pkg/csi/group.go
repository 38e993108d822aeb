package csi

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// GroupControllerGetCapabilities lists what groups can do.
func (s *Server) GroupControllerGetCapabilities(ctx context.Context, _ *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	r := &csi.GroupControllerGetCapabilitiesResponse{}
	if s.somewhere(engine.CapSnapshot) {
		r.Capabilities = append(r.Capabilities, &csi.GroupControllerServiceCapability{Type: &csi.GroupControllerServiceCapability_Rpc{
			Rpc: &csi.GroupControllerServiceCapability_RPC{Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT},
		}})
	}
	return r, nil
}

// CreateVolumeGroupSnapshot snapshots several volumes at one moment.
func (s *Server) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	if err := checkName("name", req.GetName()); err != nil {
		return nil, err
	}
	if len(req.GetSourceVolumeIds()) == 0 {
		return nil, fault.New(fault.Invalid, "source_volume_ids is empty: at least one volume is needed")
	}
	// A field of the class, which sidecars heed; Kubernetes' own suite says it here again.
	params := maps.Clone(req.GetParameters())
	delete(params, "deletionPolicy")
	c, err := parseSnapshotClass(params)
	if err != nil {
		return nil, err
	}
	var sources []image.Handle
	for i, id := range req.GetSourceVolumeIds() {
		h, err := handleOf(fmt.Sprintf("source_volume_ids[%d]", i), id)
		if err != nil {
			return nil, err
		}
		if slices.Contains(sources, h) {
			return nil, fault.New(fault.Invalid, "source_volume_ids[%d] %q is there twice", i, id)
		}
		sources = append(sources, h)
	}
	g, err := s.cfg.Manager.CreateGroup(ctx, image.GroupRequest{
		Name: req.GetName(), Sources: sources, Inexact: c.inexact, RequireNative: c.requireNative, Described: c.described,
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: group(g)}, nil
}

// GetVolumeGroupSnapshot describes a group snapshot.
func (s *Server) GetVolumeGroupSnapshot(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	h, err := handleOf("group_snapshot_id", req.GetGroupSnapshotId())
	if err != nil {
		return nil, err
	}
	g, err := s.cfg.Manager.GetGroup(ctx, h)
	if err != nil {
		return nil, err
	}
	if err := checkMembers(g, req.GetSnapshotIds()); err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: group(g)}, nil
}

// DeleteVolumeGroupSnapshot deletes a group and its snapshots. What does not
// exist is deleted already.
func (s *Server) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	h, err := handleOf("group_snapshot_id", req.GetGroupSnapshotId())
	if err == nil {
		var g image.Group
		if g, err = s.cfg.Manager.GetGroup(ctx, h); err == nil {
			if err := checkMembers(g, req.GetSnapshotIds()); err != nil {
				return nil, err
			}
			err = s.cfg.Manager.DeleteGroup(ctx, h)
		}
	}
	if err = ignoreAbsent(err); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// checkMembers verifies that the CO means the same snapshots as the group.
func checkMembers(g image.Group, ids []string) error {
	have := group(g)
	want := make([]string, 0, len(have.Snapshots))
	for _, m := range have.Snapshots {
		want = append(want, m.SnapshotId)
	}
	slices.Sort(want)
	given := slices.Sorted(slices.Values(ids))
	if !slices.Equal(want, given) {
		return fault.New(fault.Invalid, "snapshot_ids %q: the group snapshot %q has %q", given, g.Handle, want)
	}
	return nil
}

// group translates a group. Every member carries the group's ID: it cannot be
// deleted by itself.
func group(g image.Group) *csi.VolumeGroupSnapshot {
	out := &csi.VolumeGroupSnapshot{
		GroupSnapshotId: g.Handle.String(), CreationTime: timestamppb.New(g.Created), ReadyToUse: g.Ready,
	}
	for _, img := range g.Snapshots {
		m := snapshot(img)
		m.GroupSnapshotId = out.GroupSnapshotId
		out.ReadyToUse = out.ReadyToUse && m.ReadyToUse
		out.Snapshots = append(out.Snapshots, m)
	}
	return out
}
