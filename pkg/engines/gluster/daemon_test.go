package gluster_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/gluster"
	"github.com/quarry-csi/quarry/pkg/host"
	server "github.com/quarry-csi/quarry/test/gluster"
)

// daemons are the client processes whose mounts lie below a folder.
func daemons(t testing.TB, below string) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	ok(t, err)
	for _, file := range all {
		b, err := os.ReadFile(file)
		if args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"); err == nil && filepath.Base(args[0]) == "glusterfs" && strings.HasPrefix(args[len(args)-1], below+"/") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			ok(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

func noDaemons(t *testing.T, below string) {
	t.Helper()
	eventually(t, 20*time.Second, "without client processes", func() error {
		if left := daemons(t, below); len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
}

// TestClientsEndWithTheirMounts: closing a domain leaves no process, and neither does a tree that is detached.
func TestClientsEndWithTheirMounts(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	mounts := mountsFolder(t)
	e, err := gluster.Open(t.Context(), params(v, "k8s"), host.Exec{}, host.NewLocal(host.Exec{}), mounts)
	ok(t, err)
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: mib}))
	path := attach(t, e, "tree")
	a, err := e.AttachSlab(t.Context(), "tree", engine.AttachOptions{MountOptions: []string{"acl", "attribute-timeout=0"}})
	ok(t, err)
	if len(daemons(t, mounts)) != 3 || a.Path == path {
		t.Errorf("processes %v for the domain, a tree, and the same tree with options; paths %s and %s", daemons(t, mounts), path, a.Path)
	}
	ok(t, os.WriteFile(filepath.Join(path, "file"), []byte("same"), 0o644))
	if got, err := os.ReadFile(filepath.Join(a.Path, "file")); string(got) != "same" {
		t.Errorf("read %q (%v) by the other mount", got, err)
	}
	ok(t, e.DetachSlab(t.Context(), "tree"))
	eventually(t, 20*time.Second, "alone", func() error {
		if left := daemons(t, mounts); len(left) != 1 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
	ok(t, e.Close())
	noDaemons(t, mounts)
}

// TestAClientThatWasKilled is replaced by the next call, also that of a tree.
func TestAClientThatWasKilled(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	mounts := mountsFolder(t)
	e, err := gluster.Open(t.Context(), params(v, "k8s"), host.Exec{}, host.NewLocal(host.Exec{}), mounts)
	ok(t, err)
	ok(t, create(t, e, "t.before"))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: mib}))
	ok(t, os.WriteFile(filepath.Join(attach(t, e, "tree"), "file"), []byte("kept"), 0o644))
	for _, pid := range daemons(t, mounts) {
		ok(t, unix.Kill(pid, unix.SIGKILL))
	}
	ok(t, create(t, e, "t.after"))
	equal(t, "tags", tags(t, e), []string{"t.after", "t.before"})
	if got, err := os.ReadFile(filepath.Join(attach(t, e, "tree"), "file")); string(got) != "kept" {
		t.Errorf("read %q (%v)", got, err)
	}
	ok(t, e.Close())
	noDaemons(t, mounts)
}

const agent = "QUARRY_TEST_AGENT"

// TestClientsOutliveTheAgent: what a workload has mounted goes on when the agent is killed with all that is in its
// control group, as a container's runtime or systemd does it, and ends when the workload has.
func TestClientsOutliveTheAgent(t *testing.T) {
	if spec := os.Getenv(agent); spec != "" {
		beAgent(t, spec)
		return
	}
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	cgroup := newCgroup(t)
	mounts, staged := mountsFolder(t), mountsFolder(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestClientsOutliveTheAgent$", "-test.v")
	cmd.Env = append(os.Environ(), agent+"="+strings.Join([]string{v.Server.Address, mounts, staged, cgroup}, " "))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	ready := false
	lines := bufio.NewScanner(out)
	var said []string
	for !ready && lines.Scan() {
		ready = lines.Text() == "ready"
		said = append(said, lines.Text())
	}
	if cgroup != "" {
		ok(t, os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0))
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait()
	defer func() {
		if err := unix.Unmount(staged, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	}()
	if !ready {
		t.Fatalf("the agent said %q", said)
	}
	if len(daemons(t, mounts)) != 2 {
		t.Errorf("processes %v, want that of the domain and that of the tree", daemons(t, mounts))
	}
	if got, err := os.ReadFile(filepath.Join(staged, "file")); string(got) != "from the agent" {
		t.Errorf("the workload reads %q (%v)", got, err)
	}
	ok(t, os.WriteFile(filepath.Join(staged, "more"), []byte("after its death"), 0o644))

	// The next agent takes down what only the dead one had, and finds what the workload wrote.
	e, err := gluster.Open(t.Context(), params(v, "k8s"), host.Exec{}, host.NewLocal(host.Exec{}), mounts)
	ok(t, err)
	if got, err := os.ReadFile(filepath.Join(attach(t, e, "tree"), "more")); string(got) != "after its death" {
		t.Errorf("the next agent reads %q (%v)", got, err)
	}
	eventually(t, 20*time.Second, "three", func() error { // the domain's, the tree's, and the workload's
		if pids := daemons(t, mounts); len(pids) != 3 {
			return fmt.Errorf("processes %v", pids)
		}
		return nil
	})
	if got, err := os.ReadFile(filepath.Join(staged, "file")); string(got) != "from the agent" {
		t.Errorf("then the workload reads %q (%v)", got, err)
	}
	ok(t, unix.Unmount(staged, 0))
	ok(t, e.Close())
	noDaemons(t, mounts)
}

// beAgent opens a domain, binds a tree to where a workload has it, and waits to be killed.
func beAgent(t *testing.T, spec string) {
	f := strings.Split(spec, " ")
	address, mounts, staged, cgroup := f[0], f[1], f[2], f[3]
	if cgroup != "" {
		ok(t, os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte("0"), 0))
	}
	local := host.NewLocal(host.Exec{})
	e, err := gluster.Open(t.Context(), map[string]string{"servers": address, "volume": "vol", "folder": "k8s"}, host.Exec{}, local, mounts)
	ok(t, err)
	d, err := e.Describe(t.Context())
	ok(t, err)
	if notes := strings.Join(d.Notes, "\n"); strings.Contains(notes, "do not outlive") {
		t.Fatal(notes)
	}
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: mib}))
	path := attach(t, e, "tree")
	ok(t, os.WriteFile(filepath.Join(path, "file"), []byte("from the agent"), 0o644))
	ok(t, local.Bind(t.Context(), path, staged, 0))
	fmt.Println("\nready")
	select {}
}

// newCgroup makes a control group of version 2 for a process that is going to be killed with all in it; "" where there
// are none.
func newCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := host.NewLocal(host.Exec{}).Mounts()
	ok(t, err)
	for _, m := range mounts {
		if m.Type != "cgroup2" || m.Root != "/" {
			continue
		}
		dir := filepath.Join(m.Point, fmt.Sprintf("quarry-test-%d", os.Getpid()))
		ok(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() {
			eventually(t, 10*time.Second, "removed", func() error { return os.Remove(dir) })
			_ = os.Remove(filepath.Join(m.Point, "quarry-outliving")) // others may still be in it
		})
		return dir
	}
	t.Log("no control groups of version 2 here: only the agent's process group is killed")
	return ""
}

// TestNamesAreOnTheBricksDisks when a verb returns: bricks do nothing for fsync of a folder, so that of a file has to come
// after each change of a name.
func TestNamesAreOnTheBricksDisks(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed (hack/deps test)")
	}
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	e := opener(v, "k8s")(t)
	defer e.Close()
	ok(t, create(t, e, "t.first")) // makes the class
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "old", Kind: engine.Block, Size: mib}))
	for verb, do := range map[string]struct {
		run  func() error
		name string // that is made or removed
	}{
		"CreateTag": {func() error { return create(t, e, "t.traced") }, "t/t.traced"},
		"DeleteTag": {func() error { return e.DeleteTag(t.Context(), "t.first") }, "t/t.first"},
		"CreateSlab": {func() error {
			return e.CreateSlab(t.Context(), engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: mib})
		}, "slabs/tree"},
		"DeleteSlab": {func() error { return e.DeleteSlab(t.Context(), "old") }, "slabs/old"},
	} {
		t.Run(verb, func(t *testing.T) {
			trace := v.Trace(t, 1, "link,linkat,rename,renameat,renameat2,unlink,unlinkat,fsync")
			ok(t, do.run())
			named, synced := -1, -1
			calls := strings.Split(trace(), "\n")
			for i, call := range calls {
				done := strings.HasSuffix(call, "= 0")
				if strings.Contains(call, do.name+`"`) && (done || strings.HasSuffix(call, "<unfinished ...>")) {
					named = i
				}
				if done && (strings.Contains(call, "fsync(") || strings.Contains(call, "fsync resumed")) {
					synced = i
				}
			}
			if named < 0 || synced < named {
				t.Errorf("the brick's call %d changed the name %s, and its last fsync is call %d:\n%s", named, do.name, synced, strings.Join(calls, "\n"))
			}
		})
	}
}
