package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/quarry-csi/quarry/test/bench/rig"
	"github.com/quarry-csi/quarry/test/process"
)

const (
	// littleData is MiB in a volume whose data is not copied.
	littleData = 64
	// faster is the goal: how many times a copy's time is a snapshot's.
	faster = 50
)

// copied are the ways without snapshots: commands that leave a directory's content in another one.
func copied(from, to string) map[string][]string {
	return map[string][]string{
		"tar":   {"tar", "-C", from, "-cf", filepath.Join(to, "copy.tar"), "."},
		"rsync": {"rsync", "-a", from + "/", to + "/"},
	}
}

// sized are the measurements of volumes of one size.
type sized struct {
	gib, mib  int64
	snapshots []time.Duration
	copies    map[string][]time.Duration // by way; nil where none were made
}

func measureSnapshots(ctx context.Context, o options, engine string) error {
	if !o.clock {
		// The domain promises the layer beside the volume; what they hold is little.
		if err := virtual(ctx, o, 2*slices.Max(o.sizes)*gib+32*gib); err != nil {
			return err
		}
	}
	return rig.Tested(ctx, func(t testing.TB) error {
		s := serve(t, engine)
		q, share := s.quarry(t, o.bin), s.mount(t)
		for way := range copied("", "") { // the lab is slow to start a program for the first time
			if _, err := rig.Run(ctx, way, "--version"); err != nil {
				return err
			}
		}
		var all []sized
		for _, size := range o.sizes {
			one, err := s.measureSize(ctx, o, q, share, size)
			if err != nil {
				return fmt.Errorf("%d GiB: %w", size, err)
			}
			all = append(all, one)
		}
		return printSnapshots(engine, o, all)
	})
}

// measureSize takes snapshots of a mounted volume and copies its data, in turns. Each snapshot is deleted, and its layer
// merged, before the next: all are made of a volume without layers, and read from one.
func (s *served) measureSize(ctx context.Context, o options, q *process.Quarry, share string, size int64) (m sized, err error) {
	m = sized{gib: size, mib: littleData}
	if size == o.compared {
		m.mib, m.copies = o.data, map[string][]time.Duration{}
	}
	v, err := create(ctx, q, fmt.Sprintf("volume%dg", size), size*gib, "")
	if err != nil {
		return m, err
	}
	if err := v.use(ctx); err != nil {
		return m, err
	}
	if err := write(v.target, m.mib); err != nil {
		return m, err
	}
	for turn := range o.snapshots {
		if m.copies != nil && turn < o.copies {
			if err := m.copy(ctx, v.target, filepath.Join(share, "copies")); err != nil {
				return m, err
			}
		}
		if err := rig.Filled(filepath.Join(v.target, "changed"), mib); err != nil { // since the last one
			return m, err
		}
		began := time.Now()
		id, err := v.snapshot(ctx, fmt.Sprint(v.name, "-", turn))
		if err != nil {
			return m, err
		}
		m.snapshots = append(m.snapshots, time.Since(began))
		if layers, err := rig.Run(ctx, "dmsetup", "ls", "--target", "snapshot"); err != nil || strings.HasPrefix(layers, "No devices") {
			return m, errors.Join(err, errors.New("the snapshot is no layer: device-mapper has none"))
		}
		if err := removeSnapshot(ctx, q, id); err != nil {
			return m, err
		}
		if err := s.has(ctx, 1); err != nil {
			return m, err
		}
	}
	if err := v.end(ctx); err != nil {
		return m, err
	}
	return m, s.has(ctx, 0)
}

// has waits until the domain has no more than so many slabs.
func (s *served) has(ctx context.Context, want int) error {
	return until(ctx, fmt.Sprintf("%d slabs at the server", want), func() (bool, error) {
		n, err := s.slabs()
		return n == want, err
	})
}

// copy copies a directory in each way, until the copy is at the server.
func (m *sized) copy(ctx context.Context, from, to string) error {
	for way, command := range copied(from, to) {
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
		began := time.Now()
		if _, err := rig.Run(ctx, command[0], command[1:]...); err != nil {
			return err
		}
		if _, err := rig.Run(ctx, "sync", "-f", to); err != nil {
			return err
		}
		m.copies[way] = append(m.copies[way], time.Since(began))
		if n, err := content(to); err != nil || n < m.mib*mib {
			return errors.Join(err, fmt.Errorf("%s has copied %d bytes of %d", way, n, m.mib*mib))
		}
		if err := os.RemoveAll(to); err != nil {
			return err
		}
	}
	return nil
}

// content is how many bytes the files in a directory have.
func content(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	return n, err
}

func printSnapshots(engine string, o options, all []sized) error {
	fmt.Printf("\nsnapshots of a mounted volume on %s, %d of each; what a copy of its data takes\n", engine, o.snapshots)
	ways := slices.Sorted(maps.Keys(copied("", "")))
	t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "GiB\tMiB of data\tleast\tmedian\tmost\t")
	for _, way := range ways {
		fmt.Fprintf(t, "%s\tratio\t", way)
	}
	fmt.Fprintln(t)
	for _, m := range all {
		median := rig.Quantile(m.snapshots, 0.5)
		fmt.Fprintf(t, "%d\t%d\t%s\t%s\t%s\t", m.gib, m.mib, ms(slices.Min(m.snapshots)), ms(median), ms(slices.Max(m.snapshots)))
		for _, way := range ways {
			if m.copies == nil {
				fmt.Fprint(t, "\t\t")
				continue
			}
			took := rig.Quantile(m.copies[way], 0.5)
			fmt.Fprintf(t, "%s\t%.0f\t", ms(took), took.Seconds()/median.Seconds())
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, m := range all {
		for _, way := range ways {
			if m.copies == nil {
				continue
			}
			verdict := "met"
			if rig.Quantile(m.copies[way], 0.5) < faster*rig.Quantile(m.snapshots, 0.5) {
				verdict = "missed"
			}
			fmt.Printf("goal: a snapshot at least %d times as fast as %s of %d MiB, on %s: %s\n", faster, way, m.mib, engine, verdict)
		}
	}
	return nil
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
