package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/engines/lvm"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/bench/rig"
)

// candidate is one way to have a volume.
type candidate struct {
	name string
	path string // what a workload would open
	// fresh takes back all writes since the last snapshot; nil: there is none.
	fresh func(context.Context) error
}

// family are candidates on one kind of storage. The first two are the same bare
// device, the first one measured at the beginning of each round and the second one
// with the others: what they differ by is noise.
type family struct {
	name       string
	candidates []*candidate
}

func inside(ctx context.Context, o options) error {
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	fmt.Printf("kernel %s, disks of %s, images of %d MiB, chunks of %d KiB, direct I/O, %d rounds, timed measurements of %s\n",
		strings.TrimSpace(string(kernel)), rig.Latency, size/mib, o.chunk/kib, o.rounds, o.time)
	for _, storage := range []struct {
		name string
		make func(context.Context, options) (family, error)
	}{{"files", onFiles}, {"volumes", onVolumes}} {
		if o.on != "" && o.on != storage.name {
			continue
		}
		f, err := storage.make(ctx, o)
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "the devices on %s are ready\n", storage.name)
		r := newResults()
		for round := range o.rounds {
			if err := f.measure(ctx, o, round, r); err != nil {
				return fmt.Errorf("%s: %w", f.name, err)
			}
		}
		if err := r.print(f, o); err != nil {
			return err
		}
	}
	return nil
}

func onFiles(ctx context.Context, o options) (family, error) {
	f := family{name: "files on ext4, bare: a loop device"}
	mnt, err := scratch(ctx)
	if err != nil {
		return f, err
	}
	place, err := os.MkdirTemp(mnt, "domain-")
	if err != nil {
		return f, err
	}
	e, err := dir.Open(ctx, map[string]string{"path": place}, host.Exec{})
	if err != nil {
		return f, err
	}
	d := newDomain("files", e)
	bare, err := d.raw(ctx, "bare")
	if err != nil {
		return f, err
	}
	out, err := rig.Run(ctx, "losetup", "--find", "--show", "--direct-io=on", bare.Path)
	if err != nil {
		return f, err
	}
	f.bare(strings.TrimSpace(out))
	if err := f.chains(ctx, d, o); err != nil {
		return f, err
	}
	if _, err := rig.Run(ctx, "modprobe", "fuse"); err != nil {
		return f, err
	}
	for _, way := range []overlay{{name: "qcow2"}, {name: "qcow2, subclusters", format: "extended_l2=on,cluster_size=128k"}} {
		if way.dir, err = os.MkdirTemp(mnt, "qcow2-"); err != nil {
			return f, err
		}
		c, err := way.candidate(ctx)
		if err != nil {
			return f, err
		}
		f.candidates = append(f.candidates, c)
	}
	return f, nil
}

func onVolumes(ctx context.Context, o options) (family, error) {
	f := family{name: "logical volumes, bare: a logical volume"}
	dev, err := rig.Disk(ctx, "nullb1", 32<<30, 512)
	if err != nil {
		return f, err
	}
	// LVM takes no devices of a driver that it does not know.
	if err := os.WriteFile("/etc/lvm/lvmlocal.conf", []byte("devices { types = [ \"nullb\", 16 ] }\n"), 0o644); err != nil {
		return f, err
	}
	if _, err := rig.Run(ctx, "vgcreate", noArchive, group, dev); err != nil {
		return f, err
	}
	e, err := lvm.Open(ctx, map[string]string{"vg": group, "devices": dev}, host.Exec{})
	if err != nil {
		return f, err
	}
	d := newDomain("volumes", e)
	bare, err := d.raw(ctx, "bare")
	if err != nil {
		return f, err
	}
	f.bare(bare.Path)
	if err := f.chains(ctx, d, o); err != nil {
		return f, err
	}
	for _, chunk := range o.chunks {
		if chunk*kib == o.chunk {
			continue
		}
		f.candidates = append(f.candidates, d.chain(fmt.Sprintf("depth 1, chunks of %d KiB", chunk), 1, chunk*kib))
	}
	own, err := ownSnapshots(ctx, lvmOwn, 1, false)
	if err != nil {
		return f, err
	}
	clone, err := ownSnapshots(ctx, lvmClone, 1, true)
	if err != nil {
		return f, err
	}
	f.candidates = append(f.candidates, own, clone)
	if o.long {
		many, err := ownSnapshots(ctx, "LVM's own, with 8 snapshots", 8, false)
		if err != nil {
			return f, err
		}
		f.candidates = append(f.candidates, many)
	}
	return f, nil
}

func (f *family) bare(path string) {
	f.candidates = append(f.candidates, &candidate{name: "bare", path: path}, &candidate{name: "bare again", path: path})
}

// chains adds the product: the same base and layers under several tops.
func (f *family) chains(ctx context.Context, d *domain, o options) error {
	whole, err := d.whole(ctx)
	if err != nil {
		return err
	}
	f.candidates = append(f.candidates, whole)
	if err := d.build(ctx, slices.Max(o.depths)-1, o.chunk); err != nil {
		return err
	}
	for _, depth := range o.depths {
		f.candidates = append(f.candidates, d.chain(fmt.Sprint("depth ", depth), depth, o.chunk))
	}
	return nil
}

// measure does a round: every load on every candidate.
func (f family) measure(ctx context.Context, o options, round int, r *results) error {
	for _, c := range f.candidates {
		if c.fresh == nil {
			continue
		}
		if err := c.fresh(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	type measurement struct {
		candidate *candidate
		phase     phase
		shape     shape
	}
	var all []measurement
	var sections []string
	others := f.candidates[1:]
	for turn, s := range shapes(o.long) {
		for _, p := range []phase{below, first, later, above} {
			// The bare device comes first and once more, and the others at another place
			// in every round.
			order := []*candidate{f.candidates[0]}
			for i := range others {
				order = append(order, others[(i+round*3+turn)%len(others)])
			}
			for _, c := range order {
				all = append(all, measurement{c, p, s})
				sections = append(sections, section(p, s, o.time, c.path))
			}
		}
	}
	rates, err := rig.Fio(ctx, sections)
	if err != nil {
		return err
	}
	for i, m := range all {
		r.add(f, m.candidate, m.phase, m.shape, rates[i])
	}
	return nil
}
