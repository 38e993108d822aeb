package host

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// starter is a thread with a table of open files of its own, where all processes are made.
//
// A new process gets a copy of the table, and closes all but a few of its files before it runs a program.
// To close one may mean to write out what is dirty, or to ask a FUSE server; where the server is away that
// does not end, and package syscall starts one program at a time. So one dead server would keep this process
// from starting anything for any domain. The starter's table has nothing that could hang.
type starter struct {
	mu     sync.Mutex // one order at a time
	orders chan order
	send   int   // socket by which files get into the thread's table
	shared error // why the thread has no table of its own, if it has none
}

// order is something to do on the thread.
type order struct {
	do   func(fds []int)
	fds  []int // where the table is shared; else they come by the socket
	done chan error
}

// theStarter is made before this process opens any file that could hang.
var theStarter = newStarter()

func newStarter() *starter {
	s := &starter{orders: make(chan order)}
	parted := make(chan error)
	go s.run(parted)
	s.shared = <-parted
	return s
}

// apart runs do on the thread, with the numbers that these open files have there while it runs.
func (s *starter) apart(files []int, do func(fds []int)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shared == nil {
		if err := unix.Sendmsg(s.send, []byte{0}, unix.UnixRights(files...), nil, 0); err != nil {
			return fault.New(fault.Exhausted, "files for a new process: %w", err)
		}
	}
	o := order{do: do, fds: files, done: make(chan error)}
	s.orders <- o
	return <-o.done
}

// run is the thread. It never ends, and so does not end programs that die with the thread that started them.
func (s *starter) run(parted chan<- error) {
	runtime.LockOSThread()
	receive, err := s.part()
	parted <- err
	for o := range s.orders {
		if err != nil {
			o.do(o.fds)
			o.done <- nil
			continue
		}
		fds, err := receivedFiles(receive)
		if err == nil && len(fds) != len(o.fds) {
			err = fault.New(fault.Exhausted, "files for a new process: %d of %d arrived", len(fds), len(o.fds))
		}
		if err == nil {
			o.do(fds)
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		o.done <- err
	}
}

// part gives this thread a table of its own, and returns the socket there by which files come.
func (s *starter) part() (receive int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	// What the runtime waits for files with, it uses on every thread. It makes that when the first file is
	// opened that can be waited for, which has to be before the tables part.
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	// All that can fail comes before: a thread that has parted cannot go back.
	const table = "/proc/self/fd"
	all, err := os.ReadDir(table)
	var leave []int
	for _, f := range all {
		fd, wrong := strconv.Atoi(f.Name())
		if wrong != nil || fd <= 2 || fd == pair[1] {
			continue
		}
		// eventpoll and eventfd stay; what has no name any more was the listing itself
		if to, wrong := os.Readlink(filepath.Join(table, f.Name())); wrong == nil && !strings.HasPrefix(to, "anon_inode:[event") {
			leave = append(leave, fd)
		}
	}
	if err := errors.Join(err, r.Close(), w.Close(), unix.Unshare(unix.CLONE_FILES)); err != nil {
		return 0, errors.Join(err, unix.Close(pair[0]), unix.Close(pair[1]))
	}
	s.send = pair[0]
	for _, fd := range leave {
		_ = unix.Close(fd) // EBADF: it was closed just now
	}
	return pair[1], nil
}

// receivedFiles takes one message from the socket.
func receivedFiles(socket int) (fds []int, err error) {
	const most = 253 // SCM_MAX_FD
	word, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4*most))
	_, n, _, _, err := unix.Recvmsg(socket, word, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	for _, m := range messages {
		more, wrong := unix.ParseUnixRights(&m)
		fds, err = append(fds, more...), errors.Join(err, wrong)
	}
	return fds, err
}

// startProgram starts a program with these files as its descriptors 0, 1, 2 and so on; nil is /dev/null.
func startProgram(name string, args []string, files []*os.File, sys *syscall.SysProcAttr) (*os.Process, error) {
	path := name
	if filepath.Base(name) == name {
		var err error
		if path, err = exec.LookPath(name); err != nil {
			return nil, err
		}
	}
	given := slices.Clone(files)
	for i, f := range given {
		if f != nil {
			continue
		}
		flag := os.O_WRONLY
		if i == 0 { // a confined process may not write there
			flag = os.O_RDONLY
		}
		null, err := os.OpenFile(os.DevNull, flag, 0)
		if err != nil {
			return nil, err
		}
		defer null.Close()
		given[i] = null
	}
	env := []string{"LC_ALL=C"}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "LC_ALL=") {
			env = append(env, v)
		}
	}
	var numbers []int
	for _, f := range given {
		numbers = append(numbers, int(f.Fd()))
	}
	defer runtime.KeepAlive(given)
	var pid int
	var failed error
	if err := theStarter.apart(numbers, func(fds []int) {
		a := &syscall.ProcAttr{Env: env, Sys: sys}
		for _, fd := range fds {
			a.Files = append(a.Files, uintptr(fd))
		}
		pid, failed = syscall.ForkExec(path, append([]string{name}, args...), a)
	}); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, &os.PathError{Op: "fork/exec", Path: path, Err: failed}
	}
	return os.FindProcess(pid) // it is there until somebody waits for it
}

// outputDelay is for pipes that a grandchild holds open after a program has ended.
const outputDelay = time.Second

// output takes what a program says.
type output struct {
	theirs *os.File // the end for the program; to be closed when that was started
	// rest waits for what is still to be said once the program has ended. exec.ErrWaitDelay: another process holds
	// the end open; nothing is copied any more.
	rest func() error
}

// newOutput makes one, a pipe, that is copied to w until its other end is closed.
func newOutput(w io.Writer) (*output, error) {
	ours, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, ours)
		copied <- errors.Join(err, ours.Close())
	}()
	return &output{theirs: theirs, rest: func() error {
		_ = ours.SetReadDeadline(time.Now().Add(outputDelay)) // os.ErrClosed: everything was said
		err := <-copied
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return exec.ErrWaitDelay
		}
		return err
	}}, nil
}

// newKeptOutput makes one, a file in memory, that is copied to w when the program has ended: what a program says
// when this process is gone does not end it, as a pipe that nobody reads does.
func newKeptOutput(w io.Writer) (*output, error) {
	const name = "output of a program"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, ioError("make", name, err)
	}
	theirs := os.NewFile(uintptr(fd), name)
	again, err := unix.FcntlInt(theirs.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(ioError("open", name, err), theirs.Close())
	}
	ours := os.NewFile(uintptr(again), name)
	return &output{theirs: theirs, rest: func() error {
		_, err := io.Copy(w, io.NewSectionReader(ours, 0, mostSaid))
		return errors.Join(err, ours.Close())
	}}, nil
}

// mostSaid of a file of output is read, in bytes.
const mostSaid = 1 << 20
