// Command layers measures with fio what layers cost a workload: chains of 0, 1, 4
// and 8 layers, built by package block of slabs that are files and of slabs that
// are logical volumes, beside the bare device; and beside them what a user would
// take instead, LVM's own snapshots and qcow2 overlays.
//
// Device-mapper is needed, so it starts itself again in the kernel lab
// (docs/LAB.md). It must run as root, in the checkout.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/bench/rig"
)

// options are those of one run.
type options struct {
	long   bool
	on     string // "files" or "volumes"; "": both
	rounds int
	time   time.Duration // of one timed measurement
	depths []int         // of the chains
	chunk  int64         // bytes, of all layers
	chunks []int64       // sizes to compare beside the product's own
}

func main() {
	var o options
	lab := flag.String("lab", "hack/lab/run", "program that runs a command in the kernel lab")
	flag.BoolVar(&o.long, "long", false, "also one request at a time, several chunk sizes, and LVM with eight snapshots")
	flag.StringVar(&o.on, "on", "", "files or volumes only")
	flag.IntVar(&o.rounds, "rounds", 0, "rounds, in each of which everything is measured once (default 1, with -long 2)")
	flag.DurationVar(&o.time, "time", 50*time.Millisecond, "how long one measurement takes, where it is timed")
	chunk := flag.Int64("chunk", 0, "KiB in a chunk of the layers (default: what Quarry chooses)")
	flag.Func("depths", "how many layers the chains have (default 1,4,8)", func(text string) (err error) {
		o.depths, err = numbers[int](text)
		return err
	})
	flag.Func("chunks", "also measure one layer with chunks of so many KiB (default none, with -long 4,16,64,256)", func(text string) (err error) {
		o.chunks, err = numbers[int64](text)
		return err
	})
	flag.Parse()
	if o.on != "" && o.on != "files" && o.on != "volumes" {
		fmt.Fprintf(os.Stderr, "layers: -on %q: files or volumes is allowed\n", o.on)
		os.Exit(2)
	}
	if o.chunk = *chunk * kib; o.chunk == 0 {
		o.chunk = layer.ChunkSize(size)
	}
	if o.depths == nil {
		o.depths = []int{1, 4, 8}
	}
	if o.long && o.chunks == nil {
		o.chunks = []int64{4, 16, 64, 256}
	}
	if o.rounds == 0 {
		o.rounds = 1
		if o.long {
			o.rounds = 2
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	run := func() error {
		return rig.InLab(ctx, *lab, []string{"--virtual-time", "--time", "14400", "--memory", "7168", "--no-scratch"}, os.Args[1:])
	}
	if os.Getenv("QUARRY_LAB") == "1" {
		run = func() error { return inside(ctx, o) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "layers:", err)
		os.Exit(1)
	}
}

func numbers[T int | int64](text string) ([]T, error) {
	var out []T
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.ParseInt(word, 10, 32)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q: numbers above 0 are allowed, separated by commas", text)
		}
		out = append(out, T(n))
	}
	return out, nil
}
