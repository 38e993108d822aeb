package host

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// mountTimeout is long because mounting may replay a large journal.
const mountTimeout = 10 * time.Minute

// MountFilesystem mounts a device (or, for types without one, a name) on a
// directory, with the options of mount(8) that are no commands. It is a system
// call and no program: a program would go on when this process is killed, and
// mount on top of what its successor has done.
func (l *Local) MountFilesystem(ctx context.Context, source, target, fsType string, options []string) error {
	var flags uintptr
	var data []string
	for _, o := range options {
		if set, clear, ok := mountFlag(o); ok {
			flags = flags&^clear | set
		} else {
			data = append(data, o)
		}
	}
	return l.guard.offer(ctx, "mount "+source+" on "+target, mountTimeout, func(_ context.Context, hand func(error) bool) {
		err := unix.Mount(source, target, fsType, flags, strings.Join(data, ","))
		if err != nil {
			hand(mountError(source, target, fsType, options, err))
			return
		}
		if !hand(nil) {
			l.withdraw(target, func(m Mount) bool { return m.Source == source && m.Type == fsType })
		}
	})
}

// withdraw takes down a mount that came too late: nobody waits for it, and
// nobody would know of it.
func (l *Local) withdraw(target string, own func(Mount) bool) {
	again := time.NewTicker(10 * time.Millisecond) // somebody looks at it; the kernel tells nobody when it comes free
	defer again.Stop()
	for range 100 {
		at, err := l.MountsAt(target)
		if err != nil || len(at) == 0 || !own(at[len(at)-1]) {
			return
		}
		if !errors.Is(unix.Unmount(target, unix.UMOUNT_NOFOLLOW), unix.EBUSY) {
			return
		}
		<-again.C
	}
	_ = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
}

// mountError says what a failed mount means.
func mountError(source, target, fsType string, options []string, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return fault.New(fault.Unsupported, "mount %s on %s: the kernel of this node has no %s", source, target, fsType)
	case errors.Is(err, unix.EINVAL):
		return fault.New(fault.Invalid, "mount %s (%s) on %s with options %q: %w: the kernel's log says which option, or what is damaged", source, fsType, target, optionNames(options), err)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EBADMSG):
		return fault.New(fault.Corrupt, "mount %s (%s) on %s: %w: the filesystem is damaged; the kernel's log says more", source, fsType, target, err)
	}
	return fault.New(fault.Unavailable, "mount %s (%s) on %s: %w: the kernel's log may say more", source, fsType, target, err)
}

// optionNames leaves out the values, which may be secret.
func optionNames(options []string) []string {
	out := make([]string, 0, len(options))
	for _, o := range options {
		name, _, _ := strings.Cut(o, "=")
		out = append(out, name)
	}
	return out
}

// mountFlag translates an option that the kernel takes as a flag. ok is false
// for one that is the filesystem's own.
func mountFlag(o string) (set, clear uintptr, ok bool) {
	switch o {
	case "defaults":
		return 0, 0, true
	case "ro":
		return unix.MS_RDONLY, 0, true
	case "rw":
		return 0, unix.MS_RDONLY, true
	case "nosuid":
		return unix.MS_NOSUID, 0, true
	case "suid":
		return 0, unix.MS_NOSUID, true
	case "nodev":
		return unix.MS_NODEV, 0, true
	case "dev":
		return 0, unix.MS_NODEV, true
	case "noexec":
		return unix.MS_NOEXEC, 0, true
	case "exec":
		return 0, unix.MS_NOEXEC, true
	case "sync":
		return unix.MS_SYNCHRONOUS, 0, true
	case "async":
		return 0, unix.MS_SYNCHRONOUS, true
	case "dirsync":
		return unix.MS_DIRSYNC, 0, true
	case "noatime":
		return unix.MS_NOATIME, 0, true
	case "atime":
		return 0, unix.MS_NOATIME, true
	case "nodiratime":
		return unix.MS_NODIRATIME, 0, true
	case "diratime":
		return 0, unix.MS_NODIRATIME, true
	case "relatime":
		return unix.MS_RELATIME, 0, true
	case "strictatime":
		return unix.MS_STRICTATIME, 0, true
	case "lazytime":
		return unix.MS_LAZYTIME, 0, true
	case "nolazytime":
		return 0, unix.MS_LAZYTIME, true
	case "nosymfollow":
		return msNosymfollow, 0, true
	}
	return 0, 0, false
}

// msNosymfollow is MS_NOSYMFOLLOW of linux/mount.h.
const msNosymfollow = 0x100

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
	return l.guard.offer(ctx, "bind "+source+" to "+target, quick, func(ctx context.Context, hand func(error) bool) {
		id, err := bind(ctx, source, target, attr)
		if !hand(err) && err == nil {
			l.withdraw(target, func(m Mount) bool { return m.ID == id })
		}
	})
}

// bind does the work of Bind and returns the mount's number.
func bind(ctx context.Context, source, target string, attr MountAttr) (id int, err error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOSYS) {
		return 0, fault.New(fault.Unsupported, "bind %s: the kernel has no open_tree: 5.12 or newer is needed", source)
	}
	if err != nil {
		return 0, ioError("bind", source, err)
	}
	defer unix.Close(fd)
	if attr != 0 {
		set := unix.MountAttr{Attr_set: uint64(attr)}
		if attr&unix.MOUNT_ATTR_NOATIME != 0 {
			set.Attr_clr = unix.MOUNT_ATTR__ATIME
		}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &set); err != nil {
			if errors.Is(err, unix.ENOSYS) {
				return 0, fault.New(fault.Unsupported, "bind %s: the kernel has no mount_setattr: 5.12 or newer is needed", source)
			}
			return 0, ioError("bind", source, err)
		}
	}
	if id, err = mountID(fd); err != nil {
		return 0, ioError("bind", source, err)
	}
	if err := ctx.Err(); err != nil { // nobody waits any more
		return 0, fault.New(fault.KindOf(err), "bind %s to %s: %w", source, target, err)
	}
	return id, ioError("bind "+source+" to", target, unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// mountID is the number in mountinfo of the mount that a descriptor is on. It
// is in fdinfo on every kernel, and asks nothing of the storage.
func mountID(fd int) (int, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(id))
		}
	}
	return 0, fault.New(fault.Internal, "fdinfo has no mnt_id")
}

// Unmount takes the topmost mount at exactly target down, after writing out
// what is dirty. fault.InUse: somebody still uses it.
func (l *Local) Unmount(ctx context.Context, target string) error {
	return l.guard.Do(ctx, "unmount "+target, flush, func() error {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		again := time.NewTicker(10 * time.Millisecond) // the kernel tells nobody when a mount comes free
		defer again.Stop()
		for tries := 0; errors.Is(err, unix.EBUSY) && tries < 100; tries++ {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-again.C:
			}
			err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		}
		if errors.Is(err, unix.EBUSY) {
			return fault.New(fault.InUse, "unmount %s: a process still has files open or its working directory there", target)
		}
		return ioError("unmount", target, err)
	})
}

// UnmountLazily takes the topmost mount at exactly target out of sight at once; what uses it keeps
// it until it has ended. Nothing is waited for, and nothing written out. What is not mounted is success.
func (l *Local) UnmountLazily(ctx context.Context, target string) error {
	return l.guard.Do(ctx, "unmount "+target, quick, func() error {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
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
