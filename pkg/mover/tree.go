package mover

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Tree makes the directory dst equal to the directory src and returns what was
// copied. Both must exist; what dst held before is removed first, so a copy that
// was broken off is simply made again.
//
// Kept are contents with their holes, names (any bytes, any depth), owners,
// modes with set-id and sticky bits, modification and access times,
// extended attributes with ACLs and file capabilities, hard links within the
// tree, symbolic links as they are, FIFOs, sockets, device nodes, and the root
// directory's own metadata. Not kept are inode flags (chattr), creation times
// and what only the storage knows, such as compression.
//
// No link is followed. A directory on which something is mounted becomes an
// empty one. A file that was removed before it was reached is left out; one
// that changes while it is copied is copied again, at most three times.
//
// progress (may be nil) is called by one goroutine at a time, at most ten
// times per second and once at the end, with growing bytes of file content.
//
// Errors: fault.Invalid: not directories, or one holds the other.
// fault.InUse: dst is locked or holds a mount point, or something is mounted on a
// file in src. fault.Unsupported: dst cannot keep something that src has, such
// as an extended attribute. fault.Conflict: src keeps changing.
// fault.Exhausted: no space. fault.Unavailable: an I/O error. fault.Canceled,
// fault.Deadline: ctx ended.
func (m *Mover) Tree(ctx context.Context, src, dst string, progress func(done, total int64)) (TreeStats, error) {
	s, err := openRoot(src)
	if err != nil {
		return TreeStats{}, err
	}
	defer s.release()
	d, err := openRoot(dst)
	if err != nil {
		return TreeStats{}, err
	}
	defer d.release()
	err = retry(func() error { return unix.Flock(d.fd, unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return TreeStats{}, fault.New(fault.InUse, "copy target %q is locked: another process still writes it", dst)
	}
	if err != nil {
		return TreeStats{}, sysErr(err, "lock", dst)
	}
	defer func() { _ = unix.Flock(d.fd, unix.LOCK_UN) }() // as in store.close
	t := &treeCopy{m: m, src: s, dst: d, srcName: src, dstName: dst, progress: progress}
	if err := t.run(ctx); err != nil {
		if ctx.Err() != nil {
			return t.stats, canceled(ctx, "copy of "+src)
		}
		return t.stats, err
	}
	return t.stats, nil
}

func openRoot(path string) (*handle, error) {
	fd, err := retryN(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	})
	if err == unix.ENOTDIR {
		return nil, fault.New(fault.Invalid, "%q is not a directory", path)
	}
	if err != nil {
		return nil, sysErr(err, "open directory", path)
	}
	return newHandle(fd), nil
}

// treeCopy is one running tree copy. It visits the source; files are copied by
// workers.
type treeCopy struct {
	m                *Mover
	src, dst         *handle
	srcName, dstName string
	jobs             chan fileJob
	ctx              context.Context // ends with the first error
	stats            TreeStats       // Bytes under mu until the workers have ended
	links            *linkStash

	to   chain       // the target directory that corresponds to the one visited
	open []*dirState // of each level of to

	noClone, noRange atomic.Bool

	mu       sync.Mutex
	progress func(done, total int64)
	done     int64
	total    int64
	reported time.Time
}

// dirState is a target directory whose metadata is set when nothing in it
// changes any more.
type dirState struct {
	pending atomic.Int64 // the visitor, and files that workers have yet to make
	meta    meta
}

// settle notes that one of pending has ended; fd is any descriptor of the directory.
func (s *dirState) settle(fd int) error {
	if s == nil || s.pending.Add(-1) > 0 {
		return nil
	}
	return s.meta.apply(fd)
}

func (t *treeCopy) run(ctx context.Context) error {
	rootMeta, err := t.prepare(ctx)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	t.ctx = gctx
	t.jobs = make(chan fileJob, 2*t.m.workers)
	defer t.to.close()
	root := &dirState{meta: rootMeta}
	root.pending.Store(1)
	g.Go(func() error {
		defer close(t.jobs)
		fd, err := openAt(t.dst.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return sysErr(err, "open", t.dstName)
		}
		if err := t.to.push(fd); err != nil {
			return sysErr(err, "stat", t.dstName)
		}
		t.open = []*dirState{root}
		return walk(gctx, t.src.fd, t.srcName, t)
	})
	for range t.m.workers {
		g.Go(func() error { return t.work(gctx) })
	}
	err = g.Wait()
	for j := range t.jobs { // what no worker took after an error
		j.close()
	}
	if err == nil {
		err = t.links.remove()
	} else {
		t.links.close()
	}
	if err != nil {
		return err
	}
	if err := root.settle(t.dst.fd); err != nil {
		return err
	}
	return t.finish(ctx)
}

// prepare checks both sides, empties the target and reads the root's metadata.
func (t *treeCopy) prepare(ctx context.Context) (meta, error) {
	sm, err := readMeta(t.src.fd, t.srcName)
	if err != nil {
		return sm, err
	}
	ds, err := statFD(t.dst.fd)
	if err != nil {
		return sm, sysErr(err, "stat", t.dstName)
	}
	if idOf(&sm.st) == idOf(&ds) {
		return sm, fault.New(fault.Invalid, "copy source %q and target %q are the same", t.srcName, t.dstName)
	}
	size, err := scan(ctx, t.src.fd, t.srcName, idOf(&ds), t.dstName)
	if err != nil {
		return sm, err
	}
	t.total = size.Bytes
	if _, err := scan(ctx, t.dst.fd, t.dstName, idOf(&sm.st), t.srcName); err != nil {
		return sm, err
	}
	if err := wipe(ctx, t.dst.fd, t.dstName); err != nil {
		return sm, err
	}
	if err := strip(t.dst.fd, t.dstName); err != nil {
		return sm, err
	}
	// Nobody enters while it is filled; and a set-group-ID bit is not inherited.
	if err := unix.Fchmod(t.dst.fd, 0o700); err != nil {
		return sm, sysErr(err, "set mode of", t.dstName)
	}
	t.links = &linkStash{root: t.dst, groups: map[fileID]*linkGroup{}}
	return sm, t.links.chooseName(t.src.fd)
}

// finish makes the copy durable and counts it again.
func (t *treeCopy) finish(ctx context.Context) error {
	if err := retry(func() error { return unix.Syncfs(t.dst.fd) }); err != nil {
		return sysErr(err, "flush the file system of", t.dstName)
	}
	got, err := scan(ctx, t.dst.fd, t.dstName, fileID{}, "")
	if err != nil {
		return err
	}
	if got != t.stats {
		return fault.New(fault.Corrupt, "copy %q holds %+v, but %+v were copied", t.dstName, got, t.stats)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.progress != nil {
		t.total = max(t.total, t.done) // the source may have changed
		t.progress(t.total, t.total)
	}
	return nil
}

// moved takes note of n copied bytes.
func (t *treeCopy) moved(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done += n
	if t.progress == nil || time.Since(t.reported) < progressEvery {
		return
	}
	t.reported = time.Now()
	t.progress(min(t.done, t.total), t.total)
}

// visit implements visitor: it makes everything but the content of files.
func (t *treeCopy) visit(e *entry) error {
	t.stats.add(e.st.Mode, 1)
	if isDirectory(&e.st) {
		return t.makeDirectory(e)
	}
	dir, name := t.to.top(), e.name
	if e.st.Nlink > 1 {
		first, linked, err := t.links.find(e, uint64(e.st.Nlink), dir)
		if err != nil || linked {
			return err
		}
		dir, name = t.links.dir, first
	}
	if err := t.makeFile(e, dir, name); err != nil {
		return err
	}
	if e.st.Nlink > 1 {
		return t.links.place(e, t.to.top())
	}
	return nil
}

func (t *treeCopy) makeFile(e *entry, dir *handle, name string) error {
	var err error
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return t.submit(e, dir, name)
	case unix.S_IFLNK:
		var target []byte
		if target, err = readLink(e.file.fd); err == nil {
			err = unix.Symlinkat(string(target), dir.fd, name)
		}
	default:
		err = unix.Mknodat(dir.fd, name, e.st.Mode&unix.S_IFMT|0o600, int(e.st.Rdev))
	}
	if err != nil {
		return err
	}
	m, err := readMeta(e.file.fd, e.path)
	if err != nil {
		return err
	}
	fd, err := openEntry(dir.fd, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return m.apply(fd)
}

func readLink(fd int) ([]byte, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	return buf[:max(n, 0)], err
}

func (t *treeCopy) makeDirectory(e *entry) error {
	m, err := readMeta(e.file.fd, e.path)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(t.to.top().fd, e.name, 0o700); err != nil {
		return err
	}
	fd, err := openAt(t.to.top().fd, e.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	if err := t.to.push(fd); err != nil {
		return err
	}
	state := &dirState{meta: m}
	state.pending.Store(1)
	t.open = append(t.open, state)
	return nil
}

// leave implements visitor.
func (t *treeCopy) leave(*entry) error {
	n := len(t.open) - 1
	if err := t.open[n].settle(t.to.top().fd); err != nil {
		return err
	}
	t.open = t.open[:n]
	return t.to.pop()
}

// mountPoint implements visitor.
func (t *treeCopy) mountPoint(dir *handle, name, path string) error {
	m := meta{path: path}
	if err := unix.Fstatat(dir.fd, name, &m.st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if !isDirectory(&m.st) {
		return fault.New(fault.InUse, "something is mounted on the file %q: unmount it first", path)
	}
	t.stats.add(m.st.Mode, 1)
	if err := unix.Mkdirat(t.to.top().fd, name, 0o700); err != nil {
		return err
	}
	fd, err := openAt(t.to.top().fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return m.apply(fd)
}
