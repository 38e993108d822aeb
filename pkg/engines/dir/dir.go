// Package dir is the engine for a directory of a local or mounted file system.
//
// Slabs and tags are kept by package posix. This package opens the directory,
// describes it, and adds what its file system can do natively: see
// capabilities.go.
package dir

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

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	return map[string]string{"path": "absolute path of an existing directory that belongs to Quarry alone (required)"}
}

// Open opens the directory params["path"] as a domain. Missing folders in it are
// made, the left-overs of earlier processes removed, and its file system is
// tried for capabilities. Nothing is changed when it fails with fault.Invalid
// (an unknown or missing parameter, not a directory), fault.NotFound or
// fault.Permission (read-only, or not ours to write).
func Open(ctx context.Context, params map[string]string, run host.Runner) (engine.Engine, error) {
	path, err := checkParams(params)
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, posix.Fault(&os.PathError{Op: "statfs", Path: path, Err: err})
	}
	e := &dirEngine{host: host.NewLocal(run)}
	if e.Directory, err = posix.Open(path, posix.Options{Trees: hook{e}}); err != nil {
		return nil, err
	}
	e.desc = engine.Description{
		MaxSlabSize: maxSlabSize(&st),
		Location:    fmt.Sprintf("%s (%s)", path, fsName(&st)),
	}
	e.Directory.Describe(&e.desc)
	if err := e.Clean(ctx); errors.Is(err, fault.Exhausted) || ctx.Err() != nil {
		// A full disk is no reason to stay away: deleting must be possible.
		e.note("left-overs of earlier processes: not looked for: %v", err)
	} else if err != nil {
		e.note("left-overs of earlier processes: some stay in %s: %v", path, err)
	}
	if err := e.probe(&st); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

func checkParams(params map[string]string) (path string, err error) {
	known := slices.Sorted(maps.Keys(Params()))
	for name := range params {
		if !slices.Contains(known, name) {
			return "", fault.New(fault.Invalid, "parameter %q is unknown: engine dir knows %s", name, strings.Join(known, ", "))
		}
	}
	path = params["path"]
	if !filepath.IsAbs(path) {
		return "", fault.New(fault.Invalid, "parameter \"path\" is %q: the absolute path of a directory is needed", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fault.New(fault.NotFound, "parameter \"path\": %s does not exist: create the directory or mount its file system", path)
	} else if errors.Is(err, unix.ENOTDIR) {
		return "", fault.New(fault.Invalid, "parameter \"path\": %s is not a directory: a part of it is a file", path)
	} else if err != nil {
		return "", posix.Fault(fmt.Errorf("parameter \"path\": %w", err))
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", posix.Fault(err)
	}
	if !info.IsDir() {
		return "", fault.New(fault.Invalid, "parameter \"path\": %s is not a directory", path)
	}
	switch err := unix.Faccessat(unix.AT_FDCWD, real, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err {
	case nil:
		return real, nil
	case unix.EROFS:
		return "", fault.New(fault.Permission, "parameter \"path\": %s is on a read-only file system", path)
	default:
		return "", posix.Fault(fmt.Errorf("parameter \"path\": %s cannot be written: %w", path, err))
	}
}

// dirEngine is an opened domain.
type dirEngine struct {
	*posix.Directory
	host *host.Local
	desc engine.Description
	found
}

// Describe implements engine.Engine.
func (e *dirEngine) Describe(context.Context) (engine.Description, error) {
	desc := e.desc
	desc.Kinds, desc.Notes, desc.TreeParams = slices.Clone(desc.Kinds), slices.Clone(desc.Notes), slices.Clone(desc.TreeParams)
	desc.Params, desc.ParamValues = maps.Clone(desc.Params), maps.Clone(desc.ParamValues)
	return desc, nil
}

func (e *dirEngine) note(format string, args ...any) {
	e.desc.Notes = append(e.desc.Notes, fmt.Sprintf(format, args...))
}

func fsName(st *unix.Statfs_t) string {
	switch int64(st.Type) {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	}
	return fmt.Sprintf("file system type %#x", st.Type)
}

// maxSlabSize is the largest file: on ext4, 2^32-1 of its blocks.
func maxSlabSize(st *unix.Statfs_t) int64 {
	if int64(st.Type) != unix.EXT4_SUPER_MAGIC {
		return 0
	}
	return (int64(st.Bsize)<<32 - int64(st.Bsize)) / posix.Granularity * posix.Granularity
}
