package behaviour

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/gluster"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

// unlike is a domain on one of many types of storage.
type unlike struct {
	place
	// file is where the storage keeps a block slab; nil where that is no file.
	file func(slab string) string
}

// allTypes are a domain of each type of storage that there is, on its real server.
func allTypes(t *testing.T) []unlike {
	lab.Need(t)
	const size = 2 << 30
	in := func(folder string) func(string) string {
		return func(slab string) string { return filepath.Join(folder, "slabs", slab) }
	}
	entry := func(name, engine, more string) place {
		return place{name: name, entry: fmt.Sprintf("- name: %s\n  engine: %s\n  scope: node\n  %s\n", name, engine, more)}
	}
	var all []unlike
	add := func(p place, file func(string) string) { all = append(all, unlike{p, file}) }

	local := on(t, "dir", "ext4", size)
	add(local, in(local.path))

	disk := lab.Disk(t)
	program(t, "lvm", "vgcreate", "-q", "--devices", disk, "--metadatasize", "16m", "behaviour", disk)
	t.Cleanup(func() { program(t, "lvm", "vgchange", "-q", "--devices", disk, "-an", "behaviour") })
	add(entry("lvm", "lvm", fmt.Sprintf("params: {vg: behaviour, devices: %s}", disk)), nil)

	mounted := hosttest.Filesystem(t, "xfs", size)
	add(entry("sharedfs", "sharedfs", fmt.Sprintf("params: {path: %s, allowLocal: \"true\"}", mounted)), in(mounted))

	nfs := lab.StartNFS(t)
	three, four := nfs.Export(t, "ext4"), nfs.Export(t, "xfs")
	add(entry("nfs3", "nfs3", fmt.Sprintf("params: {server: 127.0.0.1, export: %s, folder: k8s}", three.Dir)), in(filepath.Join(three.Dir, "k8s")))
	add(entry("nfs4", "nfs4", fmt.Sprintf("params: {server: 127.0.0.1, export: %s, folder: k8s}", four.V4)), in(filepath.Join(four.Dir, "k8s")))

	shared := filepath.Join(hosttest.Filesystem(t, "xfs", size), "shared")
	secrets := filepath.Join(t.TempDir(), "secrets.yaml")
	if err := errors.Join(os.Mkdir(shared, 0o755),
		os.WriteFile(secrets, fmt.Appendf(nil, "username: %s\npassword: '%s'\n", samba.User, samba.YAMLPassword()), 0o600)); err != nil {
		t.Fatal(err)
	}
	smb := samba.Start(t, nil, samba.Share{Name: "k8s", Path: shared})
	add(entry("smb", "smb", fmt.Sprintf("params: {server: %q, share: k8s}\n  secretsFile: %s", smb.Address(), secrets)),
		func(slab string) string { return filepath.Join(shared, "slabs", "_"+slab+"_") })

	g := gluster.Start(t).Volume(t, gluster.VolumeSpec{Name: "vol"})
	add(entry("gluster", "gluster", fmt.Sprintf("params: {servers: %s, volume: vol, folder: k8s}", g.Server.Address)), nil) // its bricks are in another namespace

	folder := hosttest.Filesystem(t, "ext4", size)
	add(place{name: "python", entry: fmt.Sprintf("- name: python\n  socket: %s\n  engine: python-dir\n  params: {path: %s}\n", pythonEngine(t), folder)}, in(folder))
	return all
}

// pythonEngine runs the reference engine of docs/examples, and returns its socket.
func pythonEngine(t *testing.T) string {
	t.Helper()
	const checkout = "../.."
	dir, err := os.MkdirTemp("", "qp-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	text, err := os.ReadFile(checkout + "/docs/examples/engine-python/engine.py")
	if err == nil {
		err = os.WriteFile(dir+"/engine.py", text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	program(t, "protoc", "-I", checkout+"/pkg/engine/enginepb", "--python_out="+dir, "engine.proto")
	said := &strings.Builder{}
	cmd := exec.Command("/usr/bin/python3", dir+"/engine.py", "--socket", dir+"/s")
	cmd.Stderr, cmd.SysProcAttr = said, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = cmd.Process.Kill(), cmd.Wait() // it was killed
		if t.Failed() {
			t.Log(said)
		}
	})
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Stat(dir + "/s"); err == nil {
			return dir + "/s"
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func program(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// pieces are what a test volume holds between its holes: offsets and lengths in bytes.
var pieces = [][2]int64{{0, 1 << 20}, {20*mib + 4096, 256 << 10}, {32*mib - 4096, 4096}}

// scatter writes the pieces into a raw volume, durably.
func scatter(t *testing.T, device string) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range pieces {
		b := make([]byte, p[1])
		for j := range b {
			b[j] = byte(j*7 + j>>8 + 31*i + 1)
		}
		if _, err := f.WriteAt(b, p[0]); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestEveryDomainRestoresIntoEveryOther: one Quarry with a domain of each type of storage; a snapshot and a
// volume of each become a volume in each other one, the same byte by byte, holes and all.
func TestEveryDomainRestoresIntoEveryOther(t *testing.T) {
	domains := allTypes(t)
	var places []place
	for _, d := range domains {
		places = append(places, d.place)
	}
	r := newRig(t, places...)
	const size = 32 * mib
	r.eventually("all domains to be open", func() error {
		for _, d := range ask[[]admin.Domain](r, "domains") {
			if !d.Open {
				return fmt.Errorf("domain %s: %s", d.Name, d.Problem)
			}
		}
		return nil
	})
	out, _ := r.kubectl("domains", "-o", "wide")
	t.Logf("\n%s", out)
	how := &strings.Builder{}
	table := tabwriter.NewWriter(how, 0, 0, 2, ' ', 0)
	pairs := 0
	for _, from := range domains {
		source := r.volume(from.name, "source-"+from.name, size, rawBlock()).mount()
		scatter(t, source.target)
		want := checksum(t, source.target, size)
		source.unmount()
		snapshot := r.snapshot(source, "snapshot-"+from.name)
		r.eventually("the snapshot to be ready", func() error {
			l := must(r, r.ListSnapshots, &csi.ListSnapshotsRequest{SnapshotId: snapshot})
			if len(l.GetEntries()) != 1 || !l.GetEntries()[0].GetSnapshot().GetReadyToUse() {
				return errors.New(l.String())
			}
			return nil
		})
		for _, to := range domains {
			if to.name == from.name {
				continue
			}
			for what, content := range map[string]*csi.VolumeContentSource{"restore": fromSnapshot(snapshot), "clone": fromVolume(source.id)} {
				name := fmt.Sprintf("%s-of-%s-in-%s", what, from.name, to.name)
				began := time.Now()
				v := r.copyOf(content, to.name, name, size, rawBlock())
				took := time.Since(began)
				image := imageOf(t, r, v)
				if !strings.Contains(image.How, from.name) {
					t.Errorf("%s: how it came to be is %q, which does not say where from", name, image.How)
				}
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", from.name+" to "+to.name, what, image.How, took.Round(10*time.Millisecond))
				v.mount()
				if got := checksum(t, v.target, size); got != want {
					t.Errorf("%s: its content differs from that of its source", name)
				}
				v.unmount()
				if to.file != nil {
					holes(t, name, to.file(image.Slab))
				}
				v.remove()
				pairs++
			}
		}
		r.removeSnapshot(snapshot)
		source.remove()
	}
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d volumes of other domains' content:\n%s", pairs, how)
	if pairs != 2*56 {
		t.Errorf("%d pairs were tried, not 56 of each kind", pairs)
	}
	r.eventually("all slabs to be gone", func() error { return slabsGone(r) })
	r.stop()
}

// slabsGone is nil when every image is deleted and without a slab: its last tags may take a while.
func slabsGone(r *rig) error {
	for _, i := range ask[[]admin.Image](r, "images") {
		if i.State != "deleting" || len(i.Slabs) > 0 {
			return fmt.Errorf("image %+v", i)
		}
	}
	return nil
}

func imageOf(t *testing.T, r *rig, v *volume) admin.Image {
	t.Helper()
	for _, i := range ask[[]admin.Image](r, "images") {
		if i.Handle == v.id {
			return i
		}
	}
	t.Fatalf("kubectl quarry images does not show %s", v.id)
	return admin.Image{}
}

// holes checks that a file takes no more room than the pieces, and what the storage puts around them.
func holes(t *testing.T, name, file string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	written := int64(0)
	for _, p := range pieces {
		written += p[1]
	}
	if took := st.Blocks * 512; took < written || took > written+4*mib {
		t.Errorf("%s: %s takes %d KiB, and %d KiB were written", name, file, took>>10, written>>10)
	}
}
