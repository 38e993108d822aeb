package host

import (
	"context"
	"errors"
	"fmt"
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
	dog   int           // the watchdog's process
	died  chan struct{} // closed when the watchdog has ended
	ended chan struct{} // closed when nothing is done in its place any more either

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
		f, err := openFile(point, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
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
	f := &Freeze{local: l, dir: dir, died: make(chan struct{}), ended: make(chan struct{})}
	if err := f.watch(limit); err != nil {
		_ = dir.Close()
		return nil, err
	}
	answered := make(chan struct{})
	err = l.guard.offer(ctx, "freeze "+point, min(limit, quick), func(_ context.Context, hand func(error) bool) {
		defer close(answered)
		err := ioctlFreeze(dir, fifreeze)
		if !hand(err) && err == nil {
			_ = ioctlFreeze(dir, fithaw)
		}
	})
	if err == nil {
		return f, nil
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		err = fault.New(fault.Unsupported, "freeze %s: its filesystem cannot be frozen", point)
	case errors.Is(err, unix.EBUSY):
		err = fault.New(fault.InUse, "freeze %s: somebody else froze it", point)
	case errors.Is(err, stillHangs): // that attempt has a watchdog of its own
	case errors.Is(err, fault.Unavailable), errors.Is(err, fault.Deadline), errors.Is(err, fault.Canceled):
		// It may freeze yet: the watchdog stays and thaws it, should the call that
		// was left behind not come to it.
		go func() {
			<-answered
			f.outlive()
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
	theirs, ours, err := os.Pipe()
	if err != nil {
		return fault.New(fault.Exhausted, "watchdog: %w", err)
	}
	defer theirs.Close()
	dog, err := startProgram("sh", []string{"-c", thawWatchdog, "sh", seconds, "/proc/self/fd/3"}, []*os.File{theirs, nil, nil, f.dir},
		&syscall.SysProcAttr{Setsid: true}) // signals to the agent's group are not for it
	if err != nil {
		return errors.Join(fault.New(fault.Unavailable, "watchdog: %w", err), ours.Close())
	}
	f.pipe, f.dog = ours, dog.Pid
	go func() {
		_, _ = dog.Wait()
		close(f.died)
		f.mu.Lock()
		over := f.over
		f.mu.Unlock()
		if over {
			close(f.ended)
			return
		}
		// If it was killed, nobody else would thaw.
		_ = f.thaw("in place of its watchdog", func() { close(f.ended) })
	}()
	return nil
}

// thaw asks the kernel, and waits no longer than its limit; answered is called
// when the kernel has answered, however late.
func (f *Freeze) thaw(who string, answered func()) error {
	// Nobody else has this key, so it is never refused.
	key := fmt.Sprintf("thaw %s %s (%d)", f.dir.Name(), who, f.dog)
	return f.local.guard.Do(context.Background(), key, f.local.thawing, func() error {
		defer answered()
		return ioctlFreeze(f.dir, fithaw)
	})
}

// Holds says whether the freeze has held without a break so far.
func (f *Freeze) Holds() bool {
	select {
	case <-f.died:
		return false
	default:
		return true
	}
}

// Thaw ends the freeze. fault.Conflict: it had ended before, by its limit or by
// somebody else's hand, so what was copied meanwhile does not belong together.
// fault.Unavailable: the storage did not answer within 10 s, or not well: the
// filesystem is thawed when it does.
func (f *Freeze) Thaw() error {
	held := f.Holds()
	f.mu.Lock()
	over := f.over
	f.over = true
	f.mu.Unlock()
	if over {
		return fault.New(fault.Conflict, "the freeze of %s has ended before", f.dir.Name())
	}
	answered := make(chan struct{})
	err := f.thaw("at its end", func() { close(answered) })
	switch {
	case errors.Is(err, fault.Unavailable):
		go func() {
			<-answered
			f.dismiss()
		}()
		return err
	case err != nil && !errors.Is(err, unix.EINVAL): // the watchdog tries once more
		go f.outlive()
		return ioError("thaw", f.dir.Name(), err)
	}
	f.dismiss()
	switch {
	case err != nil:
		return fault.New(fault.Conflict, "the freeze of %s did not hold: it was thawed before, by its time limit or by somebody else", f.dir.Name())
	case !held:
		return fault.New(fault.Conflict, "the freeze of %s did not hold: its watchdog had ended", f.dir.Name())
	}
	return nil
}

// dismiss sends the watchdog home and waits for it, though not for ever: it
// may just be thawing what does not answer.
func (f *Freeze) dismiss() {
	f.mu.Lock()
	f.over = true
	f.mu.Unlock()
	_, _ = io.WriteString(f.pipe, "t") // EPIPE: it has ended
	gone := make(chan struct{})
	go func() {
		f.outlive()
		close(gone)
	}()
	patience := time.NewTimer(f.local.thawing)
	defer patience.Stop()
	select {
	case <-gone:
	case <-patience.C:
	}
}

// outlive waits for the end of the watchdog and lets go of the mount.
func (f *Freeze) outlive() {
	<-f.ended
	_ = f.pipe.Close()
	_ = f.dir.Close()
}

// ThawLeft thaws what an agent that died left frozen at point, and says
// whether it was.
func (l *Local) ThawLeft(ctx context.Context, point string) (bool, error) {
	return guarded(ctx, &l.guard, "thaw "+point, quick, func() (bool, error) {
		f, err := openFile(point, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
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
