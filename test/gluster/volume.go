package gluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/host"
)

// BrickSize of a brick's file system in bytes; its file is sparse.
const BrickSize = 2 << 30

// Volume is a started volume of a Server.
type Volume struct {
	Name   string
	Server *Server
	bricks []string // folders
}

// VolumeSpec says what volume to make. Brick i lies on a file system of its own.
type VolumeSpec struct {
	Name string
	// Bricks, in groups of Replica copies each; the last of a group is only an arbiter with Arbiter.
	// 0: two bricks, two copies.
	Bricks, Replica int
	Arbiter         bool
	// Disperse: that many bricks may be away of one group that has parts of each file, and no copies.
	Disperse int
	// FS of the bricks: "xfs" (the default) or "ext4".
	FS string
	// Size of each brick's file system; 0: BrickSize.
	Size int64
	// Options of the volume, as "gluster volume set" takes them.
	Options map[string]string
}

// Volume makes and starts a volume.
func (s *Server) Volume(t testing.TB, spec VolumeSpec) *Volume {
	t.Helper()
	if spec.Bricks == 0 {
		spec.Bricks, spec.Replica = 2, 2
	}
	if spec.FS == "" {
		spec.FS = "xfs"
	}
	if spec.Size == 0 {
		spec.Size = BrickSize
	}
	v := &Volume{Name: spec.Name, Server: s}
	create := []string{"volume", "create", v.Name}
	switch {
	case spec.Disperse > 0:
		create = append(create, "disperse", strconv.Itoa(spec.Bricks), "redundancy", strconv.Itoa(spec.Disperse))
	case spec.Arbiter:
		create = append(create, "replica", strconv.Itoa(spec.Replica-1), "arbiter", "1")
	case spec.Replica > 1:
		create = append(create, "replica", strconv.Itoa(spec.Replica))
	}
	create = append(create, v.newBricks(t, spec.Bricks, spec.FS, spec.Size)...)
	s.CLI(t, append(create, "force")...) // all copies are on one server here
	for name, value := range spec.Options {
		s.CLI(t, "volume", "set", v.Name, name, value)
	}
	s.CLI(t, "volume", "start", v.Name)
	v.Online(t)
	return v
}

// Add adds bricks, which makes the volume a distributed one.
func (v *Volume) Add(t testing.TB, bricks int) {
	t.Helper()
	v.Server.CLI(t, append(append([]string{"volume", "add-brick", v.Name}, v.newBricks(t, bricks, "xfs", BrickSize)...), "force")...)
	v.Online(t)
}

// newBricks makes them ready, and returns how the server's commands name them.
func (v *Volume) newBricks(t testing.TB, n int, fs string, size int64) (names []string) {
	t.Helper()
	for range n {
		folder := filepath.Join(v.Server.dir, v.Name, strconv.Itoa(len(v.bricks)))
		v.Server.filesystem(t, folder, fs, size)
		v.bricks = append(v.bricks, filepath.Join(folder, "brick"))
		names = append(names, v.Server.Address+":"+v.bricks[len(v.bricks)-1])
	}
	return names
}

// filesystem makes one and mounts it where only the server sees it.
func (s *Server) filesystem(t testing.TB, folder, fs string, size int64) {
	t.Helper()
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	image := folder + ".img"
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	switch fs {
	case "xfs":
		run(t, "mkfs.xfs", "-q", "-f", image)
	case "ext4":
		run(t, "mkfs.ext4", "-q", "-F", "-m", "0", image)
	default:
		t.Fatalf("file system %q of a brick: xfs and ext4 are known", fs)
	}
	s.in(t, "mount", "-o", "loop", image, folder)
}

// pid of brick i; 0 when it does not run.
func (v *Volume) pid(t testing.TB, i int) int {
	t.Helper()
	out, err := v.Server.try(t.Context(), "pgrep", "-f", "--", "--brick-name "+v.bricks[i]+"( |$)")
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.Fields(out)[0])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (v *Volume) signal(t testing.TB, i int, signal string) {
	t.Helper()
	pid := v.pid(t, i)
	if pid == 0 {
		t.Fatalf("brick %d of volume %s does not run", i, v.Name)
	}
	v.Server.in(t, "kill", "-"+signal, strconv.Itoa(pid))
}

// Kill kills brick i, as a crash of its host would. It stays away until Restart.
func (v *Volume) Kill(t testing.TB, i int) {
	t.Helper()
	v.signal(t, i, "KILL")
	v.Server.until(t, 10*time.Second, "the brick is gone", func() bool { return v.pid(t, i) == 0 })
}

// Pause stops brick i where it is, Resume lets it go on.
func (v *Volume) Pause(t testing.TB, i int) { t.Helper(); v.signal(t, i, "STOP") }

// Resume undoes Pause.
func (v *Volume) Resume(t testing.TB, i int) { t.Helper(); v.signal(t, i, "CONT") }

// Restart starts all bricks that are not running.
func (v *Volume) Restart(t testing.TB) {
	t.Helper()
	v.Server.CLI(t, "volume", "start", v.Name, "force")
	v.Online(t)
}

// Online waits until every brick has told its port to the server's manager.
func (v *Volume) Online(t testing.TB) {
	t.Helper()
	v.Server.until(t, 30*time.Second, "every brick of "+v.Name+" is online", func() bool {
		out, err := v.Server.try(t.Context(), "gluster", "--mode=script", "--xml", "volume", "status", v.Name)
		return err == nil && strings.Count(out, "<status>1</status>") >= len(v.bricks) && !strings.Contains(out, "<status>0</status>")
	})
}

// Healed waits until no brick has anything left to heal.
func (v *Volume) Healed(t testing.TB) {
	t.Helper()
	v.Server.until(t, 2*time.Minute, "all of "+v.Name+" is healed", func() bool {
		_, _ = v.Server.try(t.Context(), "gluster", "--mode=script", "volume", "heal", v.Name) // refused while bricks are away
		out, err := v.Server.try(t.Context(), "gluster", "--mode=script", "volume", "heal", v.Name, "info")
		return err == nil && strings.Count(out, "Number of entries: 0") == len(v.bricks)
	})
}

// Brick is where brick i has its files; only processes in the server's namespaces see it.
func (v *Volume) Brick(i int) string { return v.bricks[i] }

// Run runs a program where the bricks are.
func (v *Volume) Run(t testing.TB, args ...string) string { t.Helper(); return v.Server.in(t, args...) }

// String names it.
func (v *Volume) String() string { return fmt.Sprintf("%s:/%s", v.Server.Address, v.Name) }

// Trace records system calls (strace's "-e trace=") of brick i, from now on until the returned function is called,
// which returns them, one a line.
func (v *Volume) Trace(t testing.TB, i int, calls string) (stop func() string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "trace")
	child, conn, err := host.StartChild(host.ChildConfig{Name: "nsenter", Args: []string{"-t", strconv.Itoa(v.Server.init), "-n", "-m", "-p", "--",
		"strace", "-f", "-e", "trace=" + calls, "-o", file, "-p", strconv.Itoa(v.pid(t, i))}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); child.Kill(0) })
	status := func() string {
		return v.Server.in(t, "sh", "-c", fmt.Sprintf("cat /proc/%d/task/*/status", v.pid(t, i)))
	}
	v.Server.until(t, 20*time.Second, "every thread of the brick is traced", func() bool { return !strings.Contains(status(), "TracerPid:\t0\n") })
	return func() string {
		t.Helper()
		_, _ = v.Server.try(t.Context(), "pkill", "-INT", "-x", "strace") // it lets the brick go, and writes out what it has
		if !child.Wait(10 * time.Second) {
			t.Fatal("strace does not end")
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
}
