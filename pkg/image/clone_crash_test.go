package image_test

import (
	"context"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// meanwhile does something once, after the intent of a clone is there.
type meanwhile struct {
	engine.Engine
	do func()
}

func (m *meanwhile) CreateTag(ctx context.Context, t engine.Tag) error {
	err := m.Engine.CreateTag(ctx, t)
	if err == nil && m.do != nil && strings.Contains(string(t.Record), `"n":"clone"`) {
		do := m.do
		m.do = nil
		do()
	}
	return err
}

// A source that grows between the clone's intent and its cut is cloned whole.
func TestASourceThatGrowsWhileItIsCloned(t *testing.T) {
	r := newRig(t, "a")
	w := &meanwhile{}
	r.wrap = func(e engine.Engine) engine.Engine { w.Engine = engine.Minimal(e); return w }
	r.start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	w.do = func() {
		_, err := r.Expand(r.ctx, v.Handle, 64*mib, 0)
		r.must(err)
	}
	clone := r.from("clone", "a", v, 0)
	if clone.Size != 64*mib {
		t.Fatalf("the clone has %d bytes, its source %d", clone.Size, 64*mib)
	}
	r.holds(clone, 1)
	for _, img := range []image.Image{v, clone} {
		r.must(r.DeleteVolume(r.ctx, img.Handle))
	}
	r.collect()
	r.empty("a")
}

// A source that is formatted and filled between the clone's plan and its cut
// gives a clone that says so: taken for fresh it would be formatted once more.
func TestASourceThatIsFormattedWhileItIsCloned(t *testing.T) {
	for _, target := range []string{"a", "b"} {
		t.Run(target, func(t *testing.T) {
			r := newRig(t, "a", "b")
			w := &meanwhile{}
			r.wrap = func(e engine.Engine) engine.Engine { w = &meanwhile{Engine: e, do: w.do}; return w }
			v := image.Image{}
			w.do = func() {
				r.must(r.Formatted(r.ctx, v.Handle, "n1", "ext4"))
				r.write(v, 1)
			}
			r.start()
			v = r.volume("v", "a", 32*mib)
			a, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
			r.must(err)
			st, err := r.Stage(r.ctx, v.Handle, "n1", a.Generation)
			r.must(err)
			if !st.Fresh {
				t.Fatal("a new volume is not fresh")
			}
			clone := r.from("clone", target, v, 0)
			r.holds(clone, 1)
			a, err = r.Attach(r.ctx, clone.Handle, "n1", mount, false)
			r.must(err)
			st, err = r.Stage(r.ctx, clone.Handle, "n1", a.Generation)
			r.must(err)
			if st.Fresh || st.Filesystem != "ext4" {
				t.Fatalf("the clone holds data, and would be formatted: %+v", st)
			}
		})
	}
}

// A volume keeps the handle that it was made under when its domain is renamed,
// and is staged under it: the node is asked about that one too.
func TestAVolumeStagedUnderAFormerNameIsNotDetachedNorCopiedUnfrozen(t *testing.T) {
	r := newRig(t, "new")
	r.wrap = engine.Minimal
	r.config = func(c *image.DomainConfig) { c.Aliases = []string{"old", "older"} }
	r.start()
	v := r.volume("v", "new", 32*mib)
	old := image.Handle{Domain: "old", Image: v.Handle.Image}
	_, err := r.Attach(r.ctx, old, "n1", mount, false)
	r.must(err)
	r.agents.state[old.String()] = image.IsFrozen // that is what the node knows it as
	r.is(r.Detach(r.ctx, old, "n1"), fault.Unavailable)
	r.is(r.Detach(r.ctx, v.Handle, ""), fault.Unavailable)
	s := r.snapshot("s", v)
	if r.agents.freezes != 1 || r.agents.frozen != 0 {
		t.Fatalf("snapshot %s: frozen %d times, left frozen %d", s.Handle, r.agents.freezes, r.agents.frozen)
	}
	r.agents.state[old.String()] = image.NotStaged
	r.must(r.Detach(r.ctx, v.Handle, "n1"))
}

// A member of a group that was deleted after the clone was planned may lose its
// slab at any moment.
func TestAMemberOfADeletedGroupIsNotCloned(t *testing.T) {
	r := newRig(t, "a")
	w := &meanwhile{}
	r.wrap = func(e engine.Engine) engine.Engine { w.Engine = e; return w }
	r.start()
	v := r.volume("v", "a", 32*mib)
	g, err := r.CreateGroup(r.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{v.Handle}})
	r.must(err)
	w.do = func() { r.must(r.DeleteGroup(r.ctx, g.Handle)) }
	_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "clone", Domains: []string{"a"}, Accesses: []image.Access{mount}, Source: g.Snapshots[0].Handle.String()})
	r.is(err, fault.NotFound)
}

// Asked again under the former name of its domain, a snapshot is still the same.
func TestASnapshotAskedForAgainUnderAFormerName(t *testing.T) {
	r := newRig(t, "new")
	r.config = func(c *image.DomainConfig) { c.Aliases = []string{"old"} }
	r.start()
	v := r.volume("v", "new", 32*mib)
	old := image.Handle{Domain: "old", Image: v.Handle.Image}
	var snaps []image.Image
	var groups []image.Group
	for _, h := range []image.Handle{old, v.Handle, old} {
		s, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: h})
		r.must(err)
		g, err := r.CreateGroup(r.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{h}})
		r.must(err)
		snaps, groups = append(snaps, s), append(groups, g)
	}
	if snaps[0].Handle != snaps[2].Handle || groups[0].Handle != groups[2].Handle {
		t.Fatalf("%v %v", snaps, groups)
	}
	_, err := r.CreateGroup(r.ctx, image.GroupRequest{Name: "h", Sources: []image.Handle{old, v.Handle}})
	r.is(err, fault.Invalid)
}

// lost makes a tag, and loses the reply.
type lost struct {
	engine.Engine
	prefix string
}

func (l *lost) CreateTag(ctx context.Context, t engine.Tag) error {
	err := l.Engine.CreateTag(ctx, t)
	if err == nil && l.prefix != "" && strings.HasPrefix(t.Name, l.prefix) {
		return fault.New(fault.Unavailable, "the reply was lost")
	}
	return err
}

// After a restart both attachments would count, and both nodes could write.
func TestAVolumeThatMayBeAttachedElsewhereIsNotAttached(t *testing.T) {
	r := newRig(t, "a")
	l := &lost{}
	r.wrap = func(e engine.Engine) engine.Engine { l.Engine = e; return l }
	r.start()
	v := r.volume("v", "a", 32*mib)
	l.prefix = "a."
	_, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.is(err, fault.Unavailable)
	l.prefix = ""
	_, err = r.Attach(r.ctx, v.Handle, "n2", mount, false)
	r.is(err, fault.InUse)
	r.is(r.DeleteVolume(r.ctx, v.Handle), fault.InUse)
	r.must(r.Detach(r.ctx, v.Handle, "n1"))
	_, err = r.Attach(r.ctx, v.Handle, "n2", mount, false)
	r.must(err)
}
