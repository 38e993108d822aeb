package image_test

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// extents are offsets and lengths in KiB.
func extents(kib ...int64) []engine.Extent {
	var out []engine.Extent
	for i := 0; i < len(kib); i += 2 {
		out = append(out, engine.Extent{Offset: kib[i] << 10, Length: kib[i+1] << 10})
	}
	return out
}

func into(list *[]engine.Extent) func([]engine.Extent) error {
	return func(some []engine.Extent) error { *list = append(*list, some...); return nil }
}

func (r *rig) changed(base, target image.Image, from int64, want []engine.Extent) {
	r.t.Helper()
	var got []engine.Extent
	r.must(r.Changed(r.ctx, base.Handle, target.Handle, from, into(&got)))
	if !slices.Equal(got, want) {
		r.t.Fatalf("changed from %s to %s: %v, want %v", base.Name, target.Name, got, want)
	}
}

func (r *rig) allocated(img image.Image, from int64, want []engine.Extent) {
	r.t.Helper()
	var got []engine.Extent
	r.must(r.Allocated(r.ctx, img.Handle, from, into(&got)))
	if !slices.Equal(got, want) {
		r.t.Fatalf("allocated in %s: %v, want %v", img.Name, got, want)
	}
}

// scribble writes into an image's slab. All in KiB.
func (r *rig) scribble(img image.Image, kib ...int64) {
	r.t.Helper()
	f, err := os.OpenFile(r.path(img), os.O_RDWR, 0)
	r.must(err)
	for _, e := range extents(kib...) {
		b := make([]byte, e.Length)
		_, err := f.ReadAt(b, e.Offset)
		r.must(err)
		for i := range b {
			b[i]++
		}
		_, err = f.WriteAt(b, e.Offset)
		r.must(err)
	}
	r.must(errors.Join(f.Sync(), f.Close()))
}

// minimal has a rig whose storage can do nothing natively.
func minimal(t *testing.T, domains ...string) *rig {
	r := newRig(t, domains...)
	r.wrap = engine.Minimal
	return r
}

func TestCopiedSnapshotsAreCompared(t *testing.T) {
	r := minimal(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	r.scribble(v, 64, 16, 1024, 64)
	s1 := r.snapshot("s1", v)
	r.scribble(v, 68, 4, 2048, 128, 32764, 4)
	s2 := r.snapshot("s2", v)
	r.scribble(v, 0, 512)
	r.changed(s1, s2, 0, extents(68, 4, 2048, 128, 32764, 4))
	r.changed(s1, s2, 2100<<10, extents(2100, 76, 32764, 4)) // resumed
	r.changed(s1, s2, 2176<<10, extents(32764, 4))
	r.changed(s1, s2, 32*mib, nil)
	r.allocated(s1, 0, extents(64, 16, 1024, 64))
	r.allocated(s2, 66<<10, extents(66, 14, 1024, 64, 2048, 128, 32764, 4))
	r.allocated(s2, 32*mib, nil)
	r.restart()
	r.changed(s1, s2, 0, extents(68, 4, 2048, 128, 32764, 4))
	if ops := r.Operations(); len(ops) > 0 {
		t.Errorf("left running: %v", ops)
	}
}

// A consumer that restores the base and applies what changed has zeros where the
// base ended.
func TestAVolumeThatGrewIsComparedWithZerosBehindItsEnd(t *testing.T) {
	r := minimal(t, "a").start()
	v := r.volume("v", "a", 16*mib)
	r.scribble(v, 16380, 4)
	s1 := r.snapshot("s1", v)
	v, err := r.Expand(r.ctx, v.Handle, 32*mib, 0)
	r.must(err)
	r.scribble(v, 30000, 8)
	s2 := r.snapshot("s2", v)
	r.changed(s1, s2, 0, extents(30000, 8))
	err = r.Changed(r.ctx, s1.Handle, s2.Handle, 20*mib, func([]engine.Extent) error { return nil })
	r.must(err) // behind the base's end, not the target's
}

func TestTheBaseIsAnEarlierStateOfTheTarget(t *testing.T) {
	r := minimal(t, "a", "b").start()
	v, other := r.volume("v", "a", 16*mib), r.volume("other", "a", 16*mib)
	foreign := r.snapshot("foreign", other)
	s1 := r.snapshot("s1", v)
	r.scribble(v, 8, 4)
	s2 := r.snapshot("s2", v)
	c := r.from("c", "a", s2, 0)
	r.scribble(c, 16, 4)
	c1 := r.snapshot("c1", c)
	moved := r.from("moved", "b", c1, 0)
	r.scribble(moved, 32, 4)
	m1 := r.snapshot("m1", moved)
	s3 := r.snapshot("s3", v)
	w := r.from("w", "a", v, 0) // a volume of a volume
	r.scribble(w, 64, 4)
	s4 := r.snapshot("s4", v)
	w1 := r.snapshot("w1", w)

	r.changed(s1, c1, 0, extents(8, 4, 16, 4))
	r.changed(s2, c1, 0, extents(16, 4))
	r.changed(c1, m1, 0, extents(32, 4))
	r.changed(s1, m1, 0, extents(8, 4, 16, 4, 32, 4))
	r.changed(s3, w1, 0, extents(64, 4))
	r.changed(s1, w1, 0, extents(8, 4, 64, 4))
	for _, pair := range [][2]image.Image{{s2, s1}, {s1, s1}, {foreign, s2}, {c1, s2}, {s3, c1}, {m1, c1}, {s4, w1}} {
		err := r.Changed(r.ctx, pair[0].Handle, pair[1].Handle, 0, func([]engine.Extent) error { return nil })
		r.is(err, fault.Invalid)
		if !strings.Contains(err.Error(), "no earlier state") || !strings.Contains(err.Error(), pair[1].Source) {
			t.Errorf("%v", err)
		}
	}
	// What the snapshots came from need not be there any more.
	r.must(r.DeleteVolume(r.ctx, v.Handle))
	r.collect()
	r.changed(s1, s2, 0, extents(8, 4))
}

func TestListingsThatCannotBe(t *testing.T) {
	r := minimal(t, "a").start()
	v := r.volume("v", "a", 16*mib)
	s := r.snapshot("s", v)
	tree, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "tree", Domains: []string{"a"}, Layout: image.LayoutDirectory, Accesses: []image.Access{mount}, Size: mib})
	r.must(err)
	ts := r.snapshot("ts", tree)
	gone := image.Handle{Domain: "a", Image: "gone"}
	none := func([]engine.Extent) error { t.Error("something was listed"); return nil }
	for _, c := range []struct {
		h    image.Handle
		from int64
		kind fault.Kind
	}{
		{gone, 0, fault.NotFound}, {v.Handle, 0, fault.NotFound}, {ts.Handle, 0, fault.Unsupported}, {image.Handle{Domain: "x", Image: "y"}, 0, fault.Unavailable},
		{s.Handle, -1, fault.OutOfRange}, {s.Handle, 16*mib + 1, fault.OutOfRange},
	} {
		r.is(r.Allocated(r.ctx, c.h, c.from, none), c.kind)
		r.is(r.Changed(r.ctx, s.Handle, c.h, c.from, none), c.kind)
		if c.from == 0 {
			r.is(r.Changed(r.ctx, c.h, s.Handle, 0, none), c.kind)
		}
	}
	// Whoever listens may stop.
	r.scribble(v, 0, 64)
	s2 := r.snapshot("s2", v)
	stop := errors.New("enough")
	enough := func([]engine.Extent) error { return stop }
	if err := r.Allocated(r.ctx, s2.Handle, 0, enough); !errors.Is(err, stop) {
		t.Error(err)
	}
	if err := r.Changed(r.ctx, s.Handle, s2.Handle, 0, enough); !errors.Is(err, stop) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	cancel()
	r.is(r.Changed(ctx, s.Handle, s2.Handle, 0, none), fault.Canceled)
	// A slab that is shorter than recorded is not taken for zeros.
	r.must(os.Truncate(r.path(s), 4096))
	r.is(r.Allocated(r.ctx, s.Handle, 0, none), fault.Corrupt)
	r.is(r.Changed(r.ctx, s.Handle, s2.Handle, 0, none), fault.Corrupt)
}

func TestWhatIsBeingListedKeepsItsSlabs(t *testing.T) {
	r := minimal(t, "a").start()
	v := r.volume("v", "a", 16*mib)
	s1 := r.snapshot("s1", v)
	r.scribble(v, 0, 64)
	s2 := r.snapshot("s2", v)
	before := len(r.files("a", "slabs"))
	r.must(r.Changed(r.ctx, s1.Handle, s2.Handle, 0, func([]engine.Extent) error {
		r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
		r.must(r.DeleteSnapshot(r.ctx, s2.Handle))
		r.collect()
		if n := len(r.files("a", "slabs")); n != before {
			t.Errorf("%d slabs are left of %d", n, before)
		}
		if ops := r.Operations(); len(ops) != 1 || ops[0].Op != "list changed blocks" || ops[0].Reason != "comparison" {
			t.Errorf("operators see %+v", ops)
		}
		return nil
	}))
	r.collect()
	if n := len(r.files("a", "slabs")); n != 1 {
		t.Errorf("%d slabs are left", n)
	}
}

func TestOfAnEncryptedSnapshotThePayloadIsListed(t *testing.T) {
	r := minimal(t, "a").start()
	v, err := r.encrypted("v", "a", "", 16*mib)
	r.must(err)
	const h = header >> 10
	r.scribble(v, 0, 16, h+64, 16) // the header, too
	s1 := r.snapshot("s1", v)
	r.scribble(v, 0, 16, h+128, 4, h+16380, 4)
	s2 := r.snapshot("s2", v)
	r.allocated(s1, 0, extents(64, 16))
	r.changed(s1, s2, 0, extents(128, 4, 16380, 4))
	r.changed(s1, s2, 132<<10, extents(16380, 4))
	r.is(r.Allocated(r.ctx, s1.Handle, 16*mib+1, nil), fault.OutOfRange)
}

// differ is a storage that can tell.
type differ struct {
	engine.Engine
	say   map[[2]string][]engine.Extent // nil: declined
	asked [][2]string
}

func (d *differ) DiffSlabs(_ context.Context, from, to string) ([]engine.Extent, error) {
	d.asked = append(d.asked, [2]string{from, to})
	if list, ok := d.say[[2]string{from, to}]; ok {
		return list, nil
	}
	return nil, engine.ErrDeclined
}

func TestAStorageThatCanTellIsAsked(t *testing.T) {
	r := newRig(t, "a")
	d := &differ{say: map[[2]string][]engine.Extent{}}
	r.wrap = func(e engine.Engine) engine.Engine { d.Engine = engine.Minimal(e); return d }
	r.start()
	v := r.volume("v", "a", 16*mib)
	s1 := r.snapshot("s1", v)
	r.scribble(v, 8, 4)
	s2 := r.snapshot("s2", v)
	r.changed(s1, s2, 0, extents(8, 4)) // it declined
	if !slices.Contains(d.asked, [2]string{s1.Slab, s2.Slab}) {
		t.Errorf("it was asked about %v", d.asked)
	}
	d.say[[2]string{s1.Slab, s2.Slab}] = extents(0, 4, 8, 4, 16000, 900) // the last reaches past the end
	d.say[[2]string{"", s1.Slab}] = extents(12, 4)
	r.changed(s1, s2, 2<<10, extents(2, 2, 8, 4, 16000, 384))
	r.allocated(s1, 0, extents(12, 4))
}

func TestANativeOnlyDomainThatCannotTellSaysSo(t *testing.T) {
	r := minimal(t, "a").start()
	v := r.volume("v", "a", 16*mib)
	s1, s2 := r.snapshot("s1", v), r.snapshot("s2", v)
	r.config = func(c *image.DomainConfig) { c.NativeOnly = true }
	r.restart()
	r.is(r.Allocated(r.ctx, s1.Handle, 0, nil), fault.Unsupported)
	r.is(r.Changed(r.ctx, s1.Handle, s2.Handle, 0, nil), fault.Unsupported)
}

// layering are agents of nodes with device-mapper, as far as images that nobody
// uses need them. A merge never ends by itself.
type layering struct {
	*agents
	mu      sync.Mutex
	merging map[string]bool // slab of the layer
}

func (l *layering) Agent(node string) (image.Agent, error) {
	if _, err := l.agents.Agent(node); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *layering) Layers(context.Context, image.Handle) error          { return nil }
func (l *layering) Hold(context.Context, []image.Staging, string) error { return nil }
func (l *layering) Release(context.Context, string) error               { return nil }

func (l *layering) Switch(context.Context, []image.Staging, string) error { return nil }

func (l *layering) Prepare(context.Context, []image.Staging) (string, error) { return "", nil }

func (l *layering) Merge(_ context.Context, chain image.Staging) (image.Merging, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.merging[chain.Slabs[0].ID] = true
	return image.Merging{Left: 1}, nil
}

func (l *layering) StopMerge(_ context.Context, chain image.Staging) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.merging, chain.Slabs[0].ID)
	return nil
}

func (l *layering) running() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.merging)
}

func (l *layering) AttachImage(context.Context, image.Staging) (string, error) {
	return "", fault.New(fault.Unsupported, "no devices here")
}
func (l *layering) DetachImage(context.Context, image.Handle, string) error { return nil }

// except writes chunks into the layer of a volume that nobody uses, as the kernel does.
func (r *rig) except(v image.Image, chunks ...uint64) {
	r.t.Helper()
	now, err := r.Get(r.ctx, v.Handle)
	r.must(err)
	f, err := os.OpenFile(r.path(now), os.O_RDWR, 0)
	r.must(err)
	chunk := now.Chain[0].Chunk
	for i, old := range chunks {
		entry := binary.LittleEndian.AppendUint64(nil, old)
		_, err := f.WriteAt(binary.LittleEndian.AppendUint64(entry, uint64(2+i)), chunk+int64(i)*16)
		r.must(err)
	}
	r.must(errors.Join(f.Sync(), f.Close()))
}

// What the kernel writes into a layer is told by package layer's lab test, and
// all of it together by that of cmd/quarry.
func TestInAChainTheLayersBetweenAreListed(t *testing.T) {
	r := minimal(t, "a")
	l := &layering{agents: r.agents, merging: map[string]bool{}}
	r.mapAgents = l
	r.start()
	v := r.volume("v", "a", 32*mib)
	r.scribble(v, 4, 8)
	s1 := r.snapshot("s1", v)
	if now, err := r.Get(r.ctx, v.Handle); err != nil || len(now.Chain) != 2 || now.Chain[0].Chunk != 32<<10 {
		t.Fatalf("%+v, %v", now.Chain, err)
	}
	r.except(v, 700, 3, 4)
	s2 := r.snapshot("s2", v)
	r.except(v, 4, 5, 1023)
	s3 := r.snapshot("s3", v)
	r.except(v, 9)

	check := func() {
		t.Helper()
		r.changed(s1, s3, 0, extents(96, 96, 22400, 32, 32736, 32))
		r.changed(s1, s3, 128<<10, extents(128, 64, 22400, 32, 32736, 32))
		r.allocated(s3, 0, extents(4, 8, 96, 96, 22400, 32, 32736, 32))
		r.allocated(s1, 0, extents(4, 8))
	}
	check()
	r.changed(s1, s2, 0, extents(96, 64, 22400, 32))
	r.changed(s2, s3, 0, extents(128, 64, 32736, 32))
	r.is(r.Changed(r.ctx, s3.Handle, s1.Handle, 0, nil), fault.Invalid)
	c := r.from("c", "a", s2, 0)
	r.except(c, 1)
	c1 := r.snapshot("c1", c)
	r.changed(s1, c1, 0, extents(32, 32, 96, 64, 22400, 32))
	r.changed(s2, c1, 0, extents(32, 32))
	r.is(r.Changed(r.ctx, s3.Handle, c1.Handle, 0, nil), fault.Invalid)
	r.must(r.DeleteSnapshot(r.ctx, c1.Handle))
	r.must(r.DeleteVolume(r.ctx, c.Handle))

	// A merge moves what is listed from one layer to another: it stands still
	// while they are read, and whoever reads keeps it from beginning again.
	r.must(r.DeleteSnapshot(r.ctx, s2.Handle))
	for l.running() == 0 {
		r.collect()
	}
	check()
	r.must(r.Changed(r.ctx, s1.Handle, s3.Handle, 0, func([]engine.Extent) error {
		r.collect()
		if l.running() != 0 {
			t.Error("a merge runs while its layers are read")
		}
		return nil
	}))

	f, err := os.OpenFile(r.path(s3), os.O_RDWR, 0)
	r.must(err)
	_, err = f.WriteAt(make([]byte, 16), 0)
	r.must(errors.Join(err, f.Close()))
	r.is(r.Changed(r.ctx, s1.Handle, s3.Handle, 0, nil), fault.Corrupt)
}
