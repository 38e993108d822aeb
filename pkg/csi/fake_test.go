package csi

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

// fakeManager remembers what it was asked and answers from a map of images.
type fakeManager struct {
	images   map[image.Handle]image.Image
	groups   map[image.Handle]image.Group
	domains  []image.DomainInfo
	node     string        // that the domain belongs to
	fail     error         // of every call
	dead     chan struct{} // until it is closed, a domain does not answer
	created  []image.CreateRequest
	snapped  []image.SnapshotRequest
	grouped  []image.GroupRequest
	modified []image.Tuning
	params   map[string]string // of the last Modify
	checked  []image.Access
	unfit    error             // of CheckAccess
	extents  [][]engine.Extent // that Allocated and Changed emit, at once each
	broken   error             // of Allocated and Changed, afterwards
	panics   bool              // they do
	endless  chan error        // if not nil they emit until that fails, and say here with what
	calls    []string
}

func (f *fakeManager) did(what string) error {
	f.calls = append(f.calls, what)
	return f.fail
}

func (f *fakeManager) CreateVolume(_ context.Context, r image.CreateRequest) (image.Image, error) {
	f.created = append(f.created, r)
	h := image.Handle{Domain: "nas", Image: "v-new"}
	return image.Image{Handle: h, Name: r.Name, Mutable: true, Size: max(r.Size, 1), Layout: cmp.Or(r.Layout, image.LayoutImage), Source: r.Source, SourceMutable: r.SourceMutable}, f.did("create")
}

func (f *fakeManager) DeleteVolume(_ context.Context, h image.Handle) error {
	return cmp.Or(f.did("delete "+h.String()), f.known(h))
}

func (f *fakeManager) CreateSnapshot(_ context.Context, r image.SnapshotRequest) (image.Image, error) {
	f.snapped = append(f.snapped, r)
	return image.Image{Handle: image.Handle{Domain: r.Source.Domain, Image: "s-new"}, Source: r.Source.String(), Size: 5, Created: time.Unix(7, 0), Ready: true}, f.did("snapshot")
}

func (f *fakeManager) DeleteSnapshot(_ context.Context, h image.Handle) error {
	return cmp.Or(f.did("delete snapshot "+h.String()), f.known(h))
}

func (f *fakeManager) CreateGroup(_ context.Context, r image.GroupRequest) (image.Group, error) {
	f.grouped = append(f.grouped, r)
	g := image.Group{Handle: image.Handle{Domain: "nas", Image: "g-new"}, Created: time.Unix(7, 0), Ready: true}
	for i, s := range r.Sources {
		g.Snapshots = append(g.Snapshots, image.Image{Handle: image.Handle{Domain: "nas", Image: "m-" + string(rune('a'+i))}, Source: s.String(), Ready: true})
	}
	return g, f.did("group")
}

func (f *fakeManager) GetGroup(_ context.Context, h image.Handle) (image.Group, error) {
	g, ok := f.groups[h]
	if !ok {
		return g, fault.New(fault.NotFound, "no group %s", h)
	}
	return g, f.fail
}

func (f *fakeManager) DeleteGroup(_ context.Context, h image.Handle) error {
	return f.did("delete group " + h.String())
}

func (f *fakeManager) Expand(_ context.Context, h image.Handle, size, limit int64) (image.Image, error) {
	img, err := f.Get(context.Background(), h)
	img.Size = size
	return img, err
}

func (f *fakeManager) Modify(_ context.Context, h image.Handle, t image.Tuning, p map[string]string) error {
	f.modified, f.params = append(f.modified, t), p
	return f.did("modify " + h.String())
}

func (f *fakeManager) known(h image.Handle) error {
	if _, ok := f.images[h]; !ok {
		return fault.New(fault.NotFound, "no image %s", h)
	}
	return nil
}

func (f *fakeManager) Get(_ context.Context, h image.Handle) (image.Image, error) {
	if f.fail != nil {
		return image.Image{}, f.fail
	}
	return f.images[h], f.known(h)
}

func (f *fakeManager) List(_ context.Context, mutable bool, after string, max int) (out []image.Image, more bool, err error) {
	for _, img := range f.images {
		if img.Mutable == mutable && img.Handle.String() > after {
			out = append(out, img)
		}
	}
	slices.SortFunc(out, func(a, b image.Image) int { return cmp.Compare(a.Handle.String(), b.Handle.String()) })
	if max > 0 && len(out) > max {
		out, more = out[:max], true
	}
	return out, more, f.fail
}

func (f *fakeManager) Attach(_ context.Context, h image.Handle, on string, a image.Access, ro bool) (image.Attachment, error) {
	return image.Attachment{Node: on, Mode: a.Mode, ReadOnly: ro, Generation: 42}, f.did("attach " + h.String() + " " + on)
}

func (f *fakeManager) CheckAccess(_ context.Context, h image.Handle, as []image.Access) error {
	f.checked = as
	return cmp.Or(f.fail, f.known(h), f.unfit)
}

func (f *fakeManager) Detach(_ context.Context, h image.Handle, on string) error {
	return cmp.Or(f.did("detach "+h.String()+" "+on), f.known(h))
}

func (f *fakeManager) Capacity(context.Context, []string, string) (int64, int64, int64, error) {
	if f.dead != nil {
		<-f.dead
	}
	return 100, 50, 1, f.did("capacity")
}

func (f *fakeManager) Topology(string) (string, error) { return f.node, nil }

// Canonical knows domains whose names are their IDs.
func (f *fakeManager) Canonical(h image.Handle) image.Handle {
	for _, d := range f.domains {
		if slices.Contains(d.Config.Aliases, h.Domain) {
			h.Domain = d.ID
		}
	}
	return h
}

func (f *fakeManager) KnownDomains() []image.DomainInfo { return f.domains }

func (f *fakeManager) Allocated(_ context.Context, h image.Handle, from int64, emit func([]engine.Extent) error) error {
	return f.emit(fmt.Sprintf("allocated %s from %d", h, from), emit)
}

func (f *fakeManager) Changed(_ context.Context, base, target image.Handle, from int64, emit func([]engine.Extent) error) error {
	if err := f.known(base); err != nil {
		return err
	}
	return f.emit(fmt.Sprintf("changed %s %s from %d", base, target, from), emit)
}

// emit fails, if it has to, after everything was emitted.
func (f *fakeManager) emit(what string, emit func([]engine.Extent) error) error {
	if f.panics {
		panic("boom")
	}
	for f.endless != nil {
		if err := emit([]engine.Extent{{Offset: 0, Length: 1}}); err != nil {
			f.endless <- err
			return err
		}
	}
	for _, list := range f.extents {
		if err := emit(list); err != nil {
			return err
		}
	}
	return cmp.Or(f.did(what), f.broken)
}

// fakeNode remembers what it was asked.
type fakeNode struct {
	staged     []node.StageRequest
	published  []node.PublishRequest
	undone     []string
	asked      []string // domains
	stats      node.Stats
	conditions []node.Condition
	fail       error
}

func (n *fakeNode) Stage(_ context.Context, r node.StageRequest) error {
	n.staged = append(n.staged, r)
	return n.fail
}

func (n *fakeNode) Unstage(_ context.Context, h image.Handle, path string) error {
	n.undone = append(n.undone, "unstage "+h.String()+" "+path)
	return n.fail
}

func (n *fakeNode) Publish(_ context.Context, r node.PublishRequest) error {
	n.published = append(n.published, r)
	return n.fail
}

func (n *fakeNode) Unpublish(_ context.Context, h image.Handle, path string) error {
	n.undone = append(n.undone, "unpublish "+h.String()+" "+path)
	return n.fail
}

func (n *fakeNode) Stats(context.Context, image.Handle, string) (node.Stats, error) {
	return n.stats, n.fail
}

func (n *fakeNode) Expand(_ context.Context, _ image.Handle, _ string, size int64) (int64, error) {
	return size, n.fail
}

func (n *fakeNode) Health(context.Context, image.Handle) ([]node.Condition, error) {
	return n.conditions, n.fail
}

func (n *fakeNode) StorageHealth(_ context.Context, domains []string) []node.Condition {
	n.asked = domains
	return n.conditions
}

// world has one volume nas/v-1, one snapshot nas/s-1 of it and a group nas/g-1.
func world(t *testing.T) (*Server, *fakeManager, *fakeNode) {
	t.Helper()
	v, sn := image.Handle{Domain: "nas", Image: "v-1"}, image.Handle{Domain: "nas", Image: "s-1"}
	g := image.Handle{Domain: "nas", Image: "g-1"}
	m := &fakeManager{
		images: map[image.Handle]image.Image{
			v:  {Handle: v, Mutable: true, Layout: image.LayoutImage, Size: 1 << 30, State: image.Optimized},
			sn: {Handle: sn, Layout: image.LayoutImage, Size: 1 << 30, Source: v.String(), Ready: true, State: image.Optimized, Created: time.Unix(5, 0)},
		},
		groups: map[image.Handle]image.Group{g: {Handle: g, Ready: true, Created: time.Unix(5, 0), Snapshots: []image.Image{
			{Handle: image.Handle{Domain: "nas", Image: "m-2"}, Source: v.String(), Ready: true},
			{Handle: image.Handle{Domain: "nas", Image: "m-1"}, Source: v.String(), Ready: false},
		}}},
		domains: []image.DomainInfo{{
			ID: "nas", Open: true, Config: image.DomainConfig{Name: "nas", Scope: "shared"},
			Description: engine.Description{Kinds: []engine.Kind{engine.Block, engine.Tree}, Params: map[string]string{"mode": "permissions"}},
		}},
	}
	n := &fakeNode{}
	s, err := New(Config{NodeID: "n1", Version: "test", Manager: m, Node: n})
	if err != nil {
		t.Fatal(err)
	}
	return s, m, n
}

func wantKind(t *testing.T, what string, err error, want fault.Kind) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want %s", what, want)
	} else if got := fault.KindOf(err); got != want {
		t.Errorf("%s: %s (%v), want %s", what, got, err, want)
	}
}
