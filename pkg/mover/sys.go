package mover

import (
	"context"
	"errors"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// align is what offsets are rounded to where a copy begins or is cut in
// pieces: a multiple of every logical block size in use.
const align = 4096

func alignUp(n, a int64) int64   { return (n + a - 1) / a * a }
func alignDown(n, a int64) int64 { return n / a * a }

// retry repeats a system call that a signal interrupted.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func retryN(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); err != unix.EINTR {
			return n, err
		}
	}
}

// kindOf tells what a failed system call means to the caller.
func kindOf(err error) fault.Kind {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return fault.KindOf(err)
	}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR:
		return fault.NotFound
	case unix.ENOSPC, unix.EDQUOT, unix.EMLINK, unix.ENFILE, unix.EMFILE:
		return fault.Exhausted
	case unix.EACCES, unix.EPERM:
		return fault.Permission
	case unix.EBUSY, unix.ETXTBSY, unix.EAGAIN:
		return fault.InUse
	case unix.EFBIG:
		return fault.OutOfRange
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return fault.Unsupported
	case unix.EUCLEAN, unix.EBADMSG, unix.EILSEQ:
		return fault.Corrupt
	}
	return fault.Unavailable // EIO, ESTALE, EROFS, ENXIO, ...: not now
}

// sysErr dresses the error of a system call with what was attempted.
func sysErr(err error, op, name string) error {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fault.New(kindOf(err), "%s %s: %w", op, strconv.Quote(name), err)
}

// canceled is the error of a copy whose context ended.
func canceled(ctx context.Context, what string) error {
	return fault.New(fault.KindOf(ctx.Err()), "%s stopped: %w", what, ctx.Err())
}

// procPath names an open file, so that calls that take a path (and do not
// accept an O_PATH descriptor) reach exactly the file that was opened.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// alignedBuffer is suited for direct I/O.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+align)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(&b[0])) % align); r != 0 {
		skip = align - r
	}
	return b[skip : skip+n : skip+n]
}

func isBlockDevice(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFBLK }
func isRegular(st *unix.Stat_t) bool     { return st.Mode&unix.S_IFMT == unix.S_IFREG }
func isDirectory(st *unix.Stat_t) bool   { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
