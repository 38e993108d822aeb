// Command operations measures CreateVolume, CreateSnapshot, clone and delete over
// the CSI socket of the real process, beside their floor: the bare system calls
// that leave as many files behind as durably, on the same file system. It shows
// latencies and operations per second with one caller and with many, on XFS
// (native snapshots) and on ext4 (copies). Quarry and floor take turns.
//
// It must run as root, after `make build`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

const (
	mib      = 1 << 20
	size     = 16 * mib // of every volume
	data     = 1 * mib  // in every volume that is snapshotted
	diskSize = 24 << 30
)

func main() {
	bin := flag.String("bin", "bin", "folder of the binaries")
	dir := flag.String("dir", os.TempDir(), "where the file systems under test are kept")
	repeats := flag.Int("repeats", 5, "turns of Quarry and of the floor")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	for _, fstype := range []string{"xfs", "ext4"} {
		if err := measure(ctx, *bin, *dir, fstype, *repeats); err != nil {
			fmt.Fprintln(os.Stderr, "operations:", err)
			os.Exit(1)
		}
	}
}

// side is Quarry or the floor: four operations, each on the i-th object of a worker.
type side interface {
	createVolume(ctx context.Context, worker int, name string) error
	createSnapshot(ctx context.Context, worker int, name string) error
	clone(ctx context.Context, worker int, name string) error
	deleteVolume(ctx context.Context, worker int, name string) error
	// settle waits until nothing goes on in the background any more.
	settle(ctx context.Context) error
	// folders of the files that operations leave behind.
	folders() []string
}

// series are the measurements of one operation of one side.
type series struct {
	took  []time.Duration
	rate  []float64 // operations per second of each turn
	files int       // made by all
}

func measure(ctx context.Context, bin, parent, fstype string, repeats int) (err error) {
	dir, err := os.MkdirTemp(parent, "quarry-bench-operations-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	mnt, unmount, err := rig.Filesystem(ctx, dir, fstype, diskSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	domain := filepath.Join(mnt, "domain")
	if err := os.Mkdir(domain, 0o755); err != nil {
		return err
	}
	q, err := rig.Start(ctx, bin, dir, map[string]string{"d": domain})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Stop()) }()
	fmt.Printf("\noperations on %s, volumes of %d MiB, %d MiB in each that is snapshotted; %d turns\n", fstype, size/mib, data/mib, repeats)
	t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "operation\tcallers\tp50\tfloor\tratio\tp99\tfloor\tper second\tfloor\tratio\t")
	for _, callers := range []int{1, 32} {
		mine, err := newService(ctx, q, domain, fmt.Sprint("c", callers), callers)
		if err != nil {
			return err
		}
		bare, err := newFloor(filepath.Join(mnt, fmt.Sprint("floor", callers)), fstype == "xfs", callers)
		if err != nil {
			return err
		}
		if err := errors.Join(compare(ctx, t, mine, bare, callers, repeats), bare.close()); err != nil {
			return err
		}
	}
	return t.Flush()
}

// compare lets both sides do the same in turns.
func compare(ctx context.Context, t *tabwriter.Writer, mine, bare side, callers, repeats int) error {
	operations := []string{"CreateVolume", "CreateSnapshot", "clone", "DeleteVolume"}
	all := map[string]*[2]series{}
	for _, name := range operations {
		all[name] = &[2]series{}
	}
	each := max(20, 4*callers) // operations of each kind in a turn
	for turn := range repeats {
		for _, name := range operations {
			for k := range 2 {
				who := (turn + k) % 2 // none always comes first
				s := []side{mine, bare}[who]
				if err := one(ctx, s, name, &all[name][who], callers, each, turn); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
		}
	}
	for _, name := range operations {
		q, f := all[name][0], all[name][1]
		if q.files > f.files {
			return fmt.Errorf("%s: Quarry left %d files and the floor %d: they do not do the same", name, q.files, f.files)
		}
		p50, floor50 := rig.Quantile(q.took, 0.5), rig.Quantile(f.took, 0.5)
		rate, floorRate := rig.Quantile(q.rate, 0.5), rig.Quantile(f.rate, 0.5)
		fmt.Fprintf(t, "%s\t%d\t%v\t%v\t%.2f\t%v\t%v\t%.0f\t%.0f\t%.2f\t\n", name, callers, round(p50), round(floor50), p50.Seconds()/floor50.Seconds(),
			round(rig.Quantile(q.took, 0.99)), round(rig.Quantile(f.took, 0.99)), rate, floorRate, floorRate/rate)
	}
	return nil
}

// one turn of one side with one operation.
func one(ctx context.Context, s side, name string, m *series, callers, each, turn int) error {
	do := map[string]func(context.Context, int, string) error{
		"CreateVolume": s.createVolume, "CreateSnapshot": s.createSnapshot, "clone": s.clone, "DeleteVolume": s.deleteVolume}[name]
	before, err := files(s)
	if err != nil {
		return err
	}
	if err := batch(ctx, m, callers, each, fmt.Sprint("t", turn), do); err != nil {
		return err
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	after, err := files(s)
	m.files += after - before
	return err
}

// files counts what a side has made.
func files(s side) (n int, err error) {
	for _, folder := range s.folders() {
		entries, err := os.ReadDir(folder)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, err
		}
		n += len(entries)
	}
	return n, nil
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

// batch runs each operations on so many callers and adds what it measured.
func batch(ctx context.Context, s *series, callers, each int, turn string, do func(context.Context, int, string) error) error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var failed error
	begin := time.Now()
	for w := range callers {
		wg.Go(func() {
			for i := w; i < each; i += callers {
				one := time.Now()
				err := do(ctx, w, fmt.Sprint(turn, "-", i))
				took := time.Since(one)
				mu.Lock()
				s.took = append(s.took, took)
				failed = errors.Join(failed, err)
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	s.rate = append(s.rate, float64(each)/time.Since(begin).Seconds())
	return failed
}

// service is Quarry.
type service struct {
	q         *rig.Quarry
	domain    string
	prefix    string
	sources   []string // a volume with data for each worker
	snapshots []string // a snapshot of it

	mu   sync.Mutex
	made map[string]string // handles by name
}

func newService(ctx context.Context, q *rig.Quarry, domain, prefix string, workers int) (*service, error) {
	s := &service{q: q, domain: domain, prefix: prefix, made: map[string]string{}}
	for w := range workers {
		id, err := s.create(ctx, fmt.Sprint("source-", w), nil)
		if err != nil {
			return nil, err
		}
		if err := rig.Filled(filepath.Join(domain, "slabs", filepath.Base(id)), data); err != nil {
			return nil, err
		}
		snap, err := s.snapshot(ctx, id, fmt.Sprint("source-", w))
		if err != nil {
			return nil, err
		}
		s.sources, s.snapshots = append(s.sources, id), append(s.snapshots, snap)
	}
	return s, nil
}

func (s *service) create(ctx context.Context, name string, source *csi.VolumeContentSource) (string, error) {
	reply, err := s.q.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: s.prefix + "-" + name,
		CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{rig.Block()},
		Parameters: map[string]string{"domain": "d"}, VolumeContentSource: source})
	return reply.GetVolume().GetVolumeId(), err
}

func (s *service) snapshot(ctx context.Context, of, name string) (string, error) {
	reply, err := s.q.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{SourceVolumeId: of, Name: s.prefix + "-" + name})
	return reply.GetSnapshot().GetSnapshotId(), err
}

func (s *service) createVolume(ctx context.Context, _ int, name string) error {
	id, err := s.create(ctx, name, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made[name] = id
	return err
}

func (s *service) createSnapshot(ctx context.Context, worker int, name string) error {
	_, err := s.snapshot(ctx, s.sources[worker], name)
	return err
}

func (s *service) clone(ctx context.Context, worker int, name string) error {
	_, err := s.create(ctx, "clone-"+name, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.snapshots[worker]}}})
	return err
}

func (s *service) deleteVolume(ctx context.Context, _ int, name string) error {
	s.mu.Lock()
	id := s.made[name]
	delete(s.made, name)
	s.mu.Unlock()
	_, err := s.q.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

func (s *service) folders() []string {
	return []string{filepath.Join(s.domain, "slabs"), filepath.Join(s.domain, "tags", "i"), filepath.Join(s.domain, "tags", "d")}
}

// settle waits until the collector has removed the slabs of deleted volumes:
// those that are left are the ones that CSI lists.
func (s *service) settle(ctx context.Context) error {
	volumes, err := s.q.ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return err
	}
	snapshots, err := s.q.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return err
	}
	unix.Sync()
	want := len(volumes.GetEntries()) + len(snapshots.GetEntries())
	for {
		slabs, err := os.ReadDir(filepath.Join(s.domain, "slabs"))
		if err != nil || len(slabs) == want {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}
