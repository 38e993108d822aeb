package farfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// do does one request, with the structures of linux/fuse.h.
func (c *conn) do(op Op, id uint64, body []byte) ([]byte, error) {
	le := binary.LittleEndian
	switch op {
	case initialise:
		reply := make([]byte, 64)
		le.PutUint32(reply, 7)
		le.PutUint32(reply[4:], 31)
		le.PutUint32(reply[12:], 1<<5|1<<10) // FUSE_BIG_WRITES, FUSE_FLOCK_LOCKS
		le.PutUint32(reply[20:], maxWrite)
		le.PutUint32(reply[24:], 1)
		return reply, nil
	case forget:
		c.forget(id, le.Uint64(body))
		return nil, nil
	case batchForget:
		for rest := body[8:]; len(rest) >= 16; rest = rest[16:] {
			c.forget(le.Uint64(rest), le.Uint64(rest[8:]))
		}
		return nil, nil
	case release, releasedir:
		return nil, c.close(le.Uint64(body))
	case Flush, interrupt, destroy:
		return nil, nil
	case Read, Write, Readdir:
		return c.transfer(op, body)
	case setlk, setlkw:
		return nil, c.lock(op, body)
	case Fsync, Fsyncdir:
		f, err := c.file(le.Uint64(body))
		if err != nil {
			return nil, err
		}
		return nil, unix.Fsync(int(f.Fd()))
	}
	fd, err := c.fd(id)
	if err != nil {
		return nil, err
	}
	switch op {
	case Lookup:
		return c.entry(fd, text(body))
	case Getattr:
		return attrOut(fd)
	case Setattr:
		return c.setattr(fd, body)
	case Readlink:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, "", buf)
		return buf[:max(n, 0)], err
	case Symlink:
		name, target, _ := bytes.Cut(body, []byte{0})
		if err := unix.Symlinkat(text(target), fd, string(name)); err != nil {
			return nil, err
		}
		return c.entry(fd, string(name))
	case Mkdir:
		if err := unix.Mkdirat(fd, text(body[8:]), le.Uint32(body)&^le.Uint32(body[4:])); err != nil {
			return nil, err
		}
		return c.entry(fd, text(body[8:]))
	case mknod:
		name, mode := text(body[16:]), le.Uint32(body)&^le.Uint32(body[8:])
		if err := unix.Mknodat(fd, name, mode, int(le.Uint32(body[4:]))); err != nil {
			return nil, err
		}
		return c.entry(fd, name)
	case Unlink:
		return nil, unix.Unlinkat(fd, text(body), 0)
	case Rmdir:
		return nil, unix.Unlinkat(fd, text(body), unix.AT_REMOVEDIR)
	case Rename:
		to, err := c.fd(le.Uint64(body))
		if err != nil {
			return nil, err
		}
		from, name, _ := bytes.Cut(body[8:], []byte{0})
		return nil, unix.Renameat(fd, string(from), to, text(name))
	case Link:
		old, err := c.fd(le.Uint64(body))
		if err != nil {
			return nil, err
		}
		if err := unix.Linkat(unix.AT_FDCWD, path(old), fd, text(body[8:]), unix.AT_SYMLINK_FOLLOW); err != nil {
			return nil, err
		}
		return c.entry(fd, text(body[8:]))
	case Statfs:
		return statfsOut(fd)
	case Open, Opendir:
		flags := unix.O_RDONLY | unix.O_DIRECTORY
		if op == Open {
			flags = int(le.Uint32(body)) & (unix.O_ACCMODE | unix.O_APPEND)
		}
		got, err := unix.Open(path(fd), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		return c.opened(got), nil
	case Create:
		name, mode := text(body[16:]), le.Uint32(body[4:])&^le.Uint32(body[8:])
		got, err := unix.Openat(fd, name, int(le.Uint32(body))&(unix.O_ACCMODE|unix.O_EXCL|unix.O_TRUNC)|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, mode)
		if err != nil {
			return nil, err
		}
		entry, err := c.entry(fd, name)
		if err != nil {
			_ = unix.Close(got)
			return nil, err
		}
		return append(entry, c.opened(got)...), nil
	}
	return nil, unix.ENOSYS
}

// transfer reads and writes what is open.
func (c *conn) transfer(op Op, body []byte) ([]byte, error) {
	le := binary.LittleEndian
	f, err := c.file(le.Uint64(body))
	if err != nil {
		return nil, err
	}
	offset, size := int64(le.Uint64(body[8:])), int(le.Uint32(body[16:]))
	switch op {
	case Read:
		buf := make([]byte, size)
		n, err := unix.Pread(int(f.Fd()), buf, offset)
		return buf[:max(n, 0)], err
	case Write:
		n, err := unix.Pwrite(int(f.Fd()), body[40:40+size], offset)
		reply := make([]byte, 8)
		le.PutUint32(reply, uint32(max(n, 0)))
		return reply, err
	}
	return c.readdir(f, offset, size)
}

// lock does what struct fuse_lk_in says of a whole file, for whoever opened it.
func (c *conn) lock(op Op, body []byte) error {
	le := binary.LittleEndian
	f, err := c.file(le.Uint64(body))
	if err != nil {
		return err
	}
	how := map[uint32]int{unix.F_RDLCK: unix.LOCK_SH, unix.F_WRLCK: unix.LOCK_EX, unix.F_UNLCK: unix.LOCK_UN}[le.Uint32(body[32:])]
	if op == setlk {
		how |= unix.LOCK_NB
	}
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// readdir lists a folder; the offset of an entry is its number.
func (c *conn) readdir(f *os.File, offset int64, size int) ([]byte, error) {
	le := binary.LittleEndian
	list, err := os.ReadDir(path(int(f.Fd())))
	if err != nil {
		return nil, err
	}
	var reply []byte
	for i := offset; i < int64(len(list)); i++ {
		name := list[i].Name()
		var st unix.Stat_t
		if err := unix.Fstatat(int(f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			continue // removed meanwhile
		}
		entry := make([]byte, (24+len(name)+7)/8*8)
		le.PutUint64(entry, st.Ino)
		le.PutUint64(entry[8:], uint64(i+1))
		le.PutUint32(entry[16:], uint32(len(name)))
		le.PutUint32(entry[20:], (st.Mode&unix.S_IFMT)>>12)
		copy(entry[24:], name)
		if len(reply)+len(entry) > size {
			break
		}
		reply = append(reply, entry...)
	}
	return reply, nil
}

// setattr changes what struct fuse_setattr_in says: mode, owner, size, times.
func (c *conn) setattr(fd int, body []byte) ([]byte, error) {
	le := binary.LittleEndian
	valid := le.Uint32(body)
	has := func(bit uint32) bool { return valid&bit != 0 }
	if has(1) {
		if err := unix.Chmod(path(fd), le.Uint32(body[68:])&0o7777); err != nil {
			return nil, err
		}
	}
	if has(2) || has(4) {
		uid, gid := -1, -1
		if has(2) {
			uid = int(le.Uint32(body[76:]))
		}
		if has(4) {
			gid = int(le.Uint32(body[80:]))
		}
		if err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
			return nil, err
		}
	}
	if has(8) {
		if err := unix.Truncate(path(fd), int64(le.Uint64(body[16:]))); err != nil {
			return nil, err
		}
	}
	if has(16) || has(32) {
		times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
		for i, bit := range []uint32{16, 32} {
			if has(bit) {
				times[i] = unix.Timespec{Sec: int64(le.Uint64(body[32+8*i:])), Nsec: int64(le.Uint32(body[56+4*i:]))}
			}
			if has(bit * 8) { // now
				times[i] = unix.Timespec{Nsec: unix.UTIME_NOW}
			}
		}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path(fd), times, 0); err != nil {
			return nil, err
		}
	}
	return attrOut(fd)
}

func (c *conn) fd(id uint64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.nodes[id]; n != nil {
		return n.fd, nil
	}
	return 0, unix.ESTALE
}

func (c *conn) file(handle uint64) (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.files[handle]; f != nil {
		return f, nil
	}
	return nil, unix.EBADF
}

// opened is struct fuse_open_out of a file that gets a handle.
func (c *conn) opened(fd int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last++
	c.files[c.last] = os.NewFile(uintptr(fd), "handle")
	reply := make([]byte, 16)
	binary.LittleEndian.PutUint64(reply, c.last)
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if c.server.direct {
		binary.LittleEndian.PutUint32(reply[8:], directIO)
	}
	return reply
}

func (c *conn) close(handle uint64) error {
	f, err := c.file(handle)
	if err != nil {
		return err
	}
	c.mu.Lock()
	delete(c.files, handle)
	c.mu.Unlock()
	return f.Close()
}

// entry is struct fuse_entry_out of a name; nothing in it is valid for any time.
func (c *conn) entry(dir int, name string) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	key := inode{st.Dev, st.Ino}
	id, known := c.ids[key]
	if known {
		_ = unix.Close(fd)
	} else {
		c.last++
		id = c.last
		c.ids[key], c.nodes[id] = id, &node{fd: fd, inode: key}
	}
	c.nodes[id].lookups++
	reply := make([]byte, 40)
	binary.LittleEndian.PutUint64(reply, id)
	return append(reply, attr(&st)...), nil
}

// squash gives what was made just now, as its struct fuse_entry_out says, to a user.
func (c *conn) squash(entry []byte, user uint32) ([]byte, error) {
	fd, err := c.fd(binary.LittleEndian.Uint64(entry))
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fchownat(fd, "", int(user), int(user), unix.AT_EMPTY_PATH)
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	copy(entry[40:], attr(&st))
	return entry, err
}

func (c *conn) forget(id, lookups uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.nodes[id]
	if n == nil || id == rootNode {
		return
	}
	if n.lookups -= min(lookups, n.lookups); n.lookups == 0 {
		_ = unix.Close(n.fd)
		delete(c.nodes, id)
		delete(c.ids, n.inode)
	}
}

func attrOut(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	return append(make([]byte, 16), attr(&st)...), nil
}

// attr is struct fuse_attr.
func attr(st *unix.Stat_t) []byte {
	le := binary.LittleEndian
	var b []byte
	for _, v := range []uint64{st.Ino, uint64(st.Size), uint64(st.Blocks), uint64(st.Atim.Sec), uint64(st.Mtim.Sec), uint64(st.Ctim.Sec)} {
		b = le.AppendUint64(b, v)
	}
	for _, v := range []uint32{uint32(st.Atim.Nsec), uint32(st.Mtim.Nsec), uint32(st.Ctim.Nsec), st.Mode, uint32(st.Nlink), st.Uid, st.Gid, uint32(st.Rdev), 4096, 0} {
		b = le.AppendUint32(b, v)
	}
	return b
}

// statfsOut is struct fuse_kstatfs.
func statfsOut(fd int) ([]byte, error) {
	le := binary.LittleEndian
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return nil, err
	}
	var b []byte
	for _, v := range []uint64{st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree} {
		b = le.AppendUint64(b, v)
	}
	const transfer = 1 << 20 // as servers have that like large requests
	for _, v := range []uint32{transfer, uint32(st.Namelen), uint32(st.Frsize)} {
		b = le.AppendUint32(b, v)
	}
	return append(b, make([]byte, 80-len(b))...), nil
}

func path(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
