package host

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// The requests of linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fifreeze = 0xc0045877
	fithaw   = 0xc0045878
)

// thawWatchdog thaws the filesystem at $2 unless it reads a "t" within $1
// seconds; the pipe's end means that the agent died. Status 3: it had to.
const thawWatchdog = `if [ "$(timeout "$1" head -c 1)" = t ]; then exit 0; fi; fsfreeze -u "$2"; exit 3`

// Freeze is a frozen filesystem and the child that watches over it.
type Freeze struct {
	local *Local
	dir   *os.File
	pipe  io.WriteCloser
	ended chan struct{} // closed when the watchdog has ended

	mu   sync.Mutex
	over bool
}

// Freeze writes out the filesystem mounted at point and keeps it still until
// Thaw. A child thaws it after limit, or when this process dies (unless a
// container takes the child along: a starting agent calls ThawLeft).
//
// fault.Unsupported: the filesystem cannot. fault.InUse: somebody else froze it.
// fault.Conflict: nothing is mounted at point (any more).
func (l *Local) Freeze(ctx context.Context, point string, limit time.Duration) (*Freeze, error) {
	for _, program := range []string{"sh", "timeout", "head", "fsfreeze"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, missing(program)
		}
	}
	dir, err := guarded(ctx, &l.guard, "open "+point, quick, func() (*os.File, error) {
		f, err := os.OpenFile(point, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, ioError("open", point, err)
		}
		if err := mountRoot(f); err != nil {
			_ = f.Close()
			return nil, err
		}
		return f, nil
	})
	if err != nil {
		return nil, err
	}
	f := &Freeze{local: l, dir: dir, ended: make(chan struct{})}
	if err := f.watch(limit); err != nil {
		_ = dir.Close()
		return nil, err
	}
	left, answered := make(chan struct{}), make(chan struct{})
	err = l.guard.Do(ctx, "freeze "+point, min(limit, quick), func() error {
		defer close(answered)
		err := ioctlFreeze(dir, fifreeze)
		select {
		case <-left: // nobody waits any more
			if err == nil {
				_ = ioctlFreeze(dir, fithaw)
			}
		default:
		}
		return err
	})
	if err == nil {
		return f, nil
	}
	close(left)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		err = fault.New(fault.Unsupported, "freeze %s: its filesystem cannot be frozen", point)
	case errors.Is(err, unix.EBUSY):
		err = fault.New(fault.InUse, "freeze %s: somebody else froze it", point)
	case errors.Is(err, fault.Unavailable), errors.Is(err, fault.Deadline), errors.Is(err, fault.Canceled):
		// It may freeze yet: the watchdog stays and thaws it, should the call that
		// was left behind not come to it.
		go func() {
			<-answered
			<-f.ended
			_ = dir.Close()
		}()
		return nil, err
	default:
		err = ioError("freeze", point, err)
	}
	f.dismiss()
	return nil, err
}

// mountRoot refuses a directory on which nothing is mounted: freezing there
// would stop the filesystem that holds it, and with it perhaps the whole node.
func mountRoot(f *os.File) error {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return ioError("stat", f.Name(), err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return fault.New(fault.Conflict, "freeze %s: it is not a mount point", f.Name())
	}
	return nil
}

func (f *Freeze) watch(limit time.Duration) error {
	seconds := strconv.FormatFloat(limit.Seconds(), 'f', 3, 64)
	cmd := exec.Command("sh", "-c", thawWatchdog, "sh", seconds, "/proc/self/fd/3")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{f.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // signals to the agent's group are not for it
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return fault.New(fault.Internal, "watchdog: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fault.New(fault.Unavailable, "watchdog: %w", err)
	}
	f.pipe = pipe
	go func() {
		_ = cmd.Wait()
		// If it was killed, nobody else would thaw.
		f.mu.Lock()
		if !f.over {
			_ = ioctlFreeze(f.dir, fithaw)
		}
		f.mu.Unlock()
		close(f.ended)
	}()
	return nil
}

// Holds says whether the freeze has held without a break so far.
func (f *Freeze) Holds() bool {
	select {
	case <-f.ended:
		return false
	default:
		return true
	}
}

// Thaw ends the freeze. fault.Conflict: it had ended before, by its limit or by
// somebody else's hand, so what was copied meanwhile does not belong together.
func (f *Freeze) Thaw() error {
	held := f.Holds()
	f.mu.Lock()
	if f.over {
		f.mu.Unlock()
		return fault.New(fault.Conflict, "the freeze of %s has ended before", f.dir.Name())
	}
	f.over = true
	err := ioctlFreeze(f.dir, fithaw)
	f.mu.Unlock()
	f.dismiss()
	switch {
	case errors.Is(err, unix.EINVAL):
		return fault.New(fault.Conflict, "the freeze of %s did not hold: it was thawed before, by its time limit or by somebody else", f.dir.Name())
	case err != nil:
		return ioError("thaw", f.dir.Name(), err)
	case !held:
		return fault.New(fault.Conflict, "the freeze of %s did not hold: its watchdog had ended", f.dir.Name())
	}
	return nil
}

// dismiss sends the watchdog home and waits for it.
func (f *Freeze) dismiss() {
	f.mu.Lock()
	f.over = true
	f.mu.Unlock()
	_, _ = io.WriteString(f.pipe, "t") // EPIPE: it has ended
	_ = f.pipe.Close()
	<-f.ended
	_ = f.dir.Close()
}

// ThawLeft thaws what an agent that died left frozen at point, and says
// whether it was.
func (l *Local) ThawLeft(ctx context.Context, point string) (bool, error) {
	return guarded(ctx, &l.guard, "thaw "+point, quick, func() (bool, error) {
		f, err := os.OpenFile(point, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return false, ioError("open", point, err)
		}
		defer f.Close()
		err = ioctlFreeze(f, fithaw)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return false, nil
		}
		return err == nil, ioError("thaw", point, err)
	})
}

func ioctlFreeze(f *os.File, request uint) error {
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}
