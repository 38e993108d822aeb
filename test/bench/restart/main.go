// Command restart measures how long Quarry takes from its start until Probe says
// ready and all volumes and snapshots have been listed, and how much memory it
// has needed by then, with 10,000 images in its domain. As they are new, each
// still has the tags of its making: the most that there can be.
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
	"text/tabwriter"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
	"github.com/quarry-csi/quarry/pkg/node"
	"github.com/quarry-csi/quarry/test/bench/rig"
)

func main() {
	bin := flag.String("bin", "bin", "folder of the binaries")
	parent := flag.String("dir", os.TempDir(), "where the file system under test is kept")
	images := flag.Int("images", 10000, "volumes and snapshots, four to one")
	repeats := flag.Int("repeats", 5, "starts with cold and with warm caches")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := measure(ctx, *bin, *parent, *images, *repeats); err != nil {
		fmt.Fprintln(os.Stderr, "restart:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, bin, parent string, images, repeats int) (err error) {
	own, err := os.MkdirTemp(parent, "quarry-bench-restart-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(own)) }()
	mnt, unmount, err := rig.Filesystem(ctx, own, "ext4", 32<<30)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	// While it is filled nothing needs to survive a power cut.
	if _, err := rig.Run(ctx, "mount", "-o", "remount,barrier=0", mnt); err != nil {
		return err
	}
	if err := fill(ctx, mnt, images); err != nil {
		return err
	}
	if _, err := rig.Run(ctx, "mount", "-o", "remount,barrier=1", mnt); err != nil {
		return err
	}
	tags, err := os.ReadDir(filepath.Join(mnt, "tags", "i"))
	if err != nil {
		return err
	}
	fmt.Printf("\nstart with %d images (%d records) on ext4; %d starts each\n", images, len(tags), repeats)
	t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "caches\tready\tmost\tready and listed\tmost\tprocessor\tmost\tmemory\tmost\t")
	var ready, listed, cpu [2][]time.Duration
	var memory [2][]int64
	for range repeats {
		for warm := range 2 {
			if warm == 0 {
				unix.Sync()
				if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
					return err
				}
			}
			r, l, c, m, err := start(ctx, bin, own, mnt, images)
			if err != nil {
				return err
			}
			ready[warm], listed[warm], memory[warm] = append(ready[warm], r), append(listed[warm], l), append(memory[warm], m)
			cpu[warm] = append(cpu[warm], c)
		}
	}
	for warm, name := range []string{"cold", "warm"} {
		fmt.Fprintf(t, "%s\t%v\t%v\t%v\t%v\t%v\t%v\t%d MiB\t%d MiB\t\n", name, ms(rig.Quantile(ready[warm], 0.5)), ms(rig.Quantile(ready[warm], 1)),
			ms(rig.Quantile(listed[warm], 0.5)), ms(rig.Quantile(listed[warm], 1)),
			ms(rig.Quantile(cpu[warm], 0.5)), ms(rig.Quantile(cpu[warm], 1)), rig.Quantile(memory[warm], 0.5)>>20, rig.Quantile(memory[warm], 1)>>20)
	}
	return t.Flush()
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// start starts Quarry, asks it for everything, and stops it.
func start(ctx context.Context, bin, own, mnt string, images int) (ready, listed, cpu time.Duration, memory int64, err error) {
	begin := time.Now()
	q, err := rig.Start(ctx, bin, own, map[string]string{"d": mnt})
	if err != nil {
		return 0, 0, 0, 0, err
	}
	ready = time.Since(begin)
	defer func() { err = errors.Join(err, q.Stop()) }()
	have := 0
	for token := ""; ; {
		reply, err := q.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 1000, StartingToken: token})
		if err != nil {
			return 0, 0, 0, 0, err
		}
		have += len(reply.GetEntries())
		if token = reply.GetNextToken(); token == "" {
			break
		}
	}
	for token := ""; ; {
		reply, err := q.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: 1000, StartingToken: token})
		if err != nil {
			return 0, 0, 0, 0, err
		}
		have += len(reply.GetEntries())
		if token = reply.GetNextToken(); token == "" {
			break
		}
	}
	listed = time.Since(begin)
	if have != images {
		return 0, 0, 0, 0, fmt.Errorf("%d images are listed of %d", have, images)
	}
	if cpu, err = q.CPU(); err != nil {
		return 0, 0, 0, 0, err
	}
	memory, err = q.Memory()
	return ready, listed, cpu, memory, err
}

// fill makes the images with an Image Manager in this process.
func fill(ctx context.Context, path string, images int) error {
	ctx = klog.NewContext(ctx, klog.Logger{}) // a line for each image helps nobody; errors are returned
	engine, err := dir.Open(ctx, map[string]string{"path": path}, host.Exec{})
	if err != nil {
		return err
	}
	worker := &mover.Local{Files: mover.New(mover.Options{}), Agents: &node.Agents{}}
	m := image.New(image.Config{Installation: rig.Installation, Agents: worker.Agents, Worker: worker, CollectEvery: -1})
	worker.Engines = m.Engine
	id, err := m.AddDomain(ctx, image.DomainConfig{Name: "d", Engine: "dir", Scope: image.ScopeNode, Node: rig.Node, Overcommit: 100}, engine)
	if err != nil {
		return errors.Join(err, engine.Close())
	}
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(32)
	snapshots := images / 5
	for i := range images - snapshots {
		name := fmt.Sprintf("pvc-%08d-0000-4000-8000-000000000000", i)
		group.Go(func() error {
			v, err := again(func() (image.Image, error) {
				return m.CreateVolume(gctx, image.CreateRequest{Name: name, Domains: []string{id}, Size: 20 << 20,
					Accesses:  []image.Access{{Filesystem: "ext4", Mode: image.SingleNodeWriter}},
					Described: image.Described{Namespace: "a-namespace", Claim: fmt.Sprint("data-database-", i), Volume: name, Class: "standard"}})
			})
			if err != nil || i >= snapshots {
				return err
			}
			_, err = again(func() (image.Image, error) {
				return m.CreateSnapshot(gctx, image.SnapshotRequest{Name: "snapshot-" + name, Source: v.Handle})
			})
			return err
		})
	}
	return errors.Join(group.Wait(), m.Close())
}

// again repeats what may still be running, as a sidecar would.
func again[T any](do func() (T, error)) (t T, err error) {
	for range 100 {
		if t, err = do(); !errors.Is(err, fault.Unavailable) && !errors.Is(err, fault.Pending) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return t, err
}
