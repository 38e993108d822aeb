package dir

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// probe finds out what the file system can do, by trying in tmp/. On a full disk
// nothing can be tried, but the domain must open, or nothing could be deleted:
// then the file system's type decides, and a call that fails is declined later.
func (e *dirEngine) probe(st *unix.Statfs_t) error {
	btrfs, xfs := int64(st.Type) == unix.BTRFS_SUPER_MAGIC, int64(st.Type) == unix.XFS_SUPER_MAGIC
	var reflink, subvolume error
	err := e.Scratch(func(folder *os.File) error {
		reflink = posix.TryReflink(folder)
		if btrfs {
			subvolume = trySubvolume(folder)
		}
		return nil
	})
	if full := posix.Fault(errors.Join(err, reflink, subvolume)); errors.Is(full, fault.Exhausted) {
		e.note("capabilities are taken from the type of the file system, not tried: %v", full)
		reflink, subvolume = nil, nil
		if !btrfs && !xfs {
			reflink = errors.New("could not be tried")
		}
	} else if err != nil {
		return err
	}
	if !btrfs {
		subvolume = errors.New("only btrfs has them")
	}
	quota, missing := findQuota(e.Path(), btrfs)
	e.reflink, e.subvolume, e.limiter = reflink == nil, subvolume == nil, quota
	e.say("snapshot and clone of block slabs", "reflinks", reflink)
	e.say("snapshot and clone of tree slabs", "btrfs subvolumes", subvolume)
	e.say("quota of tree slabs", fmt.Sprint(quota), missing)
	e.say("meter", "statfs", nil)
	return nil
}

// say notes what is native, or why it is not.
func (e *dirEngine) say(what, how string, missing error) {
	if missing != nil {
		e.note("%s: default: %v", what, missing)
	} else {
		e.note("%s: native: %s", what, how)
	}
}

func trySubvolume(folder *os.File) error {
	if err := createSubvolume(folder, "a"); err != nil {
		return err
	}
	a, err := os.Open(filepath.Join(folder.Name(), "a"))
	if err != nil {
		return err
	}
	defer a.Close()
	if err := snapshotSubvolume(a, folder, "b"); err != nil {
		return err
	}
	if err := destroySubvolume(folder, "b"); err != nil {
		return err
	}
	return destroySubvolume(folder, "a")
}

// findQuota returns the quota of a path's file system, or why there is none.
func findQuota(path string, btrfs bool) (quota, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if btrfs {
		if err := (qgroups{}).enabled(f); err != nil {
			return nil, err
		}
		return qgroups{}, nil
	}
	if err := (projects{}).enabled(f); err != nil {
		return nil, err
	}
	return projects{}, nil
}
