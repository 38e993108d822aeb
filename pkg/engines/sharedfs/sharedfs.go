// Package sharedfs is the engine for a POSIX file system that the nodes have mounted already, of
// whatever type: CephFS, Lustre, GPFS, BeeGFS, ... It knows none of them. What the file system
// has to do is tried at opening, and what it does not do beside that is in the domain's notes. NFS, SMB and
// Gluster are refused: as they are mounted by others their clients break promises that no trial can see broken, and
// each has an engine that mounts it as it has to be.
//
// What it must never do is to take a node's own disk for the file system, where that is not
// mounted: see check.
package sharedfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

const (
	paramPath  = "path"
	paramLocal = "allowLocal"
)

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	return map[string]string{
		paramPath:  "absolute path of a directory that belongs to Quarry alone, in a shared file system that every node has mounted there (required)",
		paramLocal: "\"true\": the directory may be in a file system of this host alone, as for a trial on one node; where a share is not mounted, the node's own disk is then taken for it (default: \"false\")",
	}
}

// lookLimit is how long the first look at the path may take.
const lookLimit = 10 * time.Second

// Open opens the directory params["path"] as a domain. fault.Invalid: a parameter is wrong, or the
// file system cannot hold a domain; then nothing is left in it. fault.Unavailable: it does not answer, or is not
// mounted now.
func Open(ctx context.Context, params map[string]string, h *host.Local) (engine.Engine, error) {
	path, local, err := checkParams(params)
	if err != nil {
		return nil, err
	}
	var real, fsType string
	err = h.Within(ctx, "look at "+path, lookLimit, func() error {
		at, err := resolve(path)
		if err != nil {
			return err
		}
		name, err := check(h, at, local)
		if err == nil {
			real, fsType = at, name
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return share.Open(ctx, h, "", share.Storage{
		Type:     "sharedfs",
		Location: fmt.Sprintf("%s (%s)", real, fsType),
		Path:     real,
		CheckPath: func(path string) error {
			_, err := check(h, path, local)
			return err
		},
		Copies: !local,
		Posix:  posix.Options{NoLeases: !local},
	})
}

func checkParams(params map[string]string) (path string, local bool, err error) {
	known := slices.Sorted(maps.Keys(Params()))
	for name := range params {
		if !slices.Contains(known, name) {
			return "", false, fault.New(fault.Invalid, "parameter %q is unknown: engine sharedfs knows %s", name, strings.Join(known, ", "))
		}
	}
	if path = params[paramPath]; !filepath.IsAbs(path) {
		return "", false, fault.New(fault.Invalid, "parameter %q is %q: the absolute path of a directory is needed", paramPath, path)
	}
	switch params[paramLocal] {
	case "", "false":
		return path, false, nil
	case "true":
		return path, true, nil
	}
	return "", false, fault.New(fault.Invalid, "parameter %q is %q: it must be \"true\" or \"false\"", paramLocal, params[paramLocal])
}

// resolve is the path without links. What is missing may be a mount that is still to come.
func resolve(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fault.New(fault.Unavailable, "parameter %q: %s does not exist: is the file system mounted on this node? Then make the directory in it", paramPath, path)
	case errors.Is(err, unix.ENOTDIR):
		return "", fault.New(fault.Invalid, "parameter %q: %s is not a directory: a part of it is a file", paramPath, path)
	case err != nil:
		return "", posix.Fault(fmt.Errorf("parameter %q: %w", paramPath, err))
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", posix.Fault(err)
	}
	if !info.IsDir() {
		return "", fault.New(fault.Invalid, "parameter %q: %s is not a directory", paramPath, path)
	}
	return real, nil
}

// check names the type of the file system at a path, as the kernel does, and refuses one that has an engine of its own, and one of this host
// alone unless that is allowed. Where a share is not mounted, its path leads to the node's own disk, and
// an empty domain would be found there: volumes would be lost from sight, and others made where no other
// node finds them. In a container that disk is not the one of "/", so the type has to tell as well.
func check(h *host.Local, path string, local bool) (fsType string, err error) {
	var at, root unix.Stat_t
	if err := errors.Join(unix.Stat(path, &at), unix.Stat("/", &root)); err != nil {
		return "", posix.Fault(fmt.Errorf("parameter %q: %s: %w", paramPath, path, err))
	}
	mounts, err := h.Mounts()
	if err != nil {
		return "", err
	}
	m, ok := mountOf(mounts, path)
	if !ok {
		return "", fault.New(fault.Internal, "no mount in /proc/self/mountinfo holds %s", path)
	}
	if instead := ownEngine(m.Type); instead != "" {
		return "", fault.New(fault.Invalid, "parameter %q: %s is in a file system of type %s (mounted at %s): as it is mounted there, a node may not see what another has just done; use engine %s, which mounts it by itself", paramPath, path, m.Type, m.Point, instead)
	}
	if fsType = strings.TrimPrefix(m.Type, "fuse."); local {
		return fsType, nil
	}
	const advice = "mount the shared file system there, on every node; for a trial on one node set \"allowLocal\": \"true\", or use engine dir"
	switch {
	case at.Dev == root.Dev:
		return "", fault.New(fault.Unavailable, "parameter %q: %s is in the file system of \"/\" (%s): no shared file system is mounted there: %s", paramPath, path, m.Type, advice)
	case isLocal(m.Type):
		return "", fault.New(fault.Unavailable, "parameter %q: %s is in a file system of type %s (mounted at %s), which is of this node alone: %s", paramPath, path, m.Type, m.Point, advice)
	}
	return fsType, nil
}

// ownEngine is the engine to use for a type of file system whose client remembers names, sizes or content for a while unless it is
// mounted with the right options, or needs more than that; "": this one.
func ownEngine(fsType string) string {
	switch fsType {
	case "nfs", "nfs4":
		return "nfs3 or nfs4"
	case "cifs", "smb3":
		return "smb"
	case "fuse.glusterfs":
		return "gluster"
	}
	return ""
}

// mountOf is the mount that a path without links leads to: the last of those with the longest mount point.
func mountOf(mounts []host.Mount, path string) (best host.Mount, ok bool) {
	for _, m := range mounts {
		in := m.Point == "/" || path == m.Point || strings.HasPrefix(path, m.Point+"/")
		if in && len(m.Point) >= len(best.Point) {
			best, ok = m, true
		}
	}
	return best, ok
}

// isLocal says whether a type of file system is only ever mounted on one host at a time. Types that
// are not known are shared.
func isLocal(fsType string) bool {
	switch fsType {
	case "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "bcachefs", "f2fs", "jfs", "reiserfs", "nilfs2", "vfat", "exfat", "ntfs", "ntfs3", "hfsplus",
		"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "overlay", "aufs", "squashfs", "erofs", "iso9660", "udf", "autofs", "rootfs":
		return true
	}
	return false
}
