package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// volume is a CSI volume and where it is mounted while it is.
type volume struct {
	name   string
	id     string
	size   int64
	domain string
	fs     string
	// context is what ControllerPublishVolume answered, while published.
	context map[string]string
	staging string
	target  string // where a workload would see it; "" while unpublished
}

func (v *volume) capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fs}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// create asks for a volume in the domain p; source nil makes an empty one.
func (q *quarry) create(ctx context.Context, p *place, name string, bytes int64, fs string, source *csi.VolumeContentSource) (*volume, error) {
	v := &volume{name: name, domain: p.domain, fs: fs}
	reply, err := call(ctx, q.CreateVolume, &csi.CreateVolumeRequest{
		Name:                p.domain + "-" + name,
		CapacityRange:       &csi.CapacityRange{RequiredBytes: bytes},
		VolumeCapabilities:  []*csi.VolumeCapability{v.capability()},
		Parameters:          map[string]string{"domain": p.domain},
		VolumeContentSource: source,
	})
	if err != nil {
		return nil, fmt.Errorf("create volume %s: %w", name, err)
	}
	v.id, v.size = reply.GetVolume().GetVolumeId(), reply.GetVolume().GetCapacityBytes()
	return v, nil
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

// mount does what the attacher and the kubelet do: publish on the controller,
// stage and publish on the node.
func (q *quarry) mount(ctx context.Context, v *volume) error {
	published, err := call(ctx, q.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{
		VolumeId: v.id, NodeId: q.node, VolumeCapability: v.capability(),
	})
	if err != nil {
		return fmt.Errorf("attach %s: %w", v.name, err)
	}
	v.context = published.GetPublishContext()
	// The same folders as the kubelet's.
	v.staging = filepath.Join(q.Kubelet(), "plugins", "kubernetes.io", "csi", v.domain+"-"+v.name, "globalmount")
	pod := filepath.Join(q.Kubelet(), "pods", v.domain+"-"+v.name, "volumes", "kubernetes.io~csi", v.name)
	for _, dir := range []string{v.staging, pod} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if _, err := call(ctx, q.NodeStageVolume, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, PublishContext: v.context, StagingTargetPath: v.staging, VolumeCapability: v.capability(),
	}); err != nil {
		return fmt.Errorf("stage %s: %w", v.name, err)
	}
	target := filepath.Join(pod, "mount")
	if _, err := call(ctx, q.NodePublishVolume, &csi.NodePublishVolumeRequest{
		VolumeId: v.id, PublishContext: v.context, StagingTargetPath: v.staging, TargetPath: target, VolumeCapability: v.capability(),
	}); err != nil {
		return fmt.Errorf("publish %s: %w", v.name, err)
	}
	v.target = target
	return nil
}

// unmount is the reverse of mount.
func (q *quarry) unmount(ctx context.Context, v *volume) error {
	if _, err := call(ctx, q.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target}); err != nil {
		return fmt.Errorf("unpublish %s: %w", v.name, err)
	}
	v.target = ""
	if _, err := call(ctx, q.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging}); err != nil {
		return fmt.Errorf("unstage %s: %w", v.name, err)
	}
	if _, err := call(ctx, q.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: q.node}); err != nil {
		return fmt.Errorf("detach %s: %w", v.name, err)
	}
	return nil
}

// expand grows a mounted volume and the filesystem on it.
func (q *quarry) expand(ctx context.Context, v *volume, bytes int64) error {
	grown, err := call(ctx, q.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{
		VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}, VolumeCapability: v.capability(),
	})
	if err != nil {
		return fmt.Errorf("grow %s: %w", v.name, err)
	}
	v.size = grown.GetCapacityBytes()
	if !grown.GetNodeExpansionRequired() {
		return nil
	}
	if _, err := call(ctx, q.NodeExpandVolume, &csi.NodeExpandVolumeRequest{
		VolumeId: v.id, VolumePath: v.target, StagingTargetPath: v.staging,
		CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}, VolumeCapability: v.capability(),
	}); err != nil {
		return fmt.Errorf("grow the filesystem of %s: %w", v.name, err)
	}
	return nil
}

func (q *quarry) remove(ctx context.Context, v *volume) error {
	_, err := call(ctx, q.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id})
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", v.name, err)
	}
	return nil
}

// snapshot cuts v and waits until the snapshot is ready to use. cut is how long
// the call took that answered after the cut.
func (q *quarry) snapshot(ctx context.Context, v *volume, name string) (id string, cut time.Duration, err error) {
	begin := time.Now()
	request := &csi.CreateSnapshotRequest{SourceVolumeId: v.id, Name: v.domain + "-" + name}
	for {
		reply, err := call(ctx, q.CreateSnapshot, request)
		if err != nil {
			return "", 0, fmt.Errorf("snapshot %s of %s: %w", name, v.name, err)
		}
		if cut == 0 {
			cut = time.Since(begin)
		}
		if reply.GetSnapshot().GetReadyToUse() {
			return reply.GetSnapshot().GetSnapshotId(), cut, nil
		}
		select {
		case <-ctx.Done():
			return "", 0, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// how says which way an image came to be, in the words of kubectl-quarry.
func (q *quarry) how(ctx context.Context, id string) (string, error) {
	images, err := q.images(ctx)
	if err != nil {
		return "", err
	}
	for _, i := range images {
		if i.Handle == id {
			return i.How, nil
		}
	}
	return "", fmt.Errorf("kubectl-quarry images does not list %s", id)
}

// filesystemSize is what a workload sees at path, in bytes.
func filesystemSize(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(st.Blocks) * st.Bsize, nil
}

func (q *quarry) removeSnapshot(ctx context.Context, id string) error {
	if _, err := call(ctx, q.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
		return fmt.Errorf("delete snapshot %s: %w", id, err)
	}
	return nil
}
