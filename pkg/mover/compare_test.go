package mover

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// gather compares, and checks that what is told is in order and does not touch.
func gather(t testing.TB, m *Mover, a, b Side, ranges ...engine.Extent) ([]engine.Extent, error) {
	t.Helper()
	var out []engine.Extent
	err := m.Compare(context.Background(), a, b, ranges, func(list []engine.Extent) error {
		for _, e := range list {
			if n := len(out); e.Length <= 0 || n > 0 && out[n-1].Offset+out[n-1].Length >= e.Offset {
				t.Fatalf("%v came after %v", e, out)
			}
			out = append(out, e)
		}
		return nil
	})
	return out, err
}

func write(t testing.TB, path string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(data, off)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func everything(n int64) engine.Extent { return engine.Extent{Length: n} }

func TestDifferencesAreToldToTheBlock(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256*mib)
	m := New(Options{Workers: 3, Buffer: 32 << 10})
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 2000).Draw(t, "sectors") * 512
		shorter := size - rapid.Int64Range(0, size/512-1).Draw(t, "shorter")*512
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		rnd := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		was := make([]byte, size) // with something behind the end, which does not count
		for i := range was {
			was[i] = byte(rnd.Uint32())
		}
		if err := os.WriteFile(a, was, 0o600); err != nil {
			t.Fatal(err)
		}
		clear(was[shorter:])
		is := slices.Clone(was)
		for range rapid.IntRange(0, 30).Draw(t, "writes") {
			off := rnd.Int64N(size)
			for i := off; i < min(off+rnd.Int64N(20000), size); i++ {
				is[i] ^= byte(1 + rnd.Uint32N(255))
			}
		}
		if err := os.WriteFile(b, is, 0o600); err != nil {
			t.Fatal(err)
		}
		var ranges []engine.Extent
		for off := int64(0); off < size; {
			off += rnd.Int64N(100000)
			if n := min(1+rnd.Int64N(200000), size-off); n > 0 {
				ranges = append(ranges, engine.Extent{Offset: off, Length: n})
				off += n
			}
		}
		if rapid.Bool().Draw(t, "everything") {
			ranges = []engine.Extent{everything(size)}
		}
		var want []engine.Extent
		for _, r := range ranges {
			for off := r.Offset; off < r.Offset+r.Length; {
				end := min(alignDown(off, 4096)+4096, r.Offset+r.Length)
				if string(was[off:end]) != string(is[off:end]) {
					want = extend(want, engine.Extent{Offset: off, Length: end - off})
				}
				off = end
			}
		}
		var got []engine.Extent
		err := m.Compare(context.Background(), Side{Path: a, Size: shorter}, Side{Path: b, Size: size}, ranges, func(list []engine.Extent) error {
			got = append(got, list...)
			return nil
		})
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("%v, %v; want %v", got, err, want)
		}
	})
}

func TestADeviceIsComparedWithAFile(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256*mib)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	makeSparse(t, a, layoutSize, layout)
	makeSparse(t, b, layoutSize, layout)
	write(t, b, mib+4096, []byte("something else"))
	dev := loopDevice(t, b)
	want := []engine.Extent{{Offset: mib + 4096, Length: 4096}}
	got, err := gather(t, New(Options{}), Side{Path: a, Size: layoutSize}, Side{Path: dev, Size: layoutSize}, everything(layoutSize))
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestAComparisonThatIsStoppedLeavesNothingOpen(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	makeSparse(t, a, 8*mib, []extent{{0, 8 * mib}})
	makeEmpty(t, b, 8*mib)
	m := New(Options{Workers: 2, Buffer: 64 << 10})
	// So that there is more than one difference, and more than one call.
	data, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 8*mib; off += 100 << 10 {
		write(t, b, alignDown(off, 4096), data[alignDown(off, 4096):][:4096])
	}
	ca, cb := Side{Path: a, Size: 8 * mib}, Side{Path: b, Size: 8 * mib}
	calls := 0
	stop := errors.New("enough")
	err = m.Compare(t.Context(), ca, cb, []engine.Extent{everything(8 * mib)}, func([]engine.Extent) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("stopped after %d calls with %v", calls, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = m.Compare(ctx, ca, cb, []engine.Extent{everything(8 * mib)}, func([]engine.Extent) error { cancel(); return nil })
	wantKind(t, err, fault.Canceled)
	err = m.Compare(ctx, ca, cb, []engine.Extent{everything(8 * mib)}, func([]engine.Extent) error { return nil })
	wantKind(t, err, fault.Canceled)
	if n := openUnder(t, dir); n != 0 {
		t.Errorf("%d files are open", n)
	}
}

func TestWhatCannotBeListedOrComparedSaysWhy(t *testing.T) {
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "fifo")
	makeEmpty(t, file, mib)
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	m := New(Options{})
	for _, c := range []struct {
		path string
		size int64
		kind fault.Kind
		says string
	}{
		{file, 2 * mib, fault.Corrupt, "truncated"},
		{filepath.Join(dir, "none"), mib, fault.NotFound, "none"},
		{fifo, mib, fault.Invalid, "neither"},
	} {
		ask := map[string]func() error{
			"data":  func() error { _, err := m.DataExtents(t.Context(), c.path, c.size); return err },
			"layer": func() error { _, err := m.LayerExtents(t.Context(), c.path, c.size); return err },
			"a": func() error {
				_, err := gather(t, m, Side{Path: c.path, Size: c.size}, Side{Path: file}, everything(mib))
				return err
			},
			"b": func() error {
				_, err := gather(t, m, Side{Path: file}, Side{Path: c.path, Size: c.size}, everything(mib))
				return err
			},
		}
		for what, do := range ask {
			err := do()
			wantKind(t, err, c.kind)
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s of %s: %v", what, c.path, err)
			}
		}
	}
	_, err := m.LayerExtents(t.Context(), file, mib)
	wantKind(t, err, fault.Corrupt) // there is no header
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = m.LayerExtents(ctx, file, mib)
	wantKind(t, err, fault.Canceled)
	_, err = m.DataExtents(ctx, file, mib)
	wantKind(t, err, fault.Canceled)
}
