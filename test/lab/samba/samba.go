// Package samba runs a Samba server for tests: a configuration, passwords and files of its own
// in the test's folder, on a port of its own at the loopback address. Nothing else on the machine
// is touched, so it also runs outside the kernel lab; the kernel's SMB client is only in there.
package samba

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// User is who may use the shares: a system user of Debian without a use here, so that nothing is
// done as root that a user of a storage box could not do.
const User = "backup"

// Password has what makes trouble where somebody forgets to escape it.
const Password = `pass,word=",,'x y` + "\u00e4"

// YAMLPassword is Password as it stands between single quotes in YAML.
func YAMLPassword() string { return strings.ReplaceAll(Password, "'", "''") }

// Share is a folder that is shared.
type Share struct {
	Name string
	// Path of the folder; it is given to User.
	Path string
	// Lines of the share's section of smb.conf, beside what makes it writable.
	Lines []string
}

// Server is a Samba server, running or not.
type Server struct {
	Port int
	dir  string
	cmd  *exec.Cmd
}

// Start runs a server until the test ends. global are further lines of its section [global].
func Start(t testing.TB, global []string, shares ...Share) *Server {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a Samba server for tests needs root")
	}
	s := &Server{dir: t.TempDir(), Port: freePort(t)}
	for _, sh := range shares {
		Give(t, sh.Path)
	}
	if err := os.WriteFile(s.config(), []byte(s.render(global, shares)), 0o600); err != nil {
		t.Fatal(err)
	}
	s.SetPassword(t, Password)
	t.Cleanup(func() {
		s.Kill()
		if log := s.Log(); t.Failed() {
			t.Logf("the end of Samba's log:\n%s", log[max(0, len(log)-4000):])
		}
	})
	s.Run(t)
	return s
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Give makes User the owner of a folder, and opens the way to it: a test's folder is its owner's alone.
func Give(t testing.TB, path string) {
	t.Helper()
	u, err := user.Lookup(User)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	if err := os.Chown(path, uid, gid); err != nil {
		t.Fatal(err)
	}
	for up := filepath.Dir(path); strings.HasPrefix(up, filepath.Clean(os.TempDir())+"/"); up = filepath.Dir(up) {
		if err := os.Chmod(up, 0o711); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *Server) config() string { return filepath.Join(s.dir, "smb.conf") }

func (s *Server) render(global []string, shares []Share) string {
	var b strings.Builder
	fmt.Fprintf(&b, `[global]
server role = standalone server
workgroup = LAB
netbios name = LAB
disable netbios = yes
interfaces = lo
bind interfaces only = yes
smb ports = %d
passdb backend = tdbsam:%[2]s/passdb.tdb
private dir = %[2]s
lock directory = %[2]s
state directory = %[2]s
cache directory = %[2]s
pid directory = %[2]s
ncalrpc dir = %[2]s/ncalrpc
log file = %[2]s/log
log level = 1
load printers = no
printcap name = /dev/null
disable spoolss = yes
usershare max shares = 0
obey pam restrictions = no
server min protocol = SMB2_10
`, s.Port, s.dir)
	for _, line := range global {
		fmt.Fprintln(&b, line)
	}
	for _, sh := range shares {
		fmt.Fprintf(&b, "[%s]\npath = %s\nread only = no\n%s\n", sh.Name, sh.Path, strings.Join(sh.Lines, "\n"))
	}
	return b.String()
}

// SetPassword gives User a password, or another one.
func (s *Server) SetPassword(t testing.TB, password string) {
	t.Helper()
	cmd := exec.Command("smbpasswd", "-c", s.config(), "-a", "-s", User)
	cmd.Stdin = strings.NewReader(password + "\n" + password + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("smbpasswd: %v\n%s", err, out)
	}
}

// Run starts the server and waits until it accepts connections.
func (s *Server) Run(t testing.TB) {
	t.Helper()
	s.cmd = exec.Command("smbd", "--foreground", "--no-process-group", "--configfile="+s.config())
	// It has a process for each connection: they are signalled as one group.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 600 {
		c, err := net.Dial("tcp", s.Address())
		if err == nil {
			_ = c.Close() // nothing was sent
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("smbd does not listen at %s", s.Address())
}

// Address is where the server listens, as host:port.
func (s *Server) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port)) }

// Log is what the server has said.
func (s *Server) Log() string {
	log, _ := os.ReadFile(filepath.Join(s.dir, "log")) // it is read for people
	return string(log)
}

// Kill ends the server, with all its processes, at once: the connections break. One that does not
// run is left alone.
func (s *Server) Kill() {
	if s.cmd == nil {
		return
	}
	_ = s.signal(syscall.SIGKILL)
	_ = s.cmd.Wait()
	for range 200 { // its children are not ours to wait for, and keep the shares' file systems busy
		if errors.Is(s.signal(0), syscall.ESRCH) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.cmd = nil
}

// Freeze stops the server without a word: connections stay, nothing is answered.
func (s *Server) Freeze(t testing.TB) { s.must(t, syscall.SIGSTOP) }

// Thaw lets a frozen server go on.
func (s *Server) Thaw(t testing.TB) { s.must(t, syscall.SIGCONT) }

// Cut drops what clients send to the server, without a word, until mend or the test's end.
func (s *Server) Cut(t testing.TB) (mend func()) {
	t.Helper()
	rule := func(do string) {
		t.Helper()
		out, err := exec.Command("iptables", "-w", do, "INPUT", "-p", "tcp", "--dport", strconv.Itoa(s.Port), "-j", "DROP").CombinedOutput()
		if err != nil {
			t.Fatalf("iptables: %v\n%s", err, out)
		}
	}
	rule("-I")
	mend = sync.OnceFunc(func() { rule("-D") })
	t.Cleanup(mend)
	return mend
}

func (s *Server) must(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := s.signal(sig); err != nil {
		t.Fatalf("signal %v to smbd: %v", sig, err)
	}
}

func (s *Server) signal(sig syscall.Signal) error { return syscall.Kill(-s.cmd.Process.Pid, sig) }
