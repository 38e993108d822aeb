package mover

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// zeroOut zeroes a part of a block device; the kernel writes zeros itself where
// the device has no command for it. off and n are multiples of the logical block
// size, in bytes.
func zeroOut(fd int, off, n int64) error {
	span := [2]uint64{uint64(off), uint64(n)}
	return retry(func() error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span)))
		switch errno {
		case 0:
			return nil
		case unix.EINVAL, unix.ENOTTY:
			return unix.EOPNOTSUPP
		}
		return errno
	})
}
