// Package posix keeps the slabs and tags of a domain in a POSIX directory. It
// is the shared base of the engines that have one: a local directory, a file
// share.
//
//	slabs/<id>           a file is a block slab; a directory is a tree slab
//	slabs/<id>/data      what users see of a tree slab
//	slabs/<id>/spec      its promised size
//	tags/<class>/<name>  a tag; its class is its name up to the first dot
//	tmp/                 what is not finished
//	trash/               tree slabs that are deleted and wait for their removal
//	reserve/             room for deletions on a full disk
//
// Everything is made in tmp/, made durable, put under its final name in one
// step that fails when the name is taken (link, or rename of a directory that
// is not empty), and then the folder is made durable. So nothing is ever seen
// half made, on any number of hosts.
package posix

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// What is in tmp/ is locked (flock) by who makes it. A left-over that nobody
// holds is swept at the age of abandonedAfter, which only bridges the moment
// between making and locking; at deadAfter whatever the lock says, because some
// storages have none. No verb takes that long.
const (
	abandonedAfter = 2 * time.Second
	deadAfter      = 24 * time.Hour
)

// Trees makes the data directories of tree slabs. A storage with something
// better than plain directories (subvolumes, quotas) brings its own. wrapper is
// the slab's open folder.
type Trees interface {
	// Create makes wrapper/data, without a limit yet.
	Create(wrapper *os.File) error
	// Resize limits wrapper/data to size bytes where the storage can.
	Resize(wrapper *os.File, size int64) error
	// Remove removes wrapper/data faster than file by file, if it can: what it
	// leaves is removed file by file.
	Remove(wrapper *os.File)
}

// Directory is an opened domain directory. It implements engine.Engine except
// for Describe. It holds the directory open: when something else is mounted
// over its path, it does not go astray.
type Directory struct {
	path                    string
	root                    *os.Root
	slabs, tags, tmp, trash *os.File
	trees                   Trees
	host                    string   // prefix of this host's names in tmp/
	classes                 sync.Map // classes of tags that are known to be durable
	reserve                 reserve
}

// Open opens the directory at an absolute path that exists, and makes the
// folders that are missing. nil for trees: plain directories. fault.Invalid:
// nothing can be kept there. fault.Unavailable: it is not there now.
func Open(path string, trees Trees) (*Directory, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, Fault(err)
	}
	if err := checkKeeps(root, path); err != nil {
		return nil, errors.Join(Fault(err), root.Close())
	}
	hostname, err := os.Hostname()
	if err != nil {
		return nil, errors.Join(Fault(err), root.Close())
	}
	if trees == nil {
		trees = plain{}
	}
	d := &Directory{path: path, root: root, trees: trees,
		host: fmt.Sprintf("%08x.", crc32.ChecksumIEEE([]byte(hostname)))}
	made := false
	for name, f := range map[string]**os.File{"slabs": &d.slabs, "tags": &d.tags, "tmp": &d.tmp, "trash": &d.trash} {
		err := root.Mkdir(name, 0o700)
		made = made || err == nil
		if err == nil || errors.Is(err, fs.ErrExist) {
			*f, err = root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY, 0)
		}
		if errors.Is(err, unix.ENOTDIR) {
			err = fault.New(fault.Invalid, "%s is not a directory: it cannot hold a domain's %s", filepath.Join(path, name), name)
		}
		if err != nil {
			return nil, errors.Join(Fault(err), d.Close())
		}
	}
	if made {
		if err := d.syncRoot(); err != nil {
			return nil, errors.Join(Fault(err), d.Close())
		}
	}
	d.reserve.missing.Store(true) // until looked at
	d.keepReserve()
	return d, nil
}

func (d *Directory) syncRoot() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Close implements engine.Engine.
func (d *Directory) Close() error {
	err := d.root.Close()
	for _, f := range []*os.File{d.slabs, d.tags, d.tmp, d.trash} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return Fault(err)
}

// Path is where the directory was opened.
func (d *Directory) Path() string { return d.path }

// Clean removes what earlier processes left: trees that were deleted, and what
// this host began and nobody works on any more. Other processes may be at work here.
func (d *Directory) Clean(ctx context.Context) error {
	err := d.removeAll(ctx, d.trash, "trash", func(string) bool { return true })
	now, probe := time.Time{}, d.unique()
	f, errProbe := openat(d.tmp, probe, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL) // the storage's clock, not ours
	if errProbe != nil {
		return errors.Join(err, Fault(errProbe))
	}
	if info, err := f.Stat(); err == nil {
		now = info.ModTime()
	}
	errProbe = errors.Join(f.Close(), unix.Unlinkat(int(d.tmp.Fd()), probe, 0))
	return errors.Join(err, Fault(errProbe), d.removeAll(ctx, d.tmp, "tmp", func(name string) bool {
		info, err := d.root.Lstat("tmp/" + name)
		if err != nil || !strings.HasPrefix(name, d.host) {
			return false
		}
		age := now.Sub(info.ModTime())
		return age > deadAfter || age > abandonedAfter && d.abandoned(name)
	}))
}

// abandoned says whether nobody holds something in tmp/.
func (d *Directory) abandoned(name string) bool {
	f, err := openat(d.tmp, name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return false
	}
	defer f.Close() // was only read
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false
	}
	return unix.Flock(int(f.Fd()), unix.LOCK_UN) == nil
}

// hold locks something in tmp/ until release is called. Closing f would not do:
// a program that is being started at that moment has the file open until its
// exec, and the next user of the file would find it locked. Where the storage
// has no locks, its age alone protects it.
func hold(f *os.File) (release func()) {
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return func() {}
	}
	return func() { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) } // nothing is lost by a lock that stays a moment longer
}

func (d *Directory) removeAll(ctx context.Context, dir *os.File, folder string, dead func(name string) bool) error {
	var errs []error
	err := each(ctx, dir, ".", func(_ *os.File, name string) error {
		if dead(name) {
			errs = append(errs, d.remove(folder, name))
		}
		return nil
	})
	return errors.Join(append(errs, err)...)
}

// remove removes folder/name, which nothing refers to any more. Several
// processes may do that to the same one.
func (d *Directory) remove(folder, name string) error {
	path := folder + "/" + name
	if w, err := d.root.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
		d.trees.Remove(w)
		w.Close() // was only read
	}
	return Fault(d.root.RemoveAll(path))
}

// Scratch lends an empty folder in tmp/, and removes it with all that is in it.
func (d *Directory) Scratch(do func(folder *os.File) error) error {
	name := d.unique()
	if err := unix.Mkdirat(int(d.tmp.Fd()), name, 0o700); err != nil {
		return Fault(&os.PathError{Op: "mkdir", Path: filepath.Join(d.tmp.Name(), name), Err: err})
	}
	folder, err := openat(d.tmp, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		release := hold(folder)
		err = do(folder)
		release()
		err = errors.Join(err, folder.Close())
	}
	return errors.Join(Fault(err), d.remove("tmp", name))
}

// unique is a name in tmp/ or trash/ that nobody else has.
func (d *Directory) unique() string { return d.host + rand.Text() }

// place makes a file durable under a name in dir: complete, or not at all. The
// error is fs.ErrExist when the name is taken.
func (d *Directory) place(dir *os.File, name string, fill func(*os.File) error) error {
	err := d.tryPlace(dir, name, fill)
	if errors.Is(Fault(err), fault.Exhausted) {
		// What is there already is not left undone for want of room.
		if unix.Fstatat(int(dir.Fd()), name, new(unix.Stat_t), unix.AT_SYMLINK_NOFOLLOW) == nil {
			return fs.ErrExist
		}
	}
	return err
}

func (d *Directory) tryPlace(dir *os.File, name string, fill func(*os.File) error) error {
	tmp := d.unique()
	f, err := openat(d.tmp, tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	release := hold(f)
	// Each may fail without harm: the file is synced, and what stays in tmp/ is swept.
	defer func() { release(); f.Close(); unix.Unlinkat(int(d.tmp.Fd()), tmp, 0) }()
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Linkat(int(d.tmp.Fd()), tmp, int(dir.Fd()), name, 0); err != nil {
		return &os.LinkError{Op: "link", Old: filepath.Join("tmp", tmp), New: filepath.Join(dir.Name(), name), Err: err}
	}
	return published(dir)
}

// published makes dir durable after a name was put into it. When that fails the
// name may or may not survive: never Exhausted, which promises that nothing remains.
func published(dir *os.File) error {
	if err := dir.Sync(); err != nil {
		return fault.New(fault.Unavailable, "whether it was done is unknown: %w", err)
	}
	return nil
}

// openat opens name in dir, never through a symlink, and never waits for a pipe.
func openat(dir *os.File, name string, flags int) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// each calls do for every name in the folder dir/name.
func each(ctx context.Context, dir *os.File, name string, do func(folder *os.File, name string) error) error {
	folder, err := openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer folder.Close()
	list, err := names(folder)
	if err != nil {
		return err
	}
	for _, name := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := do(folder, name); err != nil {
			return err
		}
	}
	return nil
}

// Fault gives a failure of the file system its kind. Errors that have one, nil
// and engine.ErrDeclined stay as they are.
func Fault(err error) error {
	var known *fault.Error
	var errno unix.Errno
	if err == nil || errors.As(err, &known) || errors.Is(err, engine.ErrDeclined) {
		return err
	}
	if !errors.As(err, &errno) {
		return fault.Wrap(fault.KindOf(err), err)
	}
	switch errno {
	case unix.ENOSPC, unix.EDQUOT:
		return fault.Wrap(fault.Exhausted, err)
	case unix.EFBIG:
		return fault.Wrap(fault.OutOfRange, err)
	case unix.EROFS, unix.EACCES, unix.EPERM:
		return fault.Wrap(fault.Permission, err)
	case unix.EINVAL, unix.EBADF, unix.EFAULT, unix.ENAMETOOLONG:
		return fault.Wrap(fault.Internal, err)
	}
	return fault.Wrap(fault.Unavailable, err)
}
