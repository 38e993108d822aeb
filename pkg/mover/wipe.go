package mover

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// wiper removes everything in a tree.
type wiper struct{}

// wipe empties the directory root. fault.InUse: something is mounted in it.
func wipe(ctx context.Context, root int, rootName string) error {
	return walk(ctx, root, rootName, wiper{})
}

func (wiper) visit(e *entry) error {
	if isDirectory(&e.st) {
		return nil
	}
	return remove(e, 0)
}

func (wiper) leave(e *entry) error { return remove(e, unix.AT_REMOVEDIR) }

func (wiper) mountPoint(_ *handle, _, path string) error {
	return fault.New(fault.InUse, "copy target holds a mount point, %q: unmount it first", path)
}

func remove(e *entry, flags int) error {
	err := retry(func() error { return unix.Unlinkat(e.dir.fd, e.name, flags) })
	if err == unix.ENOENT {
		return nil
	}
	return sysErr(err, "remove", e.path)
}
