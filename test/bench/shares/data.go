package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

const (
	// fileSize is MiB in each file that loads read and write.
	fileSize = 128
	// diskSize of the server's disk, in memory.
	diskSize = 8 * gib
)

// load is what fio does with a file.
type load struct{ name, section string }

func loads() []load {
	// A write and its fsync, one after the other, through the page cache: a database's log.
	const synced = "ioengine=psync\ndirect=0\nfsync=1\n"
	return []load{
		{"4 KiB random read x1", "rw=randread\nbs=4k\niodepth=1\n"},
		{"4 KiB random read x16", "rw=randread\nbs=4k\niodepth=16\n"},
		{"4 KiB random write x1", "rw=randwrite\nbs=4k\niodepth=1\n"},
		{"4 KiB random write x16", "rw=randwrite\nbs=4k\niodepth=16\n"},
		{"1 MiB sequential read x4", "rw=read\nbs=1m\niodepth=4\n"},
		{"1 MiB sequential write x4", "rw=write\nbs=1m\niodepth=4\n"},
		{"4 KiB random write, fsync", "rw=randwrite\nbs=4k\n" + synced},
		{"1 MiB sequential write, fsync", "rw=write\nbs=1m\n" + synced},
	}
}

// measureData compares a file in a mounted volume with one in a directory of the same share, which is measured
// before and after it: what these two differ by is noise.
func measureData(ctx context.Context, o options, engine string) error {
	if err := virtual(ctx, o, diskSize); err != nil {
		return err
	}
	return rig.Tested(ctx, func(t testing.TB) error {
		s := serve(t, engine)
		q, share := s.quarry(t, o.bin), s.mount(t)
		v, err := create(ctx, q, "volume", gib, "")
		if err != nil {
			return err
		}
		if err := v.use(ctx); err != nil {
			return err
		}
		directory := filepath.Join(share, "directory")
		if err := os.Mkdir(directory, 0o755); err != nil {
			return err
		}
		rates, err := compare(ctx, o.time, v.target, directory)
		if err != nil {
			return err
		}
		if err := printData(engine, rates); err != nil {
			return err
		}
		return v.end(ctx)
	})
}

// virtual gives a machine in virtual time a disk for the server, and a network that takes its time.
func virtual(ctx context.Context, o options, size int64) error {
	if _, err := rig.Run(ctx, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", fmt.Sprintf("%dus", o.delay.Microseconds())); err != nil {
		return err
	}
	disk, err := rig.Disk(ctx, "nullb0", size, 4*kib)
	if err != nil {
		return err
	}
	fmt.Printf("\nvirtual time, one processor for server and client, network of %s each way, the server's disk answers in %s, XFS on it\n", o.delay, rig.Latency)
	return os.Setenv("LAB_DISKS", disk) // where servers of tests find theirs
}

// compare returns bytes per second of each load: in the directory, in the volume, and in the directory again.
func compare(ctx context.Context, took time.Duration, volume, directory string) (rates [][3]float64, err error) {
	var sections []string
	targets := [3]string{filepath.Join(directory, "file"), filepath.Join(volume, "file"), filepath.Join(directory, "file")}
	for _, path := range targets[:2] {
		if err := rig.Filled(path, fileSize*mib); err != nil {
			return nil, err
		}
	}
	for _, l := range loads() {
		for _, path := range targets {
			sections = append(sections, fmt.Sprintf("stonewall\n%ssize=%dm\ntime_based=1\nramp_time=20ms\nruntime=%dms\nfilename=%s\n",
				l.section, fileSize, took.Milliseconds(), path))
		}
	}
	flat, err := rig.Fio(ctx, sections)
	if err != nil {
		return nil, err
	}
	for i := range loads() {
		rates = append(rates, [3]float64(flat[3*i:3*i+3]))
	}
	return rates, nil
}

func printData(engine string, rates [][3]float64) error {
	fmt.Printf("\na file in an ext4 volume on %s, beside one in a directory of the same share; %d MiB, direct I/O but for fsync; MiB/s\n", engine, fileSize)
	t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "load\tdirectory\tagain\tvolume\tratio\t")
	for i, l := range loads() {
		r := rates[i]
		fmt.Fprintf(t, "%s\t%.2f\t%.2f\t%.2f\t%.2f\t\n", l.name, r[0]/float64(mib), r[2]/float64(mib), r[1]/float64(mib), r[1]/((r[0]+r[2])/2))
	}
	return t.Flush()
}
