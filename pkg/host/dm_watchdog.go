package host

import (
	"errors"
	"math"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// A watchdog must work while the disks of this node may be suspended. A program
// that is started may have to be read from one first, and a Go program does what
// it likes: it allocates, which may mean to wait for a write to such a disk. So this
// one is a copy of this process (fork without exec) that runs one function, which
// makes system calls and nothing else, in memory that it has touched and locked.
// That is what package syscall does between fork and exec, and its rules hold: no
// allocation, no growing stack, no lock, nothing of the runtime.

// resumer is the parent's side of the child.
type resumer struct {
	pid    int
	socket *os.File
}

// How the two speak: one byte each.
const (
	dogReady   = 'r' // child: everything is in place
	dogAsk     = 'a' // parent: have you left the devices alone?
	dogYes     = 'y'
	dogKeep    = 'k' // parent: your time begins anew
	dogDismiss = 'd' // parent: go home
)

// The child's exit status.
const (
	dogDismissed = iota
	dogResumed   // it had to
	dogFailed    // it could not begin, or a device cannot be resumed
)

// dogOrders is what the child works with, made before it is.
type dogOrders struct {
	socket, control uintptr // file descriptors
	nanoseconds     int64
	count           uintptr
	requests, work  unsafe.Pointer // count requests to resume, and room for one
	name            unsafe.Pointer
	area, areaSize  uintptr // memory that holds all of this
	text, textSize  uintptr // this program's code
}

// startWatchdog makes a child that resumes the devices, in this order, after
// limit or when this process dies. It is ready when this returns.
func startWatchdog(control int, uuids []string, limit time.Duration) (*resumer, error) {
	const nameRoom = 16
	area, err := unix.Mmap(-1, 0, int(unsafe.Sizeof(dogOrders{}))+nameRoom+dmHeader*(1+len(uuids)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fault.New(fault.Exhausted, "watchdog: %w", err)
	}
	defer func() { _ = unix.Munmap(area) }() // the child has a copy
	o := (*dogOrders)(unsafe.Pointer(&area[0]))
	name := area[unsafe.Sizeof(*o):]
	copy(name[:nameRoom], "quarry-watchdog\x00")
	work := name[nameRoom:]
	requests := work[dmHeader:]
	for i, uuid := range uuids {
		b, err := dmRequest{UUID: uuid, Event: dmUdev}.encode(dmHeader)
		if err != nil {
			return nil, err
		}
		copy(requests[i*dmHeader:], b)
	}
	text, textSize, err := codeOf(reflect.ValueOf(forkWatchdog).Pointer())
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fault.New(fault.Unavailable, "watchdog: %w", err)
	}
	if err := unix.SetNonblock(pair[0], true); err != nil { // for deadlines
		_, _ = unix.Close(pair[0]), unix.Close(pair[1])
		return nil, fault.New(fault.Unavailable, "watchdog: %w", err)
	}
	d := &resumer{socket: os.NewFile(uintptr(pair[0]), "watchdog")}
	*o = dogOrders{
		nanoseconds: min(limit, math.MaxInt32*time.Millisecond).Nanoseconds(),
		count:       uintptr(len(uuids)), requests: unsafe.Pointer(unsafe.SliceData(requests)), work: unsafe.Pointer(&work[0]),
		name: unsafe.Pointer(&name[0]),
		area: uintptr(unsafe.Pointer(o)), areaSize: uintptr(len(area)),
		text: text, textSize: textSize,
	}
	var pid uintptr
	var errno syscall.Errno
	err = theStarter.apart([]int{pair[1], control}, func(fds []int) {
		o.socket, o.control = uintptr(fds[0]), uintptr(fds[1])
		pid, errno = forkWatchdog(o)
	})
	_ = unix.Close(pair[1]) // that end is the child's alone, so that its death is seen
	if err == nil && errno != 0 {
		err = fault.New(fault.Unavailable, "watchdog: %w", errno)
	}
	if err != nil {
		return nil, errors.Join(err, d.socket.Close())
	}
	d.pid = int(pid)
	if !d.heard(dogReady) {
		_ = unix.Kill(d.pid, unix.SIGKILL)
		d.wait()
		_ = d.socket.Close()
		return nil, fault.New(fault.Unavailable, "the child that would watch over suspended devices did not begin: it needs Linux 5.9 and leave to lock memory (CAP_IPC_LOCK)")
	}
	return d, nil
}

// codeOf finds the mapping of this program that holds an address.
func codeOf(pc uintptr) (start, size uintptr, _ error) {
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return 0, 0, ioError("read", "/proc/self/maps", err)
	}
	for line := range strings.Lines(string(b)) {
		from, rest, _ := strings.Cut(line, "-")
		to, _, _ := strings.Cut(rest, " ")
		low, err1 := strconv.ParseUint(from, 16, 64)
		high, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && low <= uint64(pc) && uint64(pc) < high {
			return uintptr(low), uintptr(high - low), nil
		}
	}
	return 0, 0, fault.New(fault.Internal, "/proc/self/maps does not show where this program's code is")
}

// heard waits for the child to say something. false: it said nothing, or has ended.
func (d *resumer) heard(word byte) bool {
	_ = d.socket.SetReadDeadline(time.Now().Add(quick))
	var b [1]byte
	n, err := d.socket.Read(b[:])
	return err == nil && n == 1 && b[0] == word
}

// ask returns true if the child has resumed nothing, and will only if its time is up.
func (d *resumer) ask() bool { return d.tell(dogAsk) }

// keep is ask, and the child's time begins anew.
func (d *resumer) keep() bool { return d.tell(dogKeep) }

func (d *resumer) tell(word byte) bool {
	_, err := d.socket.Write([]byte{word})
	return err == nil && d.heard(dogYes)
}

func (d *resumer) dismiss() { _, _ = d.socket.Write([]byte{dogDismiss}) } // EPIPE: it has ended

// close makes a child resume that was not dismissed.
func (d *resumer) close() error { return d.socket.Close() }

// wait returns when the child has ended. done: it was dismissed, or has resumed everything.
func (d *resumer) wait() (done bool) {
	for {
		var st unix.WaitStatus
		_, err := unix.Wait4(d.pid, &st, 0, nil)
		if err == unix.EINTR {
			continue
		}
		return err == nil && st.Exited() && slices.Contains([]int{dogDismissed, dogResumed}, st.ExitStatus())
	}
}

// forkWatchdog splits the process, with all signals blocked on this thread: a
// handler must not run in the child.
//
//go:norace
//go:nosplit
//go:noinline
func forkWatchdog(o *dogOrders) (pid uintptr, errno syscall.Errno) {
	const setSize = 8 // bytes of a signal set
	every, before := ^uint64(0), uint64(0)
	_, _, errno = syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&every)), uintptr(unsafe.Pointer(&before)), setSize, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	pid, _, errno = syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno == 0 && pid == 0 {
		watch(o)
	}
	_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&before)), 0, setSize, 0, 0)
	return pid, errno
}

// watch is the child. It does not return.
//
//go:norace
//go:nosplit
//go:noinline
func watch(o *dogOrders) {
	type pollFd struct {
		fd              int32
		events, revents int16
	}
	const (
		clockMonotonic = 1
		setName        = 15 // PR_SET_NAME
		ioFlusher      = 57 // PR_SET_IO_FLUSHER: reclaim memory without waiting for disks
		rounds         = 100
		tenth          = 100 // milliseconds between rounds
		// What a function may use that does not look whether its stack must grow, and
		// what this one's frame has at most.
		stackBelow, stackAbove = 800, 512
	)
	var (
		now, end [2]int64 // seconds, nanoseconds
		p        = pollFd{fd: int32(o.socket), events: unix.POLLIN}
		word     byte
		status   uintptr = dogFailed
	)
	_, _, _ = syscall.RawSyscall6(syscall.SYS_SETSID, 0, 0, 0, 0, 0, 0) // signals to the agent's group are not for it
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, setName, uintptr(o.name), 0, 0, 0, 0)
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, ioFlusher, 1, 0, 0, 0, 0)
	// It must keep nothing open that the agent closes: not the agent's end of the
	// socket, no lock, no file of a filesystem that is to be unmounted.
	low, high := o.socket, o.control
	if low > high {
		low, high = high, low
	}
	var errno syscall.Errno
	if low > 0 {
		_, _, errno = syscall.RawSyscall6(unix.SYS_CLOSE_RANGE, 0, low-1, 0, 0, 0, 0)
	}
	if errno == 0 && high > low+1 {
		_, _, errno = syscall.RawSyscall6(unix.SYS_CLOSE_RANGE, low+1, high-1, 0, 0, 0, 0)
	}
	if errno == 0 {
		_, _, errno = syscall.RawSyscall6(unix.SYS_CLOSE_RANGE, high+1, math.MaxUint32, 0, 0, 0, 0)
	}
	// Lock the orders, what of the code is touched, and the stack: no more, because to
	// lock all that the agent has would take long.
	if errno == 0 {
		_, _, errno = syscall.RawSyscall6(syscall.SYS_MLOCK, o.area, o.areaSize, 0, 0, 0, 0)
	}
	if errno == 0 {
		_, _, errno = syscall.RawSyscall6(unix.SYS_MLOCK2, o.text, o.textSize, unix.MLOCK_ONFAULT, 0, 0, 0)
	}
	if errno == 0 {
		_, _, errno = syscall.RawSyscall6(syscall.SYS_MLOCK, uintptr(unsafe.Pointer(&end))-stackBelow, stackBelow+stackAbove, 0, 0, 0, 0)
	}
	if errno != 0 {
		goto out
	}
	// The first turn touches all that a resume needs: its requests only ask.
	word = dogReady
	for {
		if word == dogReady || word == dogKeep { // its time begins
			_, _, _ = syscall.RawSyscall6(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&end)), 0, 0, 0, 0)
			end[0] += o.nanoseconds / 1e9
			if end[1] += o.nanoseconds % 1e9; end[1] >= 1e9 {
				end[0]++
				end[1] -= 1e9
			}
		}
		if word == dogReady && resumeAll(o, unix.DM_DEV_STATUS) != 0 {
			goto out
		}
		if word == dogKeep {
			word = dogYes
		}
		if word == dogReady || word == dogYes {
			_, _, _ = syscall.RawSyscall6(syscall.SYS_WRITE, o.socket, uintptr(unsafe.Pointer(&word)), 1, 0, 0, 0)
		}
		_, _, _ = syscall.RawSyscall6(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&now)), 0, 0, 0, 0)
		// Rounded up: a limit is never cut short.
		left := (end[0]-now[0])*1000 + (end[1]-now[1]+999_999)/1_000_000
		if left <= 0 {
			break
		}
		n, errno := dogPoll(unsafe.Pointer(&p), uintptr(left))
		if errno == syscall.EINTR {
			word = 0
			continue
		}
		if errno != 0 || n == 0 {
			break
		}
		n, _, errno = syscall.RawSyscall6(syscall.SYS_READ, o.socket, uintptr(unsafe.Pointer(&word)), 1, 0, 0, 0)
		if errno != 0 || n != 1 { // the agent has died
			break
		}
		if word == dogDismiss {
			status = dogDismissed
			goto out
		}
		if word != dogKeep {
			word = dogYes
		}
	}
	for range rounds {
		if resumeAll(o, unix.DM_DEV_SUSPEND) == 0 { // without its flag that request resumes
			status = dogResumed
			break
		}
		p.fd = -1 // a pause
		_, _ = dogPoll(unsafe.Pointer(&p), tenth)
	}
out:
	for {
		_, _, _ = syscall.RawSyscall6(syscall.SYS_EXIT_GROUP, status, 0, 0, 0, 0, 0)
	}
}

// resumeAll makes every request and returns how many failed. A device that is
// gone needs nothing.
//
//go:norace
//go:nosplit
//go:noinline
func resumeAll(o *dogOrders, request uintptr) (failed int) {
	for i := uintptr(0); i < o.count; i++ {
		for at := uintptr(0); at < dmHeader; at += 8 { // the kernel answers in the same place
			*(*uint64)(unsafe.Add(o.work, at)) = *(*uint64)(unsafe.Add(o.requests, i*dmHeader+at))
		}
		_, _, errno := syscall.RawSyscall6(syscall.SYS_IOCTL, o.control, request, uintptr(o.work), 0, 0, 0)
		if errno != 0 && errno != syscall.ENXIO {
			failed++
		}
	}
	return failed
}

// dogPoll waits for milliseconds at most.
//
//go:norace
//go:nosplit
//go:noinline
func dogPoll(fds unsafe.Pointer, milliseconds uintptr) (uintptr, syscall.Errno) {
	t := [2]int64{int64(milliseconds / 1000), int64(milliseconds % 1000 * 1_000_000)}
	n, _, errno := syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(fds), 1, uintptr(unsafe.Pointer(&t)), 0, 0, 0)
	return n, errno
}
