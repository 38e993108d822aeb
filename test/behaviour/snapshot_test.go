package behaviour

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/quarry-csi/quarry/pkg/admin"
)

// check lets a filesystem's own program look at a slab, without changing it.
func check(t *testing.T, fs, slab string) {
	t.Helper()
	args := map[string][]string{
		"ext4": {"e2fsck", "-f", "-n", slab},
		"xfs":  {"xfs_repair", "-n", "-f", slab},
	}[fs]
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%v: %v\n%s", args, err, out)
	}
}

func slabFile(p place, image string) string { return filepath.Join(p.path, "slabs", image) }

func TestSnapshotsOfAVolumeUnderConstantWritesAreConsistent(t *testing.T) {
	ext4, xfs := on(t, "on-ext4", "ext4", 4<<30), on(t, "on-xfs", "xfs", 4<<30)
	r := newRig(t, ext4, xfs)
	for _, p := range r.places {
		for _, fs := range []string{"ext4", "xfs"} {
			t.Run(p.name+"/"+fs, func(t *testing.T) {
				name := p.name + "-" + fs
				v := r.volume(p.name, name, 320*mib, filesystem(fs)).mount()
				fill(t, filepath.Join(v.target, "bulk"), 1, 16*mib)
				w := startWriter(t, v.target)
				for i := range 3 {
					w.goesOn(r)
					durable := w.synced.Load()
					snap := r.snapshot(v, fmt.Sprintf("%s-snap-%d", name, i))
					w.goesOn(r)
					restored := r.copyOf(fromSnapshot(snap), p.name, fmt.Sprintf("%s-restored-%d", name, i), 320*mib, filesystem(fs))
					// A frozen XFS has records in its log, on purpose: a mount replays
					// them, and only then xfs_repair looks at it. ext4 is to be clean at once.
					if fs == "ext4" {
						check(t, fs, slabFile(p, restored.image()))
					}
					restored.mount()
					verifyCut(t, restored.target, durable)
					restored.unmount()
					check(t, fs, slabFile(p, restored.image()))
					restored.remove()
					r.removeSnapshot(snap)
				}
				w.end(t)
				v.unmount()
				v.remove()
			})
		}
	}
}

func TestASnapshotAskedForAgainKeepsItsBytes(t *testing.T) {
	r := newRig(t, on(t, "on-ext4", "ext4", 1<<30), on(t, "on-xfs", "xfs", 1<<30))
	for _, p := range r.places {
		v := r.volume(p.name, p.name+"-v", 64*mib, filesystem("ext4")).mount()
		file := filepath.Join(v.target, "file")
		before := fill(t, file, 1, 8*mib)
		request := &csi.CreateSnapshotRequest{Name: p.name + "-s", SourceVolumeId: v.id}
		first := must(r, r.CreateSnapshot, request).GetSnapshot()
		fill(t, file, 2, 8*mib)
		again := must(r, r.CreateSnapshot, request).GetSnapshot()
		if first.GetSnapshotId() != again.GetSnapshotId() || !first.GetCreationTime().AsTime().Equal(again.GetCreationTime().AsTime()) {
			t.Errorf("asked again: %v, at first: %v", again, first)
		}
		restored := r.copyOf(fromSnapshot(again.GetSnapshotId()), p.name, p.name+"-r", 64*mib, filesystem("ext4")).mount()
		if got := checksum(t, filepath.Join(restored.target, "file"), 8*mib); got != before {
			t.Errorf("%s: the snapshot holds %s, at the cut it was %s", p.name, got, before)
		}
		restored.unmount()
		v.unmount()
	}
}

func TestARawBlockVolumeInUseIsSnapshottedNativelyOrRefused(t *testing.T) {
	ext4, xfs := on(t, "on-ext4", "ext4", 1<<30), on(t, "on-xfs", "xfs", 1<<30)
	r := newRig(t, ext4, xfs)
	v := r.volume(ext4.name, "v", 32*mib, rawBlock()).mount()
	before := content(t, ext4, "slabs", "tmp")
	_, err := call(r, r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.id})
	refusal(t, err, codes.FailedPrecondition, v.image(), "in use on node "+nodeID, "no native snapshot", "detach it first")
	r.eventually("the refused snapshot to be gone", func() error { return same(before, content(t, ext4, "slabs", "tmp")) })
	v.unmount()
	r.snapshot(v, "s")

	v = r.volume(xfs.name, "w", 32*mib, rawBlock()).mount()
	want := fill(t, v.target, 3, 8*mib)
	snap := r.snapshot(v, "t")
	fill(t, v.target, 4, 8*mib)
	restored := r.copyOf(fromSnapshot(snap), xfs.name, "x", 32*mib, rawBlock()).mount()
	if got := checksum(t, restored.target, 8*mib); got != want {
		t.Errorf("the snapshot holds %s, at the cut it was %s", got, want)
	}
	restored.unmount()
	v.unmount()
}

func TestADirectoryInUseIsCopiedOnlyWhereInexactIsAllowed(t *testing.T) {
	p := on(t, "on-ext4", "ext4", 256*mib)
	r := newRig(t, p)
	req := creation(p.name, "v", 32*mib, filesystem(""))
	req.Parameters["layout"] = "directory"
	v := r.create(req).mount()
	writeFile(t, filepath.Join(v.target, "file"), []byte("hello"))
	ask4 := func(name, inexact string) (*csi.CreateSnapshotResponse, error) {
		req := &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id, Parameters: map[string]string{}}
		if inexact != "" {
			req.Parameters["inexact"] = inexact
		}
		return call(r, r.CreateSnapshot, req)
	}
	_, err := ask4("s", "")
	refusal(t, err, codes.FailedPrecondition, "directory", "in use on node "+nodeID, "inexact: allow")
	_, err = ask4("s", "refuse")
	refusal(t, err, codes.FailedPrecondition, "inexact: allow")
	_, err = ask4("s", "yes")
	refusal(t, err, codes.InvalidArgument, "inexact", "yes", "allow", "refuse")
	reply, err := ask4("s", "allow")
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range ask[[]admin.Image](r, "images") {
		if i.Handle == reply.GetSnapshot().GetSnapshotId() && !i.Inexact {
			t.Errorf("the image does not say that it is inexact: %+v", i)
		}
	}
	v.unmount()
	exact, err := ask4("t", "allow")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, i := range ask[[]admin.Image](r, "images", "--kind", "snapshot") {
		switch i.Handle {
		case reply.GetSnapshot().GetSnapshotId():
			found++
		case exact.GetSnapshot().GetSnapshotId():
			found++
			if i.Inexact {
				t.Errorf("a copy of a detached directory says that it is inexact: %+v", i)
			}
		}
	}
	if found != 2 {
		t.Errorf("kubectl-quarry images lists %d of 2 snapshots", found)
	}
}

// slowQuiesce is less than any copy of the bulk takes.
const slowQuiesce = "1ms"

func TestACopyLongerThanQuiesceLimitIsRefusedAndTheVolumeGoesOn(t *testing.T) {
	p := on(t, "on-ext4", "ext4", 2<<30)
	r := newRig(t, p)
	v := r.volume(p.name, "v", 512*mib, filesystem("ext4")).mount()
	fill(t, filepath.Join(v.target, "bulk"), 1, 128*mib)
	must(r, r.ControllerModifyVolume, &csi.ControllerModifyVolumeRequest{VolumeId: v.id, MutableParameters: map[string]string{"quiesceLimit": slowQuiesce}})
	w := startWriter(t, v.target)
	w.goesOn(r)
	before := content(t, p, "slabs", "tmp", "trash")
	for i := range 3 { // the second one is refused by what the first one taught
		_, err := call(r, r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: fmt.Sprintf("s%d", i), SourceVolumeId: v.id})
		refusal(t, err, codes.FailedPrecondition, v.image(), "frozen", "quiesceLimit ("+slowQuiesce+")", "no native snapshot", "detach it", "raise quiesceLimit")
		w.goesOn(r) // not left frozen
	}
	_, err := call(r, r.CreateVolume, cloneRequest(v, p.name, "c", 512*mib))
	refusal(t, err, codes.FailedPrecondition, "quiesceLimit ("+slowQuiesce+")")
	w.goesOn(r)
	r.eventually("the refused copies to be gone", func() error { return same(before, content(t, p, "slabs", "tmp", "trash")) })
	must(r, r.ControllerModifyVolume, &csi.ControllerModifyVolumeRequest{VolumeId: v.id, MutableParameters: map[string]string{"quiesceLimit": "1m"}})
	r.snapshot(v, "s0")
	w.goesOn(r)
	w.end(t)
	v.unmount()
}

func cloneRequest(v *volume, domain, name string, size int64) *csi.CreateVolumeRequest {
	req := creation(domain, name, size, v.cap)
	req.VolumeContentSource = fromVolume(v.id)
	return req
}

// same compares two listings.
func same(want, got []string) error {
	if fmt.Sprint(want) != fmt.Sprint(got) {
		return fmt.Errorf("before:\n%q\nnow:\n%q", want, got)
	}
	return nil
}
