package mover

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/image"
)

const mib = 1 << 20

// extent is data in a test file: random bytes of a seed.
type extent struct{ off, n int64 }

func makeSparse(t testing.TB, path string, size int64, data []extent) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	random := rand.NewChaCha8([32]byte{1})
	for _, e := range data {
		if _, err := io.CopyN(io.NewOffsetWriter(f, e.off), random, e.n); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func makeEmpty(t testing.TB, path string, size int64) {
	t.Helper()
	makeSparse(t, path, size, nil)
}

func sum(t testing.TB, path string, size int64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if n, err := io.CopyN(h, f, size); n != size {
		t.Fatalf("read %s: %d of %d bytes: %v", path, n, size, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func wantKind(t testing.TB, err error, kind fault.Kind) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want one of kind %q", err, kind)
	}
}

// layout with extents at odd places: a hole at both ends, an unaligned end.
var layout = []extent{{4096, 8192}, {mib, 3*mib + 17}, {9 * mib, 4096}, {20*mib - 100, 100}}

const layoutSize = 33*mib + 512

func TestABlockCopyIsEqualAndKeepsHoles(t *testing.T) {
	ext4, xfs, btrfs := hosttest.Filesystem(t, "ext4", 256*mib), hosttest.Filesystem(t, "xfs", 0), hosttest.Filesystem(t, "btrfs", 512*mib)
	tmpfs := tmpfs(t)
	for _, c := range []struct {
		name, src, dst string
		ways           []Way
	}{
		{"within ext4", ext4, ext4, []Way{ReadWrite}},
		{"within xfs", xfs, xfs, []Way{Reflink}},
		{"within btrfs", btrfs, btrfs, []Way{Reflink}},
		{"ext4 to xfs", ext4, xfs, []Way{ReadWrite}},
		{"tmpfs to ext4", tmpfs, ext4, []Way{ReadWrite}},
		{"btrfs to tmpfs", btrfs, tmpfs, []Way{ReadWrite}},
	} {
		for _, zeroed := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, zeroed %v", c.name, zeroed), func(t *testing.T) {
				src, dst := filepath.Join(c.src, "src"), filepath.Join(c.dst, "dst")
				makeSparse(t, src, layoutSize, layout)
				if zeroed {
					makeEmpty(t, dst, layoutSize)
				} else {
					makeSparse(t, dst, layoutSize, []extent{{0, layoutSize}})
				}
				var last int64
				stats, err := New(Options{Buffer: 256 << 10}).Block(t.Context(), src, dst, image.BlockCopy{
					Size: layoutSize, DstZeroed: zeroed,
					Progress: func(done, total int64) {
						if done < last || total != layoutSize {
							t.Errorf("progress %d of %d after %d", done, total, last)
						}
						last = done
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				if sum(t, src, layoutSize) != sum(t, dst, layoutSize) {
					t.Error("contents differ")
				}
				if s, d := blocks(t, src), blocks(t, dst); d > s+256<<10 {
					t.Errorf("the copy takes %d bytes, its source %d", d, s)
				}
				if last != layoutSize {
					t.Errorf("last progress %d, want %d", last, layoutSize)
				}
				if !contains(c.ways, stats.Way) {
					t.Errorf("copied by %s (%+v), want %v", stats.Way, stats, c.ways)
				}
			})
		}
	}
}

func contains(ways []Way, w Way) bool { return bytes.Contains(fmt.Append(nil, ways), []byte(w)) }

func tmpfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func loopDevice(t testing.TB, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return dev
}

func TestBlockDevicesAreCopiedWithoutTheirZeros(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 512*mib)
	file := filepath.Join(dir, "src")
	makeSparse(t, file, layoutSize, layout)
	want := sum(t, file, layoutSize)
	source := loopDevice(t, file)
	for _, zeroed := range []bool{true, false} {
		for _, device := range []bool{true, false} {
			t.Run(fmt.Sprintf("to a device: %v, zeroed: %v", device, zeroed), func(t *testing.T) {
				dst := filepath.Join(dir, fmt.Sprintf("dst-%v-%v", device, zeroed))
				var data []extent
				if !zeroed {
					data = []extent{{0, layoutSize}}
				}
				makeSparse(t, dst, layoutSize, data)
				target := dst
				if device {
					target = loopDevice(t, dst)
				}
				if err := New(Options{}).CopyBlock(t.Context(), source, target, image.BlockCopy{Size: layoutSize, DstZeroed: zeroed}); err != nil {
					t.Fatal(err)
				}
				if sum(t, target, layoutSize) != want {
					t.Error("contents differ")
				}
				if n := blocks(t, dst); n > 8*mib {
					t.Errorf("the copy of 3 MiB of data takes %d bytes", n)
				}
			})
		}
	}
}

func TestAnyLayoutIsCopiedAndResumed(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256*mib)
	other := hosttest.Filesystem(t, "xfs", 0)
	m := New(Options{Buffer: 64 << 10, CheckpointEvery: 128 << 10, Workers: 3})
	rapid.Check(t, func(r *rapid.T) {
		size := rapid.Int64Range(1, 4*mib).Draw(r, "size")
		var data []extent
		for range rapid.IntRange(0, 12).Draw(r, "extents") {
			off := rapid.Int64Range(0, size-1).Draw(r, "offset")
			data = append(data, extent{off, rapid.Int64Range(1, min(size-off, 512<<10)).Draw(r, "length")})
		}
		target := rapid.SampledFrom([]string{dir, other}).Draw(r, "target")
		src, dst := filepath.Join(dir, "src"), filepath.Join(target, "dst")
		makeSparse(t, src, size, data)
		zeroed := rapid.Bool().Draw(r, "zeroed")
		makeEmpty(t, dst, size+8192)
		if !zeroed {
			makeSparse(t, dst, size+8192, []extent{{0, size + 8192}})
		}
		tail := bytes.Clone(readAt(t, dst, size, 8192))
		// Break off at a random checkpoint, if there are that many, and go on.
		stopAt := rapid.IntRange(1, 8).Draw(r, "stop at checkpoint")
		enough := errors.New("enough")
		from, calls := int64(0), 0
		err := m.CopyBlock(context.Background(), src, dst, image.BlockCopy{Size: size, DstZeroed: zeroed, Checkpoint: func(off int64) error {
			if off <= from {
				r.Fatalf("checkpoint %d after %d", off, from)
			}
			from = off
			if calls++; calls == stopAt {
				return enough
			}
			return nil
		}})
		if err != nil && !errors.Is(err, enough) {
			r.Fatal(err)
		}
		if !bytes.Equal(readAt(t, src, 0, from), readAt(t, dst, 0, from)) {
			r.Fatalf("before the checkpoint at %d something is missing", from)
		}
		if err != nil {
			if err := m.CopyBlock(context.Background(), src, dst, image.BlockCopy{Size: size, From: from, DstZeroed: zeroed}); err != nil {
				r.Fatal(err)
			}
		}
		if sum(t, src, size) != sum(t, dst, size) {
			r.Fatal("contents differ")
		}
		if !bytes.Equal(tail, readAt(t, dst, size, 8192)) {
			r.Fatal("bytes beyond the copy were changed")
		}
	})
}

func readAt(t testing.TB, path string, off, n int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, n)
	if _, err := f.ReadAt(buf, off); err != nil && n > 0 {
		t.Fatal(err)
	}
	return buf
}

func TestACancelledCopyLeavesNothingOpenAndResumes(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256*mib)
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	const size = 64 * mib
	makeSparse(t, src, size, []extent{{0, 30 * mib}, {31 * mib, 20 * mib}})
	makeEmpty(t, dst, size)
	m := New(Options{Buffer: 128 << 10, CheckpointEvery: 4 * mib, Rate: 400 * mib})
	from := int64(0)
	for round := range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		limit := from + rand.Int64N(8*mib)
		err := m.CopyBlock(ctx, src, dst, image.BlockCopy{Size: size, From: from, DstZeroed: true, Checkpoint: func(off int64) error {
			from = off
			if off > limit {
				cancel()
			}
			return nil
		}})
		cancel()
		if n := openUnder(t, dir); n != 0 {
			t.Fatalf("%d files are still open", n)
		}
		if err == nil {
			if round == 0 {
				t.Fatal("the copy was never cancelled")
			}
			break
		}
		wantKind(t, err, fault.Canceled)
	}
	if sum(t, src, size) != sum(t, dst, size) {
		t.Error("contents differ")
	}
}

// openUnder counts this process's open files below dir.
func openUnder(t testing.TB, dir string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir+"/") {
			n++
		}
	}
	return n
}

func TestWhatCannotBeCopiedSaysWhy(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 64*mib)
	path := func(name string) string { return filepath.Join(dir, name) }
	makeSparse(t, path("src"), 2*mib, []extent{{0, mib}})
	makeEmpty(t, path("dst"), 2*mib)
	makeEmpty(t, path("short"), mib)
	if err := unix.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path("src"), path("same")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, src, dst string
		opts           image.BlockCopy
		kind           fault.Kind
	}{
		{"source missing", "nothing", "dst", image.BlockCopy{Size: 1}, fault.NotFound},
		{"target missing", "src", "nothing", image.BlockCopy{Size: 1}, fault.NotFound},
		{"source too short", "short", "dst", image.BlockCopy{Size: 2 * mib}, fault.Corrupt},
		{"target too short", "src", "short", image.BlockCopy{Size: 2 * mib}, fault.Invalid},
		{"negative size", "src", "dst", image.BlockCopy{Size: -1}, fault.Invalid},
		{"from beyond size", "src", "dst", image.BlockCopy{Size: 1, From: 2}, fault.Invalid},
		{"a FIFO", "fifo", "dst", image.BlockCopy{Size: 1}, fault.Invalid},
		{"a directory", ".", "dst", image.BlockCopy{Size: 1}, fault.Invalid},
		{"the same file", "src", "same", image.BlockCopy{Size: 1}, fault.Invalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantKind(t, New(Options{}).CopyBlock(t.Context(), path(c.src), path(c.dst), c.opts), c.kind)
		})
	}
	t.Run("locked target", func(t *testing.T) {
		f, err := os.Open(path("dst"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		wantKind(t, New(Options{}).CopyBlock(t.Context(), path("src"), path("dst"), image.BlockCopy{Size: mib}), fault.InUse)
	})
}

func TestAFullTargetIsExhaustedAndWorksOnceThereIsSpace(t *testing.T) {
	small := hosttest.Filesystem(t, "ext4", 32*mib)
	src, dst := filepath.Join(t.TempDir(), "src"), filepath.Join(small, "dst")
	const size = 24 * mib
	makeSparse(t, src, size, []extent{{0, size}})
	makeEmpty(t, dst, size)
	ballast := filepath.Join(small, "ballast")
	makeSparse(t, ballast, 12*mib, []extent{{0, 12 * mib}})
	opts := image.BlockCopy{Size: size, DstZeroed: true}
	wantKind(t, New(Options{}).CopyBlock(t.Context(), src, dst, opts), fault.Exhausted)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := New(Options{}).CopyBlock(t.Context(), src, dst, opts); err != nil {
		t.Fatal(err)
	}
	if sum(t, src, size) != sum(t, dst, size) {
		t.Error("contents differ")
	}
}

func TestASourceThatShrinksIsCorrupt(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256*mib)
	for name, data := range map[string][]extent{
		"in its data":  {{0, 32 * mib}},
		"in its holes": {{0, 16 * mib}},
	} {
		t.Run(name, func(t *testing.T) {
			src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
			makeSparse(t, src, 32*mib, data)
			makeEmpty(t, dst, 32*mib)
			err := New(Options{Buffer: 64 << 10, CheckpointEvery: mib}).CopyBlock(t.Context(), src, dst, image.BlockCopy{
				Size: 32 * mib, DstZeroed: true,
				Checkpoint: func(off int64) error { return os.Truncate(src, 24*mib) },
			})
			wantKind(t, err, fault.Corrupt)
		})
	}
}

func TestTheRateLimitHoldsForAllCopiesTogether(t *testing.T) {
	th := newThrottle(1000)
	for range 4 { // the first passes at once and takes its time afterwards
		if err := th.wait(t.Context(), 5); err != nil {
			t.Fatal(err)
		}
	}
	if err := th.wait(t.Context(), 1e9); err != nil { // twelve days
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := th.wait(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Fatalf("a wait behind twelve days of data ended with %v", err)
	}
}

func TestACopyKeepsToARateOfItsOwn(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	makeSparse(t, src, 8*mib, []extent{{0, 8 * mib}})
	makeSparse(t, dst, 8*mib, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := New(Options{Buffer: 128 << 10, Workers: 1}).Block(ctx, src, dst, image.BlockCopy{Size: 8 * mib, DstZeroed: true, Rate: 1}) // for months
		ended <- err
	}()
	for end := []byte{0}; end[0] == 0; end = readAt(t, dst, 128<<10-1, 1) { // the first buffer passes at once
		time.Sleep(time.Millisecond)
	}
	cancel()
	wantKind(t, <-ended, fault.Canceled)
}

func TestZeroingTouchesNothingBeside(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 64*mib)
	file := filepath.Join(dir, "file")
	for _, device := range []bool{false, true} {
		makeSparse(t, file, 8*mib, []extent{{0, 8 * mib}})
		want := readAt(t, file, 0, 8*mib)
		clear(want[mib+100 : 5*mib+7])
		target := file
		if device {
			target = loopDevice(t, file)
		}
		if err := New(Options{}).Zero(t.Context(), target, mib+100, 5*mib+7); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readAt(t, target, 0, 8*mib), want) {
			t.Errorf("device %v: not exactly the bytes asked for are zero", device)
		}
	}
	wantKind(t, New(Options{}).Zero(t.Context(), file, 0, 9*mib), fault.Corrupt)
}
