package mover

import (
	"cmp"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// wireNode is a name in a tree and what it stands for; names, links and attributes are
// any bytes.
type wireNode struct {
	Name   []byte            `json:"name,omitempty"` // of the root: that of the stash for files with several names
	Mode   uint32            `json:"mode"`
	UID    uint32            `json:"uid,omitempty"`
	GID    uint32            `json:"gid,omitempty"`
	Device uint64            `json:"dev,omitempty"`
	Access [2]int64          `json:"at"` // seconds, nanoseconds
	Modify [2]int64          `json:"mt"`
	Attrs  map[string][]byte `json:"x,omitempty"`
	Target []byte            `json:"to,omitempty"` // of a symbolic link
	// Size of a regular file, whose content follows; of the root that of all files.
	Size int64 `json:"size,omitempty"`
	// File is the number of a file with several names, in this stream, and Names how many it
	// has. Further names have nothing else.
	File  uint64 `json:"file,omitempty"`
	Names uint64 `json:"names,omitempty"`
	// Further: File was sent before, by another name.
	Further bool `json:"further,omitempty"`
}

func nodeOf(m *meta) wireNode {
	n := wireNode{Mode: m.st.Mode, UID: m.st.Uid, GID: m.st.Gid, Device: uint64(m.st.Rdev), Attrs: m.xattrs}
	n.Access[0], n.Access[1] = m.st.Atim.Unix()
	n.Modify[0], n.Modify[1] = m.st.Mtim.Unix()
	return n
}

// meta is what nodeOf was made of.
func (n *wireNode) meta(path string) (meta, error) {
	m := meta{xattrs: n.Attrs, path: path}
	m.st.Mode, m.st.Uid, m.st.Gid = n.Mode, n.UID, n.GID
	var aerr, merr error // the time is later than this architecture can say
	m.st.Atim, aerr = unix.TimeToTimespec(time.Unix(n.Access[0], n.Access[1]))
	m.st.Mtim, merr = unix.TimeToTimespec(time.Unix(n.Modify[0], n.Modify[1]))
	return m, sysErr(cmp.Or(aerr, merr), "set times of", path)
}

// apply gives the metadata to an open file.
func (n *wireNode) apply(fd int) error {
	m, err := n.meta(string(n.Name))
	if err != nil {
		return err
	}
	return m.apply(fd)
}

// SendTree implements Files: it is the source's half of Tree, over a connection.
func (m *Mover) SendTree(ctx context.Context, src string, to io.Writer) error {
	root, err := openRoot(src)
	if err != nil {
		return err
	}
	defer root.release()
	s := &treeSender{ctx: ctx, m: m, w: newWireWriter(to), files: map[fileID]uint64{}, buf: alignedBuffer(m.buffer), zeros: make([]byte, sparseUnit)}
	if err := s.run(root, src); err != nil {
		if ctx.Err() != nil {
			return canceled(ctx, "copy of "+src)
		}
		return err
	}
	return nil
}

// treeSender is a visitor that sends what it visits.
type treeSender struct {
	ctx        context.Context
	m          *Mover
	w          *wireWriter
	files      map[fileID]uint64 // with several names: their numbers
	buf, zeros []byte
}

func (s *treeSender) run(root *handle, name string) error {
	sm, err := readMeta(root.fd, name)
	if err != nil {
		return err
	}
	size, err := scan(s.ctx, root.fd, name, fileID{}, "")
	if err != nil {
		return err
	}
	stash := &linkStash{}
	if err := stash.chooseName(root.fd); err != nil {
		return err
	}
	n := nodeOf(&sm)
	n.Name, n.Size = []byte(stash.name), size.Bytes
	if err := s.w.entry(wireEntry, n); err != nil {
		return err
	}
	if err := walk(s.ctx, root.fd, name, s); err != nil {
		return err
	}
	if err := s.w.frame(wireHead{kind: wireEnd}, nil); err != nil {
		return err
	}
	return s.w.flush()
}

// visit implements visitor.
func (s *treeSender) visit(e *entry) error {
	id, several := uint64(0), e.st.Nlink > 1 && !isDirectory(&e.st)
	if several {
		var known bool
		if id, known = s.files[idOf(&e.st)]; known {
			return s.w.entry(wireEntry, wireNode{Name: []byte(e.name), Mode: e.st.Mode, File: id, Further: true})
		}
		id = uint64(len(s.files) + 1)
		s.files[idOf(&e.st)] = id
	}
	m, err := readMeta(e.file.fd, e.path)
	if err != nil {
		return err
	}
	n := nodeOf(&m)
	n.Name, n.File = []byte(e.name), id
	if several {
		n.Names = uint64(e.st.Nlink)
	}
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return s.file(e, m, n)
	case unix.S_IFLNK:
		if n.Target, err = readLink(e.file.fd); err != nil {
			return err
		}
	}
	return s.w.entry(wireEntry, n)
}

// file sends a regular file; one that changes meanwhile once more, at most three times.
func (s *treeSender) file(e *entry, m meta, n wireNode) error {
	src, err := reopen(e.file.fd, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	p := &pair{src: src, srcName: e.path, noRange: new(atomic.Bool), throttle: s.m.throttle, zeros: s.zeros}
	for tries, kind := 3, wireEntry; ; tries, kind = tries-1, wireAgain {
		n.Size = m.st.Size
		if err := s.w.entry(kind, n); err != nil {
			return err
		}
		err := s.content(p, m.st.Size)
		if err != nil && fault.KindOf(err) != fault.Corrupt { // Corrupt: it shrank
			return err
		}
		now, serr := statFD(src)
		if serr != nil {
			return serr
		}
		if err == nil && now.Size == m.st.Size && now.Mtim == m.st.Mtim {
			return s.w.frame(wireHead{kind: wireEnd, off: m.st.Size}, nil)
		}
		if err != nil && now.Size >= m.st.Size && now.Mtim == m.st.Mtim {
			return err // unchanged, yet shorter than it says
		}
		if tries == 1 {
			return fault.New(fault.Conflict, "file %q keeps changing while it is being copied: copy it when nobody writes it", e.path)
		}
		if m, err = readMeta(e.file.fd, e.path); err != nil {
			return err
		}
		again := nodeOf(&m)
		again.Name, again.File, again.Names = n.Name, n.File, n.Names
		n = again
	}
}

func (s *treeSender) content(p *pair, size int64) error {
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
		if err := s.w.hole(off, start-off); err != nil {
			return err
		}
		for at := start; at < stop; {
			n := min(stop-at, int64(len(s.buf)))
			if err := p.wait(s.ctx, n); err != nil {
				return err
			}
			if err := p.readFull(s.buf[:n], at); err != nil {
				return err
			}
			if err := p.sendData(s.w, at, s.buf[:n]); err != nil {
				return err
			}
			at += n
		}
		off = stop
	}
	return nil
}

// leave implements visitor.
func (s *treeSender) leave(*entry) error { return s.w.frame(wireHead{kind: wireLeave}, nil) }

// mountPoint implements visitor: the directory is sent, and nothing in it.
func (s *treeSender) mountPoint(dir *handle, name, path string) error {
	m := meta{path: path}
	if err := unix.Fstatat(dir.fd, name, &m.st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if !isDirectory(&m.st) {
		return fault.New(fault.InUse, "something is mounted on the file %q: unmount it first", path)
	}
	n := nodeOf(&m)
	n.Name = []byte(name)
	return errors.Join(s.w.entry(wireEntry, n), s.leave(nil))
}
