// Command datapath measures with fio what a workload gets from a raw block
// volume that Quarry staged, beside a loop device that was set up by hand in
// the same way (direct I/O) over a file on the same file system, and beside a
// file on that file system itself. The three take turns.
//
// It must run as root with fio, after `make build`.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

const size = 512 << 20

func main() {
	bin := flag.String("bin", "bin", "folder of the binaries")
	dir := flag.String("dir", os.TempDir(), "where the file system under test is kept")
	repeats := flag.Int("repeats", 5, "turns of each")
	seconds := flag.Int("seconds", 3, "of one measurement")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	for _, fstype := range []string{"xfs", "ext4"} {
		if err := measure(ctx, *bin, *dir, fstype, *repeats, *seconds); err != nil {
			fmt.Fprintln(os.Stderr, "datapath:", err)
			os.Exit(1)
		}
	}
}

// job is one kind of load.
type job struct {
	name, rw, block string
	depth           int
}

func measure(ctx context.Context, bin, parent, fstype string, repeats, seconds int) (err error) {
	dir, err := os.MkdirTemp(parent, "quarry-bench-datapath-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	mnt, unmount, err := rig.Filesystem(ctx, dir, fstype, 4<<30)
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
	volume, unstage, err := stage(ctx, q, domain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unstage()) }()

	file, backing := filepath.Join(mnt, "file"), filepath.Join(mnt, "backing")
	if err := errors.Join(rig.Filled(file, size), rig.Filled(backing, size)); err != nil {
		return err
	}
	out, err := rig.Run(ctx, "losetup", "--find", "--show", "--direct-io=on", backing)
	if err != nil {
		return err
	}
	loop := strings.TrimSpace(out)
	defer func() {
		_, e := rig.Run(context.WithoutCancel(ctx), "losetup", "--detach", loop)
		err = errors.Join(err, e)
	}()

	targets := []string{volume, loop, file}
	jobs := []job{{"4 KiB random read", "randread", "4k", 32}, {"4 KiB random write", "randwrite", "4k", 32},
		{"1 MiB sequential read", "read", "1m", 8}, {"1 MiB sequential write", "write", "1m", 8}}
	fmt.Printf("\ndata path on %s, %d MiB, direct I/O, %d turns of %d s; MiB/s\n", fstype, size>>20, repeats, seconds)
	t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "load\tvolume\tloop device\tratio\tfile\tratio\t")
	for _, j := range jobs {
		var rates [3][]float64
		var ratios [3][]float64
		for turn := range repeats {
			var now [3]float64
			for k := range targets {
				who := (turn + k) % len(targets) // none always comes first
				if now[who], err = fio(ctx, j, targets[who], seconds); err != nil {
					return err
				}
				rates[who] = append(rates[who], now[who])
			}
			for who := range targets {
				ratios[who] = append(ratios[who], now[0]/now[who])
			}
		}
		fmt.Fprintf(t, "%s\t%.0f\t%.0f\t%.2f\t%.0f\t%.2f\t\n", j.name, rig.Quantile(rates[0], 0.5), rig.Quantile(rates[1], 0.5),
			rig.Quantile(ratios[1], 0.5), rig.Quantile(rates[2], 0.5), rig.Quantile(ratios[2], 0.5))
	}
	return t.Flush()
}

// fio returns MiB per second.
func fio(ctx context.Context, j job, target string, seconds int) (float64, error) {
	out, err := rig.Run(ctx, "fio", "--name=quarry", "--filename="+target, "--rw="+j.rw, "--bs="+j.block, fmt.Sprint("--iodepth=", j.depth),
		"--ioengine=libaio", "--direct=1", fmt.Sprint("--size=", size), "--time_based", fmt.Sprint("--runtime=", seconds), "--output-format=json")
	if err != nil {
		return 0, err
	}
	var said struct {
		Jobs []struct {
			Read, Write struct {
				Bytes   float64 `json:"io_bytes"`
				Runtime float64 `json:"runtime"` // milliseconds
			}
		}
	}
	// fio may print notes before the JSON.
	if err := json.Unmarshal([]byte(out[max(0, strings.IndexByte(out, '{')):]), &said); err != nil || len(said.Jobs) != 1 {
		return 0, fmt.Errorf("fio's answer cannot be read: %w\n%s", err, out)
	}
	one := said.Jobs[0].Read
	if strings.Contains(j.rw, "write") {
		one = said.Jobs[0].Write
	}
	if one.Runtime == 0 {
		return 0, fmt.Errorf("fio measured nothing: %s", out)
	}
	return one.Bytes / (1 << 20) / (one.Runtime / 1000), nil
}

// stage makes a raw block volume whose slab is full of data, and publishes it.
func stage(ctx context.Context, q *rig.Quarry, domain string) (device string, unstage func() error, err error) {
	made, err := q.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{rig.Block()}, Parameters: map[string]string{"domain": "d"}})
	if err != nil {
		return "", nil, err
	}
	id := made.GetVolume().GetVolumeId()
	if err := rig.Filled(filepath.Join(domain, "slabs", filepath.Base(id)), size); err != nil {
		return "", nil, err
	}
	published, err := rig.Call(ctx, q.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: rig.Node, VolumeCapability: rig.Block()})
	if err != nil {
		return "", nil, err
	}
	staging, pod := filepath.Join(q.Kubelet, "staging"), filepath.Join(q.Kubelet, "pod")
	if err := errors.Join(os.Mkdir(staging, 0o755), os.Mkdir(pod, 0o755)); err != nil {
		return "", nil, err
	}
	target := filepath.Join(pod, "device")
	if _, err := rig.Call(ctx, q.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: id, PublishContext: published.GetPublishContext(),
		StagingTargetPath: staging, VolumeCapability: rig.Block()}); err != nil {
		return "", nil, err
	}
	if _, err := rig.Call(ctx, q.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: id, PublishContext: published.GetPublishContext(),
		StagingTargetPath: staging, TargetPath: target, VolumeCapability: rig.Block()}); err != nil {
		return "", nil, err
	}
	return target, func() error {
		ctx := context.WithoutCancel(ctx)
		_, e1 := rig.Call(ctx, q.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		_, e2 := rig.Call(ctx, q.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: staging})
		_, e3 := rig.Call(ctx, q.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: rig.Node})
		return errors.Join(e1, e2, e3)
	}, nil
}
