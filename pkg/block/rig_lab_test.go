package block

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

var bg = context.Background()

const (
	mib   = 1 << 20
	unit  = 4096
	per   = 8 // units in a chunk of a layer
	owner = "d/v"
)

// rig is a domain of slabs that are files.
type rig struct {
	*testing.T
	dir string
	d   *Devices
}

func newRig(t *testing.T) *rig {
	t.Helper()
	lab.Need(t)
	r := &rig{T: t, dir: t.TempDir(), d: devices()}
	if left := r.left(); left != "" {
		t.Fatalf("before the test there is %s", left)
	}
	t.Cleanup(func() {
		all, err := r.d.All(bg)
		for _, dev := range all {
			err = errors.Join(err, r.d.Detach(bg, dev))
		}
		if _, err2 := r.d.Recover(bg); err != nil || err2 != nil {
			t.Errorf("taking down: %v, %v", err, err2)
		}
		if left := r.left(); left != "" {
			t.Errorf("left is %s", left)
		}
	})
	return r
}

// devices is what a new agent starts with.
func devices() *Devices { return &Devices{Host: host.NewLocal(host.Exec{})} }

// Recover is what a new agent does.
func (d *Devices) Recover(ctx context.Context) (resumed []string, err error) {
	resumed, err = d.Resume(ctx)
	return resumed, errors.Join(err, d.CollectAll(ctx))
}

// left names what there is of ours in the kernel.
func (r *rig) left() string {
	h := host.NewLocal(host.Exec{})
	mapped, err := h.Mapped(bg, uuidPrefix)
	if err != nil {
		r.Fatal(err)
	}
	var names []string
	for _, m := range mapped {
		names = append(names, m.Name)
	}
	loops, err := h.Loops(bg, func(lp host.Loop) bool { return strings.HasPrefix(lp.Mark, markPrefix) })
	if err != nil {
		r.Fatal(err)
	}
	for _, lp := range loops {
		names = append(names, lp.Path+" "+lp.Mark)
	}
	return strings.Join(names, ", ")
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) raw(name string, size int64) Slab {
	r.Helper()
	s := Slab{ID: "d/" + name, Path: filepath.Join(r.dir, name), Size: size}
	r.must(os.WriteFile(s.Path, nil, 0o600))
	r.must(os.Truncate(s.Path, size))
	return s
}

func (r *rig) layer(name string, size int64) Slab {
	r.Helper()
	s := r.raw(name, size)
	s.Chunk = layer.ChunkSize(size)
	r.must(os.Truncate(s.Path, layer.StoreSize(size, s.Chunk)))
	f, err := os.OpenFile(s.Path, os.O_RDWR, 0)
	r.must(err)
	defer f.Close()
	r.must(layer.Format(f, s.Chunk))
	return s
}

// enlarge is what the manager does before a growth.
func (r *rig) enlarge(s *Slab, size int64) {
	r.Helper()
	s.Size = size
	if s.Chunk != 0 {
		size = layer.StoreSize(size, s.Chunk)
	}
	r.must(os.Truncate(s.Path, size))
}

func spec(slabs ...Slab) Spec {
	return Spec{Owner: owner, Use: Raw, Slabs: slabs, Size: slabs[0].Size}
}

func (r *rig) attach(s Spec) Device {
	r.Helper()
	dev, err := r.d.Attach(bg, s)
	r.must(err)
	return dev
}

// reader is a private device over a chain.
func (r *rig) reader(name string, slabs ...Slab) Device {
	r.Helper()
	return r.attach(Spec{Owner: name, Use: Private, Slabs: slabs, Size: slabs[0].Size, ReadOnly: true})
}

func (r *rig) detach(dev Device) {
	r.Helper()
	r.must(r.d.Detach(bg, dev))
}

func (r *rig) change(slabs ...Slab) {
	r.Helper()
	r.must(r.d.Switch(bg, []Spec{spec(slabs...)}))
}

func (r *rig) merge(slabs ...Slab) {
	r.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; {
		m, err := r.d.Merge(bg, slabs)
		r.must(err)
		if m.Done {
			return
		}
		if time.Now().After(deadline) {
			r.Fatalf("%d bytes are still not merged", m.Left)
		}
		time.Sleep(10 * time.Millisecond) // the kernel tells nobody
	}
}

// content is what an image should hold: a number for each unit, 0 for zeros.
type content map[int64]uint64

func (c content) copy() content {
	out := content{}
	for k, v := range c {
		out[k] = v
	}
	return out
}

func aligned(n int) []byte {
	b := make([]byte, n+unit)
	off := -uintptr(unsafe.Pointer(&b[0])) % unit
	return b[off : int(off)+n : int(off)+n]
}

func pattern(b []byte, at int64, value uint64) []byte {
	clear(b)
	if value != 0 {
		for i := 0; i < len(b); i += 16 {
			binary.LittleEndian.PutUint64(b[i:], uint64(at))
			binary.LittleEndian.PutUint64(b[i+8:], value)
		}
	}
	return b
}

func direct(path string, flags int) (*os.File, error) {
	return os.OpenFile(path, flags|unix.O_DIRECT, 0)
}

// write puts a value into units, past the page cache, durably.
func (r *rig) write(path string, c content, value uint64, units ...int64) {
	r.Helper()
	f, err := direct(path, os.O_RDWR)
	r.must(err)
	defer f.Close()
	var wg sync.WaitGroup
	errs := make([]error, len(units))
	for i, u := range units {
		c[u] = value
		wg.Go(func() { _, errs[i] = f.WriteAt(pattern(aligned(unit), u, value), u*unit) })
	}
	wg.Wait()
	r.must(errors.Join(errs...))
	r.must(f.Sync())
}

func (r *rig) verify(what, path string, size int64, c content) {
	r.Helper()
	f, err := direct(path, os.O_RDONLY)
	r.must(err)
	defer f.Close()
	end, err := f.Seek(0, 2)
	r.must(err)
	if end != size {
		r.Errorf("%s: %s has %d bytes, want %d", what, path, end, size)
	}
	got, want := aligned(mib), aligned(unit)
	for at := int64(0); at < size; at += int64(len(got)) {
		got = got[:min(int64(len(got)), size-at)]
		if _, err := f.ReadAt(got, at); err != nil {
			r.Fatalf("%s: read at %d: %v", what, at, err)
		}
		for i := int64(0); i < int64(len(got)); i += unit {
			u := (at + i) / unit
			part := got[i:min(i+unit, int64(len(got)))]
			if w := pattern(want, u, c[u])[:len(part)]; !bytes.Equal(part, w) {
				r.Fatalf("%s: unit %d of %s has number %d of unit %d, want %d", what, u, path, binary.LittleEndian.Uint64(part[8:]), binary.LittleEndian.Uint64(part), c[u])
			}
		}
	}
}

func every(n, step, size int64) []int64 {
	var out []int64
	for u := n; u < size/unit; u += step {
		out = append(out, u)
	}
	return out
}

// writer writes numbers that rise to a device past the cache, each durable before
// the next, round and round over a region of units.
type writer struct {
	stop chan struct{}
	done chan struct{}
	mu   sync.Mutex
	last uint64 // acknowledged and synced
	err  error
}

const region = 64 // units at the image's beginning

func (r *rig) writer(path string) *writer {
	w := &writer{stop: make(chan struct{}), done: make(chan struct{})}
	f, err := direct(path, os.O_RDWR)
	r.must(err)
	go func() {
		defer close(w.done)
		defer f.Close()
		for n := uint64(1); ; n++ {
			select {
			case <-w.stop:
				return
			default:
			}
			u := int64(n % region)
			_, err := f.WriteAt(pattern(aligned(unit), u, n), u*unit)
			if err == nil {
				err = f.Sync()
			}
			w.mu.Lock()
			if w.err = err; err == nil {
				w.last = n
			}
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	r.Cleanup(func() { w.end() })
	return w
}

func (w *writer) at() (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last, w.err
}

// further waits until the writer has written more.
func (w *writer) further(t testing.TB) {
	t.Helper()
	from, _ := w.at()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		now, err := w.at()
		if err != nil {
			t.Fatalf("the writer: %v", err)
		}
		if now >= from+3 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the writer stands still at %d", now)
		}
	}
}

func (w *writer) end() {
	select {
	case <-w.done:
	default:
		select {
		case <-w.stop:
		default:
			close(w.stop)
		}
		<-w.done
	}
}

// prefix checks that a region holds what a writer wrote up to one moment, and
// returns its number: the newest one, with every earlier one that was not overwritten.
func (r *rig) prefix(what, path string) uint64 {
	r.Helper()
	f, err := direct(path, os.O_RDONLY)
	r.must(err)
	defer f.Close()
	b := aligned(region * unit)
	if _, err := f.ReadAt(b, 0); err != nil {
		r.Fatal(err)
	}
	newest := uint64(0)
	for u := range int64(region) {
		newest = max(newest, binary.LittleEndian.Uint64(b[u*unit+8:]))
	}
	want := aligned(unit)
	for u := range int64(region) {
		var n uint64
		if back := (newest + region - uint64(u)) % region; back < newest {
			n = newest - back
		}
		if !bytes.Equal(b[u*unit:(u+1)*unit], pattern(want, u, n)) {
			r.Fatalf("%s: unit %d has %d, want %d as of write %d", what, u, binary.LittleEndian.Uint64(b[u*unit+8:]), n, newest)
		}
	}
	return newest
}

func (r *rig) tables() string {
	mapped, err := host.NewLocal(host.Exec{}).Mapped(bg, uuidPrefix)
	r.must(err)
	var b strings.Builder
	for _, m := range mapped {
		fmt.Fprintf(&b, "%s %d:%d suspended=%t inactive=%t open=%d %v\n", m.Name, m.Major, m.Minor, m.Suspended, m.Inactive, m.Open, m.Targets)
	}
	return b.String()
}

func waitFor(t testing.TB, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come true")
		}
	}
}
