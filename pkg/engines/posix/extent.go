package posix

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// extent is where data begins at or after an offset, and where it ends. A storage that does not
// know its holes has none.
func extent(f *os.File, at, end int64) (data, hole int64, err error) {
	seek := func(offset int64, whence int) (to int64, err error) {
		err = uninterrupted(func() (err error) { to, err = unix.Seek(int(f.Fd()), offset, whence); return err })
		return min(to, end), err
	}
	if data, err = seek(at, unix.SEEK_DATA); err == unix.ENXIO {
		return end, end, nil
	}
	if err == nil {
		hole, err = seek(data, unix.SEEK_HOLE)
	}
	if err == unix.EIO {
		// Linux asks an SMB server for the first stretch of data, and Samba 4.17 refuses to answer
		// where there are more.
		data, hole, err = mapped(f, at, end)
	}
	switch {
	case err == nil:
		return data, hole, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EIO):
		return at, end, nil // data that cannot be read fails where it is read
	}
	return 0, 0, &os.PathError{Op: "seek", Path: f.Name(), Err: err}
}

// fiemap is struct fiemap of linux/fiemap.h with room for one extent.
type fiemap struct {
	start, length uint64
	_             uint32 // flags
	mapped, count uint32
	_             uint32
	extent        struct {
		logical, _, length uint64 // the one between is the place on the disk
		_                  [2]uint64
		_                  [4]uint32
	}
}

// mapped is extent by FIEMAP. A storage that has too many extents for one answer (an SMB server: 1024) says EIO,
// and is asked for less.
func mapped(f *os.File, at, end int64) (data, hole int64, err error) {
	const fsIocFiemap = 0xc020660b
	for window := end - at; at < end; {
		window = min(window, end-at)
		m := fiemap{start: uint64(at), length: uint64(window), count: 1}
		err := uninterrupted(func() error {
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m)))
			runtime.KeepAlive(f)
			if errno != 0 {
				return errno
			}
			return nil
		})
		switch {
		case err == unix.EIO && window > Granularity:
			window /= 2
		case err != nil:
			return 0, 0, err
		case m.mapped == 0:
			at += window
		default:
			data = min(max(at, int64(m.extent.logical)), end)
			return data, min(int64(m.extent.logical+m.extent.length), end), nil
		}
	}
	return end, end, nil
}
