package share

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

// impatient makes the limits of an engine those of a test that waits for them.
func impatient(e *Engine) *Engine {
	const soon = 300 * time.Millisecond
	e.limits = limits{tag: soon, slab: soon, list: soon, probe: soon, mount: soon, open: soon, stall: soon}
	return e
}

func everything(farfs.Op) bool { return true }

// TestADeadServerHoldsNobodyUp: each verb is given up after its limit, the next ones at once, and
// Describe and another domain's verbs never wait. When the server is back, everything goes on, and what was
// given up has happened or not, but never half.
func TestADeadServerHoldsNobodyUp(t *testing.T) {
	f, other := newFar(t), newFar(t)
	e, healthy := impatient(f.open(t)), other.open(t)
	ok(t, e.CreateSlab(t.Context(), slab("before")))
	f.Hang(everything)
	tag := engine.Tag{Name: "i.a.1", Slab: "a", Record: []byte("record")}
	within(t, 5*time.Second, "a verb", func() {
		fails(t, e.CreateTag(t.Context(), tag), fault.Unavailable, "far:/share", "does not answer")
	})
	verbs := map[string]func() error{
		"CreateTag":   func() error { return e.CreateTag(t.Context(), tag) },
		"DeleteTag":   func() error { return e.DeleteTag(t.Context(), "i.b.1") },
		"ListTags":    func() error { _, err := e.ListTags(t.Context(), ""); return err },
		"CreateSlab":  func() error { return e.CreateSlab(t.Context(), slab("c")) },
		"ResizeSlab":  func() error { return e.ResizeSlab(t.Context(), "before", 2<<20) },
		"DeleteSlab":  func() error { return e.DeleteSlab(t.Context(), "before") },
		"ListSlabs":   func() error { _, err := e.ListSlabs(t.Context()); return err },
		"AttachSlab":  func() error { _, err := e.AttachSlab(t.Context(), "before", engine.AttachOptions{}); return err },
		"DomainUsage": func() error { _, err := e.DomainUsage(t.Context()); return err },
		"SlabUsage":   func() error { _, err := e.SlabUsage(t.Context(), "before"); return err },
	}
	for name, call := range verbs {
		within(t, 2*time.Second, name, func() { fails(t, call(), fault.Unavailable, "does not answer") })
	}
	hanging := e.host.Abandoned()
	if hanging == 0 || hanging > 3 {
		t.Errorf("%d calls hang: one of each kind is enough to know", hanging)
	}
	for name, call := range verbs { // the sign of life still hangs
		within(t, 100*time.Millisecond, name, func() { fails(t, call(), fault.Unavailable, "does not answer") })
	}
	within(t, 100*time.Millisecond, "Describe", func() { _, err := e.Describe(t.Context()); ok(t, err) })
	within(t, 5*time.Second, "another domain", func() { ok(t, healthy.CreateTag(t.Context(), tag)) })
	f.Release()
	eventually(t, func() error {
		if n := e.host.Abandoned(); n > 0 {
			return fmt.Errorf("%d calls still hang", n)
		}
		return nil
	})
	e.limits = usual()
	ok(t, e.CreateTag(t.Context(), tag))
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 1 || slabs[0].ID != "before" {
		t.Errorf("%v, %v", slabs, err)
	}
}

// TestAStorageThatIsNotReady: nothing is done in one that says so, until it is.
func TestAStorageThatIsNotReady(t *testing.T) {
	f := newFar(t)
	var why error
	e := f.open(t, func(s *Storage) { s.Ready = func(context.Context) error { return why } })
	why = fault.New(fault.Unavailable, "it was taken apart")
	tag := engine.Tag{Name: "i.a.1", Slab: "a", Record: []byte("record")}
	fails(t, e.CreateTag(t.Context(), tag), fault.Unavailable, "taken apart")
	_, err := e.ListTags(t.Context(), "")
	fails(t, err, fault.Unavailable, "taken apart")
	why = nil
	if tags, err := e.ListTags(t.Context(), ""); err != nil || len(tags) != 0 {
		t.Errorf("%v, %v", tags, err)
	}
	ok(t, e.CreateTag(t.Context(), tag))
}

// TestASlowObjectHoldsOnlyItselfUp: while one call hangs, others ask for a sign of life, get it, and work.
func TestASlowObjectHoldsOnlyItselfUp(t *testing.T) {
	f := newFar(t)
	e := f.open(t)
	f.Hang(func(op farfs.Op) bool { return op == farfs.Link })
	usually := e.limits
	impatient(e)
	fails(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}), fault.Unavailable)
	e.limits = usually
	fails(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}), fault.Unavailable, "earlier attempt still hangs")
	f.Hang(nil)
	before := f.Count(farfs.Statfs)
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "e.2"})) // the kernel holds the folder i
	if f.Count(farfs.Statfs) == before {
		t.Error("nobody asked for a sign of life")
	}
	f.Release()
	eventually(t, func() error {
		tags, err := e.ListTags(t.Context(), "")
		if err == nil && len(tags) != 2 {
			err = fmt.Errorf("tags %v: the one that was given up comes as well", tags)
		}
		return err
	})
}

// TestCloseWaitsForNoServer.
func TestCloseWaitsForNoServer(t *testing.T) {
	f := newFar(t)
	e, err := Open(t.Context(), host.NewLocal(host.Exec{}), f.mounts, f.storage())
	ok(t, err)
	impatient(e)
	f.Hang(everything)
	fails(t, e.DeleteTag(t.Context(), "i.a.1"), fault.Unavailable)
	within(t, 5*time.Second, "Close", func() { ok(t, e.Close()) })
	if m := mountsBelow(t, f.mounts); len(m) != 0 {
		t.Errorf("still mounted: %q", m)
	}
	f.Release()
}

// TestAMountWithoutItsServerIsReplaced, without a restart, and a slab that is attached is found by its new path.
func TestAMountWithoutItsServerIsReplaced(t *testing.T) {
	f := newFar(t)
	e := f.open(t)
	ok(t, e.CreateSlab(t.Context(), slab("a")))
	ok(t, e.CreateSlab(t.Context(), tree("t")))
	old, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	with := engine.AttachOptions{MountOptions: []string{"opt=yes"}}
	oldTree, err := e.AttachSlab(t.Context(), "t", with)
	ok(t, err)
	hold, err := os.Open(oldTree.Path) // or the crash would unmount it
	ok(t, err)
	defer hold.Close()
	f.Crash(t)
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "a"}))
	tags, err := e.ListTags(t.Context(), "")
	if err != nil || len(tags) != 1 {
		t.Errorf("%v, %v", tags, err)
	}
	now, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	if _, err := os.Stat(now.Path); err != nil || now == old {
		t.Errorf("attached at %s, before at %s: %v", now.Path, old.Path, err)
	}
	nowTree, err := e.AttachSlab(t.Context(), "t", with)
	ok(t, err)
	if _, err := os.Stat(nowTree.Path); err != nil {
		t.Error(err)
	}
	if m := mountsBelow(t, f.mounts); len(m) != 2 {
		t.Errorf("mounts %q: want the domain's and the tree's", m)
	}
}

// TestAnotherStorageInItsPlaceIsNotTouched: neither an empty one nor another domain's; and when the right one
// is back, everything goes on.
func TestAnotherStorageInItsPlaceIsNotTouched(t *testing.T) {
	f := newFar(t)
	e := f.open(t)
	ok(t, e.CreateSlab(t.Context(), slab("a")))
	strange := newFar(t)
	ok(t, strange.open(t).CreateSlab(t.Context(), slab("b")))
	empty := t.TempDir()
	for name, dir := range map[string]string{"an empty one": empty, "another domain's": strange.dir} {
		f.Move(dir)
		f.Crash(t)
		fails(t, e.CreateSlab(t.Context(), slab("c")), fault.Unavailable, "another storage is in its place", e.identity)
		_, err := e.ListSlabs(t.Context())
		fails(t, err, fault.Unavailable)
		if _, err := os.Lstat(filepath.Join(dir, "slabs", "c")); !os.IsNotExist(err) {
			t.Errorf("%s: it was written to: %v", name, err)
		}
	}
	if left, err := os.ReadDir(empty); err != nil || len(left) != 0 {
		t.Errorf("made in the empty one: %v, %v", left, err)
	}
	f.Move(f.dir)
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 1 || slabs[0].ID != "a" {
		t.Errorf("%v, %v", slabs, err)
	}
}

// TestAServerThatCannotBeMountedAnew is said so, and tried again at the next verb.
func TestAServerThatCannotBeMountedAnew(t *testing.T) {
	f := newFar(t)
	away := false
	e := f.open(t, func(s *Storage) {
		mount := s.Mount
		s.Mount = func(ctx context.Context, folder, target string, o []string) error {
			if away {
				<-ctx.Done()
				return fault.New(fault.KindOf(ctx.Err()), "mount: %w", ctx.Err())
			}
			return mount(ctx, folder, target, o)
		}
	})
	away = true
	f.Crash(t)
	impatient(e)
	within(t, 5*time.Second, "a verb", func() {
		fails(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}), fault.Unavailable, "stale", "could not be mounted within")
	})
	if points, err := os.ReadDir(e.home.path); err != nil || len(points) != 1 {
		t.Errorf("mount points after a mount that failed: %v, %v", points, err)
	}
	away, e.limits = false, usual()
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
}

// TestAPathWhoseMountWentAway: what is mounted by others is opened anew at its path, and compared.
func TestAPathWhoseMountWentAway(t *testing.T) {
	f := newFar(t)
	path := t.TempDir()
	ok(t, f.Mount("", path))
	refuse := error(nil)
	e, err := Open(t.Context(), host.NewLocal(host.Exec{}), f.mounts, Storage{Type: "path", Location: path, Path: path,
		CheckPath: func(string) error { return refuse }})
	ok(t, err)
	defer func() { ok(t, e.Close()) }()
	ok(t, e.CreateSlab(t.Context(), slab("a")))
	if left, _ := os.ReadDir(f.mounts); len(left) != 0 {
		t.Errorf("something was mounted: %v", left)
	}
	f.Crash(t)
	fails(t, e.DeleteSlab(t.Context(), "a"), fault.Unavailable)
	local := host.NewLocal(host.Exec{})
	ok(t, local.UnmountLazily(t.Context(), path))
	fails(t, e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "another storage is in its place")
	refuse = fault.New(fault.Unavailable, "nothing is mounted there")
	fails(t, e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "nothing is mounted there")
	refuse = nil
	ok(t, f.Mount("", path))
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 1 {
		t.Errorf("%v, %v", slabs, err)
	}
}

// TestACopyMayTakeLongButNotStall.
func TestACopyMayTakeLongButNotStall(t *testing.T) {
	f := newFar(t)
	e := f.open(t)
	ok(t, e.CreateSlab(t.Context(), slab("a")))
	at, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	ok(t, os.WriteFile(at.Path, make([]byte, 1<<20), 0o600))
	ok(t, e.CopySlab(t.Context(), "a", slab("b"), nil)) // by the kernel, through this host
	f.Hang(func(op farfs.Op) bool { return op == farfs.Write })
	impatient(e)
	within(t, 5*time.Second, "a copy", func() {
		fails(t, e.CopySlab(t.Context(), "a", slab("c"), nil), fault.Unavailable, "nothing was copied")
	})
	f.Release()
}

// TestAStaleObjectIsNotAStaleMount: nothing is mounted anew for it.
func TestAStaleObjectIsNotAStaleMount(t *testing.T) {
	f := newFar(t)
	mounts := 0
	e := f.open(t, func(s *Storage) {
		mount := s.Mount
		s.Mount = func(ctx context.Context, folder, target string, o []string) error {
			mounts++
			return mount(ctx, folder, target, o)
		}
	})
	errStale := posix.Fault(&os.PathError{Op: "stat", Path: "x", Err: unix.ESTALE})
	err := act(t.Context(), e, "it", time.Second, func(context.Context, *posix.Directory) error { return errStale })
	if !errors.Is(err, unix.ESTALE) || !strings.Contains(err.Error(), "stat x") {
		t.Errorf("%v", err)
	}
	if mounts != 1 {
		t.Errorf("mounted %d times", mounts)
	}
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestAPathThatWasMountedAnew: what is open of the old mount answers, but leads nowhere any more for those who get a path. It is
// opened anew if it is the same storage, as soon as it is there.
func TestAPathThatWasMountedAnew(t *testing.T) {
	f := newFar(t)
	path := t.TempDir()
	ok(t, f.Mount("", path))
	refuse := error(nil)
	local := host.NewLocal(host.Exec{})
	e, err := Open(t.Context(), local, f.mounts, Storage{Type: "path", Location: path, Path: path, CheckPath: func(string) error { return refuse }})
	ok(t, err)
	defer func() { ok(t, e.Close()) }()
	ok(t, e.CreateSlab(t.Context(), slab("a")))
	attach := func() error { _, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{}); return err }
	ok(t, local.UnmountLazily(t.Context(), path))
	refuse = fault.New(fault.Unavailable, "nothing is mounted there")
	fails(t, attach(), fault.Unavailable, "nothing is mounted there", "does not lead to")
	refuse = nil
	fails(t, attach(), fault.Unavailable, "another storage is in its place")
	ok(t, f.Mount("", path))
	ok(t, attach())
	a, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	if _, err := os.Stat(a.Path); err != nil {
		t.Error(err)
	}
}

// TestAFirstLookThatComesLate removes nothing: what it has made is another opening's by then.
func TestAFirstLookThatComesLate(t *testing.T) {
	for name, c := range map[string]struct {
		refuse unix.Errno // what is answered to the one that is late
		waits  bool       // for the answer
	}{
		"it can be no domain, and nobody waits": {unix.EPERM, false},
		"it is not known what it can be":        {unix.EIO, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFar(t)
			f.Refuse(farfs.Link, c.refuse)
			f.Hang(func(op farfs.Op) bool { return op == farfs.Link })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			local := host.NewLocal(host.Exec{})
			opened := make(chan error, 1)
			go func() { _, err := Open(ctx, local, f.mounts, f.storage()); opened <- err }()
			f.Held(t)
			f.Refuse(farfs.Link, 0)
			if !c.waits {
				cancel()
				if err := <-opened; err == nil {
					t.Fatal("it was opened")
				}
			}
			f.Hang(nil)
			later := f.open(t)
			f.Release()
			if c.waits {
				fails(t, <-opened, fault.Unavailable)
			}
			eventually(t, func() error {
				if n := local.Abandoned(); n > 0 {
					return fmt.Errorf("%d calls still hang", n)
				}
				return nil
			})
			ok(t, later.CreateSlab(t.Context(), slab("a")))
			ok(t, later.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
		})
	}
}
