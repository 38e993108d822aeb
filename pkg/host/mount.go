package host

import (
	"context"
	"errors"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// mountTimeout is long because mounting may replay a large journal.
const mountTimeout = 10 * time.Minute

// MountFilesystem mounts a device (or, for types without one, a name) on a directory.
func (l *Local) MountFilesystem(ctx context.Context, source, target, fsType string, options []string) error {
	args := []string{"-t", fsType}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	_, err := l.run.Run(ctx, Command{Name: "mount", Args: append(args, "--", source, target), Timeout: mountTimeout})
	var exit *ExitError
	if errors.As(err, &exit) {
		return fault.New(fault.Unavailable, "mount %s (%s) on %s: %w", source, fsType, target, err)
	}
	return err
}

// MountAttr are the attributes that a bind mount has for itself.
type MountAttr uint64

// ReadOnly is the attribute that every caller needs.
const ReadOnly MountAttr = unix.MOUNT_ATTR_RDONLY

// ParseMountAttr translates a mount option into a bind mount's attribute. ok
// is false for an option that only a whole filesystem can have.
func ParseMountAttr(option string) (attr MountAttr, ok bool) {
	switch option {
	case "ro":
		return ReadOnly, true
	case "nosuid":
		return unix.MOUNT_ATTR_NOSUID, true
	case "nodev":
		return unix.MOUNT_ATTR_NODEV, true
	case "noexec":
		return unix.MOUNT_ATTR_NOEXEC, true
	case "noatime":
		return unix.MOUNT_ATTR_NOATIME, true
	case "nodiratime":
		return unix.MOUNT_ATTR_NODIRATIME, true
	case "nosymfollow":
		return unix.MOUNT_ATTR_NOSYMFOLLOW, true
	case "rw", "suid", "dev", "exec", "relatime", "defaults":
		return 0, true
	}
	return 0, false
}

// Bind makes what is at source (a mount, a directory, a device node) visible
// at target. The attributes are in force from the first moment: the mount is
// prepared detached and moved into place, so nobody ever sees a read-only one
// writable. Symbolic links at the end of either path are not followed.
func (l *Local) Bind(ctx context.Context, source, target string, attr MountAttr) error {
	return l.guard.Do(ctx, "bind "+source+" to "+target, quick, func() error {
		fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOSYS) {
			return fault.New(fault.Unsupported, "bind %s: the kernel has no open_tree: 5.12 or newer is needed", source)
		}
		if err != nil {
			return ioError("bind", source, err)
		}
		defer unix.Close(fd)
		if attr != 0 {
			set := unix.MountAttr{Attr_set: uint64(attr)}
			if attr&unix.MOUNT_ATTR_NOATIME != 0 {
				set.Attr_clr = unix.MOUNT_ATTR__ATIME
			}
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &set); err != nil {
				if errors.Is(err, unix.ENOSYS) {
					return fault.New(fault.Unsupported, "bind %s: the kernel has no mount_setattr: 5.12 or newer is needed", source)
				}
				return ioError("bind", source, err)
			}
		}
		return ioError("bind "+source+" to", target, unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
	})
}

// Unmount takes the topmost mount at exactly target down, after writing out
// what is dirty. fault.InUse: somebody still uses it.
func (l *Local) Unmount(ctx context.Context, target string) error {
	return l.guard.Do(ctx, "unmount "+target, flush, func() error {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			return fault.New(fault.InUse, "unmount %s: a process still has files open or its working directory there", target)
		}
		return ioError("unmount", target, err)
	})
}

// UnmountAll takes every mount at exactly target down. None is success.
func (l *Local) UnmountAll(ctx context.Context, target string) error {
	for {
		at, err := l.MountsAt(target)
		if err != nil || len(at) == 0 {
			return err
		}
		if err := l.Unmount(ctx, target); err != nil {
			return err
		}
	}
}
