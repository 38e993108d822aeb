package dir

import (
	"context"
	"errors"
	"os"

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

// SnapshotSlab implements engine.Snapshotter. Block: a reflink. Tree: a btrfs snapshot; declined
// where that would not be a whole copy.
func (e *dirEngine) SnapshotSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	if spec.Kind == engine.Block && e.reflink {
		return e.Reflink(ctx, source, spec)
	}
	src, done, err := e.From(source, spec)
	if done || err != nil {
		return err
	}
	defer src.Close()
	if spec.Kind == engine.Tree && e.subvolume {
		return e.MakeTree(ctx, spec, func(wrapper *os.File) error { return e.snapshotTree(src, wrapper, spec.Size) })
	}
	return engine.ErrDeclined
}

// CloneSlab implements engine.Cloner.
func (e *dirEngine) CloneSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return e.SnapshotSlab(ctx, source, spec)
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

// SlabUsage implements engine.Meter. Tree: what its quota counts, up to 30
// seconds late; declined without a quota.
func (e *dirEngine) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	u, err := e.Directory.SlabUsage(ctx, id)
	if e.limiter == nil || !errors.Is(err, engine.ErrDeclined) {
		return u, err
	}
	f, _, err := e.OpenSlab(id)
	if err != nil {
		return engine.Usage{}, err
	}
	defer f.Close()
	if u.Used, u.Total, err = e.limiter.usage(f); err != nil {
		return engine.Usage{}, posix.Fault(err)
	}
	u.Available = max(0, u.Total-u.Used)
	return u, nil
}

// Importable implements engine.Importer, for a file in the domain's folder import/.
func (e *dirEngine) Importable(ctx context.Context, source string) (engine.Importable, error) {
	return e.Directory.Importable(ctx, e.host, source)
}

var (
	_ engine.Meter    = (*dirEngine)(nil)
	_ engine.Importer = (*dirEngine)(nil)
)

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
