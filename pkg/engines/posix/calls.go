package posix

import (
	"errors"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls by which names are made and looked at, again and again until they were not
// interrupted: Go interrupts its threads at any time, and a FUSE server may answer to that with EINTR.

func uninterrupted(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

func mkdirat(dir *os.File, name string, mode uint32) error {
	return uninterrupted(func() error { return unix.Mkdirat(int(dir.Fd()), name, mode) })
}

func linkat(from *os.File, old string, to *os.File, name string) error {
	return uninterrupted(func() error { return unix.Linkat(int(from.Fd()), old, int(to.Fd()), name, 0) })
}

func renameat(from *os.File, old string, to *os.File, name string) error {
	return uninterrupted(func() error { return unix.Renameat(int(from.Fd()), old, int(to.Fd()), name) })
}

func unlinkat(dir *os.File, name string, flags int) error {
	return uninterrupted(func() error { return unix.Unlinkat(int(dir.Fd()), name, flags) })
}

// statat describes name in dir, and no link's target.
func statat(dir *os.File, name string) (st unix.Stat_t, err error) {
	err = uninterrupted(func() error { return unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	return st, err
}

// statNow is statat of type and size as they are now: where a client remembers them (Refresh), it asks its server.
func (d *Directory) statNow(dir *os.File, name string) (st unix.Stat_t, err error) {
	if !d.options.Refresh {
		return statat(dir, name)
	}
	var x unix.Statx_t
	err = uninterrupted(func() error {
		return unix.Statx(int(dir.Fd()), name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, unix.STATX_TYPE|unix.STATX_SIZE, &x)
	})
	st.Mode, st.Size = uint32(x.Mode), int64(x.Size)
	return st, err
}

func stat(f *os.File) (st unix.Stat_t, err error) {
	err = uninterrupted(func() error { return unix.Fstat(int(f.Fd()), &st) })
	return st, err
}

func statfs(f *os.File) (st unix.Statfs_t, err error) {
	err = uninterrupted(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
	return st, err
}

func flock(f *os.File, how int) error {
	return uninterrupted(func() error { return unix.Flock(int(f.Fd()), how) })
}

// openat opens name in dir, never through a symlink, and never waits for a pipe.
func openat(dir *os.File, name string, flags int) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	fd, err := descriptor(dir, name, flags)
	if err == nil && flags&unix.O_DIRECTORY == 0 {
		// Or Go's poller would be told of it, and a FUSE server that does not answer to that
		// stops the poller, and with it this whole process.
		if err = unix.SetNonblock(fd, false); err != nil {
			_ = unix.Close(fd) // nothing was written
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openFolder opens a folder in another.
func (d *Directory) openFolder(dir *os.File, name string) (*os.File, error) {
	f, err := openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) && d.thereAfterAll(dir, name) {
		f, err = openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	return f, err
}

// thereAfterAll says whether a name that was not found when it was opened is there for who only looks at it (see Options.LateNames).
func (d *Directory) thereAfterAll(dir *os.File, name string) bool {
	if !d.options.LateNames {
		return false
	}
	_, err := statat(dir, name)
	return err == nil
}

// descriptor is openat for one who reads at once and has no use for an os.File.
func descriptor(dir *os.File, name string, flags int) (fd int, err error) {
	if flags&unix.O_DIRECTORY == 0 {
		flags |= unix.O_NONBLOCK
	}
	err = uninterrupted(func() (err error) {
		fd, err = unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	return fd, err
}

// mincore fills pages with a byte for each page of mapped memory; its lowest bit: it is in memory.
func mincore(m, pages []byte) error {
	return uninterrupted(func() error {
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&pages[0])))
		if errno != 0 {
			return errno
		}
		return nil
	})
}
