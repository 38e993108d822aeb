package mover

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errBuffered asks the caller to use the page cache for this request.
var errBuffered = errors.New("not possible with direct I/O")

// direct moves whole aligned blocks past the page cache: a copy of a large
// image neither evicts what others need nor ends in a long flush, and keeps more
// requests in flight. What is not aligned, and everything once the file system
// has refused, is left to the page cache; no page is ever touched by both. A nil
// direct leaves it everything.
type direct struct {
	src, dst        int // -1: not there
	noRead, noWrite atomic.Bool
}

// whole is how many bytes of a request may be moved directly.
func whole(buf []byte, off int64) int {
	if off%align != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(buf)))%align != 0 {
		return 0
	}
	return len(buf) / align * align
}

func (d *direct) read(buf []byte, off int64) (int, error) {
	n := whole(buf, off)
	if d == nil || d.src < 0 || n == 0 || d.noRead.Load() {
		return 0, errBuffered
	}
	c, err := retryN(func() (int, error) { return unix.Pread(d.src, buf[:n], off) })
	if err == unix.EINVAL {
		d.noRead.Store(true)
		return 0, errBuffered
	}
	return c, err
}

func (d *direct) write(buf []byte, off int64) (int, error) {
	n := whole(buf, off)
	if d == nil || d.dst < 0 || n == 0 || d.noWrite.Load() {
		return 0, errBuffered
	}
	c, err := retryN(func() (int, error) { return unix.Pwrite(d.dst, buf[:n], off) })
	if err == unix.EINVAL {
		d.noWrite.Store(true)
		return 0, errBuffered
	}
	return c, err
}
