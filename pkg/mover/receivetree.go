package mover

import (
	"context"
	"io"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// ReceiveTree implements Files: it is the target's half of Tree, over a connection from
// SendTree. The reader has to end with ctx.
func (m *Mover) ReceiveTree(ctx context.Context, dst string, progress func(done, total int64), from io.Reader) error {
	d, err := openRoot(dst)
	if err != nil {
		return err
	}
	defer d.release()
	err = retry(func() error { return unix.Flock(d.fd, unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return fault.New(fault.InUse, "copy target %q is locked: another process still writes it", dst)
	}
	if err != nil {
		return sysErr(err, "lock", dst)
	}
	defer func() { _ = unix.Flock(d.fd, unix.LOCK_UN) }() // as in store.close
	r := &treeReceiver{treeCopy: treeCopy{m: m, dst: d, dstName: dst, progress: progress, ctx: ctx}, r: newWireReader(from),
		buf: alignedBuffer(m.buffer), zeros: make([]byte, sparseUnit)}
	if err := r.run(); err != nil {
		if ctx.Err() != nil {
			return canceled(ctx, "copy into "+dst)
		}
		return err
	}
	return nil
}

// treeReceiver makes what a treeSender sends.
type treeReceiver struct {
	treeCopy
	r          *wireReader
	metas      []meta // of the directories that are open, the root's first
	buf, zeros []byte
}

func (t *treeReceiver) run() error {
	h, err := t.r.head()
	if err != nil {
		return err
	}
	var root wireNode
	if err := t.r.entry(h, &root); err != nil {
		return err
	}
	if h.kind != wireEntry || root.Mode&unix.S_IFMT != unix.S_IFDIR || !strings.HasPrefix(string(root.Name), stashPrefix) || plainName(string(root.Name)) != nil {
		return garbled("a root of mode %o with the stash %q", root.Mode, root.Name)
	}
	t.total = root.Size
	if err := t.empty(); err != nil {
		return err
	}
	t.links = &linkStash{root: t.dst, name: string(root.Name), groups: map[fileID]*linkGroup{}}
	defer t.links.close()
	defer t.to.close()
	fd, err := openAt(t.dst.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return sysErr(err, "open", t.dstName)
	}
	if err := t.to.push(fd); err != nil {
		return sysErr(err, "stat", t.dstName)
	}
	m, err := root.meta(t.dstName)
	if err != nil {
		return err
	}
	t.metas = []meta{m}
	for len(t.metas) > 0 {
		if err := t.next(); err != nil {
			return err
		}
	}
	return t.finish(t.ctx)
}

// empty makes the target ready to be filled.
func (t *treeReceiver) empty() error {
	if err := wipe(t.ctx, t.dst.fd, t.dstName); err != nil {
		return err
	}
	if err := strip(t.dst.fd, t.dstName); err != nil {
		return err
	}
	return sysErr(unix.Fchmod(t.dst.fd, 0o700), "set mode of", t.dstName)
}

// next takes one name, or the end of a directory or of all.
func (t *treeReceiver) next() error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	h, err := t.r.head()
	if err != nil {
		return err
	}
	last := len(t.metas) - 1
	switch {
	case h.kind == wireEntry:
		var n wireNode
		if err := t.r.entry(h, &n); err != nil {
			return err
		}
		if err := plainName(string(n.Name)); err != nil {
			return err
		}
		return sysErr(t.enter(&n), "make", t.dstName+"/.../"+string(n.Name))
	case h.kind == wireLeave && last > 0:
		if err := t.metas[last].apply(t.to.top().fd); err != nil {
			return err
		}
		t.metas = t.metas[:last]
		return sysErr(t.to.pop(), "leave a directory in", t.dstName)
	case h.kind == wireEnd && last == 0:
		if err := t.links.remove(); err != nil {
			return err
		}
		if err := t.metas[0].apply(t.dst.fd); err != nil {
			return err
		}
		t.metas = nil
		return nil
	}
	return garbled("a frame of kind %q, %d directories down", byte(h.kind), last)
}

// plainName refuses what would lead out of a directory.
func plainName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > unix.PathMax || strings.ContainsAny(name, "/\x00") {
		return garbled("the name %q", name)
	}
	return nil
}

func (t *treeReceiver) enter(n *wireNode) error {
	t.stats.add(n.Mode, 1)
	if n.Mode&unix.S_IFMT == unix.S_IFDIR {
		return t.directory(n)
	}
	dir, name := t.to.top(), string(n.Name)
	e := &entry{name: name}
	if n.File > 0 { // the stash knows files by number
		e.st.Ino = n.File
		first, linked, err := t.links.find(e, max(2, n.Names), dir)
		if err != nil || linked {
			return err
		}
		if n.Further {
			return garbled("a further name, %q, of a file that was not sent", name)
		}
		dir, name = t.links.dir, first
	}
	if err := t.make(n, dir, name); err != nil {
		return err
	}
	if n.File > 0 {
		return t.links.place(e, t.to.top())
	}
	return nil
}

func (t *treeReceiver) directory(n *wireNode) error {
	name := string(n.Name)
	m, err := n.meta(name)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(t.to.top().fd, name, 0o700); err != nil {
		return err
	}
	fd, err := openAt(t.to.top().fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	t.metas = append(t.metas, m)
	return t.to.push(fd)
}

func (t *treeReceiver) make(n *wireNode, dir *handle, name string) error {
	var err error
	switch n.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return t.file(n, dir, name)
	case unix.S_IFLNK:
		err = unix.Symlinkat(string(n.Target), dir.fd, name)
	default:
		err = unix.Mknodat(dir.fd, name, n.Mode&unix.S_IFMT|0o600, int(n.Device))
	}
	if err != nil {
		return err
	}
	fd, err := openEntry(dir.fd, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return n.apply(fd)
}

// file takes a regular file with its content.
func (t *treeReceiver) file(n *wireNode, dir *handle, name string) error {
	j := &fileJob{dir: dir, name: name}
	if err := j.create(); err != nil {
		return err
	}
	defer func() { _ = unix.Close(j.fd) }() // flushed by syncfs
	p := &pair{dst: j.fd, dstName: string(n.Name), dstZeroed: true, noRange: new(atomic.Bool), throttle: t.m.throttle, zeros: t.zeros}
	if err := unix.Ftruncate(j.fd, n.Size); err != nil {
		return err
	}
	for at := int64(0); ; {
		h, err := t.r.head()
		if err != nil {
			return err
		}
		if h.kind == wireAgain {
			var again wireNode // what is missing in it is zero, and not as before
			if err := t.r.entry(h, &again); err != nil {
				return err
			}
			*n = again
			at = 0
			if err := unix.Ftruncate(j.fd, 0); err != nil { // what was there must not shine through
				return err
			}
			if err := unix.Ftruncate(j.fd, n.Size); err != nil {
				return err
			}
			continue
		}
		if h.off != at || h.n > n.Size-at {
			return garbled("%c of %d bytes at %d in a file, where byte %d of %d is next", h.kind, h.n, h.off, at, n.Size)
		}
		switch h.kind {
		case wireEnd:
			if at != n.Size {
				return garbled("the end of a file at byte %d of %d", at, n.Size)
			}
			t.stats.Bytes += n.Size
			return n.apply(j.fd)
		case wireHole:
			if h.n == 0 {
				return garbled("a hole without a length")
			}
			at += h.n
			t.moved(h.n)
		case wireData:
			for end := at + h.n; at < end; {
				buf := t.buf[:min(end-at, int64(len(t.buf)))]
				if err := t.r.body(buf); err != nil {
					return err
				}
				if err := p.wait(t.ctx, int64(len(buf))); err != nil {
					return err
				}
				if err := p.writeFull(buf, at); err != nil {
					return err
				}
				at += int64(len(buf))
				t.moved(int64(len(buf)))
			}
		default:
			return garbled("a frame of kind %q in a file", byte(h.kind))
		}
	}
}
