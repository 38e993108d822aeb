package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/test/bench/rig"
	"github.com/quarry-csi/quarry/test/process"
)

// patience is how long something is waited for that takes moments.
const patience = 10 * time.Minute

// volume is an ext4 in a file at the server.
type volume struct {
	q               *process.Quarry
	id, name        string
	staging, target string
	published       map[string]string
}

func ext4() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4",
			// Else the kernel writes zeros for inodes, for minutes, beside what is measured.
			MountFlags: []string{"noinit_itable"}}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// create makes a volume of size bytes, empty or of a snapshot.
func create(ctx context.Context, q *process.Quarry, name string, size int64, snapshot string) (*volume, error) {
	request := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{ext4()}, Parameters: map[string]string{"domain": domain}}
	if snapshot != "" {
		request.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	}
	reply, err := rig.Call(ctx, q.CreateVolume, request)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", name, err)
	}
	return &volume{q: q, id: reply.GetVolume().GetVolumeId(), name: name,
		staging: filepath.Join(q.Kubelet(), name, "staging"), target: filepath.Join(q.Kubelet(), name, "pod", "mount")}, nil
}

// use attaches and mounts it.
func (v *volume) use(ctx context.Context) error {
	if err := v.attach(ctx); err != nil {
		return err
	}
	return v.mount(ctx)
}

// end unmounts, detaches and deletes it.
func (v *volume) end(ctx context.Context) error {
	for _, step := range []func(context.Context) error{v.unmount, v.detach, v.remove} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (v *volume) attach(ctx context.Context) error {
	reply, err := rig.Call(ctx, v.q.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: rig.Node, VolumeCapability: ext4()})
	v.published = reply.GetPublishContext()
	return err
}

func (v *volume) mount(ctx context.Context) error {
	for _, dir := range []string{v.staging, filepath.Dir(v.target)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if _, err := rig.Call(ctx, v.q.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: v.id, PublishContext: v.published,
		StagingTargetPath: v.staging, VolumeCapability: ext4()}); err != nil {
		return fmt.Errorf("stage %s: %w", v.name, err)
	}
	_, err := rig.Call(ctx, v.q.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: v.id, PublishContext: v.published,
		StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: ext4()})
	return err
}

func (v *volume) unmount(ctx context.Context) error {
	if _, err := rig.Call(ctx, v.q.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target}); err != nil {
		return err
	}
	_, err := rig.Call(ctx, v.q.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	return err
}

func (v *volume) detach(ctx context.Context) error {
	_, err := rig.Call(ctx, v.q.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: rig.Node})
	return err
}

func (v *volume) expand(ctx context.Context, size int64) error {
	to := &csi.CapacityRange{RequiredBytes: size}
	if _, err := rig.Call(ctx, v.q.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: to, VolumeCapability: ext4()}); err != nil {
		return err
	}
	_, err := rig.Call(ctx, v.q.NodeExpandVolume, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, CapacityRange: to, VolumeCapability: ext4()})
	return err
}

func (v *volume) remove(ctx context.Context) error {
	_, err := rig.Call(ctx, v.q.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

// snapshot makes one and returns its ID.
func (v *volume) snapshot(ctx context.Context, name string) (string, error) {
	reply, err := rig.Call(ctx, v.q.CreateSnapshot, &csi.CreateSnapshotRequest{SourceVolumeId: v.id, Name: name})
	if err == nil && !reply.GetSnapshot().GetReadyToUse() {
		err = fmt.Errorf("snapshot %s of %s is not ready to use", name, v.name)
	}
	return reply.GetSnapshot().GetSnapshotId(), err
}

func removeSnapshot(ctx context.Context, q *process.Quarry, id string) error {
	_, err := rig.Call(ctx, q.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: id})
	return err
}

// write puts so many MiB into files of a volume or a share, durably.
func write(dir string, size int64) error {
	const each = 16
	for i := int64(0); i*each < size; i++ {
		if err := rig.Filled(filepath.Join(dir, fmt.Sprint("file", i)), min(each, size-i*each)*mib); err != nil {
			return err
		}
	}
	return nil
}

// until asks again and again whether something is so.
func until(ctx context.Context, what string, is func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if yes, err := is(); err != nil || yes {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
