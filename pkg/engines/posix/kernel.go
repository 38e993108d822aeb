package posix

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// kernelFileSystem names the file systems in which the kernel shows itself, by
// statfs(2). Nothing can be kept there, now or later, and some say so in
// misleading ways: /proc answers mkdir with ENOENT, as a storage that is gone
// for a while may, and a control group becomes of each folder in another.
// What only waits for a storage to be mounted (autofs) is none of them.
func kernelFileSystem(magic int64) string {
	switch magic {
	case unix.PROC_SUPER_MAGIC:
		return "proc"
	case unix.SYSFS_MAGIC:
		return "sysfs"
	case unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC:
		return "cgroup"
	case unix.DEBUGFS_MAGIC:
		return "debugfs"
	case unix.TRACEFS_MAGIC:
		return "tracefs"
	case unix.SECURITYFS_MAGIC:
		return "securityfs"
	case unix.BPF_FS_MAGIC:
		return "bpf"
	case unix.DEVPTS_SUPER_MAGIC:
		return "devpts"
	case unix.EFIVARFS_MAGIC:
		return "efivarfs"
	}
	return ""
}

// checkKeeps refuses a directory in which no files can be kept. What is absent
// for a while is not refused here: whoever opens tries again.
func checkKeeps(root *os.Root, path string) error {
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := errors.Join(unix.Fstatfs(int(f.Fd()), &st), f.Close()); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if name := kernelFileSystem(int64(st.Type)); name != "" {
		return fault.New(fault.Invalid, "params.path: %s is in the kernel's own file system %s, which keeps no files: give a directory on a disk or a share", path, name)
	}
	return nil
}
