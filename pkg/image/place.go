package image

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// named says whether a class that names the domain means this one: by its
// configured name, its ID or an alias.
func (d *domain) named(name string) bool {
	return name == d.cfg.Name || name == d.id || slices.Contains(d.now().Aliases, name)
}

// candidates lists the domains that a class names, in its order.
func (m *Manager) candidates(names []string) ([]*domain, error) {
	open := m.open()
	if len(names) == 0 {
		if err := m.allOpen(); err != nil {
			return nil, err
		}
		if len(open) != 1 {
			return nil, fault.New(fault.Invalid, "parameter domain is missing: one of %s", strings.Join(configuredNames(open), ", "))
		}
		return open, nil
	}
	var out []*domain
	for _, n := range names {
		found := false
		for _, d := range open {
			if d.named(n) {
				out, found = append(out, d), true
			}
		}
		if !found {
			if why := m.closed(n); why != nil {
				return nil, fault.New(fault.Unavailable, "domain %s is not open: %w", n, why)
			}
			return nil, fault.New(fault.Invalid, "parameter domain: %q is not configured: one of %s", n, strings.Join(configuredNames(open), ", "))
		}
	}
	return out, nil
}

// closed says why a configured domain is not open; nil: there is none of that name.
func (m *Manager) closed(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e, u := range m.unopened {
		if e.name == name {
			return u.reason
		}
	}
	return nil
}

func configuredNames(ds []*domain) []string {
	var out []string
	for _, d := range ds {
		if !slices.Contains(out, d.cfg.Name) {
			out = append(out, d.cfg.Name)
		}
	}
	return out
}

// place chooses the domain and the size. A restore stays in its source's
// domain if the class allows that, because native clones need it.
func (c *creation) place(ctx context.Context, srcSize int64) error {
	list, err := c.m.candidates(c.r.Domains)
	if c.r.RestoreToSource && c.src != nil {
		list, err = []*domain{c.src.d}, nil
	}
	if err != nil {
		return err
	}
	if c.src != nil {
		if i := slices.Index(list, c.src.d); i > 0 {
			list = append([]*domain{list[i]}, slices.Delete(slices.Clone(list), i, i+1)...)
		}
	}
	var last error
	for _, d := range list {
		size, err := c.fits(ctx, d, srcSize)
		if err == nil {
			c.d, c.size = d, size
			return nil
		}
		last = err
	}
	return last
}

// fits says whether the volume can be made in d, and its size there.
func (c *creation) fits(ctx context.Context, d *domain, srcSize int64) (int64, error) {
	d.mu.Lock()
	fenced := d.fenced
	d.mu.Unlock()
	if fenced != nil {
		return 0, fenced
	}
	if err := d.checkReach(c.r.Accesses, c.layout); err != nil {
		return 0, err
	}
	if err := d.checkParams(c.r.Params, c.layout); err != nil {
		return 0, err
	}
	if err := d.checkNative(c.r.RequireNative); err != nil {
		return 0, err
	}
	if d.cfg.Scope == ScopeNode && len(c.r.Nodes) > 0 && !slices.Contains(c.r.Nodes, d.cfg.Node) {
		return 0, fault.New(fault.Exhausted, "domain %s belongs to node %s, the volume must be reachable from %s", d.id, d.cfg.Node, strings.Join(c.r.Nodes, ", "))
	}
	if c.src != nil && d != c.src.d && d.now().NativeOnly {
		return 0, fault.New(fault.Invalid, "domain %s is native-only: a volume cannot be copied into it from domain %s", d.id, c.src.d.id)
	}
	maxSlab := d.desc.MaxSlabSize
	if c.layout == LayoutDirectory {
		maxSlab = 0
	}
	size, err := slabSizeFor(c.r.Size, c.r.Limit, srcSize, d.unit(c.layout, 0), c.fs, maxSlab, c.r.header())
	if err != nil {
		return 0, err
	}
	release, err := d.reserve(ctx, size)
	if err != nil {
		return 0, err
	}
	release()
	return size, nil
}

// room is what limits a domain, as measured now. All in bytes; -1: unlimited.
type room struct {
	total, available int64
	warning          string // of the storage itself
}

// room measures the domain. Foreign bytes are promised to nobody, but are not
// free either.
func (d *domain) room(ctx context.Context) (room, error) {
	r := room{total: -1, available: -1}
	if d.now().CapacityLimit > 0 {
		r.total = d.now().CapacityLimit
	}
	if d.caps.Meter == nil {
		return r, nil
	}
	u, err := d.usage(ctx)
	if err != nil {
		return r, fault.In(err, "measure the usage", d.id, "")
	}
	r.warning = u.Warning
	d.mu.Lock()
	defer d.mu.Unlock()
	if own := u.Total - d.foreign; r.total < 0 || own < r.total {
		r.total = own
	}
	r.available = u.Available
	return r, nil
}

// usage measures the storage, and keeps what that says of itself.
func (d *domain) usage(ctx context.Context) (engine.Usage, error) {
	u, err := d.caps.Meter.DomainUsage(ctx)
	if err != nil {
		return u, err
	}
	d.mu.Lock()
	before := d.warning
	d.warning, d.watched = u.Warning, d.m.cfg.Now()
	d.mu.Unlock()
	if before != u.Warning {
		klog.FromContext(ctx).Info("The storage says of itself", "domain", d.id, "warning", u.Warning)
	}
	return u, nil
}

// watchEvery is how old the storage's word of itself may get.
const watchEvery = time.Minute

// watch asks the storage how it is, if nobody has done so for a while: health is
// answered from what is known, without waiting for storage.
func (d *domain) watch(ctx context.Context) {
	d.mu.Lock()
	recent := d.m.cfg.Now().Sub(d.watched) < watchEvery
	d.mu.Unlock()
	if d.caps.Meter == nil || recent {
		return
	}
	if _, err := d.usage(ctx); err != nil && ctx.Err() == nil {
		klog.FromContext(ctx).Error(err, "Measuring the usage", "domain", d.id)
	}
}

// left is what may still be promised. The caller holds d.mu.
func (d *domain) left(r room) int64 {
	n := int64(unlimited)
	if r.total >= 0 {
		n = int64(float64(r.total)*d.now().Overcommit) - d.promised
	}
	if r.available >= 0 {
		n = min(n, int64(float64(r.available)*d.now().Overcommit))
	}
	return max(0, n)
}

// unlimited is what a domain promises that measures nothing and has no limit: 1 EiB.
const unlimited = 1 << 60

// capacity is what may still be promised, in bytes.
func (d *domain) capacity(ctx context.Context) (int64, error) {
	r, err := d.room(ctx)
	if err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.left(r), nil
}

// reserve promises size bytes until the returned function is called (again:
// no effect). fault.Exhausted: there is not so much.
func (d *domain) reserve(ctx context.Context, size int64) (release func(), err error) {
	r, err := d.room(ctx)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := d.left(r); size > n {
		err := fault.New(fault.Exhausted, "%s (%d bytes) are asked for, domain %s has %s (%d bytes) left to promise (overcommit %g): delete something, or give the storage more space",
			bytesText(size), size, d.id, bytesText(n), n, d.now().Overcommit)
		if r.warning != "" {
			err = fault.New(fault.Exhausted, "%w (%s)", err, r.warning)
		}
		return nil, err
	}
	d.promised += size
	released := false
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !released {
			released = true
			d.promised -= size
		}
	}, nil
}

// Capacity that can still be promised in the named domains (none: all), as far
// as they can be reached from node ("": any), with the largest and the
// smallest volume possible, in bytes.
func (m *Manager) Capacity(ctx context.Context, domains []string, node string) (available, maxVolume, minVolume int64, err error) {
	if err := m.allOpen(); err != nil && len(domains) == 0 {
		return 0, 0, 0, err
	}
	list := m.open()
	if len(domains) > 0 {
		if list, err = m.candidates(domains); err != nil {
			return 0, 0, 0, err
		}
	}
	for _, d := range list {
		if node != "" && d.cfg.Scope == ScopeNode && d.cfg.Node != node {
			continue
		}
		n, err := d.capacity(ctx)
		if err != nil {
			return 0, 0, 0, err
		}
		available += n
		if d.desc.MaxSlabSize > 0 {
			n = min(n, d.desc.MaxSlabSize)
		}
		maxVolume = max(maxVolume, n)
	}
	return available, maxVolume, minSizes[""], nil
}

// allocated is how many bytes an image's slab takes now, and checks on the way
// that the slab is as large as recorded. ok is false where nobody can tell.
func (d *domain) allocated(ctx context.Context, rec record, slab string) (n int64, ok bool, err error) {
	if d.caps.Meter == nil {
		return 0, false, nil
	}
	u, err := d.caps.Meter.SlabUsage(ctx, slab)
	switch {
	case errors.Is(err, engine.ErrDeclined):
		return 0, false, nil
	case errors.Is(err, fault.NotFound): // as an answer it would say that the image does not exist
		return 0, false, fault.New(fault.Corrupt, "slab %s is missing; restore it, or delete its image: see kubectl quarry check", slab)
	case errors.Is(err, fault.Corrupt):
		return 0, false, fault.New(fault.Corrupt, "%w; restore it, or delete its image: see kubectl quarry check", err)
	case err != nil:
		return 0, false, err
	case rec.Kind == string(engine.Block) && u.Total < rec.need():
		return 0, false, fault.New(fault.Corrupt, "slab %s has %d bytes, recorded are %d: it was truncated; restore it, or delete its image: see kubectl quarry check", slab, u.Total, rec.need())
	}
	return u.Used, true, nil
}

// measureAlloc notes in a record what its slab takes now, where that can be told.
func (d *domain) measureAlloc(ctx context.Context, rec *record, slab string) {
	if n, known, err := d.allocated(ctx, *rec, slab); err == nil && known {
		rec.Alloc = max(n, 1)
	}
}
