package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// The filesystems that Quarry makes.
const (
	Ext4  = "ext4"
	XFS   = "xfs"
	Btrfs = "btrfs"
)

// toolTimeout is how long mkfs, fsck and resize of very large images are waited for.
const toolTimeout = time.Hour

// MinimumSize is the smallest device in bytes that a filesystem is made on.
// fault.Invalid: the filesystem is not known.
func MinimumSize(fsType string) (int64, error) {
	switch fsType {
	case Ext4:
		return 8 << 20, nil // below, 4 KiB blocks leave no room for a journal
	case XFS:
		return 300 << 20, nil // mkfs.xfs 6.0 and newer refuse less
	case Btrfs:
		return 110 << 20, nil // two copies of the metadata; mkfs.btrfs 6.2 asks for 109 MiB
	}
	return 0, fault.New(fault.Invalid, "filesystem %q is not known: %s, %s or %s", fsType, Ext4, XFS, Btrfs)
}

// CheckFilesystem verifies that a filesystem can be made on size bytes.
// fault.Invalid: unknown. fault.OutOfRange: too small.
func CheckFilesystem(fsType string, size int64) error {
	least, err := MinimumSize(fsType)
	if err != nil {
		return err
	}
	if size < least {
		return fault.New(fault.OutOfRange, "%s needs at least %d bytes (%d MiB), and the volume has %d", fsType, least, least>>20, size)
	}
	return nil
}

// Format makes a filesystem on a device that holds nothing worth keeping and
// reads as zero where nothing was written. It is durable on return.
func (l *Local) Format(ctx context.Context, device, fsType string, size int64) error {
	if err := CheckFilesystem(fsType, size); err != nil {
		return err
	}
	var args []string
	switch fsType {
	case Ext4:
		// No blocks for root: the image is one workload's. 4 KiB blocks however
		// small the image is, since it may grow. The slab reads as zero, so neither
		// inode tables nor journal are written now: a sparse slab stays sparse.
		args = []string{"-F", "-q", "-m", "0", "-b", "4096", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"}
	case XFS:
		// 4 KiB sectors: the image can move to storage whose sectors are that large.
		args = []string{"-f", "-q", "-K", "-s", "size=4096"}
	case Btrfs:
		args = []string{"-f", "-q", "-K"}
	}
	_, err := l.tool(ctx, device, Command{Name: "mkfs." + fsType, Args: append(args, device)})
	var exit *ExitError
	if errors.As(err, &exit) {
		return fault.New(fault.Unavailable, "make %s on %s: %w", fsType, device, err)
	}
	if err != nil {
		return err
	}
	return l.SyncDevice(ctx, device)
}

// finishing is a program of those that rewrite in several steps what a filesystem is found by: e2fsprogs write
// an ext4's superblock in pieces, and it is no filesystem any more when they are killed between two.
func finishing(name string, args ...string) Command {
	return Command{Name: name, Args: args, Finish: true}
}

// finishingOn is the command line of a program of that kind which runs on a device, whoever began it; "" if none is seen.
func finishingOn(device string) string {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return ""
	}
	for _, file := range all {
		line, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
		if slices.Contains(args, device) && slices.ContainsFunc(args, func(a string) bool {
			return slices.Contains([]string{"fsck.ext4", "e2fsck", "resize2fs"}, filepath.Base(a))
		}) {
			return strings.Join(args, " ")
		}
	}
	return ""
}

// tool is a program that changes a device's filesystem.
type tool struct {
	command string
	hangs   bool // it was killed and left behind
}

// tool runs a program that changes the filesystem on a device: one at a time,
// and none while an earlier one that could not be killed, or is to finish, still may. fault.Pending then.
func (l *Local) tool(ctx context.Context, device string, c Command) (Result, error) {
	c.Timeout = toolTimeout
	l.mu.Lock()
	if t := l.tools[device]; t != nil {
		defer l.mu.Unlock()
		if t.hangs {
			return Result{}, fault.New(fault.Pending, "%s: an earlier \"%s\" was killed and still hangs, because the storage does not answer: it has to end first", c, t.command)
		}
		return Result{}, fault.New(fault.Pending, "%s: \"%s\" still runs on %s", c, t.command, device)
	}
	t := &tool{command: c.String()}
	l.tools[device] = t
	l.mu.Unlock()
	end := func() {
		l.mu.Lock()
		delete(l.tools, device)
		l.mu.Unlock()
	}
	if c.Finish {
		// With the container, too, where that can be; else nothing is better.
		c.Begun = func(pid int) { _ = l.Outlive(pid) }
	}
	res, err := l.run.Run(ctx, c)
	var hang *HangError
	if !errors.As(err, &hang) {
		end()
		return res, err
	}
	l.mu.Lock()
	t.hangs = !c.Finish
	l.mu.Unlock()
	go func() {
		<-hang.Ended
		end()
	}()
	return res, err
}

// The bits of the status of fsck(8).
const (
	fsckCorrected   = 1
	fsckUncorrected = 4
)

// Check repairs an unmounted filesystem before it is mounted for writing, as
// the kubelet does: small things automatically; what needs a person is
// fault.Corrupt. note is for the log. xfs and btrfs check themselves when mounted.
func (l *Local) Check(ctx context.Context, device, fsType string) (note string, err error) {
	if fsType != Ext4 {
		return "", nil
	}
	res, err := l.tool(ctx, device, finishing("fsck.ext4", "-a", device))
	var exit *ExitError
	if !errors.As(err, &exit) {
		return "", err
	}
	said := strings.TrimSpace(string(res.Stdout) + string(res.Stderr))
	switch code := exit.Result.ExitCode; {
	case code < 0: // somebody killed it
		return "", fault.New(fault.Unavailable, "check ext4 on %s: %w", device, err)
	case code&fsckUncorrected != 0:
		return "", fault.New(fault.Corrupt, "fsck found errors on %s that it does not repair by itself: run \"e2fsck -f\" on it, or restore a snapshot: %s", device, said)
	case code == fsckCorrected:
		return "fsck repaired " + device + ": " + said, nil
	}
	return "fsck of " + device + " could not finish, the mount decides: " + said, nil
}

// GrowsOnline says whether this process may grow a mounted filesystem: ext4
// asks for CAP_SYS_RESOURCE, which some sandboxes withhold even from root.
func (l *Local) GrowsOnline(fsType string) bool {
	if fsType != Ext4 {
		return true
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return true // the growing itself will tell
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// GrowUnmounted lets an ext4 that is not mounted fill its device, after the
// full check that resize2fs insists on.
func (l *Local) GrowUnmounted(ctx context.Context, device string) error {
	_, err := l.tool(ctx, device, finishing("e2fsck", "-f", "-p", device))
	var exit *ExitError
	if errors.As(err, &exit) {
		switch code := exit.Result.ExitCode; {
		case code >= 0 && code&fsckUncorrected != 0:
			return fault.New(fault.Corrupt, "ext4 on %s cannot be grown before it was repaired: %w", device, err)
		case code != fsckCorrected:
			return fault.New(fault.Unavailable, "check ext4 on %s: %w", device, err)
		}
	} else if err != nil {
		return err
	}
	_, err = l.tool(ctx, device, finishing("resize2fs", device))
	if errors.As(err, &exit) {
		return fault.New(fault.Unavailable, "grow ext4 on %s: %w", device, err)
	}
	return err
}

// GrowFilesystem lets the filesystem mounted at point fill its device. One
// that fills it already is success. fault.InUse: this process may not while it
// is mounted.
func (l *Local) GrowFilesystem(ctx context.Context, fsType, device, point string) error {
	var c Command
	switch fsType {
	case Ext4:
		if !l.GrowsOnline(fsType) {
			return fault.New(fault.InUse, "ext4 on %s cannot be grown while it is mounted, because Quarry runs without CAP_SYS_RESOURCE: it grows when the volume is staged next; or give Quarry the capability", device)
		}
		c = Command{Name: "resize2fs", Args: []string{device}}
	case XFS:
		c = Command{Name: "xfs_growfs", Args: []string{"-d", point}}
	case Btrfs:
		c = Command{Name: "btrfs", Args: []string{"filesystem", "resize", "max", point}}
	default:
		_, err := MinimumSize(fsType)
		return err
	}
	_, err := l.tool(ctx, device, c)
	var exit *ExitError
	if errors.As(err, &exit) {
		return fault.New(fault.Unavailable, "grow %s on %s: %w", fsType, device, err)
	}
	return err
}

// SeparateBtrfs makes sure that a btrfs can be mounted beside another one with
// the same filesystem ID, such as the source of a clone. Kernels from 6.7 on
// give the second one a temporary ID and nothing needs to be written; older
// ones mix the two up, so there the image gets an ID of its own first.
func (l *Local) SeparateBtrfs(ctx context.Context, device, uuid string, readOnly bool) error {
	return l.separateBtrfs(ctx, "/sys/fs/btrfs", device, uuid, readOnly)
}

func (l *Local) separateBtrfs(ctx context.Context, sysfs, device, uuid string, readOnly bool) error {
	if exists(filepath.Join(sysfs, "features/temp_fsid")) || !exists(filepath.Join(sysfs, uuid)) {
		return nil
	}
	const why = "%s is btrfs with the ID %s, which is already mounted on this node"
	if readOnly {
		return fault.New(fault.Unsupported, why+", and cannot get another one because it is read-only: Linux 6.7 or newer is needed, or a node that does not use its relatives", device, uuid)
	}
	sb, err := l.Superblock(ctx, device, Btrfs)
	if err != nil {
		return err
	}
	if sb.Dirty { // btrfstune would make the log unreadable
		return fault.New(fault.Unsupported, why+", and cannot get another one before its log was replayed: Linux 6.7 or newer is needed, or a node that does not use its relatives", device, uuid)
	}
	// It is not to finish whoever dies, for it does not hold its device; what it has begun it does again.
	_, err = l.tool(ctx, device, Command{Name: "btrfstune", Args: []string{"-m", device}})
	var exit *ExitError
	if errors.As(err, &exit) {
		return fault.New(fault.Unavailable, "give the btrfs on %s an ID of its own: %w", device, err)
	}
	return err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
