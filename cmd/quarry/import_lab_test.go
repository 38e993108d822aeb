package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/process"
)

// TestALogicalVolumeIsImportedAndUsed, by the real programs.
func TestALogicalVolumeIsImportedAndUsed(t *testing.T) {
	lab.Need(t)
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	disk, group, point := lab.Disk(t), "quarry-test-import", t.TempDir()
	run("vgcreate", "-s", "1m", "--metadatasize", "8m", group, disk)
	t.Cleanup(func() { run("vgremove", "-ff", "-y", group) })
	run("lvcreate", "-y", "-L", "64m", "-n", "old", group)
	device := "/dev/" + group + "/old"
	run("mkfs.ext4", "-q", device)
	run("mount", device, point)
	if err := os.WriteFile(filepath.Join(point, "file"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}

	u := newUser(t, fmt.Sprintf("- name: fast\n  engine: lvm\n  params: {vg: %s, devices: %s}\n", group, disk))
	programs := t.TempDir()
	if err := process.Build(programs, "kubectl-quarry"); err != nil {
		t.Fatal(err)
	}
	command := []string{"import", "legacy", "--domain", "fast", "--source", "old", "--admin-endpoint", u.AdminEndpoint()}
	kubectl := filepath.Join(programs, "kubectl-quarry")
	mounted, err := exec.Command(kubectl, command...).CombinedOutput()
	for end := time.Now().Add(5 * time.Minute); strings.Contains(string(mounted), "is being opened") && time.Now().Before(end); time.Sleep(time.Second) {
		mounted, err = exec.Command(kubectl, command...).CombinedOutput()
	}
	run("umount", point)
	if err == nil || !strings.Contains(string(mounted), "in use") {
		t.Fatalf("of a volume that is mounted: %v\n%s", err, mounted)
	}
	out := run(kubectl, append(command, "--dry-run")...)
	if !strings.Contains(out, "64Mi with ext4. Nothing was changed.") {
		t.Fatalf("a dry run: %s", out)
	}
	out = run(kubectl, command...)
	found := regexp.MustCompile(`^Imported: volume "legacy" is (\S+), 64Mi with ext4`).FindStringSubmatch(out)
	if found == nil || run(kubectl, command...) != out {
		t.Fatalf("imported: %s", out)
	}

	id, staging, target := found[1], filepath.Join(u.Kubelet(), "staging"), filepath.Join(u.Kubelet(), "target")
	ext4 := &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
	context := ask(u, u.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: labNode, VolumeCapability: ext4}).GetPublishContext()
	if err := os.MkdirAll(staging, 0o755); err != nil {
		t.Fatal(err)
	}
	ask(u, u.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: id, PublishContext: context, StagingTargetPath: staging, VolumeCapability: ext4})
	ask(u, u.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: ext4})
	if have, err := os.ReadFile(filepath.Join(target, "file")); err != nil || string(have) != "kept" {
		t.Errorf("the volume holds %q, %v", have, err)
	}
	ask(u, u.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
	ask(u, u.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
	ask(u, u.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: labNode})
	ask(u, u.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: id})
}
