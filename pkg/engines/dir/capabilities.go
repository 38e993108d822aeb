package dir

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// found is what the file system can do, found out by trying at opening.
type found struct {
	reflink   bool  // FICLONE between two files in the directory
	subvolume bool  // tree slabs are btrfs subvolumes
	limiter   quota // or nil
}

// quota limits directory trees. data is the open data directory of a tree slab.
type quota interface {
	// limit sets the limit of data to size bytes.
	limit(data *os.File, size int64) error
	// usage returns the bytes used in data, and its limit. What was written in the
	// last 30 seconds may be missing.
	usage(data *os.File) (used, limit int64, err error)
}

// Supports implements engine.Narrower.
func (e *dirEngine) Supports(c engine.Capability) bool {
	switch c {
	case engine.CapSnapshot, engine.CapClone:
		return e.reflink || e.subvolume
	case engine.CapQuota:
		return e.limiter != nil
	case engine.CapMeter, engine.CapImport:
		return true
	}
	return false
}

// SnapshotSlab implements engine.Snapshotter. Block: FICLONE locks the source's
// inode and writes its dirty pages first, so it sees every write whole and in
// order. The new slab has the size of spec. Tree: a btrfs snapshot; declined
// where that would not be a whole copy.
func (e *dirEngine) SnapshotSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	if err := engine.CheckName("source slab ID", source); err != nil {
		return err
	}
	if same, err := e.Same(spec); same || err != nil {
		return err
	}
	src, slab, err := e.OpenSlab(source)
	if err != nil {
		return err
	}
	defer src.Close()
	switch {
	case slab.Kind != spec.Kind:
		return fault.New(fault.Invalid, "slab %q is a %s slab: a copy of it cannot be of kind %s", source, slab.Kind, spec.Kind)
	case spec.Kind == engine.Tree && e.subvolume:
		return e.MakeTree(ctx, spec, func(wrapper *os.File) error { return e.snapshotTree(src, wrapper, spec.Size) })
	case spec.Kind == engine.Block && e.reflink:
		return e.MakeBlock(ctx, spec, func(f *os.File) error { return clone(f, src) })
	}
	return engine.ErrDeclined
}

// CloneSlab implements engine.Cloner.
func (e *dirEngine) CloneSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return e.SnapshotSlab(ctx, source, spec)
}

func clone(to, from *os.File) error {
	switch err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd())); err {
	case unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ETXTBSY:
		return engine.ErrDeclined // this pair cannot: a no-copy-on-write file, a swap file
	case nil:
		return nil
	default:
		return &os.LinkError{Op: "reflink", Old: from.Name(), New: to.Name(), Err: err}
	}
}

func (e *dirEngine) snapshotTree(src, wrapper *os.File, size int64) error {
	if err := snapshotSubvolume(src, wrapper, "data"); err != nil {
		return err
	}
	return e.limit(wrapper, size)
}

func (e *dirEngine) limit(wrapper *os.File, size int64) error {
	if e.limiter == nil {
		return nil
	}
	return posix.OpenData(wrapper, func(data *os.File) error { return e.limiter.limit(data, size) })
}

// SetQuota implements engine.Quota.
func (e *dirEngine) SetQuota(ctx context.Context, id string, size int64) error {
	if err := errors.Join(engine.CheckName("slab ID", id), posix.Fault(ctx.Err())); err != nil {
		return err
	}
	if size <= 0 {
		return fault.New(fault.Invalid, "quota of slab %q: size %d: it must be greater than zero", id, size)
	}
	f, slab, err := e.OpenSlab(id)
	if err != nil {
		return err
	}
	defer f.Close()
	if slab.Kind != engine.Tree {
		return fault.New(fault.Invalid, "slab %q is a block slab: its size is its limit", id)
	}
	return posix.Fault(e.limiter.limit(f, size))
}

// DomainUsage implements engine.Meter.
func (e *dirEngine) DomainUsage(ctx context.Context) (engine.Usage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(e.Path(), &st); err != nil {
		return engine.Usage{}, posix.Fault(&os.PathError{Op: "statfs", Path: e.Path(), Err: err})
	}
	size := int64(st.Bsize)
	return engine.Usage{
		Total: int64(st.Blocks) * size, Used: int64(st.Blocks-st.Bfree) * size, Available: int64(st.Bavail) * size,
		InodesTotal: int64(st.Files), InodesFree: int64(st.Ffree),
	}, nil
}

// SlabUsage implements engine.Meter. Block: what the file has allocated; blocks
// shared by reflinks count in every file. Tree: what its quota counts, up to 30
// seconds late; declined without a quota, since walking a large tree takes too
// long.
func (e *dirEngine) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	if err := errors.Join(engine.CheckName("slab ID", id), posix.Fault(ctx.Err())); err != nil {
		return engine.Usage{}, err
	}
	f, slab, err := e.OpenSlab(id)
	if err != nil {
		return engine.Usage{}, err
	}
	defer f.Close()
	u := engine.Usage{Total: slab.Size}
	if slab.Kind == engine.Tree {
		if e.limiter == nil {
			return engine.Usage{}, engine.ErrDeclined
		}
		if u.Used, u.Total, err = e.limiter.usage(f); err != nil {
			return engine.Usage{}, posix.Fault(err)
		}
	} else {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return engine.Usage{}, posix.Fault(&os.PathError{Op: "stat", Path: f.Name(), Err: err})
		}
		u.Used = st.Blocks * 512
	}
	u.Available = max(0, u.Total-u.Used)
	return u, nil
}

// hook makes tree slabs in the best way that was found.
type hook struct{ e *dirEngine }

// Create implements posix.Trees.
func (h hook) Create(wrapper *os.File) error {
	if h.e.subvolume {
		return createSubvolume(wrapper, "data")
	}
	return posix.MakeData(wrapper)
}

// Resize implements posix.Trees.
func (h hook) Resize(wrapper *os.File, size int64) error { return h.e.limit(wrapper, size) }

// Remove implements posix.Trees. Without a probe yet it does no harm: on other
// file systems the call is unknown, and a plain directory is refused.
func (h hook) Remove(wrapper *os.File) { _ = destroySubvolume(wrapper, "data") }
