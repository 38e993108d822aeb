package layer

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/test/lab"
)

func dmsetup(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.Command("dmsetup", args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("dmsetup %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// mapped makes a device-mapper device; down takes it down before the test ends.
func mapped(t *testing.T, name, table string) (path string, down func()) {
	t.Helper()
	dmsetup(t, table, "create", name)
	up := true
	down = func() {
		if up {
			up = false
			dmsetup(t, "", "remove", "--retry", name)
		}
	}
	t.Cleanup(down)
	return "/dev/mapper/" + name, down
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// rig is an image of zeros with a layer that the kernel keeps.
type rig struct {
	t             *testing.T
	origin, store string
	size, chunk   int64
	room          int64 // bytes of the store
	file          *os.File
}

func newRig(t *testing.T, size, chunk, room int64) *rig {
	t.Helper()
	t.Setenv("TMPDIR", "/dev/shm") // every new exception waits for a flush
	r := &rig{t: t, origin: lab.Loop(t, size), store: lab.Loop(t, room), size: size, chunk: chunk, room: room}
	r.file = open(t, r.store)
	t.Cleanup(func() { r.file.Close() }) // before the loop devices go
	return r
}

func (r *rig) format() {
	r.t.Helper()
	if err := Format(r.file, r.chunk); err != nil {
		r.t.Fatal(err)
	}
}

// layer makes the kernel use the store; the chunk size in the table is the smallest one.
func (r *rig) layer(store string) (*os.File, func()) {
	r.t.Helper()
	path, remove := mapped(r.t, "layer-test", fmt.Sprintf("0 %d snapshot %s %s PO %d", r.size/512, r.origin, store, r.chunk/512))
	f := open(r.t, path)
	return f, func() { f.Close(); remove() }
}

func content(old, chunk int64) []byte {
	b := aligned(chunk)
	copy(b, bytes.Repeat(fmt.Appendf(nil, "chunk %12d\n", old), int(chunk/19)+1))
	return b
}

func (r *rig) write(f *os.File, olds ...int64) {
	r.t.Helper()
	for _, old := range olds {
		if _, err := f.WriteAt(content(old, r.chunk), old*r.chunk); err != nil {
			r.t.Fatal(err)
		}
	}
}

// verify reads the whole image: these chunks were written, all others are zeros.
func (r *rig) verify(f *os.File, olds []int64) {
	r.t.Helper()
	var s set
	for _, old := range olds {
		s.add(old)
	}
	b := aligned(r.chunk)
	for old := range r.size / r.chunk {
		want := aligned(r.chunk)
		if !s.add(old) {
			want = content(old, r.chunk)
		}
		if _, err := f.ReadAt(b, old*r.chunk); err != nil || !bytes.Equal(b, want) {
			r.t.Fatalf("chunk %d: %v, begins with %q, want %q", old, err, b[:19], want[:19])
		}
	}
}

func (r *rig) listed() []int64 {
	r.t.Helper()
	var out []int64
	if err := Exceptions(r.file, r.room, func(old, _ int64) error { out = append(out, old); return nil }); err != nil {
		r.t.Fatal(err)
	}
	return out
}

func some(n, of int64) []int64 {
	var out []int64
	for _, p := range rand.Perm(int(of))[:n] {
		out = append(out, int64(p))
	}
	return out
}

func TestTheKernelsExceptionsAreListed(t *testing.T) {
	lab.Need(t)
	for _, chunk := range []int64{4096, 65536} {
		t.Run(fmt.Sprint(chunk), func(t *testing.T) {
			size := 2000 * chunk
			r := newRig(t, size, chunk, StoreSize(size, chunk))
			r.format()
			f, down := r.layer(r.store)
			if status := dmsetup(t, "", "status", "layer-test"); strings.Contains(status, "Invalid") {
				t.Fatalf("the kernel does not take a store that was formatted: %s", status)
			}
			written := some(600, 2000)
			r.write(f, written...)
			if _, err := f.WriteAt(aligned(4096)[:512], 1999*chunk); err != nil { // part of a chunk
				t.Fatal(err)
			}
			if !slices.Contains(written, 1999) {
				written = append(written, 1999)
			}
			inUse := r.listed()
			down()
			if got := r.listed(); !slices.Equal(got, inUse) || !slices.Equal(got, written) {
				t.Errorf("%d chunks were written; listed in use %d, detached %d, in another order or not all", len(written), len(inUse), len(got))
			}
			slices.Sort(written)
			extents, err := Changed(r.file, r.room)
			if err != nil {
				t.Fatal(err)
			}
			var got []int64
			for _, e := range extents {
				for at := e.Offset; at < e.Offset+e.Length; at += chunk {
					got = append(got, at/chunk)
				}
			}
			if !slices.Equal(got, written) {
				t.Errorf("changed are %v, written were %v", got, written)
			}
			if n, err := Settle(r.file, r.room); err != nil || n != int64(len(written)) {
				t.Errorf("settle: %d, %v", n, err)
			}
		})
	}
}

func TestTheKernelTakesTheChunkSizeFromTheHeader(t *testing.T) {
	lab.Need(t)
	r := newRig(t, 64<<20, 32768, StoreSize(64<<20, 32768))
	r.format()
	r.chunk = 4096 // in the table
	f, down := r.layer(r.store)
	r.chunk = 32768
	r.write(f, 5)
	down()
	if got := r.listed(); !slices.Equal(got, []int64{5}) {
		t.Errorf("listed %v", got)
	}
}

func TestTheKernelDoesNotBelieveWhatLayInTheSpaceBefore(t *testing.T) {
	lab.Need(t)
	const chunk, size = 4096, 1024 * 4096
	r := newRig(t, size, chunk, StoreSize(size, chunk))
	r.format()
	f, down := r.layer(r.store)
	r.write(f, some(1000, 1024)...)
	down()
	r.format()
	f, down = r.layer(r.store)
	r.verify(f, nil)
	first := some(256, 1024) // a whole area: the old second one follows on disk
	r.write(f, first...)
	down()
	if got := r.listed(); !slices.Equal(got, first) {
		t.Errorf("listed %d, written %d", len(got), len(first))
	}
	f, down = r.layer(r.store)
	r.verify(f, first)
	down()
}

func TestAFullRewriteInRandomOrderFits(t *testing.T) {
	lab.Need(t)
	for _, chunks := range []int64{300, 512} {
		t.Run(fmt.Sprint(chunks), func(t *testing.T) {
			const chunk = 4096
			size := chunks * chunk
			r := newRig(t, size, chunk, StoreSize(size, chunk))
			r.format()
			f, down := r.layer(r.store)
			all := some(chunks, chunks)
			r.write(f, all...)
			r.verify(f, all)
			if s := dmsetup(t, "", "status", "layer-test"); strings.Contains(s, "Invalid") || strings.Contains(s, "Overflow") {
				t.Errorf("status %s", s)
			}
			down()
			f, down = r.layer(r.store)
			r.verify(f, all)
			down()
		})
	}
}

// The room for one area more is not for nothing.
func TestWithoutRoomForTheAreaAheadTheLastWriteIsFatal(t *testing.T) {
	lab.Need(t)
	const chunk, size = 4096, 256 * 4096
	r := newRig(t, size, chunk, StoreSize(size, chunk)-chunk)
	r.format()
	f, down := r.layer(r.store)
	r.write(f, some(255, 255)...)
	if _, err := f.WriteAt(content(255, chunk), 255*chunk); err == nil {
		t.Error("the last write was acknowledged")
	}
	if s := dmsetup(t, "", "status", "layer-test"); !strings.Contains(s, "Invalid") {
		t.Errorf("status %s", s)
	}
	down()
}

func TestAStoreThatTheKernelGaveUpIsRepaired(t *testing.T) {
	lab.Need(t)
	const chunk, size = 4096, 1024 * 4096
	r := newRig(t, size, chunk, StoreSize(size, chunk))
	r.format()
	const good = 400 // chunks of the store
	table := fmt.Sprintf("0 %d linear %s 0\n%d %d %%s", good*8, r.store, good*8, r.room/512-good*8)
	fine := fmt.Sprintf(table, fmt.Sprintf("linear %s %d", r.store, good*8))
	path, storeDown := mapped(t, "layer-test-store", fine)
	f, down := r.layer(path)
	written := some(300, 1024)
	r.write(f, written...)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	dmsetup(t, fmt.Sprintf(table, "error"), "load", "layer-test-store")
	dmsetup(t, "", "resume", "layer-test-store")
	var lost error
	var last int64
	for last = int64(0); lost == nil && last < 1024; last++ {
		if slices.Contains(written, last) {
			continue
		}
		if _, lost = f.WriteAt(content(last, chunk), last*chunk); lost == nil {
			written = append(written, last)
		}
	}
	if lost == nil {
		t.Fatal("no write failed")
	}
	if s := dmsetup(t, "", "status", "layer-test"); !strings.Contains(s, "Invalid") {
		t.Fatalf("status %s", s)
	}
	if _, err := f.ReadAt(aligned(chunk), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("an invalid layer reads with %v", err)
	}
	down()
	storeDown()
	if h, err := ReadHeader(r.file); err != nil || h.Valid {
		t.Errorf("header %+v, %v", h, err)
	}
	if err := Exceptions(r.file, r.room, func(int64, int64) error { return nil }); !errors.Is(err, fault.Corrupt) {
		t.Errorf("an invalid store is listed: %v", err)
	}
	n, err := Repair(r.file, r.room)
	if err != nil || n != int64(len(written)) {
		t.Fatalf("repair: %d, %v; %d were acknowledged", n, err, len(written))
	}
	f, down = r.layer(r.store)
	r.verify(f, written)
	down()
}
