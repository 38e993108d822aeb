// Command shares measures volumes on storage over a network, with real servers in
// the kernel lab and the real Quarry process:
//
//   - snapshots: a snapshot of a mounted volume by a layer, of several sizes, beside
//     what a driver without snapshots does: tar and rsync of its data into another
//     folder of the share;
//   - data: what a workload gets from a volume that is a file at the server, beside a
//     directory of the same share;
//   - calls: how often the server is asked in each call of CSI.
//
// It starts itself again in the kernel lab (docs/LAB.md). It must run as root, in
// the checkout, after `make build`.
//
// Snapshots and the data path are measured in virtual time, where the clock of an
// emulated processor counts instructions. Server and client share that processor, so
// their work adds up, as it does for who waits for one answer before asking again;
// with many requests at a time a real server would work beside its client, and the
// absolute rates would be higher, also those of tar and rsync, up to twice. What is
// compared are two ways that ask the same server over the same connection. The network
// between them is made to take its time (-delay), else a round trip would cost the
// instructions alone.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

// options are those of one run.
type options struct {
	bin       string
	parts     []string
	on        []string // engines; nil: those that each part has by itself
	sizes     []int64  // GiB
	compared  int64    // GiB; one of sizes
	data      int64    // MiB in the volume that is compared
	snapshots int
	copies    int
	rounds    int // of counting
	clock     bool
	delay     time.Duration
	time      time.Duration
}

// part is one of the measurements.
type part struct {
	name    string
	engines []string // unless others are asked for
	lab     []string // options of hack/lab/run
	run     func(ctx context.Context, o options, engine string) error
}

func parts(o options) []part {
	clock := []string{"--time", "7200", "--memory", "5120", "--disk", "1T"}
	virtual := []string{"--time", "7200", "--memory", "7168", "--no-scratch", "--virtual-time"}
	snapshots := virtual
	if o.clock {
		snapshots = clock
	}
	return []part{
		{"calls", []string{"nfs3", "nfs4", "smb"}, clock, countCalls},
		{"snapshots", []string{"nfs3", "smb"}, snapshots, measureSnapshots},
		{"data", []string{"nfs3", "nfs4"}, virtual, measureData},
	}
}

func main() {
	var o options
	lab := flag.String("lab", "hack/lab/run", "program that runs a command in the kernel lab")
	flag.StringVar(&o.bin, "bin", "bin", "folder of the binaries")
	list := func(to *[]string, name, usage string, allowed ...string) {
		flag.Func(name, usage, func(text string) error {
			*to = strings.Split(text, ",")
			for _, word := range *to {
				if !slices.Contains(allowed, word) {
					return fmt.Errorf("%q: allowed are %s, separated by commas", word, strings.Join(allowed, ", "))
				}
			}
			return nil
		})
	}
	list(&o.parts, "part", "calls, snapshots or data only", "calls", "snapshots", "data")
	list(&o.on, "on", "nfs3, nfs4 or smb only (default what each part has)", "nfs3", "nfs4", "smb")
	flag.Func("sizes", "GiB of the volumes that are snapshotted (default 1,10,100)", func(text string) (err error) {
		o.sizes, err = numbers(text)
		return err
	})
	flag.Int64Var(&o.compared, "compared", 10, "GiB of the volume whose data is copied as well; one of -sizes")
	flag.Int64Var(&o.data, "data", 1024, "MiB of data in it")
	flag.IntVar(&o.snapshots, "snapshots", 5, "snapshots of each volume")
	flag.IntVar(&o.copies, "copies", 1, "copies by tar and by rsync")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each call is counted")
	flag.BoolVar(&o.clock, "clock", false, "snapshots and copies on the clock, with two processors and no delay of the network")
	flag.DurationVar(&o.delay, "delay", 50*time.Microsecond, "what the network adds one way, in virtual time")
	flag.DurationVar(&o.time, "time", 100*time.Millisecond, "how long one measurement of the data path takes")
	flag.Parse()
	if o.sizes == nil {
		o.sizes = []int64{1, 10, 100}
	}
	if err := run(o, *lab); err != nil {
		fmt.Fprintln(os.Stderr, "shares:", err)
		os.Exit(1)
	}
}

func run(o options, lab string) (err error) {
	if !slices.Contains(o.sizes, o.compared) {
		return fmt.Errorf("-compared %d: one of -sizes %v is needed", o.compared, o.sizes)
	}
	if o.data < littleData || o.data*mib > o.compared*gib*3/4 {
		return fmt.Errorf("-data %d: between %d and three quarters of the volume (%d) is needed", o.data, littleData, o.compared*gib/mib*3/4)
	}
	if o.snapshots < 1 || o.copies < 1 || o.rounds < 1 {
		return fmt.Errorf("-snapshots %d, -copies %d, -rounds %d: 1 is the least", o.snapshots, o.copies, o.rounds)
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(o.bin, "quarry")); err != nil {
		return fmt.Errorf("-bin: %w (make build makes it)", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	for _, p := range parts(o) {
		if o.parts != nil && !slices.Contains(o.parts, p.name) {
			continue
		}
		engines := o.on
		if engines == nil {
			engines = p.engines
		}
		for _, engine := range engines {
			do := func() error { return p.run(ctx, o, engine) }
			if os.Getenv("QUARRY_LAB") != "1" { // each has a machine of its own: nothing is left of the one before
				do = func() error {
					return rig.InLab(ctx, lab, p.lab, append(slices.Clone(os.Args[1:]), "-part", p.name, "-on", engine))
				}
			}
			if err := do(); err != nil {
				return fmt.Errorf("%s on %s: %w", p.name, engine, err)
			}
		}
	}
	return nil
}

func numbers(text string) (out []int64, err error) {
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.ParseInt(word, 10, 32)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q: numbers above 0 are allowed, separated by commas", text)
		}
		out = append(out, n)
	}
	return out, nil
}
