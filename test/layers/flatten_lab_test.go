package layers

import (
	"errors"
	"fmt"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestAChainOfSnapshotsThatAllLive: with a limit of two layers a mounted volume under load
// gets seven snapshots, of which none is deleted before all chains are short.
func TestAChainOfSnapshotsThatAllLive(t *testing.T) {
	disk := spare(t)
	seed := seedOf(t)
	r := newRig(t, disk)
	const size, limit = 32 * mib, 2
	v, err := r.volume("v", size, filesystem(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call(r.ControllerModifyVolume, &csi.ControllerModifyVolumeRequest{VolumeId: v.id, MutableParameters: map[string]string{"chainLimit": fmt.Sprint(limit)}}); err != nil {
		t.Fatal(err)
	}
	load := startMounted(t, v.target, seed)
	more := func() {
		t.Helper()
		from := load.mark().sum()
		if err := eventually("the load to go on", patience, func() error {
			if now := load.mark().sum(); now < from+20 {
				return fmt.Errorf("%d writes after %d", now, from)
			}
			return load.going().Err()
		}); err != nil {
			t.Fatal(errors.Join(err, load.end()))
		}
	}
	type snapshot struct {
		id            string
		before, after mark
	}
	var all []snapshot
	for i := range 7 {
		more()
		s := snapshot{before: load.mark()}
		reply, err := call(r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: fmt.Sprintf("s%d", i), SourceVolumeId: v.id})
		if err != nil {
			t.Fatal(err)
		}
		s.id, s.after = reply.GetSnapshot().GetSnapshotId(), load.mark()
		all = append(all, s)
	}
	if err := eventually("chains of at most two layers", patience, func() error {
		images, err := r.admin.Images(t.Context())
		for _, i := range images {
			if i.State == "deleting" && len(i.Slabs) == 0 {
				continue // its tags stay for a while
			}
			if i.State != "optimized" || len(i.Slabs) > limit+1 {
				err = errors.Join(err, fmt.Errorf("%s is %s (%s) with the slabs %v", i.Name, i.State, i.Reason, i.Slabs))
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d slabs", len(r.files("slabs")))
	more()
	for i, s := range all {
		probe, err := r.volume(fmt.Sprintf("s%d-probe", i), size, rawBlock(), s.id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := load.holds(probe.target, s.before, s.after); err != nil {
			t.Errorf("snapshot %d: %v", i, err)
		}
		if err := errors.Join(probe.remove(), r.removeSnapshot(s.id)); err != nil {
			t.Fatal(err)
		}
	}
	more()
	if err := errors.Join(r.alone(v), load.end(), v.unpublish(), v.publish()); err != nil {
		t.Fatal(err)
	}
	if err := load.fio(v.target, load.round, "--verify_only"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(v.remove(), r.leavesNothing()); err != nil {
		t.Fatal(err)
	}
}
