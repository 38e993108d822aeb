package share

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
)

func slabWords(id string) string  { return fmt.Sprintf("slab %q", id) }
func tagWords(name string) string { return fmt.Sprintf("tag %q", name) }

// CreateSlab implements engine.Engine.
func (e *Engine) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	return act(ctx, e, slabWords(spec.ID), e.limits.slab, func(ctx context.Context, d *posix.Directory) error { return d.CreateSlab(ctx, spec) })
}

// ResizeSlab implements engine.Engine.
func (e *Engine) ResizeSlab(ctx context.Context, id string, size int64) error {
	return act(ctx, e, slabWords(id), e.limits.slab, func(ctx context.Context, d *posix.Directory) error { return d.ResizeSlab(ctx, id, size) })
}

// DeleteSlab implements engine.Engine. A tree so large that it is not gone within the limit goes on being
// removed; the slab is deleted then.
func (e *Engine) DeleteSlab(ctx context.Context, id string) error {
	return act(ctx, e, slabWords(id), e.limits.slab, func(ctx context.Context, d *posix.Directory) error { return d.DeleteSlab(ctx, id) })
}

// ListSlabs implements engine.Engine.
func (e *Engine) ListSlabs(ctx context.Context) ([]engine.Slab, error) {
	return verb(ctx, e, "the list of slabs", e.limits.list, func(ctx context.Context, d *posix.Directory) ([]engine.Slab, error) { return d.ListSlabs(ctx) })
}

// CreateTag implements engine.Engine.
func (e *Engine) CreateTag(ctx context.Context, tag engine.Tag) error {
	return act(ctx, e, tagWords(tag.Name), e.limits.tag, func(ctx context.Context, d *posix.Directory) error { return d.CreateTag(ctx, tag) })
}

// DeleteTag implements engine.Engine.
func (e *Engine) DeleteTag(ctx context.Context, name string) error {
	return act(ctx, e, tagWords(name), e.limits.tag, func(ctx context.Context, d *posix.Directory) error { return d.DeleteTag(ctx, name) })
}

// ListTags implements engine.Engine.
func (e *Engine) ListTags(ctx context.Context, prefix string) ([]engine.Tag, error) {
	return verb(ctx, e, fmt.Sprintf("the list of tags %q", prefix), e.limits.list, func(ctx context.Context, d *posix.Directory) ([]engine.Tag, error) {
		return d.ListTags(ctx, prefix)
	})
}

// SnapshotSlab implements engine.Snapshotter.
func (e *Engine) SnapshotSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return act(ctx, e, slabWords(spec.ID), e.limits.slab, func(ctx context.Context, d *posix.Directory) error { return d.Reflink(ctx, source, spec) })
}

// CloneSlab implements engine.Cloner.
func (e *Engine) CloneSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return e.SnapshotSlab(ctx, source, spec)
}

// copyLimit is for copies that move on: the largest slab takes as long as it takes.
const copyLimit = 30 * 24 * time.Hour

// CopySlab implements engine.Copier. It may take as long as it moves on.
func (e *Engine) CopySlab(ctx context.Context, source string, spec engine.SlabSpec, progress func(done int64)) error {
	var ended atomic.Bool // progress is told nothing after the return
	defer ended.Store(true)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := time.AfterFunc(e.limits.stall, func() {
		cancel(fault.New(fault.Unavailable, "%s of %s: nothing was copied for %s: the storage does not answer", slabWords(spec.ID), e.storage.Location, e.limits.stall))
	})
	defer stall.Stop()
	err := act(ctx, e, slabWords(spec.ID), copyLimit, func(ctx context.Context, d *posix.Directory) error {
		return d.Copy(ctx, source, spec, func(done int64) {
			stall.Reset(e.limits.stall)
			if progress != nil && !ended.Load() {
				progress(done)
			}
		})
	})
	var stalled *fault.Error
	if err != nil && errors.As(context.Cause(ctx), &stalled) {
		return stalled
	}
	return err
}

// DomainUsage implements engine.Meter.
func (e *Engine) DomainUsage(ctx context.Context) (engine.Usage, error) {
	u, err := verb(ctx, e, "the usage", e.limits.probe, func(ctx context.Context, d *posix.Directory) (engine.Usage, error) { return d.DomainUsage(ctx) })
	if err != nil || e.storage.Health == nil {
		return u, err
	}
	warning, err := bounded(ctx, e, "the health", e.limits.probe, e.storage.Health, nil)
	if err != nil {
		warning = fmt.Sprintf("its health is not known: %v", err)
	}
	u.Warning = warning
	return u, nil
}

// SlabUsage implements engine.Meter.
func (e *Engine) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	return verb(ctx, e, slabWords(id), e.limits.probe, func(ctx context.Context, d *posix.Directory) (engine.Usage, error) { return d.SlabUsage(ctx, id) })
}

// Importable implements engine.Importer.
func (e *Engine) Importable(ctx context.Context, source string) (engine.Importable, error) {
	return verb(ctx, e, fmt.Sprintf("import of %q", source), e.limits.slab, func(ctx context.Context, d *posix.Directory) (engine.Importable, error) {
		return d.Importable(ctx, e.host, source)
	})
}

// ImportSlab implements engine.Importer.
func (e *Engine) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return act(ctx, e, slabWords(spec.ID), e.limits.slab, func(ctx context.Context, d *posix.Directory) error { return d.ImportSlab(ctx, source, spec) })
}

// KeepSlab implements engine.Importer.
func (e *Engine) KeepSlab(ctx context.Context, source, id string) error {
	return act(ctx, e, slabWords(id), e.limits.slab, func(ctx context.Context, d *posix.Directory) error { return d.KeepSlab(ctx, source, id) })
}
