package node

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// thawed waits until a write into a frozen filesystem comes through.
func thawed(t *testing.T, dir string) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(dir, "w"), []byte("w"), 0o600) }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute): // far beyond every limit here
		_, _ = host.NewLocal(host.Exec{}).ThawLeft(bg, dir)
		t.Fatal("the filesystem stayed frozen")
	}
}

// isFrozen asks the kernel: a filesystem that is frozen refuses to be frozen again.
func isFrozen(t *testing.T, dir string) bool {
	t.Helper()
	f, err := host.NewLocal(host.Exec{}).Freeze(bg, dir, time.Minute)
	if errors.Is(err, fault.InUse) {
		return true
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	return false
}

func TestFreezeHoldsUntilThaw(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		h := w.volume("v", testSize)
		if f, err := w.node.Freeze(bg, h, time.Minute); err != nil || f != image.NotStaged {
			t.Fatalf("%v %v", f, err)
		}
		w.stage(h, fs)
		for range 2 {
			for range 2 { // idempotent
				if f, err := w.node.Freeze(bg, h, time.Minute); err != nil || f != image.IsFrozen {
					t.Fatalf("%v %v", f, err)
				}
			}
			if !isFrozen(t, w.staging(h)) {
				t.Fatal("it is not frozen")
			}
			c, err := w.node.Health(bg, h)
			w.ok(err)
			wantCondition(t, c, Degraded, "Frozen")
			w.ok(w.node.Thaw(bg, h))
			thawed(t, w.staging(h))
			w.fails(w.node.Thaw(bg, h), fault.Conflict)
		}
		if f, err := w.node.Freeze(bg, h, time.Minute); err != nil || f != image.IsFrozen {
			t.Fatalf("%v %v", f, err)
		}
		w.unstage(h) // ends the freeze first
		w.fails(w.node.Thaw(bg, h), fault.Conflict)
	})
}

func TestThawSaysThatTheWatchdogHadToAct(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	_, err := w.node.Freeze(bg, h, 2*time.Second) // what a busy machine needs to freeze it
	w.ok(err)
	thawed(t, w.staging(h))
	w.fails(w.node.Thaw(bg, h), fault.Conflict, "did not hold")
	if f, err := w.node.Freeze(bg, h, time.Minute); err != nil || f != image.IsFrozen {
		t.Fatalf("%v %v", f, err)
	}
	// Somebody else's hand.
	if was, err := w.node.host.ThawLeft(bg, w.staging(h)); err != nil || !was {
		t.Fatalf("%v %v", was, err)
	}
	w.fails(w.node.Thaw(bg, h), fault.Conflict, "did not hold")
}

// freezer starts another process that freezes dir and does not come to thaw it.
func freezer(t *testing.T, dir string, limit time.Duration) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), freezePoint+"="+dir, freezeLimit+"="+limit.String())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "frozen\n" {
		t.Fatalf("the other process said %q: %v", line, err)
	}
	return cmd
}

func TestFreezeDoesNotOutliveItsAgent(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	agent := freezer(t, w.staging(h), time.Hour)
	if !isFrozen(t, w.staging(h)) {
		t.Fatal("it is not frozen")
	}
	w.ok(agent.Process.Signal(syscall.SIGKILL))
	thawed(t, w.staging(h))
	// The watchdog thaws first and ends then; until it has, the mount is in use.
	for deadline := time.Now().Add(time.Minute); ; {
		err := w.node.Unstage(bg, h, w.staging(h))
		if err == nil {
			break
		}
		if !errors.Is(err, fault.InUse) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestStartingAgentThawsWhatItFinds(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	w.begin() // nothing to do
	d, err := os.Open(w.staging(h))
	w.ok(err)
	const fifreeze = 0xc0045877
	w.ok(unix.IoctlSetInt(int(d.Fd()), fifreeze, 0)) // nobody watches over it
	w.ok(d.Close())
	w.restart()
	w.begin()
	thawed(t, w.staging(h))
}

// TestASwitchIsPreparedHeldAndReleased: until then nobody else works on the image; released twice,
// or too late, the moment does not count.
func TestASwitchIsPreparedHeldAndReleased(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	st, err := w.Stage(bg, h, "n1", 0)
	w.ok(err)
	images := []image.Staging{st}
	prepared, err := w.node.Prepare(bg, images)
	w.ok(err)
	if _, err := w.node.Prepare(bg, images); !errors.Is(err, fault.Pending) {
		t.Fatalf("prepared twice: %v", err)
	}
	w.ok(w.node.Hold(bg, images, prepared))
	w.fails(w.node.Hold(bg, images, prepared), fault.Conflict) // once
	w.ok(w.node.Release(bg, prepared))
	w.fails(w.node.Release(bg, prepared), fault.Conflict, "10s")
	w.ok(w.node.Switch(bg, images, prepared)) // what is over costs nothing, and the image is not locked any more

	prepared, err = w.node.Prepare(bg, images)
	w.ok(err)
	w.ok(w.node.Release(bg, prepared)) // given up
	prepared, err = w.node.Prepare(bg, images)
	w.ok(err)
	w.ok(w.node.Switch(bg, images, prepared))
	w.fails(w.node.Hold(bg, images, prepared), fault.Conflict)

	w.node.holdLimit = 10 * time.Millisecond
	prepared, err = w.node.Prepare(bg, images)
	w.ok(err)
	w.ok(w.node.Hold(bg, images, prepared))
	for errors.Is(w.node.Switch(bg, images, ""), fault.Pending) {
		time.Sleep(time.Millisecond)
	}
	w.fails(w.node.Release(bg, prepared), fault.Conflict)
}
