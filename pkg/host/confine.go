package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// RunConfined becomes the same program again with args, and without what that does not need:
// it has no capabilities (capabilities(7), by number) but those named, no way to new ones, and,
// where writable is not "", writes no file outside that directory, if the kernel has Landlock; then
// args are given "--confined" with "writing", else with "capabilities". It works for root and for a
// Child with a user of its own, whose connection stays open. It returns only if that fails.
func RunConfined(capabilities []uint, writable string, args ...string) error {
	runtime.LockOSThread() // what is given up here is this thread's, and execve keeps that one
	what := "capabilities"
	if err := prctl(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fault.New(fault.Internal, "give up new privileges: %w", err)
	}
	if writable != "" {
		confined, err := writeOnlyBelow(writable)
		if err != nil {
			return fault.New(fault.Unavailable, "confine the writing to %s: %w", writable, err)
		}
		if confined {
			what = "writing"
		}
	}
	if err := keepOnly(capabilities); err != nil {
		return err
	}
	if err := prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL)); err != nil { // that of StartChild was the first thread's
		return fault.New(fault.Internal, "end with the process that started this one: %w", err)
	}
	err := unix.Exec("/proc/self/exe", slices.Concat(os.Args[:1], args, []string{"--confined", what}), os.Environ())
	return fault.New(fault.Internal, "run again, confined: %w", err)
}

func prctl(option int, arg uintptr) error { return unix.Prctl(option, arg, 0, 0, 0) }

// keepOnly gives up all capabilities of this thread but some.
func keepOnly(capabilities []uint) error {
	has, err := permitted()
	if err != nil {
		return fault.New(fault.Internal, "read the capabilities: %w", err)
	}
	keep := has & bits(capabilities)
	if has&(1<<unix.CAP_SETPCAP) != 0 {
		for n := 0; n <= unix.CAP_LAST_CAP; n++ {
			if keep&(1<<n) != 0 {
				continue
			}
			if err := prctl(unix.PR_CAPBSET_DROP, uintptr(n)); err != nil && !errors.Is(err, unix.EINVAL) { // an older kernel has fewer
				return fault.New(fault.Internal, "give up capability %d: %w", n, err)
			}
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	low, high := uint32(keep), uint32(keep>>32)
	data := [2]unix.CapUserData{{Effective: low, Permitted: low, Inheritable: low}, {Effective: high, Permitted: high, Inheritable: high}}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fault.New(fault.Internal, "give up capabilities: %w", err)
	}
	return nil
}

// What Landlock restricts: all that changes a directory or the content of a file. Its second
// version is the first that lets files move between directories; the third knows truncation.
const (
	landlockRefer    = 2
	landlockTruncate = 3
)

// writeOnlyBelow restricts this thread; false: the kernel cannot.
func writeOnlyBelow(dir string) (bool, error) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || version < landlockRefer {
		return false, nil
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE |
		unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK |
		unix.LANDLOCK_ACCESS_FS_MAKE_FIFO | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK | unix.LANDLOCK_ACCESS_FS_MAKE_SYM | unix.LANDLOCK_ACCESS_FS_REFER}
	if version >= landlockTruncate {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr.Handled_access_fs), 0) // the kernel takes any length
	if errno != 0 {
		return false, fmt.Errorf("make Landlock's rules: %w", errno)
	}
	rules := os.NewFile(fd, "Landlock's rules")
	defer rules.Close()
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	below := unix.LandlockPathBeneathAttr{Allowed_access: attr.Handled_access_fs, Parent_fd: int32(f.Fd())}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, rules.Fd(), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&below)), 0, 0, 0); errno != 0 {
		return false, fmt.Errorf("allow writing below %s: %w", dir, errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, rules.Fd(), 0, 0); errno != 0 {
		return false, fmt.Errorf("restrict this process: %w", errno)
	}
	return true, nil
}
