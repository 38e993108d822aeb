package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/admin"
)

// TestSlabsThatFail: the disk fails where a slab of a volume in use lies. What was
// acknowledged is there when it works again, of the volume and of its snapshot, and until then the volume's
// health and kubectl quarry check say what is wrong.
func TestSlabsThatFail(t *testing.T) {
	for _, c := range []struct {
		name    string
		slab    int    // of the chain, from the head
		from    int64  // bytes of it that go on working
		finding string // the kind of what check finds
	}{
		{"the layer of the volume", 0, mib, "mend"}, // the kernel gives it up, and says so in its store
		{"the layer of the volume, with its header", 0, 0, "report"},
		{"the slab below its layer", 1, 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newFrail(t, spare(t))
			r := newRig(t, disk.path)
			v, err := r.volume("v", 64*mib, filesystem(), "")
			if err != nil {
				t.Fatal(err)
			}
			load := &mounted{workers: newWorkers(t), work: t.TempDir()}
			if err := load.more(v.target, 30); err != nil {
				t.Fatal(err)
			}
			before := load.mark()
			reply, err := call(r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.id})
			if err != nil {
				t.Fatal(err)
			}
			snapshot := reply.GetSnapshot().GetSnapshotId()
			if err := load.more(v.target, 30); err != nil {
				t.Fatal(err)
			}

			disk.fail(extents(t, r.slab(v, c.slab), c.from))
			drop(t) // so that what is read is read from the disk
			if err := load.more(v.target, 100_000); err == nil {
				t.Fatal("every write is acknowledged")
			}
			t.Logf("%d entries were acknowledged", load.durable.Load())
			if h := r.health(v); !strings.Contains(h, "status:") {
				t.Error("the volume's health tells nothing")
			}
			if f := r.finding(v); f != c.finding {
				t.Errorf("check found %q, want %q", f, c.finding)
			}
			if err := v.unpublish(); err != nil {
				t.Fatal(err)
			}
			err = v.tryPublish(t)
			// Where the slab below fails, a write of less than a chunk makes the kernel give
			// the layer up, too: it cannot copy the rest.
			code := status.Code(err)
			if c.finding == "mend" && code != codes.DataLoss || c.finding == "report" && code != codes.Unavailable || code != codes.DataLoss && code != codes.Unavailable {
				t.Errorf("published while it fails: %v", err)
			}

			disk.mend()
			if err := v.unpublish(); err != nil {
				t.Fatal(err)
			}
			if code == codes.DataLoss {
				if err := v.tryPublish(t); err == nil || !strings.Contains(err.Error(), "kubectl quarry fix") {
					t.Errorf("published with a layer that was given up: %v", err)
				}
				if err := v.unpublish(); err != nil {
					t.Fatal(err)
				}
				r.fix(v)
			}
			if f := r.finding(v); f != "" {
				t.Errorf("check still finds %q", f)
			}
			if err := v.publish(); err != nil {
				t.Fatal(err)
			}
			n, err := load.look(v.target, load.mark(), load.mark())
			if err != nil {
				t.Fatal(err)
			}
			load.durable.Store(n) // an entry more may have been written than was acknowledged
			if err := load.more(v.target, 30); err != nil {
				t.Fatalf("it can be written again: %v", err)
			}
			probe, err := r.volume("probe", 64*mib, rawBlock(), snapshot)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := load.holds(probe.target, before, before); err != nil {
				t.Errorf("the snapshot: %v", err)
			}
			if err := errors.Join(probe.remove(), r.removeSnapshot(snapshot), r.alone(v)); err != nil {
				t.Fatal(err)
			}
			if _, err := load.look(v.target, load.mark(), load.mark()); err != nil {
				t.Errorf("merged: %v", err)
			}
			if err := errors.Join(v.remove(), r.leavesNothing()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// more writes so many entries.
func (m *mounted) more(dir string, count uint64) error {
	f, err := os.OpenFile(filepath.Join(dir, journal), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	for n := m.durable.Load(); count > 0 && err == nil; n, count = n+1, count-1 {
		err = m.enter(f, dir, n)
	}
	return errors.Join(err, f.Close())
}

// tryPublish is publish without the patience of a sidecar.
func (v *volume) tryPublish(t *testing.T) error {
	t.Helper()
	published, err := call(v.r.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.cap})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err = v.r.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, PublishContext: published.GetPublishContext(), StagingTargetPath: v.staging, VolumeCapability: v.cap})
	return err
}

// slab is the file of a volume's slab, counted from the head.
func (r *rig) slab(v *volume, at int) string {
	r.t.Helper()
	all, err := r.admin.Images(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(i admin.Image) bool { return i.Handle == v.id })
	if i < 0 || at >= len(all[i].Slabs) {
		r.t.Fatalf("%s has no slab %d: %v", v.id, at, all)
	}
	return filepath.Join(r.path, "slabs", all[i].Slabs[at])
}

// health is what the node says of a volume, in one line.
func (r *rig) health(v *volume) string {
	r.t.Helper()
	reply, err := call(r.NodeGetVolumeHealth, &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
	if err != nil {
		r.t.Fatal(err)
	}
	text := reply.String()
	r.t.Logf("health: %s", text)
	return text
}

// finding is the kind of what check finds about a volume, or "".
func (r *rig) finding(v *volume) string {
	r.t.Helper()
	checked, err := r.admin.Check(context.Background(), domainName)
	if err != nil {
		r.t.Fatal(err)
	}
	kind := ""
	for _, f := range checked.Findings {
		if strings.HasSuffix(v.id, "/"+f.Object) {
			r.t.Logf("check: %s: %s", f.Kind, f.Message)
			kind = f.Kind
		}
	}
	return kind
}

func (r *rig) fix(v *volume) {
	r.t.Helper()
	done, err := r.admin.Fix(context.Background(), admin.FixRequest{Kinds: []string{"mend"}, Apply: true})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range done.Results {
		if r.t.Logf("fix: %s: %s %s", f.Object, f.Done, f.Error); f.Error != "" {
			r.t.Errorf("%s of %s is not fixed: %s", f.Message, v.name, f.Error)
		}
	}
}

// frail is a device over a disk of which parts can be made to fail.
type frail struct {
	t          *testing.T
	disk, path string
	sectors    int64
}

func newFrail(t *testing.T, disk string) *frail {
	t.Helper()
	size, err := strconv.ParseInt(strings.TrimSpace(run(t, "blockdev", "--getsz", disk)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	const name = "layers-frail"
	f := &frail{t: t, disk: disk, path: "/dev/mapper/" + name, sectors: size}
	f.dmsetup(f.table(nil), "create", name)
	t.Cleanup(func() { f.dmsetup("", "remove", "--retry", name) })
	t.Cleanup(f.mend)
	return f
}

// part of a disk, in sectors.
type part struct{ first, count int64 }

func (f *frail) table(bad []part) string {
	var out strings.Builder
	at := int64(0)
	fine := func(end int64) {
		if at < end {
			fmt.Fprintf(&out, "%d %d linear %s %d\n", at, end-at, f.disk, at)
		}
	}
	for _, p := range bad {
		fine(p.first)
		fmt.Fprintf(&out, "%d %d error\n", p.first, p.count)
		at = p.first + p.count
	}
	fine(f.sectors)
	return out.String()
}

// fail makes parts fail from now on.
func (f *frail) fail(bad []part) {
	f.t.Helper()
	slices.SortFunc(bad, func(a, b part) int { return int(a.first - b.first) })
	f.put(f.table(bad))
}

func (f *frail) mend() { f.t.Helper(); f.put(f.table(nil)) }

func (f *frail) put(table string) {
	f.t.Helper()
	f.dmsetup(table, "load", filepath.Base(f.path))
	f.dmsetup("", "suspend", "--nolockfs", "--noflush", filepath.Base(f.path))
	f.dmsetup("", "resume", filepath.Base(f.path))
}

func (f *frail) dmsetup(stdin string, args ...string) {
	f.t.Helper()
	cmd := exec.Command("dmsetup", args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("dmsetup %v: %v\n%s%s", args, err, stdin, out)
	}
}

// extents is where a file lies on its disk, without so many bytes at its beginning.
func extents(t *testing.T, file string, skip int64) []part {
	t.Helper()
	line := regexp.MustCompile(`(?m)^\s*\d+:\s+(\d+)\.\.\s*(\d+):\s+(\d+)\.\.`)
	var out []part
	for _, f := range line.FindAllStringSubmatch(run(t, "filefrag", "-v", "-b512", "-s", file), -1) {
		var n [3]int64
		for i := range n {
			var err error
			if n[i], err = strconv.ParseInt(f[i+1], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		cut := max(0, skip/512-n[0])
		if count := n[1] + 1 - n[0] - cut; count > 0 {
			out = append(out, part{n[2] + cut, count})
		}
	}
	if len(out) == 0 {
		t.Fatalf("%s lies nowhere behind byte %d", file, skip)
	}
	return out
}

// drop empties the page cache.
func drop(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}
