package mover

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

func reflink(t testing.TB, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string, size int64) *side {
	t.Helper()
	s, err := openSized(path, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return &side{store: s, size: size, direct: &direct{src: s.direct, dst: -1}}
}

func length(list []engine.Extent) (n int64) {
	for _, e := range list {
		n += e.Length
	}
	return n
}

func TestWhatReflinkCopiesShareIsNotRead(t *testing.T) {
	const size, data = 24 * mib, 16 * mib
	for _, c := range []struct {
		name, fs   string
		compressed bool
	}{{"xfs", "xfs", false}, {"btrfs", "btrfs", false}, {"btrfs, compressed", "btrfs", true}} {
		t.Run(c.name, func(t *testing.T) {
			dir := hosttest.Filesystem(t, c.fs, 512*mib)
			a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			makeEmpty(t, a, size)
			if c.compressed {
				if out, err := exec.Command("chattr", "+c", a).CombinedOutput(); err != nil {
					t.Fatalf("chattr: %v: %s", err, out)
				}
			}
			random := make([]byte, data)
			_, _ = rand.NewChaCha8([32]byte{1}).Read(random) // never fails
			for i := range random {
				random[i] |= 0xfe // compressible
			}
			write(t, a, 0, random)
			reflink(t, a, b)
			var want []engine.Extent
			for off := int64(mib); off < size; off += 3*mib + 4096 {
				write(t, b, off, []byte("something else"))
				want = append(want, engine.Extent{Offset: off, Length: 4096})
			}
			all := []engine.Extent{everything(size)}
			left := length(unshared(open(t, a, size), open(t, b, size), all))
			if c.compressed && left != size || !c.compressed && left > size-data+mib {
				t.Errorf("%d bytes are read", left)
			}
			m := New(Options{})
			got, err := gather(t, m, Side{Path: a, Size: size}, Side{Path: b, Size: size}, all...)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%v, %v; want %v", got, err, want)
			}
			// What lies behind the end of one is not what the other has there.
			cut := engine.Extent{Offset: 10 * mib, Length: data - 10*mib}
			got, err = gather(t, m, Side{Path: a, Size: cut.Offset}, Side{Path: b, Size: size}, all...)
			if err != nil || !slices.Contains(got, cut) {
				t.Errorf("%v, %v; want %v among them", got, err, cut)
			}
		})
	}
}

func TestWithout(t *testing.T) {
	e := func(off, end int64) engine.Extent { return engine.Extent{Offset: off, Length: end - off} }
	for _, c := range []struct{ ranges, same, want []engine.Extent }{
		{[]engine.Extent{e(0, 10)}, nil, []engine.Extent{e(0, 10)}},
		{[]engine.Extent{e(0, 10)}, []engine.Extent{e(0, 10)}, nil},
		{[]engine.Extent{e(5, 10), e(20, 30)}, []engine.Extent{e(0, 6), e(8, 25), e(27, 40)}, []engine.Extent{e(6, 8), e(25, 27)}},
		{[]engine.Extent{e(5, 10), e(12, 15), e(20, 30)}, []engine.Extent{e(6, 21)}, []engine.Extent{e(5, 6), e(21, 30)}},
	} {
		if got := without(c.ranges, c.same); !slices.Equal(got, c.want) {
			t.Errorf("%v without %v: %v, want %v", c.ranges, c.same, got, c.want)
		}
	}
}
