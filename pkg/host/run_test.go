package host

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/hangfs"
)

// A program that sleeps in the kernel survives its killing, and may still write
// when the next one of its kind is started.
func TestAProgramThatCannotBeKilledIsNotStartedBesideItself(t *testing.T) {
	fs, dir := hangfs.New(t, 1<<20), t.TempDir()
	started := filepath.Join(dir, "started")
	// It stands for any program that works on storage.
	script := "#!/bin/sh\necho x >> " + started + "\nexec cat " + fs.File + "\n"
	if err := os.WriteFile(filepath.Join(dir, "xfs_growfs"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	l := NewLocal(Exec{})
	grow := func(ctx context.Context) error {
		return within(t, "growing", func() error { return l.GrowFilesystem(ctx, XFS, "/dev/x", "/mnt") })
	}
	starts := func() int {
		b, err := os.ReadFile(started)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), "x")
	}

	ctx, cancel := context.WithCancel(t.Context())
	fs.Hang(func(op hangfs.Op) bool { return op == hangfs.Open })
	running := make(chan error, 1)
	go func() { running <- l.GrowFilesystem(ctx, XFS, "/dev/x", "/mnt") }()
	fs.Held(t)
	if err := grow(t.Context()); !errors.Is(err, fault.Pending) || starts() != 1 {
		t.Fatalf("beside one that runs: %v, %d started", err, starts())
	}
	cancel()
	err := within(t, "what was killed", func() error { return <-running })
	var hang *HangError
	if !errors.Is(err, fault.Canceled) || !errors.As(err, &hang) || l.Abandoned() != 1 {
		t.Fatalf("%v, %d abandoned", err, l.Abandoned())
	}
	if err := grow(t.Context()); !errors.Is(err, fault.Pending) || !contains(err, "still hangs") || starts() != 1 {
		t.Fatalf("beside one that hangs: %v, %d started", err, starts())
	}
	fs.Release()
	<-hang.Ended
	until(t, "it is forgotten", func() bool { return l.Abandoned() == 0 })
	if err := grow(t.Context()); err != nil || starts() != 2 {
		t.Fatalf("afterwards: %v, %d started", err, starts())
	}
}

// slowTool is a command that begins, says something where it is told to, and writes a file of that name at its end.
func slowTool(dir string) Command {
	const script = `echo $$ >"$1/pid"; mv "$1/pid" "$1/begun"; while [ ! -e "$1/go" ]; do sleep 0.01; done; echo said; echo said >&2; : >"$1/done"`
	return finishing("sh", "-c", script, "sh", dir)
}

func TestAToolThatIsToFinishOutlastsItsCaller(t *testing.T) {
	dir, l := t.TempDir(), NewLocal(Exec{})
	in := func(name string) string { return filepath.Join(dir, name) }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { _, err := l.tool(ctx, "/dev/x", slowTool(dir)); ended <- err }()
	until(t, "it begins", func() bool { return exists(in("begun")) })
	cancel()
	err := within(t, "who waits no longer", func() error { return <-ended })
	if !errors.Is(err, fault.Canceled) || !contains(err, "it goes on") {
		t.Fatal(err)
	}
	if _, err := l.tool(t.Context(), "/dev/x", slowTool(dir)); !errors.Is(err, fault.Pending) || !contains(err, "still runs") || l.Abandoned() != 0 {
		t.Fatalf("beside it: %v, %d abandoned", err, l.Abandoned())
	}
	if err := os.WriteFile(in("go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "it finishes", func() bool { return exists(in("done")) })
	var res Result
	until(t, "it is forgotten", func() bool {
		res, err = l.tool(t.Context(), "/dev/x", slowTool(dir))
		return !errors.Is(err, fault.Pending)
	})
	if err != nil || string(res.Stdout) != "said\n" || string(res.Stderr) != "said\n" {
		t.Fatalf("one that is waited for: %+v %v", res, err)
	}
}

// A check of a filesystem that is cut short can leave one that nobody finds any more.
func TestAToolThatIsToFinishOutlastsItsProcess(t *testing.T) {
	const where = "QUARRY_TEST_TOOL"
	if dir, group, ok := strings.Cut(os.Getenv(where), " "); ok {
		if group != "" {
			if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0); err != nil {
				t.Fatal(err)
			}
		}
		_, err := NewLocal(Exec{}).tool(t.Context(), "/dev/x", slowTool(dir))
		t.Fatalf("it was to be killed: %v", err)
	}
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	group := testGroup(t)
	c.Env = append(os.Environ(), where+"="+dir+" "+group)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "it begins", func() bool { return exists(in("begun")) })
	if group != "" { // a container's runtime ends all that is in its group
		pid, err := os.ReadFile(in("begun"))
		if err != nil {
			t.Fatal(err)
		}
		until(t, "it leaves the group", func() bool {
			b, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/cgroup")
			return err == nil && strings.Contains(string(b), outliving)
		})
		if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	_ = c.Wait()
	if err := os.WriteFile(in("go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "it finishes", func() bool { return exists(in("done")) })
}

// testGroup makes a control group for what is going to be killed with all in it; "" where a process cannot leave one.
func testGroup(t *testing.T) string {
	t.Helper()
	pid, err1 := namespaceOf("pid")
	cgroup, err2 := namespaceOf("cgroup")
	mounts, err3 := NewLocal(Exec{}).Mounts()
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.Type != "cgroup2" || m.Root != "/" || pid != firstPIDNamespace || cgroup != firstCgroupNamespace {
			continue
		}
		dir := filepath.Join(m.Point, "quarry-test-"+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			until(t, "the group can be removed", func() bool { return os.Remove(dir) == nil })
			_ = os.Remove(filepath.Join(m.Point, outliving)) // others may still be in it
		})
		return dir
	}
	t.Log("no control groups to leave here: only the process is killed")
	return ""
}

// Whoever comes after a killed agent may find a check of a large filesystem still at work.
func TestADeviceOnWhichAToolFinishesIsNotFree(t *testing.T) {
	l, file, mark := slab(t, 1<<20)
	lp, err := l.AttachLoop(t.Context(), LoopSpec{File: file, Size: 1 << 20, Mark: mark})
	if err != nil {
		t.Fatal(err)
	}
	claim, err := os.OpenFile(lp.Path, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer claim.Close()
	if err := within(t, "claiming", func() error { return l.Unclaimed(t.Context(), lp.Path) }); !errors.Is(err, fault.InUse) {
		t.Errorf("claimed by another program: %v", err)
	}
	c := exec.Command("sh", "-c", "sleep 60; :", "e2fsck", "-a", lp.Path)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	if err := within(t, "claiming", func() error { return l.Unclaimed(t.Context(), lp.Path) }); !errors.Is(err, fault.Pending) || !contains(err, "e2fsck -a "+lp.Path) {
		t.Errorf("claimed by a check: %v", err)
	}
}
