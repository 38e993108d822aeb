package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

func TestWritesWaitForSpaceOnExt4(t *testing.T) {
	at := ext4(t, 2<<30)
	writesWait(t, at, at)
}

func ext4(t *testing.T, size int64) (at string) {
	t.Helper()
	lab.Need(t)
	device, at := lab.Loop(t, size), t.TempDir()
	command(t, "mkfs.ext4", "-q", "-m", "0", device)
	command(t, "mount", device, at)
	t.Cleanup(func() { command(t, "umount", at) })
	return at
}

// TestWritesWaitOfAFastWriter, which takes the space itself.
func TestWritesWaitOfAFastWriter(t *testing.T) {
	at := ext4(t, 3<<30)
	dir := filepath.Join(at, "node")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w := newWorldIn(t, dir, "fast")
	v := w.layered("v", 1<<30)
	fill := w.filler(at)
	_, r := fill.reserve()
	fill.leave(r.Low + 128<<20)
	stop := w.guarding()
	const pieces, piece = 250, 2 << 20
	path, done := filepath.Join(w.staging(v), "f"), make(chan error, 1)
	go func() {
		f, err := os.Create(path)
		for n := 0; err == nil && n < pieces; n++ {
			_, err = f.Write(bytes.Repeat([]byte{byte(n)}, piece))
		}
		done <- errors.Join(err, f.Sync(), f.Close())
	}()
	w.until("paused", func() bool { return w.node.Paused() == 1 })
	if free, _ := fill.reserve(); free < r.Floor/2 {
		t.Errorf("%d bytes are left", free)
	}
	w.valid()
	fill.giveBack()
	w.ok(<-done)
	w.until("resumed", func() bool { return w.node.Paused() == 0 })
	w.valid()
	stop()
	w.unstage(v)
	w.stage(v, host.Ext4)
	f, err := os.Open(path)
	w.ok(err)
	b := make([]byte, piece)
	for n := range pieces {
		_, err := io.ReadFull(f, b)
		w.ok(err)
		if !bytes.Equal(b, bytes.Repeat([]byte{byte(n)}, piece)) {
			t.Fatalf("piece %d is another", n)
		}
	}
	w.ok(f.Close())
	w.unstage(v)
}

// TestWritesWaitForSpaceOnNFS3, which cannot allocate any.
func TestWritesWaitForSpaceOnNFS3(t *testing.T) {
	server := lab.StartNFS(t).Export(t, "ext4")
	at := t.TempDir()
	command(t, "mount", "-t", "nfs", "-o", "vers=3,proto=tcp,nolock", "127.0.0.1:"+server.Dir, at)
	t.Cleanup(func() { command(t, "umount", at) })
	f, err := os.Create(filepath.Join(at, "probe"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 1<<20); err != unix.EOPNOTSUPP {
		t.Errorf("space can be allocated: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	writesWait(t, at, server.Dir)
}

func command(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// filler takes space of a storage, from outside.
type filler struct {
	w   *world
	at  string
	f   *os.File
	end int64
}

func (w *world) filler(at string) *filler {
	f, err := os.Create(filepath.Join(at, "filler"))
	w.ok(err)
	w.t.Cleanup(func() { _ = f.Close() })
	return &filler{w: w, at: at, f: f}
}

func (f *filler) reserve() (free int64, r layer.Reserve) {
	u, err := f.w.node.host.Usage(context.Background(), f.at)
	f.w.ok(err)
	return u.Available, layer.ReserveOf(u.Total)
}

// leave takes what is free, but for so many bytes.
func (f *filler) leave(bytes int64) {
	f.w.t.Helper()
	free, _ := f.reserve()
	f.w.ok(unix.Fallocate(int(f.f.Fd()), 0, f.end, free-bytes))
	f.end += free - bytes
}

func (f *filler) giveBack() {
	f.w.t.Helper()
	f.w.ok(errors.Join(f.f.Truncate(0), f.f.Sync()))
	f.end = 0
}

// entries are files in a folder, each durable before the next.
type entries struct {
	dir     string
	durable atomic.Int64
	stop    chan struct{}
	done    chan error
}

func startEntries(dir string) *entries {
	e := &entries{dir: dir, stop: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		for n := int64(0); ; n++ {
			select {
			case <-e.stop:
				e.done <- nil
				return
			case <-time.After(10 * time.Millisecond):
			}
			f, err := os.Create(e.path(n))
			if err == nil {
				_, err = f.WriteString(strings.Repeat(fmt.Sprintf("%08d", n), 1024))
				err = errors.Join(err, f.Sync(), f.Close())
			}
			if err != nil {
				e.done <- err
				return
			}
			e.durable.Store(n + 1)
		}
	}()
	return e
}

func (e *entries) path(n int64) string { return filepath.Join(e.dir, fmt.Sprint("f", n)) }

func (e *entries) check(w *world) {
	w.t.Helper()
	for n := range e.durable.Load() {
		w.reads(e.path(n), strings.Repeat(fmt.Sprintf("%08d", n), 1024))
	}
}

func (w *world) until(what string, is func() bool) {
	w.t.Helper()
	// Where storage is slow, one breath may not be enough for a single write.
	for end := time.Now().Add(30 * breathEvery); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("never %s", what)
		}
	}
}

// layered makes a volume with a thin layer, and stages it.
func (w *world) layered(name string, size int64) image.Handle {
	w.t.Helper()
	base := w.volume(name, size)
	w.stage(base, host.Ext4)
	w.unstage(base)
	w.overlay(base, name+"-over")
	w.stage(base, host.Ext4)
	return base
}

// overlay puts an empty layer over a volume's slabs, in the metadata.
func (w *world) overlay(h image.Handle, name string) {
	w.t.Helper()
	size := w.images[h].Size
	over := image.SlabRef{ID: name, Size: size, Chunk: layer.ShareChunk} // which may lie on a share, too
	f, err := os.Create(w.path(over.ID))
	w.ok(err)
	w.ok(f.Truncate(layer.StoreSize(size, over.Chunk)))
	w.ok(layer.Format(f, over.Chunk))
	w.ok(f.Close())
	w.change(h, func(st *image.Staging) { st.Slabs = append([]image.SlabRef{over}, st.Slabs...) })
}

// guard runs the node's guard until stop, as an agent does.
func (w *world) guarding() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.node.Guard(ctx) }()
	return func() {
		cancel()
		w.ok(<-done)
	}
}

func (w *world) conditions(h image.Handle) string {
	w.t.Helper()
	list, err := w.node.Health(context.Background(), h)
	w.ok(err)
	var out []string
	for _, c := range list {
		out = append(out, c.Reason)
	}
	return strings.Join(out, " ")
}

// valid fails if the kernel has given up a layer.
func (w *world) valid() {
	w.t.Helper()
	all, err := w.node.host.Mapped(context.Background(), "QUARRY-s-")
	w.ok(err)
	for _, m := range all {
		status, err := w.node.host.StatusMapped(context.Background(), m)
		w.ok(err)
		if strings.Contains(status[0], "Invalid") || strings.Contains(status[0], "failed") {
			w.t.Fatalf("%s is %q", m.Name, status)
		}
	}
}

// writesWait is the life of volumes on a storage that is filled from outside; at is where the node sees it.
func writesWait(t *testing.T, at, server string) {
	dir := filepath.Join(at, "node")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w := newWorldIn(t, dir, "full")
	ctx := context.Background()
	v, other := w.layered("v", 64<<20), w.volume("other", 32<<20)
	w.stage(other, host.Ext4) // and has no layer
	fill := w.filler(server)
	e := startEntries(w.staging(v))
	w.until("written", func() bool { return e.durable.Load() > 3 })
	stop := w.guarding()
	_, r := fill.reserve()
	fill.leave(r.Low - 8<<20)
	w.until("paused", func() bool { return w.node.Paused() == 1 })
	standing := e.durable.Load()
	w.until("a breath", func() bool { return e.durable.Load() > standing+1 })
	w.valid()

	// Below the floor nothing breathes.
	fill.leave(r.Floor - 4<<20)
	w.until("closed", func() bool {
		var st unix.Stat_t
		w.ok(unix.Stat(w.path("v"), &st))
		return w.node.guard.closed(st.Dev) != "" && w.node.Paused() == 1
	})
	standing = e.durable.Load()
	for end := time.Now().Add(breathEvery + 3*time.Second); time.Now().Before(end); time.Sleep(lookSoon) {
		if now := e.durable.Load(); now > standing+1 || w.node.Paused() != 1 {
			t.Fatalf("below the floor the writer went from %d to %d", standing, now)
		}
	}
	if got := w.conditions(v); got != "WritesPaused" {
		t.Errorf("its condition is %q", got)
	}
	if got := w.conditions(other); got != "" {
		t.Errorf("a volume without layers: %q", got)
	}
	if s := w.node.StorageHealth(ctx, nil); len(s) != 1 || s[0].Reason != "WritesPaused" {
		t.Errorf("the storage: %+v", s)
	}
	if st, err := w.node.Stats(ctx, v, w.staging(v)); err != nil || len(st.Conditions) != 1 || st.Total == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	_, err := w.node.Freeze(ctx, v, time.Minute)
	w.fails(err, fault.Exhausted, "wait")
	_, err = w.node.Expand(ctx, v, w.staging(v), 0)
	w.fails(err, fault.Exhausted, "wait")
	w.fails(w.node.Stage(ctx, w.request(v, host.Ext4)), fault.Exhausted, "wait")
	w.fails(w.node.Unstage(ctx, v, w.staging(v)), fault.Unavailable, "cannot be written out")
	w.valid()
	fill.giveBack()
	w.until("resumed", func() bool { return w.node.Paused() == 0 })
	standing = e.durable.Load()
	w.until("written", func() bool { return e.durable.Load() > standing+3 })
	if got := w.conditions(v); got != "" {
		t.Errorf("afterwards its condition is %q", got)
	}

	// A pod is deleted while it waits: its writer ends, and its volume is taken down.
	fill.leave(r.Low - 8<<20)
	w.until("paused", func() bool { return w.node.Paused() == 1 })
	close(e.stop)
	w.ok(<-e.done)
	w.write(filepath.Join(w.staging(other), "f"), "not held up")
	w.unstage(v)
	if free, _ := fill.reserve(); free >= r.Low {
		t.Errorf("%d bytes are free", free)
	}
	w.fails(w.node.Stage(ctx, w.request(v, host.Ext4)), fault.Exhausted, "would wait")
	fill.giveBack()
	w.stage(v, host.Ext4)
	e.check(w)

	// The agent is replaced.
	e2 := startEntries(w.staging(v))
	w.until("written", func() bool { return e2.durable.Load() > 3 })
	stop()
	w.restart()
	w.begin()
	fill.leave(r.Low - 8<<20)
	stop = w.guarding()
	w.until("paused", func() bool { return w.node.Paused() == 1 })
	stop()
	w.restart() // while it is paused
	w.begin()
	stop = w.guarding()
	w.until("paused", func() bool { return w.node.Paused() == 1 })
	w.valid()
	fill.giveBack()
	w.until("resumed", func() bool { return w.node.Paused() == 0 })
	standing = e2.durable.Load()
	w.until("written", func() bool { return e2.durable.Load() > standing+3 })
	close(e2.stop)
	w.ok(<-e2.done)
	stop()
	w.unstage(v)
	w.unstage(other)
	w.ok(unix.Unlink(filepath.Join(server, "filler")))
	w.stage(v, host.Ext4)
	e2.check(w)
	w.unstage(v)
}
