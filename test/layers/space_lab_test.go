package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

// paused is how many layers the kernel holds.
func pausedLayers(t *testing.T) int {
	t.Helper()
	n := 0
	for line := range strings.Lines(run(t, "dmsetup", "info", "-C", "--noheadings", "--separator", " ", "-o", "uuid,suspended")) {
		if f := strings.Fields(line); len(f) == 2 && strings.HasPrefix(f[0], "QUARRY-s-") && f[1] == "Suspended" {
			n++
		}
	}
	return n
}

func (r *rig) paused(want int) {
	r.t.Helper()
	if err := eventually(fmt.Sprint(want, " paused layers"), patience, func() error {
		if n := pausedLayers(r.t); n != want {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
}

// stateOf is an image's state, and why.
func (r *rig) state(v *volume, state, reason string) {
	r.t.Helper()
	if err := eventually("the state "+state, patience, func() error {
		all, err := r.admin.Images(context.Background())
		for _, i := range all {
			if i.Handle == v.id && (i.State != state || !strings.Contains(i.Reason, reason)) {
				err = fmt.Errorf("it is %s: %s", i.State, i.Reason)
			}
		}
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
}

// TestThinLayersOnAStorageThatRunsFull: what is written waits before it is full, goes on when there
// is space again, and outlives a killed Quarry and the end of its pod meanwhile.
func TestThinLayersOnAStorageThatRunsFull(t *testing.T) {
	lab.Need(t)
	r := newRig(t, lab.Loop(t, 2*gib))
	create := &csi.CreateVolumeRequest{Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib},
		VolumeCapabilities: []*csi.VolumeCapability{filesystem()}, Parameters: map[string]string{"domain": domainName, "thinLayers": "true"}}
	made, err := call(r.CreateVolume, create)
	if err != nil {
		t.Fatal(err)
	}
	v := &volume{r: r, id: made.GetVolume().GetVolumeId(), name: "v", size: 64 * mib, cap: filesystem(),
		staging: filepath.Join(r.Kubelet(), "v", "staging"), target: filepath.Join(r.Kubelet(), "v", "target")}
	if err := v.publish(); err != nil {
		t.Fatal(err)
	}
	snapshot := func(name string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		made, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id})
		return made.GetSnapshot().GetSnapshotId(), err
	}
	s, err := snapshot("s")
	if err != nil {
		t.Fatal(err)
	}
	var head unix.Stat_t
	if err := unix.Stat(r.slab(v, 0), &head); err != nil || head.Blocks*512 > 8*mib {
		t.Errorf("its layer takes %d bytes, %v", head.Blocks*512, err)
	}

	m := &mounted{workers: newWorkers(t), work: t.TempDir()}
	j, err := os.OpenFile(filepath.Join(v.target, journal), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	m.g.Go(func() error { return errors.Join(m.write(j, v.target), j.Close()) })
	further := func() {
		t.Helper()
		from := m.durable.Load()
		if err := eventually("more to be written", patience, func() error {
			if now := m.durable.Load(); now < from+3 {
				return fmt.Errorf("it went from %d to %d", from, now)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	further()

	var st unix.Statfs_t
	if err := unix.Statfs(r.path, &st); err != nil {
		t.Fatal(err)
	}
	reserve := layer.ReserveOf(int64(st.Blocks) * st.Bsize)
	filler, err := os.Create(filepath.Join(r.path, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	if err := unix.Fallocate(int(filler.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-reserve.Low+8*mib); err != nil {
		t.Fatal(err)
	}
	r.paused(1)
	r.state(v, "degraded", "wait")
	if kind := r.finding(v); kind != "report" {
		t.Errorf("check finds %q", kind)
	}
	if err := eventually("the node to say so", patience, func() error {
		if text := r.health(v); !strings.Contains(text, "WritesPaused") {
			return errors.New(text)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := snapshot("refused"); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), domainName) {
		t.Errorf("a snapshot meanwhile: %v", err)
	}

	if err := r.Kill(); err != nil {
		t.Fatal(err)
	}
	further() // nobody guards it: the watchdog resumes
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.paused(1)

	// The pod goes: its writer ends at the next breath, its volume is taken down.
	if err := m.end(); err != nil {
		t.Fatal(err)
	}
	if err := v.unpublish(); err != nil {
		t.Fatal(err)
	}
	if left := mapped(t); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
	if err := v.tryPublish(t); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("staged while writes would wait: %v", err)
	}
	if err := errors.Join(filler.Truncate(0), filler.Sync(), os.Remove(filler.Name())); err != nil {
		t.Fatal(err)
	}
	if err := v.publish(); err != nil {
		t.Fatal(err)
	}
	r.state(v, "optimized", "")
	if _, err := m.look(v.target, m.mark(), m.mark()); err != nil {
		t.Error(err)
	}
	if kind := r.finding(v); kind != "" {
		t.Errorf("check finds %q", kind)
	}
	if err := errors.Join(r.removeSnapshot(s), r.alone(v), v.remove(), r.leavesNothing()); err != nil {
		t.Fatal(err)
	}
}
