package image_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// hookedNodes are chainNodes whose calls a test looks at, holds up and lets fail.
// Copies get an empty file.
type hookedNodes struct {
	chainNodes
	t    testing.TB
	dead bool
	hook func(call string, st image.Staging) error
}

func (n *hookedNodes) Agent(node string) (image.Agent, error) {
	if n.dead {
		return nil, fault.New(fault.Unavailable, "the process is dead")
	}
	if node != "n1" && node != "n2" {
		return nil, fault.New(fault.NotFound, "there is no node %s", node)
	}
	return hookedNode{chainNode{&n.chainNodes, node}, n}, nil
}

type hookedNode struct {
	chainNode
	c *hookedNodes
}

func (n hookedNode) ask(call string, st image.Staging) error {
	if n.c.hook == nil {
		return nil
	}
	return n.c.hook(call, st)
}

var _ image.ChainAgent = hookedNode{}

func (n hookedNode) Switch(_ context.Context, list []image.Staging, _ string) error {
	return n.ask("Switch", list[0])
}

func (n hookedNode) Merge(ctx context.Context, st image.Staging) (image.Merging, error) {
	if err := n.ask("Merge", st); err != nil {
		return image.Merging{}, err
	}
	return n.chainNode.Merge(ctx, st)
}

func (n hookedNode) AttachImage(_ context.Context, st image.Staging) (string, error) {
	if err := n.ask("AttachImage", st); err != nil {
		return "", err
	}
	p := filepath.Join(n.c.t.TempDir(), "chain")
	return p, errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, st.Size))
}

// hooked is a rig over such nodes, on which a merge is done at once or never.
func hooked(t *testing.T, done bool) (*rig, *hookedNodes) {
	r := newRig(t, "a")
	r.wrap = engine.Minimal
	n := &hookedNodes{t: t, chainNodes: chainNodes{merging: map[string]string{}, done: done}}
	r.mapAgents = n
	return r, n
}

func (r *rig) stageOn(v image.Image, node string) image.Staging {
	r.t.Helper()
	a, err := r.Attach(r.ctx, v.Handle, node, mount, false)
	r.must(err)
	st, err := r.Stage(r.ctx, v.Handle, node, a.Generation)
	r.must(err)
	r.must(r.Built(r.ctx, v.Handle, node, st.Told))
	return st
}

func (r *rig) until(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("in a minute there was not: %s", what)
		}
	}
}

func (r *rig) idle() {
	r.t.Helper()
	r.until("an end of all operations", func() bool { return len(r.Operations()) == 0 })
}

// takeover lets another process go on, with agents that still do what they did.
func (n *hookedNodes) takeover(r *rig) *hookedNodes {
	r.t.Helper()
	n.dead = true
	next := &hookedNodes{t: n.t, chainNodes: chainNodes{merging: map[string]string{}}}
	n.mu.Lock()
	for slab, node := range n.merging {
		next.merging[slab] = node
	}
	n.mu.Unlock()
	r.mapAgents = next
	r.start()
	return next
}

// TestNothingIsMergedIntoWhatIsFlattened: both may be due in the same round, and the
// node may take its time before a merge begins.
func TestNothingIsMergedIntoWhatIsFlattened(t *testing.T) {
	for range 5 {
		r, n := hooked(t, true)
		r.start()
		v := r.volume("v", "a", 1<<20)
		r.must(r.Modify(r.ctx, v.Handle, image.Tuning{ChainLimit: 2}, nil))
		r.stageOn(v, "n1")
		var top image.Image
		for k := range 4 {
			top = r.snapshot(fmt.Sprintf("s%d", k), v)
		}
		var mu sync.Mutex
		copied, both := false, false
		begun := make(chan struct{})
		n.hook = func(call string, st image.Staging) error {
			switch call {
			case "Switch":
				select {
				case <-begun:
				case <-time.After(100 * time.Millisecond): // there may be no flattening
				}
			case "AttachImage":
				mu.Lock()
				if st.Slabs[0].ID == top.Slab && !copied {
					copied = true
					close(begun)
				}
				mu.Unlock()
			case "Merge":
				mu.Lock()
				both = both || copied && st.Slabs[1].ID == top.Slab
				mu.Unlock()
			}
			return nil
		}
		r.must(r.DeleteSnapshot(r.ctx, top.Handle))
		r.must(r.Collect(r.ctx))
		r.until("an end of the flattening", func() bool {
			for _, o := range r.Operations() {
				if o.Op == "flatten" {
					return false
				}
			}
			return true
		})
		if mu.Lock(); both {
			t.Error("a layer was merged into the slab that a flattening was copying")
		}
		mu.Unlock()
		r.must(r.Close())
	}
}

// TestAMergeOfADeletedImageOutlivesItsManager: it is still running on the node that the
// former manager chose.
func TestAMergeOfADeletedImageOutlivesItsManager(t *testing.T) {
	r, n := hooked(t, false)
	r.start()
	v := r.volume("v", "a", 1<<20)
	s1, s2 := r.snapshot("s1", v), r.snapshot("s2", v)
	r.snapshot("s3", v)
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	r.must(r.DeleteSnapshot(r.ctx, s2.Handle))
	r.must(r.Collect(r.ctx))
	r.until("a merge", func() bool { return n.on() == "n1" })
	next := n.takeover(r)
	r.stageOn(v, "n2")
	if on := next.on(); on == "n1" {
		t.Error("the volume is in use on n2, and n1 merges a layer of its chain")
	}
}

// TestAMergeOutlivesItsUsersAndItsManager: it was begun below a volume in use, which is
// used elsewhere when another manager has come.
func TestAMergeOutlivesItsUsersAndItsManager(t *testing.T) {
	r, n := hooked(t, false)
	r.start()
	v := r.volume("v", "a", 1<<20)
	s1 := r.snapshot("s1", v)
	r.snapshot("s2", v)
	r.stageOn(v, "n1")
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	r.must(r.Collect(r.ctx))
	r.until("a merge", func() bool { return n.on() == "n1" })
	r.unstaged(v, "n1")
	r.must(r.Detach(r.ctx, v.Handle, "n1"))
	next := n.takeover(r)
	r.stageOn(v, "n2")
	if on := next.on(); on == "n1" {
		t.Error("the volume is in use on n2, and n1 merges a layer of its chain")
	}
}

// TestAMergeDoesNotBeginWhileAVolumeAboveItIsStaged: a staging has looked for merges
// when it began.
func TestAMergeDoesNotBeginWhileAVolumeAboveItIsStaged(t *testing.T) {
	r, n, e := lossyRig(t, false)
	raw := image.Access{Block: true, Mode: image.SingleNodeWriter}
	v, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{raw}, Size: 1 << 20})
	r.must(err)
	s1 := r.snapshot("s1", v)
	r.snapshot("s2", v)
	a, err := r.Attach(r.ctx, v.Handle, "n2", raw, false)
	r.must(err)
	in, out := make(chan struct{}), make(chan struct{})
	var once sync.Once
	e.set(func(name string, create func() error) error { // the first staging of a raw volume is noted
		if strings.HasPrefix(name, "i."+v.Handle.Image) {
			once.Do(func() { close(in); <-out })
		}
		return create()
	})
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	ended := make(chan error, 1)
	go func() {
		_, err := r.Stage(r.ctx, v.Handle, "n2", a.Generation)
		ended <- err
	}()
	<-in
	r.must(r.Collect(r.ctx))
	time.Sleep(200 * time.Millisecond) // a merge tries several times
	if on := n.on(); on != "" {
		t.Errorf("a merge began on %s while the volume was being staged on n2", on)
	}
	close(out)
	r.must(<-ended)
}

// lossy lets a test decide about each CreateTag.
type lossy struct {
	engine.Engine
	mu sync.Mutex
	on func(name string, create func() error) error
}

func (e *lossy) CreateTag(ctx context.Context, t engine.Tag) error {
	e.mu.Lock()
	on := e.on
	e.mu.Unlock()
	create := func() error { return e.Engine.CreateTag(ctx, t) }
	if on == nil {
		return create()
	}
	return on(t.Name, create)
}

func (e *lossy) set(on func(name string, create func() error) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.on = on
}

// lose creates the tags of a prefix and says that it is not known.
func (e *lossy) lose(prefix string) {
	e.set(func(name string, create func() error) error {
		err := create()
		if err == nil && strings.HasPrefix(name, prefix) {
			return fault.New(fault.Unavailable, "the reply was lost")
		}
		return err
	})
}

func lossyRig(t *testing.T, done bool) (*rig, *hookedNodes, *lossy) {
	r, n := hooked(t, done)
	e := &lossy{}
	r.wrap = func(in engine.Engine) engine.Engine { e.Engine = engine.Minimal(in); return e }
	r.start()
	return r, n, e
}

// TestTwoSettleOneRecord: the seal of a snapshot by a layer is uncertain, and both who needs
// the volume next and the collector find out what came of it.
func TestTwoSettleOneRecord(t *testing.T) {
	r, _, e := lossyRig(t, true)
	v := r.volume("v", "a", 1<<20)
	mine := "i." + v.Handle.Image + "."
	e.lose(mine)
	_, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.is(err, fault.Unavailable)
	both := make(chan struct{}, 8)
	e.set(func(name string, create func() error) error {
		if strings.HasPrefix(name, mine) {
			both <- struct{}{}
			for end := time.Now().Add(time.Second); len(both) < 2 && time.Now().Before(end); time.Sleep(time.Millisecond) {
			}
		}
		return create()
	})
	attached := make(chan error, 1)
	go func() {
		_, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
		attached <- err
	}()
	r.until("a second attempt at the record", func() bool { return len(both) > 0 })
	r.must(r.Collect(r.ctx))
	r.must(<-attached)
	e.set(nil)
	r.collect()
	r.restart()
	if _, err := r.Get(r.ctx, v.Handle); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// TestAMemberOfAGroupOverAnUncertainVolume: the group is dead, and whether the volume
// stands on the member's slab is not known.
func TestAMemberOfAGroupOverAnUncertainVolume(t *testing.T) {
	r, _, e := lossyRig(t, true)
	v := r.volume("v", "a", 1<<20)
	e.lose("i." + v.Handle.Image + ".")
	_, err := r.CreateGroup(r.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{v.Handle}})
	r.is(err, fault.Unavailable)
	_ = r.Collect(r.ctx) // it cannot do much
	e.set(nil)
	_ = r.Collect(r.ctx) // it may begin in the middle
	r.stageOn(v, "n1")
	r.collect()
	r.restart()
	now, err := r.Get(r.ctx, v.Handle)
	r.must(err)
	if now.State == image.Broken {
		t.Errorf("after a restart the volume is broken: %s", now.Reason)
	}
}

// TestAnUncertainHoldOfAMerge keeps nobody from deleting the image.
func TestAnUncertainHoldOfAMerge(t *testing.T) {
	r, _, e := lossyRig(t, true)
	v := r.volume("v", "a", 1<<20)
	s1, s2 := r.snapshot("s1", v), r.snapshot("s2", v)
	var once sync.Once
	e.set(func(name string, create func() error) error {
		err := create()
		if strings.HasPrefix(name, "a.") {
			once.Do(func() { err = fault.New(fault.Unavailable, "the reply was lost") })
		}
		return err
	})
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	for range 5 {
		r.must(r.Collect(r.ctx))
		r.idle()
		r.clock.turn(11 * time.Minute)
	}
	if now, err := r.Get(r.ctx, s2.Handle); err != nil || len(now.Chain) != 1 {
		t.Errorf("the snapshot's chain is %v (%v): nothing was merged", now.Chain, err)
	}
	r.must(r.DeleteSnapshot(r.ctx, s2.Handle))
}

// TestAMergeThatCannotBeginKeepsNoOtherBack: its volume is attached, and nobody stages it.
func TestAMergeThatCannotBeginKeepsNoOtherBack(t *testing.T) {
	r, n := hooked(t, true)
	r.start()
	v, w := r.volume("v", "a", 1<<20), r.volume("w", "a", 1<<20)
	s := r.snapshot("s", v)
	r.snapshot("w1", w)
	w2 := r.snapshot("w2", w)
	_, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	r.must(r.DeleteSnapshot(r.ctx, s.Handle))
	r.must(r.DeleteSnapshot(r.ctx, w2.Handle))
	for range 20 {
		r.must(r.Collect(r.ctx))
		r.idle()
		r.clock.turn(30 * time.Second)
	}
	if n.asked == 0 {
		t.Error("in 20 rounds nothing of the other volume was merged")
	}
}

// metered measures and has no snapshots of its own.
type metered struct{ engine.Engine }

func (e metered) Supports(c engine.Capability) bool { return c == engine.CapMeter }
func (e metered) DomainUsage(ctx context.Context) (engine.Usage, error) {
	return e.Engine.(engine.Meter).DomainUsage(ctx)
}
func (e metered) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	return e.Engine.(engine.Meter).SlabUsage(ctx, id)
}

// TestASnapshotPromisesTheSlabThatItTookOver when its little layer was merged.
func TestASnapshotPromisesTheSlabThatItTookOver(t *testing.T) {
	r, _ := hooked(t, true)
	r.wrap = func(e engine.Engine) engine.Engine { return metered{e} }
	r.start()
	const size = 32 << 20
	v := r.volume("v", "a", size)
	f, err := os.OpenFile(r.path(v), os.O_RDWR, 0)
	r.must(err)
	_, err = f.WriteAt(content(1, size), 0)
	r.must(errors.Join(err, f.Sync(), f.Close()))
	s1, s2 := r.snapshot("s1", v), r.snapshot("s2", v)
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	for range 5 {
		r.collect()
		r.idle()
	}
	if now, err := r.Get(r.ctx, s2.Handle); err != nil || len(now.Chain) != 1 {
		t.Fatalf("the snapshot's chain is %v (%v): nothing was merged", now.Chain, err)
	}
	if p := r.Domains(r.ctx)[0].Promised; p < 2*size {
		t.Errorf("a volume of %d MiB and a snapshot whose slab has as much promise %d MiB", size>>20, p>>20)
	}
}

// TestAFlatteningThatNodesDoNotKnowIsNotMerged: the layer in whose place the raw slab came
// is still in use.
func TestAFlatteningThatNodesDoNotKnowIsNotMerged(t *testing.T) {
	r, n := hooked(t, true)
	r.start()
	v := r.volume("v", "a", 1<<20)
	r.snapshot("s1", v)
	s2 := r.snapshot("s2", v)
	r.snapshot("s3", v)
	st := r.stageOn(v, "n1")
	r.must(r.Modify(r.ctx, v.Handle, image.Tuning{ChainLimit: 2}, nil))
	copied := false
	n.hook = func(call string, st image.Staging) error {
		switch {
		case call == "AttachImage":
			copied = true
			r.must(r.DeleteSnapshot(r.ctx, s2.Handle))
		case call == "Switch" && st.Handle == v.Handle:
			return fault.New(fault.Unavailable, "the node is slow")
		}
		return nil
	}
	for range 6 {
		_ = r.Collect(r.ctx) // the node is slow
		r.idle()
		r.clock.turn(11 * time.Minute)
	}
	if !copied {
		t.Fatal("nothing was flattened")
	}
	slabs := strings.Join(r.files("a", "slabs"), " ")
	for _, s := range st.Slabs {
		if !strings.Contains(slabs, s.ID) {
			t.Errorf("slab %s is gone, and the volume stands on it on n1", s.ID)
		}
	}
}

// TestAHalfMadeSnapshotWaitsForNobody: it holds the snapshot and would wait for the volume,
// while a staging holds the volume and waits for the snapshot.
func TestAHalfMadeSnapshotWaitsForNobody(t *testing.T) {
	r, n, e := lossyRig(t, false)
	v := r.volume("v", "a", 1<<20)
	p := r.snapshot("p", v)
	a, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	_, err = r.Stage(r.ctx, v.Handle, "n1", a.Generation)
	r.must(err)
	n.hook = func(call string, _ image.Staging) error {
		if call == "Switch" {
			return fault.New(fault.Unavailable, "not now")
		}
		return nil
	}
	_, err = r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.is(err, fault.Unavailable)
	r.must(r.DeleteSnapshot(r.ctx, p.Handle))
	in, out := make(chan struct{}), make(chan struct{})
	var once sync.Once
	e.set(func(_ string, create func() error) error {
		once.Do(func() { close(in); <-out })
		return create()
	})
	modified := make(chan error, 1)
	go func() { modified <- r.Modify(r.ctx, v.Handle, image.Tuning{ChainLimit: 5}, nil) }()
	<-in // it has the volume
	_, err = r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.is(err, fault.Pending)
	close(out)
	r.must(<-modified)
}

// TestALateWordThatAnImageWasUnstagedCountsForNothing: over a link, a message may
// arrive when the image is in use once more. Its chain would be changed below it.
func TestALateWordThatAnImageWasUnstagedCountsForNothing(t *testing.T) {
	r := newRig(t, "a").start()
	defer r.Close()
	v := r.volume("v", "a", 1<<20)
	r.stageOn(v, "n1")
	first, err := r.Outline(r.ctx, v.Handle, "n1")
	r.must(err)
	if first.Told == 0 || first.Size != v.Size || len(first.Slabs) != 1 {
		t.Errorf("outline %+v", first)
	}
	r.must(r.Unstaged(r.ctx, v.Handle, "n1", first.Told))
	at, err := r.Get(r.ctx, v.Handle)
	r.must(err)
	if at.Attachments[0].Staged {
		t.Error("unstaged, and still said to be staged")
	}
	if _, err := r.Stage(r.ctx, v.Handle, "n1", at.Attachments[0].Generation); err != nil {
		t.Fatal(err)
	}
	for _, late := range []int64{first.Told, 0} {
		if err := r.Unstaged(r.ctx, v.Handle, "n1", late); !errors.Is(err, fault.Conflict) {
			t.Errorf("a late word: %v", err)
		}
	}
	if at, err = r.Get(r.ctx, v.Handle); err != nil || !at.Attachments[0].Staged {
		t.Errorf("staged again, and a late word undid that: %+v, %v", at.Attachments, err)
	}
}
