package behaviour

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/admin"
)

func TestAKilledQuarryStopsNobodyAndFindsEverythingAgain(t *testing.T) {
	ext4, xfs := on(t, "on-ext4", "ext4", 2<<30), on(t, "on-xfs", "xfs", 2<<30)
	r := newRig(t, ext4, xfs)
	var volumes []*volume
	var writers []*writer
	for _, p := range r.places {
		for _, fs := range []string{"ext4", "xfs"} {
			v := r.volume(p.name, p.name+"-"+fs, 320*mib, filesystem(fs)).mount()
			volumes, writers = append(volumes, v), append(writers, startWriter(t, v.target))
		}
	}
	directory := creation("on-ext4", "directory", 32*mib, filesystem(""))
	directory.Parameters["layout"] = "directory"
	v := r.create(directory).mount()
	volumes, writers = append(volumes, v), append(writers, startWriter(t, v.target))
	raw := r.volume("on-xfs", "raw", 32*mib, rawBlock()).mount()
	sum := fill(t, raw.target, 1, 8*mib)

	for range 3 {
		for _, w := range writers {
			w.goesOn(r)
		}
		r.kill()
		for _, w := range writers { // while there is no Quarry
			w.goesOn(r)
		}
		if got := checksum(t, raw.target, 8*mib); got != sum {
			t.Error("the raw block volume changed")
		}
		r.start()
	}
	loops, mounts := len(r.loops()), len(r.mounts())
	// Asked again, as a kubelet that was restarted asks, nothing is made twice.
	for _, v := range append(volumes, raw) {
		if err := v.stage(); err != nil {
			t.Errorf("staging %s again: %v", v.name, err)
		}
		must(r, r.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: v.cap})
		ctx, cancel := once()
		_, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
		cancel()
		refusal(t, err, codes.FailedPrecondition, "attached to "+nodeID, "detach it first")
		stats := must(r, r.NodeGetVolumeStats, &csi.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target})
		if len(stats.GetUsage()) == 0 || stats.GetUsage()[0].GetTotal() == 0 {
			t.Errorf("statistics of %s: %v", v.name, stats)
		}
	}
	if l, m := len(r.loops()), len(r.mounts()); l != loops || m != mounts {
		t.Errorf("asked again: %d loop devices and %d mounts instead of %d and %d", l, m, loops, mounts)
	}
	for i, w := range writers {
		w.goesOn(r)
		durable := w.synced.Load()
		w.end(t)
		volumes[i].unmount()
		volumes[i].mount()
		verifyCut(t, volumes[i].target, durable)
		volumes[i].unmount()
		volumes[i].remove()
	}
	raw.unmount()
	raw.remove()
	if len(r.loops())+len(r.mounts()) > 0 {
		t.Errorf("left are %v, %v", r.loops(), r.mounts())
	}
	r.eventually("all space to be back", func() error {
		for _, p := range r.places {
			if left := content(t, p, "slabs", "tmp", "trash"); len(left) > 0 {
				return fmt.Errorf("left are %q", left)
			}
		}
		return nil
	})
}

// A kill while a filesystem is frozen for a copy must not leave it frozen.
func TestAKillDuringAQuiescedCopyThawsAndLeavesNothing(t *testing.T) {
	p := on(t, "on-ext4", "ext4", 4<<30)
	r := newRig(t, p)
	v := r.volume(p.name, "v", 1<<30, filesystem("ext4")).mount()
	fill(t, filepath.Join(v.target, "bulk"), 1, 512*mib)
	w := startWriter(t, v.target)
	w.goesOn(r)
	durable := w.synced.Load()
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() {
		_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.id})
		answered <- err
	}()
	r.copying(t, answered)
	r.kill()
	cancel()
	if err := <-answered; err == nil {
		t.Fatal("the snapshot was made before the kill: the test proves nothing")
	}
	w.goesOn(r) // thawed by the watchdog: there is no Quarry
	r.start()
	w.goesOn(r)
	r.snapshot(v, "s")
	restored := r.copyOf(fromSnapshot(r.snapshot(v, "s")), p.name, "r", 1<<30, filesystem("ext4"))
	check(t, "ext4", slabFile(p, restored.image()))
	restored.mount()
	verifyCut(t, restored.target, durable)
	restored.unmount()
	w.end(t)
	v.unmount()
	r.eventually("the copy that was cut short to be gone", func() error {
		if left := content(t, p, "slabs"); len(left) != 3 {
			return fmt.Errorf("there are %q", left)
		}
		return nil
	})
}

// copying waits until kubectl-quarry operations shows a copy under way.
func (r *rig) copying(t *testing.T, answered <-chan error) admin.Operation {
	t.Helper()
	var found admin.Operation
	r.eventually("a copy to be under way", func() error {
		select {
		case err := <-answered:
			t.Fatalf("it ended before it was seen: %v", err)
		default:
		}
		ops := ask[[]admin.Operation](r, "operations")
		for _, o := range ops {
			if o.Total > 0 && o.Done > 0 && o.Done < o.Total {
				found = o
				return nil
			}
		}
		return fmt.Errorf("under way is %+v", ops)
	})
	return found
}

// impatience is how long a caller waits who does not wait for a copy.
const impatience = 50 * time.Millisecond

func TestALongCopyIsJoinedAndSaysHowFarItIs(t *testing.T) {
	p, other := on(t, "here", "ext4", 5<<30), on(t, "there", "ext4", 5<<30)
	r := newRig(t, p, other)
	v := r.volume(p.name, "v", 3<<30, filesystem("ext4")).mount()
	sum := fill(t, filepath.Join(v.target, "bulk"), 1, 512*mib)
	v.unmount()
	snap := r.snapshot(v, "s")
	req := creation(other.name, "restored", 3<<30, filesystem("ext4"))
	req.VolumeContentSource = fromSnapshot(snap)
	said, listed := "", ""
	for id := ""; id == ""; {
		ctx, cancel := context.WithTimeout(t.Context(), impatience)
		reply, err := r.CreateVolume(ctx, req)
		cancel()
		switch c := status.Code(err); c {
		case codes.OK:
			id = reply.GetVolume().GetVolumeId()
		case codes.Aborted:
			refusal(t, err, codes.Aborted, "still running", "restored")
			if m := status.Convert(err).Message(); strings.Contains(m, "% of 3 GiB") {
				said = m
			}
			if out, exit := r.kubectl("operations"); exit != 0 {
				t.Errorf("kubectl-quarry operations: status %d:\n%s", exit, out)
			} else if strings.Contains(out, "% of 3 GiB") {
				listed = out
			}
		case codes.DeadlineExceeded: // the caller's own
		default:
			t.Fatal(err)
		}
	}
	says(t, said, "create volume", "restored", "copying from here.", " to there.")
	says(t, listed, "OPERATION", "create volume", "restored", "copying from here.", " to there.")
	restored := r.copyOf(fromSnapshot(snap), other.name, "restored", 3<<30, filesystem("ext4")).mount() // the same
	if checksum(t, filepath.Join(restored.target, "bulk"), 512*mib) != sum {
		t.Error("the copy is not what its source is")
	}
	restored.unmount()
	if got := content(t, other, "slabs"); len(got) != 1 {
		t.Errorf("joined calls made %q", got)
	}
	if _, err := os.Stat(slabFile(other, restored.image())); err != nil {
		t.Error(err)
	}
}
