package mover

import (
	"context"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// openLevels is how many directories of one path are open at once. What lies
// above is closed and found again through "..", so that neither the depth of a
// tree nor the length of its paths matters.
const openLevels = 32

// handle is an open file with a count of users.
type handle struct {
	fd   int
	refs atomic.Int32
}

func newHandle(fd int) *handle {
	h := &handle{fd: fd}
	h.refs.Store(1)
	return h
}

func (h *handle) hold() *handle {
	h.refs.Add(1)
	return h
}

func (h *handle) release() {
	if h != nil && h.refs.Add(-1) == 0 {
		_ = unix.Close(h.fd) // what matters was flushed by syncfs
	}
}

// fileID tells files apart as long as they exist.
type fileID struct{ dev, ino uint64 }

func idOf(st *unix.Stat_t) fileID { return fileID{uint64(st.Dev), st.Ino} }

func statFD(fd int) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Fstat(fd, &st) })
	return st, err
}

// chain is a path of directories from a root down, of which the lowest are open.
type chain struct{ levels []level }

type level struct {
	h  *handle // nil: closed for now
	id fileID
}

// push adds an open directory; the chain owns it from now on, also on errors.
func (c *chain) push(fd int) error {
	h := newHandle(fd)
	st, err := statFD(fd)
	if err != nil {
		h.release()
		return err
	}
	c.levels = append(c.levels, level{h, idOf(&st)})
	if i := len(c.levels) - 1 - openLevels; i >= 0 {
		c.levels[i].h.release()
		c.levels[i].h = nil
	}
	return nil
}

// top is the lowest directory; hold it to keep it beyond the next pop.
func (c *chain) top() *handle { return c.levels[len(c.levels)-1].h }

// pop goes one directory up.
func (c *chain) pop() error {
	n := len(c.levels) - 1
	low := c.levels[n]
	if up := &c.levels[n-1]; up.h == nil {
		fd, err := openAt(low.h.fd, "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if err != nil {
			return err
		}
		st, err := statFD(fd)
		if err == nil && idOf(&st) != up.id {
			err = fault.New(fault.Conflict, "a directory was moved while its tree was being copied: copy again when nobody changes it")
		}
		if err != nil {
			_ = unix.Close(fd)
			return err
		}
		up.h = newHandle(fd)
	}
	low.h.release()
	c.levels = c.levels[:n]
	return nil
}

func (c *chain) close() {
	for _, l := range c.levels {
		l.h.release()
	}
	c.levels = nil
}

func openAt(dir int, name string, flags int) (int, error) {
	return retryN(func() (int, error) { return unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0) })
}

// openEntry opens one name of a directory without following a link and without
// entering a mount (EXDEV), only as a place (O_PATH): nothing is waited for,
// no device is touched, and what is learned from it is about this very file.
func openEntry(dir int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	return retryN(func() (int, error) { return unix.Openat2(dir, name, &how) })
}

// reopen opens for reading what an O_PATH descriptor stands for, without
// changing its access time if the file's owner allows that.
func reopen(fd, flags int) (int, error) {
	open := func(flags int) (int, error) {
		return retryN(func() (int, error) { return unix.Open(procPath(fd), flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0) })
	}
	n, err := open(flags | unix.O_NOATIME)
	if err == unix.EPERM {
		n, err = open(flags)
	}
	return n, err
}

// listNames reads a directory.
func listNames(fd int) ([]string, error) {
	var names []string
	buf := make([]byte, 64<<10)
	for {
		n, err := retryN(func() (int, error) { return unix.ReadDirent(fd, buf) })
		if err != nil || n <= 0 {
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// entry is a name in a directory and what it stands for.
type entry struct {
	dir  *handle
	name string
	file *handle // O_PATH; hold it to keep it
	st   unix.Stat_t
	path string // below the root, for messages
}

// visitor is told about a tree from the root down. Only the root itself is
// not visited.
type visitor interface {
	// visit is called once for every name, for a directory before what is in it.
	visit(e *entry) error
	// leave is called for a directory after what is in it. e.file is closed.
	leave(e *entry) error
	// mountPoint is called instead of visit where something is mounted.
	mountPoint(dir *handle, name, path string) error
}

// walk visits everything under root without following links or entering mounts.
func walk(ctx context.Context, root int, rootName string, v visitor) error {
	var c chain
	defer c.close()
	type open struct {
		names []string
		e     *entry
	}
	var stack []open
	enter := func(from int, e *entry) error {
		fd, err := reopen(from, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		names, err := listNames(fd)
		if err != nil {
			_ = unix.Close(fd)
			return err
		}
		stack = append(stack, open{names, e})
		return c.push(fd)
	}
	if err := enter(root, &entry{path: rootName}); err != nil {
		return sysErr(err, "read directory", rootName)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		top := &stack[len(stack)-1]
		if len(top.names) == 0 {
			e := top.e
			if stack = stack[:len(stack)-1]; len(stack) == 0 {
				return nil
			}
			if err := c.pop(); err != nil {
				return sysErr(err, "leave directory", e.path)
			}
			e.dir = c.top()
			if err := v.leave(e); err != nil {
				return sysErr(err, "leave directory", e.path)
			}
			continue
		}
		e := &entry{dir: c.top(), name: top.names[0]}
		e.path = shorten(top.e.path + "/" + e.name)
		top.names = top.names[1:]
		if err := visitOne(e, v, enter); err != nil {
			return err
		}
	}
}

func visitOne(e *entry, v visitor, enter func(int, *entry) error) error {
	fd, err := openEntry(e.dir.fd, e.name)
	switch err {
	case nil:
	case unix.ENOENT:
		return nil // removed since the directory was read
	case unix.EXDEV:
		return sysErr(v.mountPoint(e.dir, e.name, e.path), "visit mount point", e.path)
	default:
		return sysErr(err, "open", e.path)
	}
	file := newHandle(fd)
	defer file.release()
	if e.st, err = statFD(fd); err != nil {
		return sysErr(err, "stat", e.path)
	}
	e.file = file
	if err := v.visit(e); err != nil {
		return sysErr(err, "visit", e.path)
	}
	e.file = nil
	if isDirectory(&e.st) {
		return sysErr(enter(fd, e), "read directory", e.path)
	}
	return nil
}

// shorten keeps the end of a long path: messages name places, and paths may be
// endless.
func shorten(path string) string {
	const most = 512
	if len(path) <= most {
		return path
	}
	return "..." + path[len(path)-most+3:]
}
