package layer

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Harmless refuses a layer with chunks of several pages in a file on a share, whose device would destroy memory of
// the node (see Shares above), with fault.Unsupported. It asks the file system, which may hang.
func Harmless(path string, chunk int64) error {
	if chunk <= int64(os.Getpagesize()) {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		kind := fault.Unavailable
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			kind = fault.NotFound
		}
		return fault.New(kind, "statfs %s: %w", path, err)
	}
	switch int64(fs.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC:
		return fault.New(fault.Unsupported, "%s lies on a share, where a layer with chunks of %d bytes would destroy memory of this node: at most %d are allowed, and the engine of a share says SharedAccess", path, chunk, ShareChunk)
	}
	return nil
}
