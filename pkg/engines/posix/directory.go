// Package posix keeps the slabs and tags of a domain in a POSIX directory. It
// is the shared base of the engines that have one: a local directory, a file
// share.
//
//	slabs/<id>           a file is a block slab; a directory is a tree slab
//	slabs/<id>/data      what users see of a tree slab
//	slabs/<id>/spec      its promised size; spec.<n>: that which took the place of the size n
//	tags/<class>/<name>  a tag; its class is its name up to the first dot
//	identity             the storage's random ID, where it was asked for
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
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// What is in tmp/ is locked (flock) by who makes it. A left-over of this host that nobody
// holds is swept at the age of abandonedAfter, which only bridges the moment
// between making and locking; at deadAfter whatever the lock says, because some
// storages have none, and whoever made it: an agent's host name may be that of a pod, which never
// comes back. Nothing stays unchanged that long while somebody works on it: of a copy, which may take longer, each
// step is a write. What is swept all the same gets no other name any more, and the verb fails.
const (
	abandonedAfter = 2 * time.Second
	deadAfter      = 7 * 24 * time.Hour
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
	folder                  *os.File // the directory itself
	options                 Options
	trees                   Trees
	host                    string   // prefix of this host's names in tmp/
	classes                 sync.Map // classes of tags that are known to be durable
	reserve                 reserve
	made                    []string   // folders that were not there before
	growing                 sync.Mutex // held to grow a slab on a storage without locks
}

// Open opens the directory at an absolute path that exists, and makes the
// folders that are missing. fault.Invalid:
// nothing can be kept there. fault.Unavailable: it is not there now.
func Open(path string, o Options) (*Directory, error) {
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
	if o.Trees == nil {
		o.Trees = plain{}
	}
	d := &Directory{path: path, root: root, options: o, trees: o.Trees,
		host: fmt.Sprintf("%08x.", crc32.ChecksumIEEE([]byte(hostname)))}
	if d.folder, err = root.OpenFile(".", os.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return nil, errors.Join(Fault(err), d.Close())
	}
	for name, f := range map[string]**os.File{"slabs": &d.slabs, "tags": &d.tags, "tmp": &d.tmp, "trash": &d.trash} {
		err := root.Mkdir(name, 0o700)
		if err == nil {
			d.made = append(d.made, name)
		}
		if err == nil || errors.Is(err, fs.ErrExist) {
			*f, err = root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY, 0)
		}
		if errors.Is(err, unix.ENOTDIR) {
			err = fault.New(fault.Invalid, "%s is not a directory: it cannot hold a domain's %s", filepath.Join(path, name), name)
		}
		if err != nil {
			return nil, errors.Join(Fault(err), d.Unmake(), d.Close())
		}
	}
	if d.made != nil {
		err := d.syncFolder(d.folder)
		if errors.Is(err, unix.EINVAL) {
			err = fault.New(fault.Invalid, "%s cannot hold a domain: a folder cannot be made durable: %w", path, err)
		}
		if err != nil {
			return nil, errors.Join(Fault(err), d.Unmake(), d.Close())
		}
	}
	d.reserve.missing.Store(true) // until looked at
	d.keepReserve()
	return d, nil
}

// Close implements engine.Engine.
func (d *Directory) Close() error {
	err := d.root.Close()
	for _, f := range []*os.File{d.folder, d.slabs, d.tags, d.tmp, d.trash} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return Fault(err)
}

// Alive asks the storage for a sign of life, and whether the open folders are still its own. A
// stale one is unix.ESTALE.
func (d *Directory) Alive() error {
	for _, f := range []*os.File{d.slabs, d.tags, d.tmp, d.trash} {
		if _, err := statfs(f); err != nil {
			return Fault(&os.PathError{Op: "statfs", Path: f.Name(), Err: err})
		}
		if _, err := stat(f); err != nil {
			return Fault(&os.PathError{Op: "stat", Path: f.Name(), Err: err})
		}
	}
	return nil
}

// Unmake removes what Open has made where nothing was, as long as nothing is in it.
func (d *Directory) Unmake() error {
	var errs []error
	if len(d.made) == 4 { // else the reserve may be another's
		for i := range reserveFiles {
			errs = append(errs, d.root.Remove(fmt.Sprintf("reserve/%d", i)))
		}
		errs = append(errs, d.root.Remove("reserve"))
	}
	for _, name := range d.made {
		errs = append(errs, d.root.Remove(name))
	}
	return Fault(errors.Join(slices.DeleteFunc(errs, func(err error) bool { return errors.Is(err, fs.ErrNotExist) })...))
}

// Path is where the directory was opened.
func (d *Directory) Path() string { return d.path }

// Clean removes what earlier processes left: trees that were deleted, and what
// was begun and nobody works on any more. Other processes may be at work here.
func (d *Directory) Clean(ctx context.Context) error {
	err := d.removeAll(ctx, d.trash, "trash", func(string) bool { return true })
	now, probe := time.Time{}, d.unique()
	f, errProbe := create(d.tmp, probe) // the storage's clock, not ours
	if errProbe != nil {
		return errors.Join(err, Fault(errProbe))
	}
	if info, err := f.Stat(); err == nil {
		now = info.ModTime()
	}
	errProbe = errors.Join(f.Close(), unlinkat(d.tmp, probe, 0))
	return errors.Join(err, Fault(errProbe), d.removeAll(ctx, d.tmp, "tmp", func(name string) bool {
		info, err := d.root.Lstat("tmp/" + name)
		if err != nil {
			return false
		}
		age := now.Sub(info.ModTime())
		return age > deadAfter || strings.HasPrefix(name, d.host) && age > abandonedAfter && d.abandoned(name)
	}))
}

// abandoned says whether nobody holds something in tmp/.
func (d *Directory) abandoned(name string) bool {
	if d.options.NoLocks {
		return false
	}
	f, err := openat(d.tmp, name, unix.O_RDWR) // NFS 4 locks nothing that is open for reading alone
	if errors.Is(err, unix.EISDIR) {
		f, err = openat(d.tmp, name, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	if err != nil {
		return false
	}
	defer f.Close() // was only read
	if flock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return false
	}
	return flock(f, unix.LOCK_UN) == nil
}

// hold locks something in tmp/ until release is called. Closing f would not do:
// a program that is being started at that moment has the file open until its
// exec, and the next user of the file would find it locked. Where the storage
// has no locks, its age alone protects it.
func (d *Directory) hold(f *os.File) (release func()) {
	if d.options.NoLocks || flock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return func() {}
	}
	return func() { _ = flock(f, unix.LOCK_UN) } // nothing is lost by a lock that stays a moment longer
}

func (d *Directory) removeAll(ctx context.Context, dir *os.File, folder string, dead func(name string) bool) error {
	var errs []error
	err := d.each(ctx, dir, ".", func(_ *os.File, name string) error {
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
	if err := mkdir(d.tmp, name, 0o700); err != nil {
		return Fault(err)
	}
	folder, err := openat(d.tmp, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		release := d.hold(folder)
		err = do(folder)
		release()
		err = errors.Join(err, folder.Close())
	}
	return errors.Join(Fault(err), d.remove("tmp", name))
}
