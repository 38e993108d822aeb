package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/hangfs"
)

// until waits for a condition.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen: " + what)
		}
	}
}

// abandon starts f, waits until it hangs, and leaves it.
func abandon(t *testing.T, fs *hangfs.FS, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	fs.Held(t)
	cancel()
	if err := <-ended; !errors.Is(err, fault.Canceled) {
		t.Fatalf("it was left while it hung: %v", err)
	}
}

func backedBy(t *testing.T, file string) (devices []string) {
	t.Helper()
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == file {
			devices = append(devices, strings.Split(f, "/")[3])
		}
	}
	return devices
}

func TestAttachingThatWasLeftBehindLeavesNoDevice(t *testing.T) {
	for _, at := range []hangfs.Op{hangfs.Open, hangfs.Getattr} {
		fs, l := hangfs.New(t, 1<<20), NewLocal(Exec{})
		spec := LoopSpec{File: fs.File, Size: 1 << 20, Mark: "quarry-test-late-attach"}
		fs.Hang(func(op hangfs.Op) bool {
			// The device is there when the kernel is asked what it is over.
			return op == at && (op == hangfs.Open || len(backedBy(t, fs.File)) > 0)
		})
		abandon(t, fs, func(ctx context.Context) error { _, err := l.AttachLoop(ctx, spec); return err })
		fs.Release()
		until(t, "the call comes back", func() bool { return l.Abandoned() == 0 })
		until(t, "no device is left", func() bool { return len(backedBy(t, fs.File)) == 0 })
		lp, err := l.AttachLoop(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.DetachLoop(t.Context(), lp); err != nil {
			t.Fatal(err)
		}
	}
}

// A device is known by its mark although the storage below it does not answer, also to a process that has just been started:
// neither its own volume nor another one has to wait for a dead server.
func TestALoopDeviceThatDoesNotAnswerIsKnown(t *testing.T) {
	fs, l := hangfs.New(t, 1<<20), NewLocal(Exec{})
	spec := LoopSpec{File: fs.File, Size: 1 << 20, Mark: "quarry-test-known to all"}
	made, err := l.AttachLoop(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Getattr })
	started := NewLocal(Exec{})
	found, err := started.Loops(t.Context(), func(lp Loop) bool { return lp.Mark == spec.Mark })
	if err != nil || len(found) != 1 || found[0] != made || started.Abandoned() != 0 {
		t.Errorf("found %+v (%v), want %+v", found, err, made)
	}
	fs.Release()
	if err := started.DetachLoop(t.Context(), made); err != nil {
		t.Fatal(err)
	}
	if _, ok := made.recall(); ok {
		t.Error("the memo of a device that is gone is still there")
	}
}

func TestAMemoOfAnotherBootIsNotBelieved(t *testing.T) {
	_, file, mark := slab(t, 1<<20)
	lp, err := NewLocal(Exec{}).AttachLoop(t.Context(), LoopSpec{File: file, Size: 1 << 20, Mark: mark})
	if err != nil {
		t.Fatal(err)
	}
	text, ok := lp.memo()
	if !ok {
		t.Skip("this kernel gives disks no sequence")
	}
	if got, ok := lp.recall(); !ok || got != lp {
		t.Errorf("recalled %+v (%v), want %+v", got, ok, lp)
	}
	for _, wrong := range []string{"0" + text, "", "rubbish", strings.Replace(text, " ", "  ", 1)} {
		link := filepath.Join(memos, lp.sequence)
		if err := errors.Join(os.Remove(link), os.Symlink(wrong+" ", link)); err != nil {
			t.Fatal(err)
		}
		if got, ok := lp.recall(); ok {
			t.Errorf("%q was recalled as %+v", wrong, got)
		}
	}
}

// Whoever looks for all devices of an image must not take some for all.
func TestALoopDeviceThatDoesNotAnswerIsNotPassedOver(t *testing.T) {
	fs := hangfs.New(t, 1<<20) // first, so that it outlives the devices
	l, file, mark := slab(t, 1<<20)
	known, err := l.AttachLoop(t.Context(), LoopSpec{File: file, Size: 1 << 20, Mark: mark})
	if err != nil {
		t.Fatal(err)
	}
	dead, err := l.AttachLoop(t.Context(), LoopSpec{File: fs.File, Size: 1 << 20, Mark: mark})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(fs.Release)
	mine := func(lp Loop) bool { return lp.Mark == mark }
	if found, err := l.Loops(t.Context(), mine); err != nil || len(found) != 2 {
		t.Fatalf("%+v %v", found, err)
	}
	dead.forget()               // an earlier version has made it
	started := NewLocal(Exec{}) // it has never asked
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Getattr })
	abandon(t, fs, func(ctx context.Context) error { _, err := started.loop(ctx, dead.Number, dead.Backing); return err })
	found, err := started.Loops(t.Context(), mine)
	if !errors.Is(err, fault.Unavailable) || !contains(err, dead.Path) || len(found) != 1 || found[0] != known {
		t.Fatalf("%+v %v", found, err)
	}
	fs.Release()
	until(t, "it answers", func() bool { return started.Abandoned() == 0 })
	if found, err = started.Loops(t.Context(), mine); err != nil || len(found) != 2 {
		t.Fatalf("%+v %v", found, err)
	}
}

func TestDetachingThatWasLeftBehindLeavesTheDeviceToItsNextUser(t *testing.T) {
	fs, l := hangfs.New(t, 1<<20), NewLocal(Exec{})
	spec := LoopSpec{File: fs.File, Size: 1 << 20, Mark: "quarry-test-late-detach"}
	lp, err := l.AttachLoop(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		fs.Release()
		until(t, "the call comes back", func() bool { return l.Abandoned() == 0 })
		if err := l.DetachLoop(context.Background(), lp); err != nil {
			t.Error(err)
		}
	})
	if f, err := os.OpenFile(lp.Path, os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.Write(make([]byte, 4096)); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Fsync })
	abandon(t, fs, func(ctx context.Context) error { return l.DetachLoop(ctx, lp) })
	fs.Release() // by now it may have been staged again
	until(t, "the call comes back", func() bool { return l.Abandoned() == 0 })
	if again, err := l.AttachLoop(t.Context(), spec); err != nil || again != lp {
		t.Fatalf("the device was taken from its next user: %+v %v, was %+v", again, err, lp)
	}
}

func TestMountingThatWasLeftBehindLeavesNoMount(t *testing.T) {
	fs, l, ctx := hangfs.New(t, 16<<20), NewLocal(Exec{}), context.Background()
	if _, err := (Exec{}).Run(ctx, Command{Name: "mkfs.ext4", Args: []string{"-q", "-F", fs.File}}); err != nil {
		t.Fatal(err)
	}
	lp, err := l.AttachLoop(ctx, LoopSpec{File: fs.File, Size: 16 << 20, Mark: "quarry-test-late-mount"})
	if err != nil {
		t.Fatal(err)
	}
	point := t.TempDir()
	t.Cleanup(func() {
		fs.Release()
		until(t, "the call comes back", func() bool { return l.Abandoned() == 0 })
		if err := errors.Join(l.UnmountAll(ctx, point), l.DetachLoop(ctx, lp)); err != nil {
			t.Error(err)
		}
	})
	mount := func(ctx context.Context) error { return l.MountFilesystem(ctx, lp.Path, point, Ext4, nil) }
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Read || op == hangfs.Write })
	abandon(t, fs, mount)
	if err := mount(ctx); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("a second one beside the first: %v", err)
	}
	fs.Release()
	until(t, "the call comes back", func() bool { return l.Abandoned() == 0 })
	if at, err := l.MountsAt(point); err != nil || len(at) != 0 {
		t.Fatalf("mounted without an owner: %+v %v", at, err)
	}
	if err := mount(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestBindingThatWasLeftBehindLeavesNoMount(t *testing.T) {
	fs, l := hangfs.New(t, 1<<20), NewLocal(Exec{})
	target := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(target, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.UnmountAll(context.Background(), target); err != nil {
			t.Error(err)
		}
	})
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Lookup })
	abandon(t, fs, func(ctx context.Context) error { return l.Bind(ctx, fs.File, target, 0) })
	fs.Release()
	until(t, "the call comes back", func() bool { return l.Abandoned() == 0 })
	if at, err := l.MountsAt(target); err != nil || len(at) != 0 {
		t.Fatalf("mounted without an owner: %+v %v", at, err)
	}
}

// The wait may also end between f's end and the hand-over.
func TestWhatNobodyTookIsKnownToItsMaker(t *testing.T) {
	var g Guard
	undone, release := make(chan struct{}), make(chan struct{})
	err := g.offer(t.Context(), "x", time.Millisecond, func(ctx context.Context, hand func(error) bool) {
		<-ctx.Done() // nobody waits any more
		<-release
		if hand(nil) {
			t.Error("somebody took it")
		}
		if g.Abandoned() != 1 {
			t.Error("it may be tried again before it is undone")
		}
		close(undone)
	})
	if !errors.Is(err, fault.Unavailable) {
		t.Fatal(err)
	}
	close(release)
	<-undone
	until(t, "it is forgotten", func() bool { return g.Abandoned() == 0 })
}

// frozen is an ext4 that is frozen and whose storage then stops taking writes.
func frozen(t *testing.T, mark string) (*hangfs.FS, *Local, *Freeze) {
	t.Helper()
	fs, l, ctx := hangfs.New(t, 16<<20), NewLocal(Exec{}), context.Background()
	if _, err := (Exec{}).Run(ctx, Command{Name: "mkfs.ext4", Args: []string{"-q", "-F", fs.File}}); err != nil {
		t.Fatal(err)
	}
	lp, err := l.AttachLoop(ctx, LoopSpec{File: fs.File, Size: 16 << 20, Mark: mark})
	if err != nil {
		t.Fatal(err)
	}
	point := t.TempDir()
	t.Cleanup(func() {
		fs.Release()
		until(t, "the calls come back", func() bool { return l.Abandoned() == 0 })
		var err error
		until(t, "it comes free", func() bool { err = l.UnmountAll(ctx, point); return !errors.Is(err, fault.InUse) })
		if err := errors.Join(err, l.DetachLoop(ctx, lp)); err != nil {
			t.Error(err)
		}
	})
	if err := l.MountFilesystem(ctx, lp.Path, point, Ext4, nil); err != nil {
		t.Fatal(err)
	}
	l.thawing = 50 * time.Millisecond
	f, err := l.Freeze(ctx, point, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Write || op == hangfs.Fsync })
	return fs, l, f
}

// within fails the test when f hangs.
func within(t *testing.T, what string, f func() error) error {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(20 * time.Second): // far beyond every limit here
		t.Fatal(what + " hangs")
		return nil
	}
}

func TestAThawThatHangsHoldsNobodyUp(t *testing.T) {
	fs, l, f := frozen(t, "quarry-test-late-thaw")
	if err := within(t, "thawing", f.Thaw); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("the storage does not answer: %v", err)
	}
	if fs.Held(t); l.Abandoned() == 0 {
		t.Fatal("what hangs is not counted")
	}
	if err := within(t, "thawing again", f.Thaw); !errors.Is(err, fault.Conflict) {
		t.Fatal(err)
	}
	fs.Release()
	if err := within(t, "writing", func() error { return os.WriteFile(filepath.Join(f.dir.Name(), "f"), nil, 0o600) }); err != nil {
		t.Fatal(err)
	}
	<-f.ended // the watchdog was sent home
}

func TestAThawInPlaceOfTheWatchdogHoldsNobodyUp(t *testing.T) {
	fs, _, f := frozen(t, "quarry-test-late-watchdog")
	if err := unix.Kill(-f.dog, unix.SIGKILL); err != nil { // it leads a session of its own
		t.Fatal(err)
	}
	fs.Held(t)
	if f.Holds() {
		t.Fatal("it holds without a watchdog")
	}
	if err := within(t, "thawing", f.Thaw); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("the storage does not answer: %v", err)
	}
	fs.Release()
	if err := within(t, "writing", func() error { return os.WriteFile(filepath.Join(f.dir.Name(), "f"), nil, 0o600) }); err != nil {
		t.Fatal(err)
	}
}
