package image

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sort"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// view is an image as users and operators see it.
func (m *Manager) view(img *image) Image {
	d := img.d
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.viewLocked(img)
}

func (d *domain) viewLocked(img *image) Image {
	rec := img.rec
	v := Image{Handle: d.handle(img), Name: rec.Name, Layout: rec.layout(), Mutable: rec.Mutable, Size: rec.payload(), Promised: img.promise, Encrypted: rec.Crypt > 0, ThinLayers: rec.Thin, Slab: img.slab,
		Source: rec.Source, SourceMutable: rec.SrcVol, Created: rec.created(), State: Optimized, Ready: true, Fresh: !rec.Used, Filesystem: rec.FS,
		Inexact: rec.Inexact, How: rec.How, Params: maps.Clone(rec.Params), Described: img.desc, Warning: d.warning}
	if rec.Tuning != nil {
		v.Tuning = *rec.Tuning
	}
	if rec.Group != "" {
		v.Group = Handle{d.id, rec.Group}.String()
	}
	switch {
	case d.finished(img):
		v.State, v.Reason = Deleting, d.whyDeleting(img)
	case !d.visible(img) && !rec.Strong:
		v.State, v.Ready = Creating, false
		if img.op != nil {
			v.Reason = img.op.describe()
		} else {
			v.Reason = "left over from an earlier run"
		}
	default:
		v.State, v.Reason = d.stateOf(img)
	}
	if v.Parent = img.below(); !img.slabGone {
		v.Chain, _ = d.chain(img) // as far as it goes; what is wrong is the state's reason
	}
	for _, k := range d.kids(img) {
		v.Children = append(v.Children, k.id)
	}
	for _, a := range img.attached {
		if a.Mode == ModeMerging {
			continue // it is Quarry's own
		}
		v.Attachments = append(v.Attachments, a.Attachment)
	}
	slices.SortFunc(v.Attachments, func(a, b Attachment) int { return cmp.Compare(a.Node, b.Node) })
	return v
}

func (d *domain) whyDeleting(img *image) string {
	switch {
	case img.slabGone:
		return "its slab is gone, its last tags follow"
	case img.readers > 0 || d.pinned(img.id):
		return "a copy of it is still running"
	case len(d.children[img.id]) > 1:
		return fmt.Sprintf("%d images lie over its slab", len(d.children[img.id]))
	case len(d.children[img.id]) == 1:
		return "the image over its slab is going to be merged into it"
	}
	return "waiting for the collector"
}

// Get returns a visible image. fault.NotFound; fault.Unavailable when its
// domain is not open.
func (m *Manager) Get(_ context.Context, h Handle) (Image, error) {
	img, err := m.find(h)
	if err != nil {
		return Image{}, err
	}
	return m.view(img), nil
}

// List returns the visible volumes (mutable) or snapshots ordered by handle,
// beginning after the handle `after` ("": from the start), at most limit (0:
// all), and whether there are more. fault.Unavailable until every configured
// domain was indexed.
func (m *Manager) List(_ context.Context, mutable bool, after string, limit int) (list []Image, more bool, err error) {
	if err := m.allOpen(); err != nil {
		return nil, false, err
	}
	for _, d := range m.open() {
		ids, err := d.sorted(mutable)
		if err != nil {
			return nil, false, err
		}
		start := sort.Search(len(ids), func(i int) bool { return Handle{d.id, ids[i]}.String() > after })
		for _, id := range ids[start:] {
			if limit > 0 && len(list) == limit {
				return list, true, nil
			}
			d.mu.Lock()
			img := d.images[id]
			if img != nil && d.visible(img) {
				list = append(list, d.viewLocked(img))
			}
			d.mu.Unlock()
		}
	}
	return list, false, nil
}

// sorted lists the IDs of the visible volumes or snapshots.
func (d *domain) sorted(mutable bool) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fenced != nil {
		return nil, d.fenced
	}
	var ids []string
	for id, img := range d.images {
		if img.rec.Mutable == mutable && d.visible(img) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// All returns every image of every open domain, hidden, creating and deleting
// ones too, ordered by handle: for operators.
func (m *Manager) All(context.Context) []Image {
	var out []Image
	for _, d := range m.open() {
		d.mu.Lock()
		for _, id := range slices.Sorted(maps.Keys(d.images)) {
			if img := d.images[id]; img.rev != 0 && img.rec.Kind != kindGroup {
				out = append(out, d.viewLocked(img))
			}
		}
		d.mu.Unlock()
	}
	return out
}

// Domains describes the configured domains, ordered by name, and measures
// those that are open.
func (m *Manager) Domains(ctx context.Context) []DomainInfo {
	return m.describe(func(d *domain) DomainInfo { return d.measured(ctx) })
}

// KnownDomains is Domains without Usage and Capacity: no storage is asked.
func (m *Manager) KnownDomains() []DomainInfo {
	return m.describe((*domain).info)
}

func (m *Manager) describe(info func(*domain) DomainInfo) []DomainInfo {
	var out []DomainInfo
	for _, d := range m.open() {
		out = append(out, info(d))
	}
	m.mu.Lock()
	for _, u := range m.unopened {
		out = append(out, DomainInfo{ID: u.cfg.Name, Config: u.cfg, Problem: u.reason.Error()})
	}
	m.mu.Unlock()
	slices.SortStableFunc(out, func(a, b DomainInfo) int { return cmp.Compare(a.ID, b.ID) })
	for _, op := range m.Operations() {
		for i := range out {
			if out[i].ID == op.Domain {
				out[i].Operations++
			}
		}
	}
	return out
}

func (d *domain) measured(ctx context.Context) DomainInfo {
	v := d.info()
	fenced := v.Problem
	if d.caps.Meter != nil {
		if u, err := d.usage(ctx); err != nil {
			v.Problem = err.Error()
		} else {
			v.Usage = &u
		}
	}
	if n, err := d.capacity(ctx); err != nil {
		v.Problem = err.Error()
	} else {
		v.Capacity = n
	}
	v.Problem = cmp.Or(fenced, v.Problem)
	if v.Usage != nil {
		v.Warning = v.Usage.Warning
	}
	return v
}

func (d *domain) info() DomainInfo {
	v := DomainInfo{ID: d.id, Config: *d.now(), Open: true, Epoch: int64(d.epoch), Owner: d.m.cfg.Installation,
		Description: d.desc, Capabilities: d.caps.List()}
	d.mu.Lock()
	defer d.mu.Unlock()
	v.Promised, v.Warning = d.promised, d.warning
	if d.fenced != nil {
		v.Open, v.Problem = false, d.fenced.Error()
	}
	for _, img := range d.images {
		switch {
		case !d.visible(img):
		case img.rec.Mutable:
			v.Volumes++
		default:
			v.Snapshots++
		}
	}
	return v
}

// errGone is for a finding that no longer stands.
func errGone(id string) error {
	return fault.New(fault.NotFound, "finding %s does not stand any more: check again", id)
}
