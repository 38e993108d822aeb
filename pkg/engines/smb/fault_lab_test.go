package smb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

func tag(name string) engine.Tag { return engine.Tag{Name: name, Slab: "s", Record: []byte(name)} }

func TestLabAFrozenServerHoldsUpNobodyElse(t *testing.T) {
	frozen, other := newRig(t, "ext4", nil), newRig(t, "ext4", nil)
	e, o := frozen.open(t, "", ""), other.open(t, "", "")
	ctx := t.Context()
	must(t, e.CreateTag(ctx, tag("i.before")))
	frozen.Freeze(t)
	thawed := false
	defer func() {
		if !thawed {
			frozen.Thaw(t)
		}
	}()
	ended := make(chan error, 1)
	begin := time.Now()
	go func() { ended <- e.CreateTag(ctx, tag("i.during")) }()
	for n := range 20 { // the other domain goes on as if nothing were
		begin := time.Now()
		must(t, o.CreateTag(ctx, tag(fmt.Sprintf("i.%d", n))))
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("a tag in another domain took %s", took)
		}
	}
	if err := <-ended; !errors.Is(err, fault.Unavailable) {
		t.Errorf("a tag at a frozen server: %v", err)
	}
	t.Logf("a tag at a frozen server was given up after %s", time.Since(begin))
	begin = time.Now()
	if _, err := e.ListTags(ctx, ""); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a listing at a frozen server: %v", err)
	}
	if took := time.Since(begin); took > 15*time.Second {
		t.Errorf("the second call waited for %s: it is known that the server hangs", took)
	}
	begin = time.Now()
	if _, err := e.Describe(ctx); err != nil || time.Since(begin) > time.Second {
		t.Errorf("the description: %v after %s", err, time.Since(begin))
	}
	frozen.Thaw(t)
	thawed = true
	eventually(t, 2*time.Minute, func() error {
		if err := e.CreateTag(ctx, tag("i.during")); err != nil { // it may have happened
			return err
		}
		return e.CreateTag(ctx, tag("i.after"))
	})
	if names := tagNames(t, e); fmt.Sprint(names) != "[i.after i.before i.during]" {
		t.Errorf("the tags are %v", names)
	}
}

func TestLabARestartedServerLosesNothingOfALoopDevice(t *testing.T) {
	r := newRig(t, "xfs", nil)
	e := r.open(t, "", "")
	ctx := t.Context()
	const size = 64 << 20
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "disk", Kind: engine.Block, Size: size}))
	at, err := e.AttachSlab(ctx, "disk", engine.AttachOptions{})
	must(t, err)
	local := host.NewLocal(host.Exec{})
	loop, err := local.AttachLoop(ctx, host.LoopSpec{File: at.Path, Size: size, Mark: "smb-restart"})
	must(t, err)
	defer func() { must(t, local.DetachLoop(ctx, loop)) }()
	device, err := os.OpenFile(loop.Path, os.O_RDWR, 0)
	must(t, err)
	defer device.Close()

	put := func(offset int64, letter byte) error {
		if _, err := device.WriteAt(bytes.Repeat([]byte{letter}, 8<<20), offset); err != nil {
			return err
		}
		return device.Sync()
	}
	must(t, put(0, 'a'))
	r.Kill()
	during := make(chan error, 1)
	go func() { during <- put(8<<20, 'b') }()
	select {
	case err := <-during:
		t.Fatalf("a write was acknowledged while there was no server: %v", err)
	case <-time.After(5 * time.Second):
	}
	r.Run(t)
	begin := time.Now()
	if err := <-during; err != nil {
		t.Fatalf("a write failed although the server came back: %v", err)
	}
	t.Logf("the write went on %s after the server was back", time.Since(begin))
	must(t, put(16<<20, 'c'))

	content, err := os.ReadFile(onServer(t, r, "slabs", "disk"))
	must(t, err)
	for i, letter := range []byte("abc") {
		if part := content[i<<23 : (i+1)<<23]; !bytes.Equal(part, bytes.Repeat([]byte{letter}, 8<<20)) {
			t.Errorf("what was written as %q is something else at the server", letter)
		}
	}
	eventually(t, time.Minute, func() error { return e.CreateTag(ctx, tag("i.after")) })
}

// looped is a block slab with a loop device over it, which is open past the page cache.
func looped(t *testing.T, e engine.Engine, size int64) (device *os.File) {
	t.Helper()
	ctx := t.Context()
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "disk", Kind: engine.Block, Size: size}))
	at, err := e.AttachSlab(ctx, "disk", engine.AttachOptions{})
	must(t, err)
	local := host.NewLocal(host.Exec{})
	loop, err := local.AttachLoop(ctx, host.LoopSpec{File: at.Path, Size: size, Mark: t.Name()})
	must(t, err)
	t.Cleanup(func() { must(t, local.DetachLoop(context.WithoutCancel(ctx), loop)) })
	device, err = os.OpenFile(loop.Path, os.O_RDWR|unix.O_DIRECT, 0)
	must(t, err)
	t.Cleanup(func() { must(t, device.Close()) })
	return device
}

// aligned is memory for direct I/O.
func aligned(t *testing.T, size int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Munmap(b)) })
	return b
}

// A flush that the connection was lost under is an error of the disk to whoever waits for it: a filesystem stops.
func TestLabAFlushOutlivesTheConnection(t *testing.T) {
	r := newRig(t, "xfs", nil)
	device := looped(t, r.open(t, "", ""), 8<<20)
	b := aligned(t, 4096)
	for round := range 3 {
		_, err := device.WriteAt(b, int64(round)*4096)
		must(t, err)
		r.Freeze(t)
		flushed := make(chan error, 1)
		go func() { flushed <- device.Sync() }()
		time.Sleep(time.Second) // it is at the server by now, if it has to go there
		r.Kill()
		r.Run(t)
		if err := <-flushed; err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if _, err := device.ReadAt(b, 0); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// A server that crashes forgets what it had not written to its disk, and tells nobody: what was written before
// and is flushed afterwards has to be there.
func TestLabAServerThatForgetsIsNotBelieved(t *testing.T) {
	r := newRig(t, "xfs", nil)
	device := looped(t, r.open(t, "", ""), 8<<20)
	b := aligned(t, 1<<20)
	for round := range 3 {
		copy(b, bytes.Repeat([]byte{'a' + byte(round)}, len(b)))
		_, err := device.WriteAt(b, 0)
		must(t, err)
		r.Freeze(t)
		shutDown(t, r.disk)
		r.Kill()
		remount(t, r.disk, "xfs")
		r.Run(t)
		if err := device.Sync(); err != nil {
			t.Errorf("round %d: flush: %v", round, err)
			continue // it was not said to be durable
		}
		_, err = device.ReadAt(b, 0)
		must(t, err)
		if want := bytes.Repeat([]byte{'a' + byte(round)}, len(b)); !bytes.Equal(b, want) {
			t.Errorf("round %d: what was flushed without an error begins with %q and not with %q", round, b[:4], want[:4])
		}
	}
}

// TestLabAFilesystemOutlivesItsServer: a server that was restarted, or crashed and forgot what it had not written
// to its disk, says nothing of that to a client that goes on. No write below a mounted filesystem may fail or be missing.
func TestLabAFilesystemOutlivesItsServer(t *testing.T) {
	r := newRig(t, "xfs", nil)
	e := r.open(t, "", "")
	ctx := t.Context()
	const size, piece = 256 << 20, 64 << 10
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "disk", Kind: engine.Block, Size: size}))
	at, err := e.AttachSlab(ctx, "disk", engine.AttachOptions{})
	must(t, err)
	local, point := host.NewLocal(host.Exec{}), t.TempDir()
	loop, err := local.AttachLoop(ctx, host.LoopSpec{File: at.Path, Size: size, Mark: "smb-outlives"})
	must(t, err)
	defer func() { must(t, local.DetachLoop(context.WithoutCancel(ctx), loop)) }()
	must(t, local.Format(ctx, loop.Path, host.Ext4, size))
	must(t, local.MountFilesystem(ctx, loop.Path, point, host.Ext4, nil))

	content := func(n int64) []byte { return bytes.Repeat(fmt.Appendf(nil, "%08d", n), piece/8) }
	file := func(n int64) string { return filepath.Join(point, fmt.Sprint(n%200)) }
	var durable atomic.Int64 // files before this one
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- func() error {
			for n := int64(0); ; n++ {
				select {
				case <-stop:
					return nil
				default:
				}
				f, err := os.Create(file(n))
				if err != nil {
					return err
				}
				_, err = f.Write(content(n))
				if n%4 != 3 { // what is not waited for is in the next one's journal, and on its way
					err = errors.Join(err, f.Close())
				} else if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
					durable.Store(n + 1)
				}
				if err != nil {
					return fmt.Errorf("file %d: %w", n, err)
				}
			}
		}()
	}()
	goesOn := func() {
		t.Helper()
		before, begin := durable.Load(), time.Now()
		for durable.Load() < before+20 {
			select {
			case err := <-ended:
				t.Fatalf("after %d files: %v", durable.Load(), err)
			case <-time.After(10 * time.Millisecond):
			}
			if time.Since(begin) > 3*time.Minute {
				t.Fatal("the writer does not go on")
			}
		}
		t.Logf("20 files more in %s", time.Since(begin))
	}
	for round := range 4 {
		goesOn()
		if round%2 == 0 {
			r.Kill()
			r.Run(t)
			continue
		}
		r.Freeze(t)
		shutDown(t, r.disk)
		r.Kill()
		remount(t, r.disk, "xfs")
		r.Run(t)
	}
	goesOn()
	close(stop)
	must(t, <-ended)
	must(t, local.Unmount(ctx, point))
	if note, err := local.Check(ctx, loop.Path, host.Ext4); err != nil || note != "" {
		t.Errorf("fsck: %q, %v", note, err)
	}
	res, err := (host.Exec{}).Run(ctx, host.Command{Name: "e2fsck", Args: []string{"-f", "-n", loop.Path}})
	if err != nil {
		t.Errorf("%v\n%s", err, res.Stdout)
	}
	must(t, local.MountFilesystem(ctx, loop.Path, point, host.Ext4, nil))
	defer func() { must(t, local.Unmount(context.WithoutCancel(ctx), point)) }()
	last := durable.Load()
	for n := max(0, last-200+4); n < last; n++ { // the writer may have begun four more
		if got, err := os.ReadFile(file(n)); err != nil || n%4 == 3 && !bytes.Equal(got, content(n)) {
			t.Errorf("file %d of %d is not as it was written (%d bytes, %v)", n, last, len(got), err)
		}
	}
}

// What a verb answered is at the server's disk: its file system is shut down like by a power cut,
// without writing out what its journal has in memory.
func TestLabWhatWasAnsweredSurvivesAPowerCutAtTheServer(t *testing.T) {
	for _, fstype := range []string{"xfs", "ext4"} {
		for name, verb := range map[string]struct{ do, check func(e engine.Engine) error }{
			"tag": {
				func(e engine.Engine) error { return e.CreateTag(t.Context(), tag("i.1.1")) },
				func(e engine.Engine) error { return has(tagNames(t, e), "i.1.1") },
			},
			"tag gone": {
				func(e engine.Engine) error {
					return errors.Join(e.CreateTag(t.Context(), tag("i.1.1")), e.DeleteTag(t.Context(), "i.1.1"))
				},
				func(e engine.Engine) error {
					if names := tagNames(t, e); len(names) > 0 {
						return fmt.Errorf("tags %v", names)
					}
					return nil
				},
			},
			"block": {
				func(e engine.Engine) error {
					return e.CreateSlab(t.Context(), engine.SlabSpec{ID: "s", Kind: engine.Block, Size: 1 << 20})
				},
				func(e engine.Engine) error {
					_, err := e.AttachSlab(t.Context(), "s", engine.AttachOptions{})
					return err
				},
			},
			"tree": {
				func(e engine.Engine) error {
					return e.CreateSlab(t.Context(), engine.SlabSpec{ID: "s", Kind: engine.Tree, Size: 1 << 20})
				},
				func(e engine.Engine) error {
					_, err := e.AttachSlab(t.Context(), "s", engine.AttachOptions{})
					return errors.Join(err, e.DetachSlab(t.Context(), "s"))
				},
			},
			"growth": {
				func(e engine.Engine) error {
					return errors.Join(e.CreateSlab(t.Context(), engine.SlabSpec{ID: "s", Kind: engine.Block, Size: 1 << 20}),
						e.ResizeSlab(t.Context(), "s", 2<<20))
				},
				func(e engine.Engine) error {
					slabs, err := e.ListSlabs(t.Context())
					if err == nil && (len(slabs) != 1 || slabs[0].Size != 2<<20) {
						err = fmt.Errorf("slabs %v", slabs)
					}
					return err
				},
			},
		} {
			t.Run(fstype+" "+name, func(t *testing.T) {
				r := newRig(t, fstype, nil)
				e := r.opened(t, "d", "")
				must(t, verb.do(e))
				shutDown(t, r.disk)
				r.Kill()
				_ = e.Close() // its server is gone
				remount(t, r.disk, fstype)
				r.Run(t)
				if err := verb.check(r.open(t, "d", apart)); err != nil {
					t.Errorf("what was answered did not survive: %v", err)
				}
			})
		}
	}
}

// shutDown stops a file system where it is; see ioctl_xfs_goingdown(2) and ext4's EXT4_IOC_SHUTDOWN.
func shutDown(t *testing.T, mountpoint string) {
	t.Helper()
	const goingDown, noLogFlush = 0x8004587d, 2
	f, err := os.Open(mountpoint)
	must(t, err)
	defer f.Close()
	must(t, unix.IoctlSetPointerInt(int(f.Fd()), goingDown, noLogFlush))
}

// remount lets a file system that was shut down recover from its journal.
func remount(t *testing.T, mountpoint, fstype string) {
	t.Helper()
	local := host.NewLocal(host.Exec{})
	at, err := local.MountsAt(mountpoint)
	must(t, err)
	// The loop device goes with its last user, so one is kept.
	device, err := os.Open(at[0].Source)
	must(t, err)
	defer device.Close()
	must(t, local.Unmount(t.Context(), mountpoint))
	must(t, local.MountFilesystem(t.Context(), at[0].Source, mountpoint, fstype, nil))
}

func onServer(t *testing.T, r *rig, parts ...string) string {
	t.Helper()
	parts[len(parts)-1] = "_" + parts[len(parts)-1] + "_"
	return filepath.Join(append([]string{r.folder}, parts...)...)
}

func eventually(t *testing.T, limit time.Duration, try func() error) {
	t.Helper()
	begin := time.Now()
	for {
		err := try()
		if err == nil {
			t.Logf("it works %s after", time.Since(begin))
			return
		}
		if time.Since(begin) > limit {
			t.Fatalf("after %s still: %v", limit, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
