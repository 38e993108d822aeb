package sanity

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// TestGroupSnapshot goes where csi-test does not: two mounted volumes that are
// being written are snapshotted together, the group is found again by another
// process, restored, and deleted.
func TestGroupSnapshot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting file systems needs root")
	}
	binary := build(t)
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) { groupSnapshot(t, binary, fs) })
	}
}

// groupSnapshot returns the driver, which runs.
func groupSnapshot(t *testing.T, binary, fs string) *driver {
	root, dir := hosttest.Filesystem(t, fs, 8<<30), t.TempDir()
	domain := filepath.Join(root, "domain")
	if err := os.Mkdir(domain, 0o755); err != nil {
		t.Fatal(err)
	}
	d := start(t, binary, dir, directory(domain))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	u := user{t: t, ctx: ctx, dir: dir, d: d}

	a, b := u.create("a", ""), u.create("b", "")
	targetA, targetB := u.publish(a), u.publish(b)
	write(t, filepath.Join(targetA, "file"), "content of a")
	write(t, filepath.Join(targetB, "file"), "content of b")

	asked := &csi.CreateVolumeGroupSnapshotRequest{Name: "group", SourceVolumeIds: []string{a, b}}
	g, err := d.CreateVolumeGroupSnapshot(ctx, asked)
	if err != nil {
		t.Fatalf("%v\n%s", err, d.LastLog(40))
	}
	group := g.GroupSnapshot
	if !group.ReadyToUse || len(group.Snapshots) != 2 || group.CreationTime == nil {
		t.Fatalf("the group: %v", group)
	}
	write(t, filepath.Join(targetA, "file"), "changed")
	again, err := d.CreateVolumeGroupSnapshot(ctx, asked)
	if err != nil || again.GroupSnapshot.GroupSnapshotId != group.GroupSnapshotId || len(again.GroupSnapshot.Snapshots) != 2 {
		t.Errorf("asked again: %v, %v", again, err)
	}
	_, err = d.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "group", SourceVolumeIds: []string{a}})
	wantCode(t, "another group of the same name", err, "AlreadyExists")

	// A member is a snapshot like others, but cannot be deleted by itself.
	members := ids(group)
	_, err = u.d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: members[0]})
	wantCode(t, "deleting a member", err, "InvalidArgument")
	l, err := u.d.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil || len(l.Entries) != 2 {
		t.Errorf("listed: %v, %v", l, err)
	}

	// The process ends while the volumes stay mounted; another finds all of it again.
	d.stop(t)
	d = start(t, binary, dir, directory(domain))
	u.d = d
	found, err := d.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: group.GroupSnapshotId, SnapshotIds: members})
	if err != nil || !slices.Equal(ids(found.GroupSnapshot), members) || !found.GroupSnapshot.CreationTime.AsTime().Equal(group.CreationTime.AsTime()) {
		t.Errorf("after a restart: %v, %v; want %v", found, err, group)
	}
	if text, err := os.ReadFile(filepath.Join(targetA, "file")); err != nil || string(text) != "changed" {
		t.Errorf("the mounted volume after a restart: %q, %v", text, err)
	}

	for _, m := range group.Snapshots {
		want := map[string]string{a: "content of a", b: "content of b"}[m.SourceVolumeId]
		restored := u.create("restored-"+want[len(want)-1:], m.SnapshotId)
		text, err := os.ReadFile(filepath.Join(u.publish(restored), "file"))
		if err != nil || string(text) != want {
			t.Errorf("restored from %s: %q, %v; want %q", m.SnapshotId, text, err, want)
		}
		u.remove(restored)
	}

	_, err = d.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: group.GroupSnapshotId, SnapshotIds: members[:1]})
	wantCode(t, "deleting with another list", err, "InvalidArgument")
	for range 2 {
		if _, err := d.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: group.GroupSnapshotId, SnapshotIds: members}); err != nil {
			t.Errorf("deleting the group: %v", err)
		}
	}
	_, err = u.d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: a})
	wantCode(t, "deleting a volume in use", err, "FailedPrecondition")
	u.remove(a)
	u.remove(b)
	d.nothingIsLeft(t, domain)
	return d
}

// user does with a driver what a container orchestrator does.
type user struct {
	t   *testing.T
	ctx context.Context
	dir string
	d   *driver
}

func capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
	}
}

func (u *user) create(name, snapshot string) string {
	u.t.Helper()
	req := &csi.CreateVolumeRequest{
		Name: name, VolumeCapabilities: []*csi.VolumeCapability{capability()}, CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20},
	}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot},
		}}
	}
	r, err := u.d.CreateVolume(u.ctx, req)
	if err != nil {
		u.t.Fatalf("creating %s: %v\n%s", name, err, u.d.LastLog(40))
	}
	return r.Volume.VolumeId
}

func (u *user) paths(id string) (staging, target string) {
	p := filepath.Join(u.dir, strings.ReplaceAll(id, "/", "_"))
	return p + ".staging", p + ".target"
}

func (u *user) publish(id string) (target string) {
	u.t.Helper()
	staging, target := u.paths(id)
	if err := os.Mkdir(staging, 0o755); err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() { u.unpublish(id) })
	p, err := u.d.ControllerPublishVolume(u.ctx, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "node-1", VolumeCapability: capability()})
	if err == nil {
		_, err = u.d.NodeStageVolume(u.ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: staging, VolumeCapability: capability(), PublishContext: p.PublishContext})
	}
	if err == nil {
		_, err = u.d.NodePublishVolume(u.ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: capability(), PublishContext: p.PublishContext})
	}
	if err != nil {
		u.t.Fatalf("publishing %s: %v\n%s", id, err, u.d.LastLog(40))
	}
	return target
}

// unpublish may be repeated; it needs a driver that runs.
func (u *user) unpublish(id string) {
	if !u.d.Running() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	staging, target := u.paths(id)
	_, err := u.d.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
	if err == nil {
		_, err = u.d.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
	}
	if err == nil {
		_, err = u.d.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: "node-1"})
	}
	if err != nil {
		u.t.Errorf("unpublishing %s: %v", id, err)
	}
}

func (u *user) remove(id string) {
	u.t.Helper()
	u.unpublish(id)
	if _, err := u.d.DeleteVolume(u.ctx, &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
		u.t.Errorf("deleting %s: %v", id, err)
	}
}

func ids(g *csi.VolumeGroupSnapshot) []string {
	var out []string
	for _, s := range g.GetSnapshots() {
		out = append(out, s.SnapshotId)
	}
	slices.Sort(out)
	return out
}

func write(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, what string, err error, want string) {
	t.Helper()
	if got := status.Code(err).String(); got != want {
		t.Errorf("%s: %s (%v), want %s", what, got, err, want)
	}
}
