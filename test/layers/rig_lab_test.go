package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/process"
)

const (
	nodeID     = "n1"
	domainName = "disk"
	mib        = int64(1) << 20
	gib        = int64(1) << 30
	// patience is how long one call may be repeated, as a sidecar repeats it, and
	// how long a state is waited for: far beyond what either takes.
	patience = 10 * time.Minute
	// longVariable, set to "long", asks for what takes an hour.
	longVariable = "QUARRY_LAYERS"
	seedVariable = "QUARRY_SEED"
)

func long() bool { return os.Getenv(longVariable) == "long" }

// seedOf is the test's seed, given or new, and says it.
func seedOf(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano()) % 1_000_000
	if s := os.Getenv(seedVariable); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", seedVariable, err)
		}
		seed = n
	}
	t.Logf("%s=%d", seedVariable, seed)
	return seed
}

// rig is quarry standalone with a domain of engine dir on an ext4 file system of its own.
type rig struct {
	t      *testing.T
	path   string // of the domain
	admin  *admin.Client
	binary string
	*process.Quarry
}

// newRig makes the file system on a disk and starts quarry. What a failed test leaves
// is taken down, so that the next one finds its disks free.
func newRig(t *testing.T, disk string) *rig {
	t.Helper()
	run(t, "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", disk)
	dir, err := os.MkdirTemp("", "ql-") // short, because the path of a socket may have 107 bytes only
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, path: filepath.Join(dir, domainName)}
	if err := errors.Join(os.Mkdir(r.path, 0o700), process.Build(dir, "quarry")); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", disk, r.path)
	if out := os.Getenv("LAB_OUT"); out != "" { // can be read there while the test runs
		if err := os.Symlink(filepath.Join(out, strings.ReplaceAll(t.Name(), "/", ".")+".log"), filepath.Join(dir, "quarry.log")); err != nil {
			t.Fatal(err)
		}
	}
	r.binary = filepath.Join(dir, "quarry")
	r.Quarry, err = process.New(process.Config{Binary: r.binary, Dir: dir, Node: nodeID, Installation: "layers",
		Domains: process.DomainsFile(process.Domain(domainName, r.path, ""))})
	if err != nil {
		t.Fatal(err)
	}
	endpoint, err := admin.ParseEndpoint(r.AdminEndpoint())
	if err != nil {
		t.Fatal(err)
	}
	r.admin = admin.NewClient(endpoint)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of quarry's log:\n%s", r.LastLog(80))
			r.show()
		}
		if err := r.Kill(); err != nil {
			t.Error(err)
		}
		r.takeDown(dir)
		if err := errors.Join(r.Close(), unix.Unmount(r.path, 0), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// show logs what an operator would look at.
func (r *rig) show() {
	for _, args := range [][]string{{"dmsetup", "table"}, {"dmsetup", "status"}, {"losetup", "-l"}, {"ls", "-lsR", r.path + "/slabs", r.path + "/tmp"}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		r.t.Logf("%v: %v\n%s", args, err, out)
	}
	if all, err := r.admin.Images(context.Background()); err == nil {
		for _, i := range all {
			r.t.Logf("image %s %q: %s, %s; slabs %v, children %v, attached %v", i.Handle, i.Name, i.State, i.Reason, i.Slabs, i.Children, i.Nodes)
		}
	}
}

// takeDown takes away what a failed test left: mounts, then devices.
func (r *rig) takeDown(dir string) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		r.t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	for _, line := range slices.Backward(lines) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") && f[4] != r.path {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				r.t.Errorf("unmount %s: %v", f[4], err)
			}
		}
	}
	for range 100 { // layers deep
		left := mapped(r.t)
		if len(left) == 0 {
			break
		}
		for _, name := range left {
			_ = exec.Command("dmsetup", "remove", name).Run() // those below when what is above has gone
		}
	}
	for dev := range r.loops() {
		_ = exec.Command("losetup", "-d", dev).Run() // the unmount tells if one stays
	}
}

// mapped lists our device-mapper devices by name.
func mapped(t *testing.T) []string {
	t.Helper()
	var out []string
	for line := range strings.Lines(run(t, "dmsetup", "info", "-C", "--noheadings", "--separator", " ", "-o", "name,uuid")) {
		if f := strings.Fields(line); len(f) == 2 && strings.HasPrefix(f[1], "QUARRY-") {
			out = append(out, f[0])
		}
	}
	return out
}

// loops are the loop devices over files of the domain.
func (r *rig) loops() map[string]string {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		r.t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(text), r.path+"/") { // else it was detached meanwhile
			out["/dev/"+strings.Split(f, "/")[3]] = strings.TrimSpace(string(text))
		}
	}
	return out
}

// files lists what lies in a folder of the domain.
func (r *rig) files(folder string) []string {
	r.t.Helper()
	var out []string
	err := filepath.WalkDir(filepath.Join(r.path, folder), func(path string, e os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) { // the collector was faster
			return nil
		}
		if err == nil && !e.IsDir() {
			out = append(out, strings.TrimPrefix(path, r.path+"/"))
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// call makes a CSI call and repeats it as a sidecar does while the answer means
// "may still be running".
func call[Q, A any](method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		reply, err := method(ctx, request)
		if c := status.Code(err); c != codes.Aborted && c != codes.Unavailable && c != codes.DeadlineExceeded {
			if err != nil {
				err = fmt.Errorf("%T: %w", request, err)
			}
			return reply, err
		}
		select {
		case <-ctx.Done():
			return reply, fmt.Errorf("%T, repeated for %s: %w", request, patience, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// eventually asks until there is no error.
func eventually(what string, limit time.Duration, ask func() error) error {
	return during(context.Background(), what, limit, ask)
}

// during is eventually for as long as ctx lasts.
func during(ctx context.Context, what string, limit time.Duration, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w: %w", what, ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func filesystem() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func rawBlock() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// volume is a CSI volume that is published at target.
type volume struct {
	r       *rig
	id      string
	name    string
	size    int64
	cap     *csi.VolumeCapability
	staging string
	target  string
	context map[string]string // of the last publication
	secrets map[string]string // for staging
}

// volume makes a volume, empty or of a snapshot, and publishes it.
func (r *rig) volume(name string, size int64, c *csi.VolumeCapability, snapshot string) (*volume, error) {
	v, err := r.create(name, size, c, snapshot, nil)
	if err != nil {
		return nil, err
	}
	return v, v.publish()
}

// create makes a volume, encrypted if there are secrets, and leaves it detached.
func (r *rig) create(name string, size int64, c *csi.VolumeCapability, snapshot string, secrets map[string]string) (*volume, error) {
	req := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: map[string]string{"domain": domainName}}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	}
	if secrets != nil {
		req.Parameters["encrypted"] = "true"
	}
	reply, err := call(r.CreateVolume, req)
	if err != nil {
		return nil, err
	}
	return &volume{r: r, id: reply.GetVolume().GetVolumeId(), name: name, size: size, cap: c, secrets: secrets,
		staging: filepath.Join(r.Kubelet(), name, "staging"), target: filepath.Join(r.Kubelet(), name, "target")}, nil
}

func (v *volume) publish() error {
	published, err := call(v.r.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.cap})
	if err == nil {
		err = os.MkdirAll(v.staging, 0o755)
	}
	if err == nil {
		v.context = published.GetPublishContext()
		err = v.stage()
	}
	if err == nil {
		_, err = call(v.r.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: v.cap})
	}
	if err != nil {
		return fmt.Errorf("publish %s: %w", v.name, err)
	}
	return nil
}

func (v *volume) stage() error {
	_, err := call(v.r.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: v.id, PublishContext: v.context, StagingTargetPath: v.staging, VolumeCapability: v.cap, Secrets: v.secrets})
	return err
}

func (v *volume) unstage() error {
	_, err := call(v.r.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
	return err
}

func (v *volume) unpublish() error {
	_, err := call(v.r.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target})
	if err == nil {
		err = v.unstage()
	}
	if err == nil {
		_, err = call(v.r.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID})
	}
	if err != nil {
		return fmt.Errorf("unpublish %s: %w", v.name, err)
	}
	return nil
}

// remove takes the volume out of use and deletes it.
func (v *volume) remove() error {
	if err := v.unpublish(); err != nil {
		return err
	}
	if _, err := call(v.r.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id}); err != nil {
		return fmt.Errorf("delete %s: %w", v.name, err)
	}
	return nil
}

func (r *rig) removeSnapshot(id string) error {
	_, err := call(r.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: id})
	return err
}

// alone waits until a volume stands on nothing but its own raw slab, and says so.
func (r *rig) alone(v *volume) error {
	slabs := 0
	return eventually("one optimized raw slab under "+v.name, patience, func() error {
		all, err := r.admin.Images(context.Background())
		if err != nil {
			return err
		}
		for _, i := range all {
			if i.Handle == v.id {
				if n := len(r.files("slabs")); n != slabs {
					r.t.Logf("%d slabs, %d of them under %s", n, len(i.Slabs), v.name)
					slabs = n
				}
				if i.State == "optimized" && len(i.Slabs) == 1 && len(r.files("slabs")) == 1 {
					return nil
				}
				return fmt.Errorf("it is %s (%s) with the slabs %v; in the domain there are %v", i.State, i.Reason, i.Slabs, r.files("slabs"))
			}
		}
		return errors.New("it is not listed")
	})
}

// tagRetention is how long tags of what is dead stay, at most: ten minutes until the
// collector's next look at all tags, ten more for all but an image's last, then ten for
// that, and something for the rounds.
const tagRetention = 33 * time.Minute

// leavesNothing waits until nothing of deleted images is left in the domain and in
// the kernel. Their tags stay for a while: see leavesNoTags.
func (r *rig) leavesNothing() error {
	return eventually("nothing to be left", patience, func() error {
		if left := mapped(r.t); len(left) > 0 {
			return fmt.Errorf("device-mapper devices %v", left)
		}
		if left := r.loops(); len(left) > 0 {
			return fmt.Errorf("loop devices %v", left)
		}
		for _, folder := range []string{"slabs", "tmp", "trash"} {
			if left := r.files(folder); len(left) > 0 {
				return fmt.Errorf("files %v", left)
			}
		}
		all, err := r.admin.Images(context.Background())
		for _, i := range all {
			if i.State != "deleting" || len(i.Nodes) > 0 {
				err = errors.Join(err, fmt.Errorf("image %s (%s) is %s, attached: %v", i.Handle, i.Name, i.State, i.Nodes))
			}
		}
		return err
	})
}

// leavesNoTags waits, in the long form, until the tags of deleted images are gone,
// while other tests go on.
func (r *rig) leavesNoTags() error {
	if !long() {
		return nil
	}
	r.t.Parallel()
	return eventually("the tags of deleted images to be gone", tagRetention, func() error {
		for _, tag := range r.files("tags") {
			if name := filepath.Base(tag); !slices.Contains([]string{"e", "o", "n"}, strings.SplitN(name, ".", 2)[0]) {
				return fmt.Errorf("tag %s is still there", name)
			}
		}
		return nil
	})
}

// spare is a disk of the lab.
func spare(t *testing.T) string {
	t.Helper()
	lab.Need(t)
	return lab.Disk(t)
}
