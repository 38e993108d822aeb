// Command copy measures Quarry's block copy beside what an administrator would
// use instead: cp --sparse=always and qemu-img convert, on a sparse image on
// ext4. All run in turns in one go, each from cold caches and until the data is
// on the device. The last line is the best alternative's time divided by
// Quarry's: at least 0.9 is the goal, above 1 is faster.
//
// It must run as root and needs cp, qemu-img, mkfs.ext4 and mount.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
)

type config struct {
	size, data, extent int64
	repeats            int
	seed               uint64
	dir                string
	mover              mover.Options
}

func main() {
	var c config
	sizeMiB := flag.Int64("size", 10<<10, "virtual size of the image in MiB")
	dataMiB := flag.Int64("data", 1<<10, "data in it in MiB")
	extentKiB := flag.Int64("extent", 1<<10, "mean length of an extent in KiB")
	flag.IntVar(&c.repeats, "repeats", 5, "times that each copy is made")
	flag.Uint64Var(&c.seed, "seed", 1, "of the places of the extents")
	flag.StringVar(&c.dir, "dir", os.TempDir(), "where the file system under test is kept")
	flag.IntVar(&c.mover.Workers, "workers", 0, "mover's workers; 0: its default")
	flag.IntVar(&c.mover.Buffer, "buffer", 0, "mover's buffer in bytes; 0: its default")
	flag.Parse()
	c.size, c.data, c.extent = *sizeMiB<<20, *dataMiB<<20, *extentKiB<<10
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "copy:", err)
		os.Exit(1)
	}
}

// way is one way to copy src to dst, which exists empty for Quarry only.
type way struct {
	name string
	copy func(ctx context.Context, src, dst string) error
	took []time.Duration
}

func run(ctx context.Context, c config) (err error) {
	if c.size <= 0 || c.data <= 0 || c.data > c.size || c.extent < 4<<10 || c.repeats < 1 {
		return fmt.Errorf("need 0 < data <= size, an extent of at least 4 KiB and one repeat")
	}
	dir, err := os.MkdirTemp(c.dir, "quarry-bench-copy-")
	if err != nil {
		return err
	}
	mnt, err := makeFilesystem(ctx, dir, 3*c.data+1<<30)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	defer func() {
		if e := unix.Unmount(mnt, 0); e != nil { // then nothing below it is touched
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", mnt, e))
			return
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	src, dst := filepath.Join(mnt, "src"), filepath.Join(mnt, "dst")
	if err := makeImage(src, c); err != nil {
		return err
	}
	m := mover.New(c.mover)
	ways := []*way{
		{name: "quarry mover", copy: func(ctx context.Context, src, dst string) error {
			if err := os.WriteFile(dst, nil, 0o600); err != nil {
				return err
			}
			if err := os.Truncate(dst, c.size); err != nil {
				return err
			}
			return m.CopyBlock(ctx, src, dst, image.BlockCopy{Size: c.size, DstZeroed: true})
		}},
		{name: "cp --sparse=always", copy: tool("cp", "--sparse=always")},
		{name: "qemu-img convert", copy: tool("qemu-img", "convert", "-f", "raw", "-O", "raw")},
	}
	for r := range c.repeats {
		for i := range ways {
			w := ways[(i+r)%len(ways)] // none always follows the same other
			took, err := measure(ctx, w, mnt, src, dst)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			fmt.Fprintf(os.Stderr, "%d/%d %s: %v\n", r+1, c.repeats, w.name, took.Round(time.Millisecond))
			if r == 0 {
				if err := compare(src, dst); err != nil {
					return fmt.Errorf("%s: %w", w.name, err)
				}
			}
			w.took = append(w.took, took)
		}
	}
	return report(ways, c)
}

func tool(name string, args ...string) func(context.Context, string, string) error {
	return func(ctx context.Context, src, dst string) error {
		_, err := host.Exec{}.Run(ctx, host.Command{Name: name, Args: append(slices.Clone(args), src, dst), Timeout: time.Hour})
		return err
	}
}

func makeFilesystem(ctx context.Context, dir string, size int64) (string, error) {
	backing, mnt := filepath.Join(dir, "backing"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(backing, nil, 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(backing, size); err != nil {
		return "", err
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return "", err
	}
	for _, c := range []host.Command{
		// Nothing is left to be done in the background while we measure.
		{Name: "mkfs.ext4", Args: []string{"-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", backing}},
		{Name: "mount", Args: []string{"-o", "loop", backing, mnt}},
	} {
		if _, err := (host.Exec{}).Run(ctx, c); err != nil {
			return "", err
		}
	}
	return mnt, nil
}

// makeImage writes random data in extents of random length, scattered evenly.
func makeImage(path string, c config) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(c.size); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(c.seed, 0))
	random := rand.NewChaCha8([32]byte{byte(c.seed)})
	buf := make([]byte, 2*c.extent)
	slots := max(c.data/c.extent, 1)
	for i, left := int64(0), c.data; i < slots && left > 0; i++ {
		n := min((rnd.Int64N(2*c.extent)+4095)/4096*4096, left)
		if i == slots-1 {
			n = min(left, int64(len(buf)))
		}
		at := c.size / slots * i / 4096 * 4096
		n = min(n, c.size-at)
		if _, err := random.Read(buf[:n]); err != nil {
			return err
		}
		if _, err := f.WriteAt(buf[:n], at); err != nil {
			return err
		}
		left -= n
	}
	return f.Sync()
}

// measure times one copy until the whole file system is on the device.
func measure(ctx context.Context, w *way, mnt, src, dst string) (time.Duration, error) {
	if err := os.Remove(dst); err != nil && !os.IsNotExist(err) {
		return 0, err
	}
	// All that is dirty here reaches the disk first; then every way starts cold.
	for _, path := range []string{mnt, filepath.Dir(mnt)} {
		if err := syncfs(path); err != nil {
			return 0, err
		}
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		return 0, err
	}
	start := time.Now()
	if err := w.copy(ctx, src, dst); err != nil {
		return 0, err
	}
	err := syncfs(mnt)
	return time.Since(start), err
}

func syncfs(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// compare fails when two files differ in content.
func compare(a, b string) error {
	f, err := os.Open(a)
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := os.Open(b)
	if err != nil {
		return err
	}
	defer g.Close()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; at += int64(len(x)) {
		n, e1 := io.ReadFull(f, x)
		k, e2 := io.ReadFull(g, y)
		switch {
		case !bytes.Equal(x[:n], y[:k]):
			return fmt.Errorf("the copy differs from its source near byte %d", at)
		case e1 == io.EOF || e1 == io.ErrUnexpectedEOF:
			return nil
		case e1 != nil:
			return e1
		case e2 != nil:
			return e2
		}
	}
}

func report(ways []*way, c config) error {
	fmt.Printf("sparse image of %d MiB with %d MiB of data in extents of %d KiB, ext4, %d repeats\n",
		c.size>>20, c.data>>20, c.extent>>10, c.repeats)
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tmedian\tleast\tmost\tMiB/s\tspeed relative to mover\t")
	mine := median(ways[0].took)
	best := time.Duration(0)
	for i, w := range ways {
		m := median(w.took)
		if i > 0 && (best == 0 || m < best) {
			best = m
		}
		fmt.Fprintf(t, "%s\t%v\t%v\t%v\t%.0f\t%.2f\t\n", w.name, m.Round(time.Millisecond), slices.Min(w.took).Round(time.Millisecond),
			slices.Max(w.took).Round(time.Millisecond), float64(c.data>>20)/m.Seconds(), mine.Seconds()/m.Seconds())
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Printf("ratio %.2f\n", best.Seconds()/mine.Seconds())
	return err
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return (d[(len(d)-1)/2] + d[len(d)/2]) / 2
}
