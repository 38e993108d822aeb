package mover

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// store is an open block slab: a regular file or a block device.
type store struct {
	path string
	fd   int
	// direct is the same file without the page cache, or -1.
	direct int
	device bool
	st     unix.Stat_t
	size   int64
}

func (s *store) close() {
	if s.fd >= 0 {
		// Not left to close: a program that is being started has the file open
		// until its exec, and a copy that follows at once would find it locked.
		_ = unix.Flock(s.fd, unix.LOCK_UN)
	}
	for _, fd := range []*int{&s.fd, &s.direct} {
		if *fd >= 0 {
			_ = unix.Close(*fd) // what was written is already flushed, or lost anyway
			*fd = -1
		}
	}
}

// remote says whether the file lies on a server, or behind a process, that may
// be able to copy by itself.
func (s *store) remote() bool {
	var st unix.Statfs_t
	if s.device || retry(func() error { return unix.Fstatfs(s.fd, &st) }) != nil {
		return false
	}
	switch uint32(st.Type) { //nolint:gosec // magic numbers are 32 bits wide
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC,
		unix.AFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return true
	}
	return false
}

// openSource opens path for reading.
func openSource(path string) (*store, error) {
	return openStore(path, unix.O_RDONLY)
}

// openTarget opens path for writing and locks it until it is closed.
func openTarget(path string) (*store, error) {
	return openLocked(path, unix.O_RDWR|unix.O_EXCL) // refused while it is mounted or part of another device
}

// openLocked opens what no other mover writes. O_EXCL is for devices.
func openLocked(path string, flags int) (*store, error) {
	s, err := openStore(path, flags)
	if err != nil {
		return nil, err
	}
	if err := s.lock("copy target"); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// lock takes the file's lock, which is given back with the file.
func (s *store) lock(what string) error {
	err := retry(func() error { return unix.Flock(s.fd, unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		err = fault.New(fault.InUse, "%s %s is locked: another process still writes it", what, strconv.Quote(s.path))
	}
	return sysErr(err, "lock", s.path)
}

func openStore(path string, flags int) (*store, error) {
	// Looking first keeps the open below from having effects on other kinds of
	// files; O_NONBLOCK keeps it from waiting for a FIFO's other end.
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return nil, sysErr(err, "stat", path)
	}
	s := &store{path: path, fd: -1, direct: -1}
	flags |= unix.O_CLOEXEC | unix.O_NONBLOCK
	if !isBlockDevice(&st) {
		flags &^= unix.O_EXCL
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY && !isBlockDevice(&st) {
		through, err := host.WriteThrough(path)
		if err != nil {
			return nil, err
		}
		flags |= through
	}
	fd, err := retryN(func() (int, error) { return unix.Open(path, flags, 0) })
	if err != nil {
		return nil, sysErr(err, "open", path)
	}
	s.fd = fd
	if err := unix.Fstat(fd, &s.st); err != nil {
		s.close()
		return nil, sysErr(err, "stat", path)
	}
	// Opened through the descriptor: certainly the same file. Where the file
	// system has no direct I/O, the page cache does.
	if fd, err := retryN(func() (int, error) {
		return unix.Open(procPath(s.fd), flags&^unix.O_EXCL|unix.O_DIRECT, 0)
	}); err == nil {
		s.direct = fd
	}
	s.device = isBlockDevice(&s.st)
	if !s.device && !isRegular(&s.st) {
		s.close()
		return nil, fault.New(fault.Invalid, "%s is neither a regular file nor a block device", strconv.Quote(path))
	}
	if s.size, err = s.currentSize(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// currentSize asks for the size in bytes as it is now.
func (s *store) currentSize() (int64, error) {
	if s.device {
		var n uint64
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n)))
		if errno != 0 {
			return 0, sysErr(errno, "size of", s.path)
		}
		return int64(n), nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return 0, sysErr(err, "stat", s.path)
	}
	return st.Size, nil
}

// same says whether both are the same file or device.
func same(a, b *store) bool {
	if a.device && b.device {
		return a.st.Rdev == b.st.Rdev
	}
	return a.device == b.device && a.st.Dev == b.st.Dev && a.st.Ino == b.st.Ino
}

// extents walks over the data of a file.
type extents struct {
	fd int
	// blind: the file cannot tell holes from data (a device, an old server).
	blind bool
}

// next returns the first stretch of data at or after off and before end;
// start == end when there is none.
func (e *extents) next(off, end int64) (start, stop int64, err error) {
	if e.blind {
		return off, end, nil
	}
	start, err = unix.Seek(e.fd, off, unix.SEEK_DATA)
	switch err {
	case nil:
	case unix.ENXIO: // only a hole until the end of the file
		return end, end, nil
	case unix.EINVAL, unix.EOPNOTSUPP, unix.EIO: // EIO: Samba 4.17, where there is more than one stretch
		e.blind = true
		return off, end, nil
	default:
		return 0, 0, err
	}
	if start >= end {
		return end, end, nil
	}
	stop, err = unix.Seek(e.fd, start, unix.SEEK_HOLE)
	if err == unix.ENXIO { // the file shrank in between: reading will say so
		return start, end, nil
	}
	return start, min(stop, end), err
}

// hidden says whether the file has holes that it cannot show: fewer blocks than
// its size needs, yet no hole is found (NFSv3, compression).
func (e *extents) hidden(size int64) (bool, error) {
	if e.blind || size == 0 {
		return e.blind, nil
	}
	st, err := statFD(e.fd)
	if err != nil || st.Blocks*512 >= size {
		return false, err
	}
	hole, err := unix.Seek(e.fd, 0, unix.SEEK_HOLE)
	switch err {
	case nil:
		return hole >= size, nil
	case unix.ENXIO: // shorter by now: reading says so
		return false, nil
	case unix.EINVAL, unix.EOPNOTSUPP, unix.EIO:
		e.blind = true
		return true, nil
	}
	return false, err
}
