// Package gluster starts real Gluster servers for tests: glusterd, bricks on file systems of their
// own and the self-heal daemon, in namespaces of their own (network, mounts, processes). So any
// number of them run beside each other and beside one that the machine has, and nothing of a
// server outlives its test, however that ends: the kernel takes the namespaces down with their
// first process, which dies with the test's.
package gluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/lab"
)

// Server is a running Gluster server with one address and no volume yet.
type Server struct {
	// Address of it, which this machine's network namespace reaches.
	Address string
	// Nowhere is an address of the same network that nobody has.
	Nowhere string

	init int    // the first process of its namespaces
	link string // this side of the cable
	dir  string
	said *strings.Builder
}

// Need skips the test where no Gluster server can run. In the kernel lab it never skips.
func Need(t testing.TB) {
	t.Helper()
	if why := missing(); why != "" {
		if lab.Inside() {
			t.Fatalf("the lab has no Gluster server: %s", why)
		}
		t.Skipf("needs a Gluster server: %s", why)
	}
}

func missing() string {
	if os.Geteuid() != 0 {
		return "it runs as root only"
	}
	for _, p := range []string{"glusterd", "gluster", "glusterfs", "ip", "nsenter", "unshare", "mkfs.xfs"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Sprintf("program %q is not installed (hack/deps lab)", p)
		}
	}
	return ""
}

// Start starts a server. It is gone when the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	Need(t)
	s := &Server{dir: t.TempDir(), said: &strings.Builder{}}
	// The shell reaps what its children leave behind, and ends when its connection is closed.
	child, conn, err := host.StartChild(host.ChildConfig{Name: "unshare", Args: []string{
		"--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", "read -r -u 3",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		if !child.Kill(10 * time.Second) {
			t.Errorf("the Gluster server %s hangs", s.Address)
		}
		s.loopsGone(t)
	})
	if s.init, err = onlyChild(t.Context(), child.PID()); err != nil {
		t.Fatalf("the namespaces of the server: %v: %s", err, child.Ended())
	}
	s.plug(t)
	// The namespace has copies of all mounts of this machine: those of other tests would be in use as long as it lives.
	s.in(t, "sh", "-c", `awk -v own="$1/" '$5 != "/" && $5 !~ "^/(proc|sys|dev)" && index(own, $5 "/") != 1 { print $5 }' /proc/self/mountinfo |
		tac | while read -r m; do umount -l "$(printf %b "$m")"; done`, "sh", s.dir)
	// What glusterd writes outside its configuration, and what it refuses to start without.
	s.in(t, "sh", "-ec", `mount -t tmpfs none /var/lib/glusterd
		mount -t tmpfs none /var/log/glusterfs; mkdir /var/log/glusterfs/bricks
		mount -t tmpfs none /run; mkdir /run/gluster`)
	s.withoutGeoReplication(t)
	s.in(t, "glusterd")
	s.until(t, 30*time.Second, "glusterd answers", func() bool {
		_, err := s.try(t.Context(), "gluster", "--mode=script", "peer", "status")
		return err == nil
	})
	return s
}

// withoutGeoReplication puts a program that only says its name in the place of the one that glusterd starts many times
// when it begins: that is written in Python, and takes minutes on an emulated processor.
func (s *Server) withoutGeoReplication(t testing.TB) {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/glusterfs/gsyncd")
	if err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(s.dir, "gsyncd")
	if err := os.WriteFile(short, []byte("#!/bin/sh\necho gsyncd\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range found {
		s.in(t, "mount", "--bind", short, program)
	}
}

// plug connects the server's network with this machine's: a cable of two interfaces, the server's
// address behind it. The number that is free is taken; other test processes take theirs.
func (s *Server) plug(t testing.TB) {
	t.Helper()
	const first, many = 16, 200
	var last error
	for n := first; n < first+many; n++ {
		s.link = fmt.Sprintf("quarry-gl%d", n)
		if _, last = here(t.Context(), "ip", "link", "add", s.link, "type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(s.init)); last == nil {
			// The kernel takes down the network of a namespace some time after that has gone: the cable goes first.
			t.Cleanup(func() {
				if _, err := here(context.WithoutCancel(t.Context()), "ip", "link", "delete", s.link); err != nil {
					t.Errorf("the cable %s: %v", s.link, err)
				}
			})
			s.Address, s.Nowhere = fmt.Sprintf("198.18.%d.2", n), fmt.Sprintf("198.18.%d.9", n)
			run(t, "ip", "addr", "add", fmt.Sprintf("198.18.%d.1/24", n), "dev", s.link)
			run(t, "ip", "link", "set", s.link, "up")
			s.in(t, "ip", "link", "set", "lo", "up")
			s.in(t, "ip", "addr", "add", s.Address+"/24", "dev", "eth0")
			s.in(t, "ip", "link", "set", "eth0", "up")
			return
		}
		if !strings.Contains(last.Error(), "exists") {
			break
		}
	}
	t.Fatalf("an interface for the server: %v", last)
}

// Unplug cuts the network between the server and this machine, Plug restores it.
func (s *Server) Unplug(t testing.TB) { t.Helper(); run(t, "ip", "link", "set", s.link, "down") }

// Plug undoes Unplug.
func (s *Server) Plug(t testing.TB) { t.Helper(); run(t, "ip", "link", "set", s.link, "up") }

// CLI runs the server's gluster program and returns what it says.
func (s *Server) CLI(t testing.TB, args ...string) string {
	t.Helper()
	return s.in(t, append([]string{"gluster", "--mode=script"}, args...)...)
}

// StopManager kills glusterd, StartManager starts it again: without it bricks go on serving, but nobody can mount.
func (s *Server) StopManager(t testing.TB) {
	t.Helper()
	s.in(t, "pkill", "-KILL", "-x", "glusterd")
}

// StartManager undoes StopManager.
func (s *Server) StartManager(t testing.TB) {
	t.Helper()
	s.withoutGeoReplication(t)
	s.in(t, "glusterd")
	s.until(t, 30*time.Second, "glusterd answers", func() bool {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(s.Address, "24007"), time.Second)
		if err == nil {
			_ = conn.Close() // nothing was sent
		}
		return err == nil
	})
}

// Pause stops every process of the server where it is, Resume lets them go on.
func (s *Server) Pause(t testing.TB) {
	t.Helper()
	s.in(t, "pkill", "-STOP", "gluster")
}

// Resume undoes Pause.
func (s *Server) Resume(t testing.TB) {
	t.Helper()
	s.in(t, "pkill", "-CONT", "gluster")
}

// in runs a program in the server's namespaces; the test ends if it fails.
func (s *Server) in(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.try(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *Server) try(ctx context.Context, args ...string) (string, error) {
	return here(ctx, append([]string{"nsenter", "-t", strconv.Itoa(s.init), "-n", "-m", "-p", "--"}, args...)...)
}

// until waits for something that the server does by itself.
func (s *Server) until(t testing.TB, limit time.Duration, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	end := time.Now().Add(limit)
	for !is() {
		if time.Now().After(end) {
			log, _ := s.try(context.WithoutCancel(t.Context()), "sh", "-c", "tail -n 20 /var/log/glusterfs/glusterd.log /var/log/glusterfs/bricks/*")
			t.Fatalf("waited %s until %s, and it is not so. What the server logged:\n%s", limit, what, log)
		}
		<-tick.C
	}
}

// loopsGone waits until the kernel has freed the loop devices of the bricks.
func (s *Server) loopsGone(t testing.TB) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond) // nobody is told when a device comes free
	defer tick.Stop()
	var left []string
	for range 100 {
		left = nil
		files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), s.dir+"/") {
				left = append(left, strings.TrimSpace(string(b)))
			}
		}
		if left == nil {
			return
		}
		<-tick.C
	}
	t.Errorf("the server is gone, and loop devices of its bricks are not: %q", left)
}

// onlyChild waits for the one child of a process.
func onlyChild(ctx context.Context, pid int) (int, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			return 0, err
		}
		if f := strings.Fields(string(b)); len(f) == 1 {
			child, err := strconv.Atoi(f[0])
			if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", child)); err == nil && strings.TrimSpace(string(name)) == "bash" {
				return child, nil // its namespaces are complete
			}
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-tick.C:
		}
	}
	return 0, fmt.Errorf("process %d has not started its child", pid)
}

func run(t testing.TB, args ...string) {
	t.Helper()
	if _, err := here(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

func here(ctx context.Context, args ...string) (string, error) {
	res, err := (host.Exec{}).Run(ctx, host.Command{Name: args[0], Args: args[1:]})
	if err != nil {
		return "", fmt.Errorf("%w\n%s%s", err, res.Stdout, res.Stderr)
	}
	return string(res.Stdout), nil
}
