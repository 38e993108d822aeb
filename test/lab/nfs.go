package lab

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// NFS is the NFS server of the lab's kernel. There is one in a machine; tests of it do not run in parallel.
type NFS struct {
	root  string // exported with fsid=0: where NFS 4 clients begin
	shell *shell
}

// nfsGrace is how long a restarted server lets nobody have new state, in seconds; it is the least that the kernel takes.
const nfsGrace = 10

// StartNFS starts the server for the versions 3, 4.1 and 4.2, unless it runs, with all that a distribution starts
// around it. It skips outside the lab.
func StartNFS(t testing.TB) *NFS {
	t.Helper()
	Need(t)
	sh, err := newShell()
	if err != nil {
		t.Fatal(err)
	}
	n := &NFS{root: filepath.Join(os.TempDir(), "nfs"), shell: sh}
	if _, err := os.Stat("/proc/fs/nfsd/threads"); err != nil {
		n.program(t, "modprobe", "nfsd")
		for _, dir := range []string{n.root, "/run/rpcbind", "/var/lib/nfs/rpc_pipefs", "/var/lib/nfs/v4recovery", "/var/lib/nfs/nfsdcld", "/var/lib/nfs/sm", "/var/lib/nfs/sm.bak"} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		n.program(t, "mount", "-t", "rpc_pipefs", "sunrpc", "/var/lib/nfs/rpc_pipefs")
		n.program(t, "mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
		n.program(t, "rpcbind", "-w")
		n.program(t, "rpc.statd", "--no-notify")
		n.program(t, "nfsdcld")
		n.program(t, "rpc.mountd")
		n.share(t, n.root, "ro", "fsid=0")
	}
	n.Start(t)
	return n
}

// Start starts what Stop has stopped.
func (n *NFS) Start(t testing.TB) {
	t.Helper()
	n.Versions(t)
}

// Versions starts the server without some versions ("3", "4.2"), which it has again after a Stop and a Start.
func (n *NFS) Versions(t testing.TB, without ...string) {
	t.Helper()
	args := []string{"--grace-time", strconv.Itoa(nfsGrace), "--lease-time", strconv.Itoa(nfsGrace), "-N", "4.0"}
	for _, v := range []string{"3", "4.1", "4.2"} {
		if !slices.Contains(without, v) {
			args = append(args, "-V", v)
		}
	}
	for _, v := range without {
		args = append(args, "-N", v)
	}
	n.program(t, "rpc.nfsd", append(args, "8")...)
}

// Stop ends the server's threads: connections are refused, and its clients' state is forgotten.
func (n *NFS) Stop(t testing.TB) {
	t.Helper()
	n.program(t, "rpc.nfsd", "0")
}

// Cut drops what clients send to the server, without a word, until mend or the test's end.
func (n *NFS) Cut(t testing.TB) (mend func()) {
	t.Helper()
	rule := []string{"INPUT", "-p", "tcp", "--dport", "2049", "-j", "DROP"}
	n.program(t, "iptables", append([]string{"-w", "-I"}, rule...)...)
	mended := false
	mend = func() {
		if !mended {
			mended = true
			n.program(t, "iptables", append([]string{"-w", "-D"}, rule...)...)
		}
	}
	t.Cleanup(mend)
	return mend
}

// Exported is a file system that the server exports.
type Exported struct {
	// Dir is where it is mounted on the server, and its name for NFS 3; V4 is its name for NFS 4.
	Dir, V4 string
	device  string
}

// Export makes a file system on a disk, with a mkfs.<kind>, mounts it at the server and exports it until the test ends. Options
// come after rw, no_root_squash and sync, and the last of a kind counts.
func (n *NFS) Export(t testing.TB, kind string, options ...string) Exported {
	t.Helper()
	x := Exported{device: Disk(t)}
	name := filepath.Base(x.device) + "-" + kind
	x.Dir, x.V4 = filepath.Join(n.root, name), "/"+name
	mkfs := []string{"-q", x.device}
	if kind == "xfs" {
		mkfs = append([]string{"-f", "-m", "reflink=1"}, mkfs...)
	}
	n.program(t, "mkfs."+kind, mkfs...)
	if err := os.MkdirAll(x.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.program(t, "mount", x.device, x.Dir)
	t.Cleanup(func() { n.takeDown(t, x) })
	n.share(t, x.Dir, options...)
	return x
}

// Options exports it anew with other options.
func (n *NFS) Options(t testing.TB, x Exported, options ...string) {
	t.Helper()
	n.share(t, x.Dir, options...)
	n.program(t, "exportfs", "-f") // what the kernel remembers of it
}

// Withdraw ends the export. The file system stays mounted.
func (n *NFS) Withdraw(t testing.TB, x Exported) {
	t.Helper()
	n.program(t, "exportfs", "-u", "*:"+x.Dir)
	n.program(t, "exportfs", "-f")
}

func (n *NFS) share(t testing.TB, dir string, options ...string) {
	t.Helper()
	all := append([]string{"rw", "no_root_squash", "no_all_squash", "sync", "no_subtree_check"}, options...)
	n.program(t, "exportfs", "-i", "-o", strings.Join(all, ","), "*:"+dir)
}

// takeDown unmounts an export's file system. The server is stopped for that: it caches open files for some seconds, and
// remembers for two minutes of what it has asked in vain whether it is exported.
func (n *NFS) takeDown(t testing.TB, x Exported) {
	n.Stop(t)
	defer n.Start(t)
	status, said, err := n.shell.run("exportfs", "-u", "*:"+x.Dir)
	if err != nil || status != 0 && !strings.Contains(said, "Could not find") {
		t.Errorf("exportfs -u: status %d, %v: %s", status, err, said)
	}
	for range 100 {
		if err = unix.Unmount(x.Dir, 0); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("unmount %s at the server: %v; what it holds:\n%s", x.Dir, err, n.holds())
	}
}

// holds says what the server has open, and for whom.
func (n *NFS) holds() string {
	var b strings.Builder
	files, _ := filepath.Glob("/proc/fs/nfsd/clients/*/*")
	for _, f := range append(files, "/proc/fs/nfsd/filecache", "/proc/net/rpc/nfsd.export/content", "/proc/net/rpc/nfsd.fh/content", "/proc/locks", "/proc/self/mounts") {
		content, _ := os.ReadFile(f)
		fmt.Fprintf(&b, "%s:\n%s\n", f, content)
	}
	return b.String()
}

// shell runs programs for a test. It is started before anything of the server is mounted: a process that has a file of a
// dead server open for writing, with dirty pages, starts no program any more, since the program's first act is to close
// that file. So a test could not start the server again.
type shell struct {
	mu  sync.Mutex
	in  io.Writer
	out *bufio.Reader
}

func newShell() (*shell, error) {
	cmd := exec.Command("/bin/bash")
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	return &shell{in: in, out: bufio.NewReader(out)}, cmd.Start() // it ends with this process, whose end of the pipe it reads
}

// run runs a program and returns its status and what it said. A daemon that it leaves behind has none of the pipes.
func (s *shell) run(name string, args ...string) (status int, said string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := "said=$(mktemp)\n"
	for _, word := range append([]string{name}, args...) {
		line += "'" + strings.ReplaceAll(word, "'", `'\''`) + "' "
	}
	line += `</dev/null >"$said" 2>&1; echo $? "$(base64 -w0 <"$said")"; rm -f "$said"` + "\n"
	if _, err := io.WriteString(s.in, line); err != nil {
		return 0, "", err
	}
	reply, err := s.out.ReadString('\n')
	if err != nil {
		return 0, "", err
	}
	number, text, _ := strings.Cut(strings.TrimSpace(reply), " ")
	out, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return 0, "", err
	}
	status, err = strconv.Atoi(number)
	return status, string(out), err
}

// program runs a program and fails the test with what it said if it fails.
func (n *NFS) program(t testing.TB, name string, args ...string) {
	t.Helper()
	status, said, err := n.shell.run(name, args...)
	if err != nil || status != 0 {
		t.Fatalf("%s %s: status %d, %v\n%s", name, strings.Join(args, " "), status, err, said)
	}
}
