package posix

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Tried is what a storage turned out to do, beside what it must. A nil field: it does; else why not.
type Tried struct {
	Reflink  error // FICLONE between two files
	Copy     error // copy_file_range without the bytes passing through this host
	Locks    error // flock keeps others out
	Sparse   error // a large file without content takes no room
	DirectIO error
}

// Try finds out what the storage of the directory does, by doing it in a folder of its own. What
// slabs and tags depend on has to work: where it does not, the error is fault.Invalid and says what
// is wrong and what would help. fault.Exhausted: the storage is full, and nothing could be tried.
func (d *Directory) Try(ctx context.Context) (Tried, error) {
	var t Tried
	err := d.Scratch(func(folder *os.File) error {
		for _, must := range []func(*os.File) error{d.tryFiles, d.tryLinks, d.tryRenames, d.tryNames, d.tryOwner} {
			if err := errors.Join(ctx.Err(), must(folder)); err != nil {
				return err
			}
		}
		t.Reflink, t.Copy = TryReflink(folder), tryCopy(folder)
		t.Locks, t.Sparse, t.DirectIO = tryLocks(folder), trySparse(folder), tryDirectIO(folder)
		return nil
	})
	for _, e := range []error{t.Reflink, t.Copy, t.Sparse, t.DirectIO} {
		if full := Fault(e); errors.Is(full, fault.Exhausted) {
			return t, full
		}
	}
	return t, err
}

// cannot is the error of a storage that lacks what everything depends on. One that is full, or
// fails just now, may well have it.
func cannot(format string, args ...any) error {
	for _, a := range args {
		err, _ := a.(error)
		var errno unix.Errno
		if !errors.As(err, &errno) {
			continue
		}
		switch errno {
		case unix.ENOSPC, unix.EDQUOT, unix.ESTALE, unix.ENOTCONN, unix.EIO, unix.ETIMEDOUT, unix.EHOSTDOWN, unix.EROFS:
			return Fault(err)
		}
	}
	return fault.New(fault.Invalid, "the storage cannot hold a domain: %w", fmt.Errorf(format, args...))
}

// write makes a file with content, and returns it open.
func write(folder *os.File, name, content string) (*os.File, error) {
	f, err := create(folder, name)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteString(content); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// put makes a file with content.
func put(folder *os.File, name, content string) error {
	f, err := write(folder, name, content)
	if err != nil {
		return err
	}
	return f.Close()
}

// holds says with nil that a file has that content and no other.
func holds(folder *os.File, name, content string) error {
	f, err := openat(folder, name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	have := make([]byte, len(content)+1)
	n, _ := f.ReadAt(have, 0) // it ends before have does
	if string(have[:n]) != content {
		return fmt.Errorf("%s holds %q, and %q was written", name, have[:n], content)
	}
	return nil
}

// tryFiles: a file keeps its content, and file and folder can be made durable.
func (d *Directory) tryFiles(folder *os.File) error {
	f, err := write(folder, "file", "kept")
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		_ = f.Close() // it is of no use
		return cannot("a file cannot be made durable: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := d.syncFolder(folder); err != nil {
		return cannot("a folder cannot be made durable: %w", err)
	}
	if err := holds(folder, "file", "kept"); err != nil {
		return cannot("a file does not keep its content: %w", err)
	}
	return nil
}

// tryLinks: a second name is the same file, and no name that is taken is given to another.
func (d *Directory) tryLinks(folder *os.File) error {
	for _, name := range []string{"first", "second"} {
		if err := put(folder, name, name); err != nil {
			return err
		}
	}
	if err := linkat(folder, "first", folder, "linked"); err != nil && err != unix.EEXIST { // a lost reply: what is there is looked at
		return cannot("it has no hard links, by which a tag gets its name: %w", err)
	}
	first, err := statat(folder, "first")
	if err != nil {
		return err
	}
	linked, err := statat(folder, "linked")
	if err != nil {
		return cannot("a hard link that was made is not there: %w", err)
	}
	if first.Ino != linked.Ino || first.Dev != linked.Dev {
		return cannot("a hard link (inode %d) is another file than the one that it was made of (inode %d): inode numbers have to stay the same", linked.Ino, first.Ino)
	}
	switch err := linkat(folder, "first", folder, "second"); {
	case err == nil:
		return cannot("a hard link took the place of a file that had the name: two nodes could have the same tag")
	case err != unix.EEXIST:
		return cannot("a hard link to a name that is taken fails with %q, not %q", err, unix.EEXIST)
	}
	for name, content := range map[string]string{"linked": "first", "second": "second"} {
		if err := holds(folder, name, content); err != nil {
			return cannot("after hard links were made: %w", err)
		}
	}
	return nil
}

// tryRenames: a folder is moved, and not onto one that holds something.
func (d *Directory) tryRenames(folder *os.File) error {
	for _, name := range []string{"from", "to"} {
		if err := mkdir(folder, name, 0o700); err != nil {
			return err
		}
		in, err := openat(folder, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		if err := errors.Join(put(in, "of", name), in.Close()); err != nil {
			return err
		}
	}
	if err := renameat(folder, "from", folder, "moved"); err != nil && err != unix.ENOENT {
		return cannot("a folder cannot be renamed: %w", err)
	}
	if err := renameat(folder, "moved", folder, "to"); err == nil {
		return cannot("a folder was renamed onto another that was not empty: two nodes could make the same slab")
	}
	for _, name := range []string{"moved", "to"} {
		want := map[string]string{"moved": "from", "to": "to"}[name]
		in, err := openat(folder, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == nil {
			err = errors.Join(holds(in, "of", want), in.Close())
		}
		if err != nil {
			return cannot("after folders were renamed: %w", err)
		}
	}
	return nil
}

// tryNames: the names of slabs and tags come back as they were made.
func (d *Directory) tryNames(folder *os.File) error {
	long := strings.Repeat("n", engine.MaxName-1) // two that differ at the very end
	var want []string
	for _, name := range []string{long + "1", long + "2", "ends.with.", "ends.with", "ends_with_", "ends-with-", "con", "aux.1"} {
		want = append(want, d.onDisk(name))
	}
	open := func() (*os.File, error) { return openat(folder, "names", unix.O_RDONLY|unix.O_DIRECTORY) }
	if err := mkdir(folder, "names", 0o700); err != nil {
		return err
	}
	in, err := open()
	if err != nil {
		return err
	}
	defer in.Close()
	for _, name := range want {
		if err := put(in, name, ""); err != nil {
			return cannot("a file cannot have the name %q (%d bytes): %w", short(name), len(name), err)
		}
	}
	listing, err := open() // some show what was there when they were opened
	if err != nil {
		return err
	}
	defer listing.Close()
	have, err := names(listing)
	if err != nil {
		return err
	}
	slices.Sort(want)
	slices.Sort(have)
	for i, name := range want {
		if i >= len(have) || have[i] != name {
			return cannot("of %d files whose names were made, %d are listed, and %q (%d bytes) is not among them", len(want), len(have), short(name), len(name))
		}
	}
	return nil
}

// short is a name for messages.
func short(name string) string {
	if len(name) > 20 {
		return name[:20] + "..."
	}
	return name
}

// tryOwner: what is made belongs to this process's user, and has the mode that it is given.
func (d *Directory) tryOwner(folder *os.File) error {
	if d.options.NoOwner {
		return nil
	}
	if err := mkdir(folder, "owned", 0o700); err != nil {
		return err
	}
	f, err := openat(folder, "owned", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := stat(f)
	if err != nil {
		return err
	}
	if int(st.Uid) != os.Geteuid() {
		return cannot("what user %d makes belongs to user %d: its users are mapped to others (root_squash, all_squash), and directory volumes need their owners; export it with no_root_squash", os.Geteuid(), st.Uid)
	}
	const mode = 0o2771
	if err := uninterrupted(func() error { return unix.Fchmod(int(f.Fd()), mode) }); err != nil {
		return cannot("a folder cannot be given a mode: %w", err)
	}
	st, err = stat(f)
	if err == nil && st.Mode&0o7777 != mode {
		err = cannot("a folder with the mode %#o has %#o after it was set", mode, st.Mode&0o7777)
	}
	return err
}

const pieces = 256 << 10

// TryReflink says with nil that files in a folder can share their blocks.
func TryReflink(folder *os.File) error {
	from, err := write(folder, "reflink.from", strings.Repeat("quarry. ", pieces/8))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := write(folder, "reflink.to", "")
	if err != nil {
		return err
	}
	defer to.Close()
	if err := uninterrupted(func() error { return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) }); err != nil {
		return fmt.Errorf("the file system has no reflinks: %w", err)
	}
	return holds(folder, "reflink.to", strings.Repeat("quarry. ", pieces/8))
}

// tryCopy says with nil that the storage copies by itself. Where it does not, the kernel reads and
// writes through this host without saying so; but then what was copied is in its page cache.
func tryCopy(folder *os.File) error {
	content := strings.Repeat("copied. ", pieces/8)
	from, err := write(folder, "copy.from", content)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := from.Sync(); err != nil {
		return err
	}
	to, err := write(folder, "copy.to", "")
	if err != nil {
		return err
	}
	defer to.Close()
	for at := int64(0); at < pieces; {
		n, err := copyRange(to, from, at, pieces-at)
		if errors.Is(err, engine.ErrDeclined) {
			return errors.New("the kernel has no copy_file_range for it")
		}
		if err != nil {
			return err
		}
		at += n
	}
	cached, err := inPageCache(to)
	if err != nil {
		return fmt.Errorf("whether the storage copies by itself cannot be seen: %w", err)
	}
	if cached {
		return errors.New("the bytes pass through this host")
	}
	return holds(folder, "copy.to", content)
}

// inPageCache says whether any of the first pieces bytes of a file is in this host's memory.
func inPageCache(f *os.File) (bool, error) {
	m, err := unix.Mmap(int(f.Fd()), 0, pieces, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, err
	}
	defer func() { _ = unix.Munmap(m) }()
	pages := make([]byte, pieces/os.Getpagesize())
	if err := mincore(m, pages); err != nil {
		return false, err
	}
	return bytes.ContainsFunc(pages, func(r rune) bool { return r&1 != 0 }), nil
}

// tryLocks: of two who have a file open, one gets the lock.
func tryLocks(folder *os.File) error {
	a, err := write(folder, "locked", "")
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := openat(folder, "locked", unix.O_RDWR)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := flock(a, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("there are no locks (flock): %w", err)
	}
	if err := flock(b, unix.LOCK_EX|unix.LOCK_NB); err == nil {
		return errors.New("a lock (flock) keeps nobody out")
	}
	return flock(a, unix.LOCK_UN)
}

// trySparse: a file of 64 MiB without content takes nearly no room.
func trySparse(folder *os.File) error {
	f, err := write(folder, "sparse", "")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	st, err := stat(f)
	if err == nil && st.Blocks*512 > 1<<20 {
		err = fmt.Errorf("a file of 64 MiB without content takes %d KiB: volumes take their whole size at once", st.Blocks/2)
	}
	return err
}

func tryDirectIO(folder *os.File) error {
	f, err := openat(folder, "direct", unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT)
	if err != nil {
		return fmt.Errorf("a file cannot be opened for direct I/O: %w", err)
	}
	defer f.Close()
	page, err := unix.Mmap(-1, 0, Granularity, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(page) }()
	if _, err := f.WriteAt(page, 0); err != nil {
		return fmt.Errorf("direct I/O of %d bytes fails: %w", Granularity, err)
	}
	return nil
}
