package host

import (
	"bytes"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// ChildFD is the file descriptor at which a Child finds its end of the connection.
const ChildFD = 3

// ChildConfig says how a Child runs.
type ChildConfig struct {
	Name string
	Args []string
	// UID and GID that it runs as; 0: this process's.
	UID, GID uint32
	// Capabilities (capabilities(7), by number) that it has as UID, of those that this process
	// has. As this process's user it has them all, and has to give them up itself: see RunConfined.
	Capabilities []uint
	// Said is told each line that it writes to standard error, if not nil.
	Said func(line string)
}

// Child is a program that runs beside this process, and not longer, with one connection
// between the two.
type Child struct {
	proc  *os.Process
	said  func(line string)
	line  []byte // begun on standard error
	ended chan struct{}

	mu   sync.Mutex
	last string // line of standard error
	how  string // it ended
}

// StartChild starts one, and returns this process's end of the connection. The child ends when
// that is closed, if it is well behaved; see Kill. It is killed when this process ends.
func StartChild(c ChildConfig) (*Child, net.Conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fault.New(fault.Unavailable, "a connection to %s: %w", c.Name, err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "connection"), os.NewFile(uintptr(pair[1]), "connection")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err = errors.Join(err, ours.Close()); err != nil {
		return nil, nil, fault.New(fault.Unavailable, "a connection to %s: %w", c.Name, err)
	}
	sys := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if c.UID != 0 {
		sys.Credential = &syscall.Credential{Uid: c.UID, Gid: c.GID}
		has, err := permitted()
		if err != nil {
			return nil, nil, errors.Join(fault.Wrap(fault.Internal, err), conn.Close())
		}
		for _, n := range c.Capabilities {
			if has&(1<<n) != 0 {
				sys.AmbientCaps = append(sys.AmbientCaps, uintptr(n))
			}
		}
	}
	child := &Child{said: c.Said, ended: make(chan struct{})}
	stderr, err := newOutput(child)
	if err != nil {
		return nil, nil, errors.Join(fault.New(fault.Unavailable, "start %s: %w", c.Name, err), conn.Close())
	}
	child.proc, err = startProgram(c.Name, c.Args, []*os.File{nil, nil, stderr.theirs, theirs}, sys) // the last is ChildFD
	_ = stderr.theirs.Close()
	if err != nil {
		return nil, nil, errors.Join(fault.New(fault.Unavailable, "start %s: %w", c.Name, err), conn.Close())
	}
	go func() {
		defer close(child.ended)
		state, err := child.proc.Wait()
		err = errors.Join(err, stderr.rest())
		_, _ = child.Write([]byte("\n")) // it never fails; what was begun is the last line
		child.mu.Lock()
		defer child.mu.Unlock()
		switch {
		case err != nil && state == nil:
			child.how = err.Error()
		default:
			child.how = state.String() // what it left behind may hold its output open
		}
	}()
	return child, conn, nil
}

// longestLine is after how many bytes a line is passed on that has not ended.
const longestLine = 4096

// Write implements io.Writer for what it writes to standard error.
func (c *Child) Write(b []byte) (int, error) {
	for line := range bytes.Lines(b) {
		c.line = append(c.line, line...)
		if line[len(line)-1] != '\n' && len(c.line) < longestLine {
			continue
		}
		text := strings.TrimSpace(strings.ToValidUTF8(string(c.line), "\uFFFD"))
		c.line = c.line[:0]
		if text == "" {
			continue
		}
		c.mu.Lock()
		c.last = text
		c.mu.Unlock()
		if c.said != nil {
			c.said(text)
		}
	}
	return len(b), nil
}

// PID of it.
func (c *Child) PID() int { return c.proc.Pid }

// Ended says how it has ended: "exit status 1: the last line that it said"; "": it has not.
func (c *Child) Ended() string {
	select {
	case <-c.ended:
	default:
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last != "" {
		return c.how + ": " + c.last
	}
	return c.how
}

// Wait waits until it has ended, but not longer than patience. false: it has not.
func (c *Child) Wait(patience time.Duration) bool {
	limit := time.NewTimer(patience)
	defer limit.Stop()
	select {
	case <-c.ended:
		return true
	case <-limit.C:
		return c.Ended() != ""
	}
}

// Kill waits until it has ended by itself, kills it after patience, and waits again. false: it hangs in
// the kernel, and was left behind.
func (c *Child) Kill(patience time.Duration) bool {
	if c.Wait(patience) {
		return true
	}
	_ = syscall.Kill(-c.proc.Pid, syscall.SIGKILL) // ESRCH: it has ended just now
	return c.Wait(killPatience)
}

// killPatience is how long a killed process may take to end.
const killPatience = 2 * time.Second

// InheritedConn is a child's end of the connection. It is for one caller.
func InheritedConn() (net.Conn, error) {
	f := os.NewFile(ChildFD, "connection")
	if f == nil {
		return nil, fault.New(fault.Invalid, "file descriptor %d is not open: it should be the connection to the process that started this one", ChildFD)
	}
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fault.New(fault.Invalid, "file descriptor %d should be the connection to the process that started this one: %w", ChildFD, err)
	}
	return conn, nil
}

// permitted are the capabilities that this process has, as bits.
func permitted() (uint64, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, err
	}
	return uint64(data[1].Permitted)<<32 | uint64(data[0].Permitted), nil
}

// bits of a set of capabilities.
func bits(capabilities []uint) (set uint64) {
	for _, n := range capabilities {
		set |= 1 << n
	}
	return set
}
