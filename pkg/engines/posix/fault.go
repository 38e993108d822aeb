package posix

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Fault gives a failure of the file system its kind. Errors that have one, nil
// and engine.ErrDeclined stay as they are.
func Fault(err error) error {
	var known *fault.Error
	var errno unix.Errno
	if err == nil || errors.As(err, &known) || errors.Is(err, engine.ErrDeclined) {
		return err
	}
	if !errors.As(err, &errno) {
		return fault.Wrap(fault.KindOf(err), err)
	}
	switch errno {
	case unix.ENOSPC, unix.EDQUOT:
		return fault.Wrap(fault.Exhausted, err)
	case unix.EFBIG:
		return fault.Wrap(fault.OutOfRange, err)
	case unix.EROFS, unix.EACCES, unix.EPERM:
		return fault.Wrap(fault.Permission, err)
	case unix.EINVAL, unix.EBADF, unix.EFAULT, unix.ENAMETOOLONG:
		return fault.Wrap(fault.Internal, err)
	}
	return fault.Wrap(fault.Unavailable, err)
}
