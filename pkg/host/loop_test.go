package host

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const attachFile, attachMark = "QUARRY_TEST_ATTACH", "QUARRY_TEST_MARK"

// TestMain makes this test binary a process that attaches a loop device, or a Child.
func TestMain(m *testing.M) {
	if os.Getenv(beChild) != "" {
		child()
	}
	if file := os.Getenv(attachFile); file != "" {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // all start together
		lp, err := NewLocal(Exec{}).AttachLoop(context.Background(), LoopSpec{File: file, Size: 1 << 20, Mark: os.Getenv(attachMark)})
		if err != nil {
			println(err.Error())
			os.Exit(1)
		}
		os.Stdout.WriteString(lp.Path)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// slab makes a file and a mark of its own.
func slab(t *testing.T, size int64) (l *Local, file, mark string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root for loop devices")
	}
	l, file = NewLocal(Exec{}), filepath.Join(t.TempDir(), "slab")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	mark = filepath.Base(filepath.Dir(filepath.Dir(file)))
	mark = mark[max(0, len(mark)-MaxMark):]
	t.Cleanup(func() {
		for _, lp := range attached(t, l, mark) {
			if err := l.DetachLoop(context.Background(), lp); err != nil {
				t.Error(err)
			}
		}
	})
	return l, file, mark
}

func attached(t *testing.T, l *Local, mark string) []Loop {
	t.Helper()
	found, err := l.Loops(context.Background(), func(lp Loop) bool { return lp.Mark == mark })
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestProcessesThatAttachTogetherShareOneDevice(t *testing.T) {
	l, file, mark := slab(t, 1<<20)
	var procs []*exec.Cmd
	var outs []*os.File
	for range 6 {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), attachFile+"="+file, attachMark+"="+mark)
		c.Stderr = os.Stderr
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		c.Stdout = out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		procs, outs = append(procs, c), append(outs, out)
		defer func() { _, _ = in.Write(nil) }()
		t.Cleanup(func() { _ = c.Process.Kill() })
		go func() { _, _ = in.Write([]byte("\n")) }()
	}
	seen := map[string]bool{}
	for i, c := range procs {
		if err := c.Wait(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(outs[i].Name())
		if err != nil {
			t.Fatal(err)
		}
		seen[string(b)] = true
	}
	if found := attached(t, l, mark); len(seen) != 1 || len(found) != 1 || !seen[found[0].Path] {
		t.Fatalf("devices %v, the kernel has %+v", seen, found)
	}
}

func TestLoopDeviceFollowsTheRecord(t *testing.T) {
	l, file, mark := slab(t, 4<<20)
	ctx := context.Background()
	if _, err := l.AttachLoop(ctx, LoopSpec{File: file, Size: 5 << 20, Mark: mark}); !errors.Is(err, fault.Corrupt) || !contains(err, "4194304") || !contains(err, "5242880") {
		t.Fatalf("a truncated file: %v", err)
	}
	lp, err := l.AttachLoop(ctx, LoopSpec{File: file, Size: 1 << 20, Mark: mark})
	if err != nil || lp.Size != 1<<20 || lp.ReadOnly {
		t.Fatalf("%+v %v", lp, err)
	}
	t.Logf("direct I/O on %s: %v", filepath.Dir(file), lp.DirectIO)
	for _, size := range []int64{2 << 20, 4 << 20} {
		if lp, err = l.GrowLoop(ctx, lp, size); err != nil || lp.Size != size {
			t.Fatalf("%+v %v", lp, err)
		}
	}
	if _, err := l.GrowLoop(ctx, lp, 8<<20); !errors.Is(err, fault.Corrupt) {
		t.Fatalf("grown beyond the file: %v", err)
	}
	if _, err := l.AttachLoop(ctx, LoopSpec{File: file, Size: 1 << 20, Mark: mark + "x"[:min(1, MaxMark-len(mark))]}); !errors.Is(err, fault.InUse) {
		t.Fatalf("a second owner: %v", err)
	}
	ro, err := l.AttachLoop(ctx, LoopSpec{File: file, Size: 4 << 20, Mark: mark, ReadOnly: true})
	if err != nil || !ro.ReadOnly || ro.Size != 4<<20 {
		t.Fatalf("read-only after writable: %+v %v", ro, err)
	}
	if err := l.DetachLoop(ctx, ro); err != nil {
		t.Fatal(err)
	}
	if err := l.DetachLoop(ctx, ro); err != nil {
		t.Fatalf("again: %v", err)
	}
	if found := attached(t, l, mark); len(found) != 0 {
		t.Fatalf("left: %+v", found)
	}
}

func TestDeviceOnItsWayOutIsKept(t *testing.T) {
	l, file, mark := slab(t, 1<<20)
	ctx := context.Background()
	spec := LoopSpec{File: file, Size: 1 << 20, Mark: mark}
	lp, err := l.AttachLoop(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	user, err := os.Open(lp.Path)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := os.Open(lp.Path) // another one, which detaches it and ends
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.IoctlSetInt(int(agent.Fd()), unix.LOOP_CLR_FD, 0), agent.Close()); err != nil {
		t.Fatal(err)
	}
	again, err := l.AttachLoop(ctx, spec)
	if err != nil || again.Path != lp.Path {
		t.Fatalf("%+v %v", again, err)
	}
	if err := user.Close(); err != nil {
		t.Fatal(err)
	}
	if found := attached(t, l, mark); len(found) != 1 {
		t.Fatalf("it went with its last user: %+v", found)
	}
}

// A container's /dev may lack the node that an earlier container made: the
// device is there all the same, and must neither be overlooked nor said to be gone.
func TestADeviceWhoseNodeIsMissingIsFound(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root for loop devices")
	}
	l, ctx := NewLocal(Exec{}), context.Background()
	file := filepath.Join(t.TempDir(), "slab")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 1<<20)); err != nil {
		t.Fatal(err)
	}
	const mark = "quarry-test-node-is-missing"
	lp, err := l.AttachLoop(ctx, LoopSpec{File: file, Size: 1 << 20, Mark: mark})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = loopNode(lp.Number)
		_ = l.DetachLoop(ctx, lp)
	})
	mine := func(lp Loop) bool { return lp.Mark == mark }
	if err := os.Remove(lp.Path); err != nil {
		t.Fatal(err)
	}
	l = NewLocal(Exec{})
	found, err := l.Loops(ctx, mine)
	if err != nil || len(found) != 1 {
		t.Fatalf("found %v, %v", found, err)
	}
	if err := os.Remove(lp.Path); err != nil {
		t.Fatal(err)
	}
	if err := l.DetachLoop(ctx, found[0]); err != nil {
		t.Fatal(err)
	}
	if found, err = l.Loops(ctx, mine); err != nil || len(found) != 0 {
		t.Fatalf("after detaching: %v, %v", found, err)
	}
}
