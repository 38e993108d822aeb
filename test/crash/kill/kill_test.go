package kill_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

const (
	quickKills = 10
	workers    = 5
	diskSize   = 12 << 30
)

func number(t *testing.T, env string, without uint64) uint64 {
	s := os.Getenv(env)
	if s == "" {
		return without
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q: must be a number", env, s)
	}
	return n
}

// TestKilledUnderLoad: whatever moment kill -9 comes at, what was acknowledged is
// there, whole, and what was deleted is gone; nothing is half visible, no
// filesystem stays frozen, and in the end nothing is left.
func TestKilledUnderLoad(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making file systems, loop devices and mounts needs root")
	}
	kills := int(number(t, "QUARRY_KILLS", quickKills))
	seed := number(t, "QUARRY_SEED", uint64(time.Now().UnixNano()))
	t.Logf("QUARRY_KILLS=%d QUARRY_SEED=%d", kills, seed)

	binary := filepath.Join(t.TempDir(), "quarry")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "./cmd/quarry")
	build.Dir = filepath.Join("..", "..", "..")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	domains := map[string]string{
		"native": hosttest.Filesystem(t, "xfs", diskSize),
		"plain":  hosttest.Filesystem(t, "ext4", diskSize),
	}
	dir := t.TempDir()
	q, err := newQuarry(binary, dir, domains)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { takeDown(t, q, domains) })
	r := &run{q: q, l: newLedger(), active: &writers{all: map[*writer]bool{}}, kills: kills, rnd: rand.New(rand.NewPCG(seed, 0))}
	users, err := r.underLoad(t.Context(), seed)
	t.Logf("%s; steps: %s", r.report(), total(users))
	if err == nil {
		err = r.nothingIsLeft(t, domains)
	}
	if err != nil {
		t.Fatalf("seed %d, after kill %d: %v\nthe end of the log:\n%s", seed, r.killed, err, q.lastLog(60))
	}
}

// run is one run of the test.
type run struct {
	q      *quarry
	l      *ledger
	active *writers
	kills  int
	rnd    *rand.Rand

	killed, early, families, watched int
	slowest                          time.Duration
}

func (r *run) report() string {
	return fmt.Sprintf("%d kills: %d while starting, %d with all children, %d left to the watchdog; slowest start %s",
		r.killed, r.early, r.families, r.watched, r.slowest.Round(time.Millisecond))
}

func total(users []*worker) string {
	sum := map[string]int{}
	for _, w := range users {
		for name, n := range w.done {
			sum[name] += n
		}
	}
	var out []string
	for name, n := range sum {
		out = append(out, fmt.Sprintf("%s %d", name, n))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// underLoad lets workers work and kills Quarry until it was killed enough.
func (r *run) underLoad(ctx context.Context, seed uint64) ([]*worker, error) {
	group, ctx := errgroup.WithContext(ctx)
	if err := r.start(ctx, false); err != nil {
		return nil, err
	}
	enough := make(chan struct{})
	var users []*worker
	for i := range workers {
		w := &worker{q: r.q, l: r.l, active: r.active, id: i, rnd: rand.New(rand.NewPCG(seed, uint64(i)+1)), done: map[string]int{}}
		users = append(users, w)
		group.Go(func() error { return w.run(ctx, enough) })
	}
	group.Go(func() error {
		for r.killed < r.kills {
			if err := r.kill(ctx); err != nil {
				return err
			}
		}
		close(enough)
		return nil
	})
	return users, group.Wait()
}

// start starts Quarry; with audit, what it lists is compared once it is ready.
func (r *run) start(ctx context.Context, audit bool) error {
	begin := time.Now()
	if err := r.q.start(); err != nil {
		return err
	}
	if err := r.q.ready(ctx); err != nil {
		return err
	}
	r.slowest = max(r.slowest, time.Since(begin))
	if !audit {
		return nil
	}
	return r.q.audit(ctx, r.l)
}

// kill waits for a moment of chance, kills, and starts again; sometimes the new
// process is killed before it is ready.
func (r *run) kill(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Duration(r.rnd.IntN(1200)) * time.Millisecond):
	}
	r.killed++
	switch n := r.rnd.IntN(10); n {
	case 0:
		// Dead for good, as far as anybody knows: what is frozen is up to the watchdogs.
		r.watched++
		if err := r.q.kill(false); err != nil {
			return err
		}
		for _, w := range r.active.list() {
			if err := w.goesOn(ctx); err != nil {
				return err
			}
		}
	default:
		family := n < 4 // then nothing but the next start can thaw
		if family {
			r.families++
		}
		if err := r.q.kill(family); err != nil {
			return err
		}
	}
	for r.killed < r.kills && r.rnd.IntN(5) == 0 {
		if err := r.q.start(); err != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(r.rnd.IntN(80)) * time.Millisecond):
		case <-ctx.Done():
		}
		r.killed++
		r.early++
		if err := r.q.kill(r.rnd.IntN(2) == 0); err != nil {
			return err
		}
	}
	if err := r.start(ctx, true); err != nil {
		return err
	}
	if r.rnd.IntN(4) > 0 {
		return nil
	}
	for _, w := range r.active.list() {
		if err := w.goesOn(ctx); err != nil {
			return err
		}
	}
	return nil
}

// until repeats check until it succeeds.
func until(ctx context.Context, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// nothingIsLeft deletes what was forsaken, and looks for what should not be.
func (r *run) nothingIsLeft(t *testing.T, domains map[string]string) error {
	ctx := t.Context()
	if err := r.q.audit(ctx, r.l); err != nil {
		return err
	}
	forsook := 0
	err := until(ctx, func() error {
		images, err := r.q.admin.Images(ctx)
		if err != nil {
			return err
		}
		for _, img := range images {
			key := keyOf(img)
			switch {
			case img.State == "deleting":
				continue
			case r.l.get(key).phase == forsaken && img.State != "creating":
				forsook++
				if _, err := call(ctx, r.q.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: img.Handle}); err != nil {
					return err
				}
			}
			return fmt.Errorf("%s (%s) is left: %s, %s", key, img.Handle, img.State, img.Reason)
		}
		return nil
	})
	if err != nil {
		return err
	}
	have, err := r.q.list(ctx)
	if err != nil || len(have) > 0 {
		return fmt.Errorf("listed after all was deleted: %v, error %v", have, err)
	}
	for name, path := range domains {
		for _, folder := range []string{"slabs", "trash"} {
			if err := until(ctx, func() error { return empty(filepath.Join(path, folder)) }); err != nil {
				return fmt.Errorf("domain %s: %w", name, err)
			}
		}
		if entries, err := os.ReadDir(filepath.Join(path, "tmp")); err == nil && len(entries) > 0 {
			t.Logf("domain %s: %d files that were being made when their process died wait in tmp/ for their removal", name, len(entries))
		}
	}
	checked, err := r.q.admin.Check(ctx, "")
	if err != nil {
		return err
	}
	for _, f := range checked.Findings {
		if f.Kind != "clean" {
			return fmt.Errorf("check finds: %+v", f)
		}
	}
	t.Logf("%d of the volumes that were forsaken had been made; check finds %d things to clean", forsook, len(checked.Findings))
	if err := r.q.stop(); err != nil {
		return err
	}
	points, err := mountsBelow(r.q.kubelet)
	if err != nil || len(points) > 0 {
		return fmt.Errorf("mounts are left: %v, error %v", points, err)
	}
	for _, path := range domains {
		devices, err := loopsBelow(path)
		if err != nil || len(devices) > 0 {
			return fmt.Errorf("loop devices are left: %v, error %v", devices, err)
		}
	}
	return nil
}

func empty(folder string) error {
	entries, err := os.ReadDir(folder)
	if err == nil && len(entries) > 0 {
		err = fmt.Errorf("%d are left in %s, the first is %s", len(entries), folder, entries[0].Name())
	}
	return err
}

// takeDown removes whatever a failed run left standing.
func takeDown(t *testing.T, q *quarry, domains map[string]string) {
	if err := q.conn.Close(); err != nil {
		t.Error(err)
	}
	if q.cmd != nil && q.cmd.Process != nil {
		select {
		case <-q.exited:
		default:
			if err := q.kill(true); err != nil {
				t.Error(err)
			}
		}
	}
	points, err := mountsBelow(q.kubelet)
	if err != nil {
		t.Error(err)
	}
	for _, at := range points {
		if f, err := os.Open(at); err == nil {
			_ = unix.IoctlSetInt(int(f.Fd()), 0xc0045878, 0) // FITHAW: most are not frozen
			f.Close()
		}
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", at, err)
		}
	}
	for _, path := range domains {
		devices, err := loopsBelow(path)
		if err != nil {
			t.Error(err)
		}
		for _, dev := range devices {
			if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
				t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
			}
		}
	}
}

// mountsBelow returns the mount points below dir, the last mounted first.
func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			found = append(found, fields[4])
		}
	}
	slices.Reverse(found)
	return found, nil
}

// loopsBelow returns the loop devices whose backing file is below dir.
func loopsBelow(dir string) ([]string, error) {
	attributes, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, a := range attributes {
		data, err := os.ReadFile(a)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(string(data), dir+"/") {
			found = append(found, "/dev/"+filepath.Base(filepath.Dir(filepath.Dir(a))))
		}
	}
	return found, nil
}
