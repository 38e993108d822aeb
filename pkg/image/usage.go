package image

import (
	"context"
	"maps"
	"slices"

	"golang.org/x/sync/errgroup"
)

// measuring is how many slabs are measured at once.
const measuring = 8

// Use is what an image takes of its domain.
type Use struct {
	Image
	Allocated int64 // bytes of its slab; blocks that it shares with others count for each
	Measured  bool  // false: nobody can tell
}

// Usage measures what every image of the open domains takes, deleted ones too that still
// have their slabs, ordered by handle. It is what All returns, but for what has no slab.
func (m *Manager) Usage(ctx context.Context) []Use {
	var out []Use
	for _, d := range m.open() {
		first := len(out)
		d.mu.Lock()
		for _, id := range slices.Sorted(maps.Keys(d.images)) {
			if img := d.images[id]; img.rev != 0 && img.rec.Kind != kindGroup && !img.slabGone && img.slab != "" {
				out = append(out, Use{Image: d.viewLocked(img)})
			}
		}
		d.mu.Unlock()
		if d.caps.Meter == nil {
			continue
		}
		var group errgroup.Group
		group.SetLimit(measuring)
		for i := range out[first:] {
			u := &out[first+i]
			group.Go(func() error {
				if s, err := d.caps.Meter.SlabUsage(ctx, u.Slab); err == nil { // a slab that is missing is for Check
					u.Allocated, u.Measured = s.Used, true
				}
				return nil
			})
		}
		_ = group.Wait() // none of them fails
	}
	return out
}
