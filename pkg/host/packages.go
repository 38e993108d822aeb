package host

import "github.com/quarry-csi/quarry/pkg/fault"

// debianPackage names the Debian package that holds a program; "" for one
// that Quarry does not use.
func debianPackage(program string) string {
	switch program {
	case "mkfs.ext4", "fsck.ext4", "resize2fs", "e2fsck":
		return "e2fsprogs"
	case "mkfs.xfs", "xfs_growfs":
		return "xfsprogs"
	case "mkfs.btrfs", "btrfs", "btrfstune":
		return "btrfs-progs"
	case "blkid", "fsfreeze":
		return "util-linux"
	case cryptsetup:
		return "cryptsetup-bin"
	case "glusterfs":
		return "glusterfs-client"
	case "timeout", "head":
		return "coreutils"
	}
	return ""
}

// missing is the error for a program that is not there.
func missing(program string) error {
	if p := debianPackage(program); p != "" {
		return fault.New(fault.Unsupported, "program %q is not installed on this node: install the Debian package %q (or its like)", program, p)
	}
	return fault.New(fault.Unsupported, "program %q is not installed on this node", program)
}
