package mover

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// fileJob is a regular file to copy.
type fileJob struct {
	file  *handle // source, O_PATH
	dir   *handle // target directory
	name  string  // in it
	fd    int     // of the target if it was made already, else -1
	state *dirState
	path  string
}

func (j *fileJob) close() {
	j.file.release()
	j.dir.release()
	if j.fd >= 0 {
		_ = unix.Close(j.fd) // flushed by syncfs
	}
}

// submit gives a file to the workers. One with several names is made at once,
// because the next name may come before its content.
func (t *treeCopy) submit(e *entry, dir *handle, name string) error {
	j := fileJob{file: e.file.hold(), dir: dir.hold(), name: name, fd: -1, path: e.path}
	if e.st.Nlink > 1 {
		if err := j.create(); err != nil {
			j.close()
			return err
		}
	} else {
		j.state = t.open[len(t.open)-1]
		j.state.pending.Add(1)
	}
	select {
	case t.jobs <- j:
		return nil
	case <-t.ctx.Done():
		j.close()
		return t.ctx.Err()
	}
}

func (j *fileJob) create() (err error) {
	j.fd, err = retryN(func() (int, error) {
		return unix.Openat(j.dir.fd, j.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	})
	return err
}

// work copies files until there are no more.
func (t *treeCopy) work(ctx context.Context) error {
	buf := alignedBuffer(t.m.buffer)
	zeros := make([]byte, sparseUnit)
	for j := range t.jobs {
		err := ctx.Err()
		if err == nil {
			err = t.copyFile(ctx, &j, buf, zeros)
		}
		if err == nil {
			err = j.state.settle(j.dir.fd)
		}
		j.close()
		if err != nil {
			return sysErr(err, "copy", j.path)
		}
	}
	return nil
}

// copyFile copies content and metadata of one file.
func (t *treeCopy) copyFile(ctx context.Context, j *fileJob, buf, zeros []byte) error {
	m, err := readMeta(j.file.fd, j.path) // before reading, which changes the access time
	if err != nil {
		return err
	}
	src, err := reopen(j.file.fd, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	if j.fd < 0 {
		if err := j.create(); err != nil {
			return err
		}
	}
	p := &pair{
		src: src, dst: j.fd, srcName: j.path, dstName: j.path, dstZeroed: true,
		noRange: &t.noRange, throttle: t.m.throttle, zeros: zeros,
	}
	for tries := 3; ; tries-- {
		err := t.copyContent(ctx, p, m.st.Size, buf)
		if err != nil && fault.KindOf(err) != fault.Corrupt { // Corrupt: it shrank
			return err
		}
		now, serr := statFD(src)
		if serr != nil {
			return serr
		}
		if err == nil && now.Size == m.st.Size && now.Mtim == m.st.Mtim {
			break
		}
		if err != nil && now.Size >= m.st.Size && now.Mtim == m.st.Mtim {
			return err // unchanged, yet shorter than it says
		}
		if tries == 1 {
			return fault.New(fault.Conflict, "file %q keeps changing while it is being copied: copy it when nobody writes it", j.path)
		}
		if m, err = readMeta(j.file.fd, j.path); err != nil {
			return err
		}
		if err := unix.Ftruncate(j.fd, 0); err != nil { // what was there must not shine through
			return err
		}
	}
	t.mu.Lock()
	t.stats.Bytes += m.st.Size
	t.mu.Unlock()
	return m.apply(j.fd)
}

// copyContent copies size bytes into an empty target.
func (t *treeCopy) copyContent(ctx context.Context, p *pair, size int64, buf []byte) error {
	if size == 0 {
		return nil
	}
	if !t.noClone.Load() {
		// The whole file, to its end: the only length that need not be aligned.
		ok, err := p.clone(0, 0)
		if err != nil {
			return err
		}
		if ok {
			t.moved(size)
			return unix.Ftruncate(p.dst, size)
		}
		t.noClone.Store(true)
	}
	if err := unix.Ftruncate(p.dst, size); err != nil {
		return err
	}
	x := &extents{fd: p.src}
	hidden, err := x.hidden(size)
	if err != nil {
		return err
	}
	p.detectZeros = hidden
	for off := int64(0); off < size; {
		start, stop, err := x.next(off, size)
		if err != nil {
			return err
		}
		for at := start; at < stop; {
			n := min(stop-at, int64(len(buf)))
			if err := p.copy(ctx, at, n, buf); err != nil {
				return err
			}
			at += n
			t.moved(n)
		}
		t.moved(start - off)
		off = stop
	}
	return nil
}
