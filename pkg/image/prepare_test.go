package image_test

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// switching are nodes that write down in what order they are asked to switch.
type switching struct {
	hookedNodes
	log struct {
		sync.Mutex
		calls []string
		slabs []image.SlabRef // of the last Prepare
	}
}

type switchingNode struct {
	hookedNode
	s *switching
}

var _ image.ChainAgent = switchingNode{}

func (s *switching) Agent(node string) (image.Agent, error) {
	a, err := s.hookedNodes.Agent(node)
	if err != nil {
		return nil, err
	}
	return switchingNode{a.(hookedNode), s}, nil
}

func (n switchingNode) call(what string) {
	n.s.log.Lock()
	defer n.s.log.Unlock()
	n.s.log.calls = append(n.s.log.calls, what+" "+n.name)
}

func (n switchingNode) Prepare(_ context.Context, images []image.Staging) (string, error) {
	n.call("prepare")
	n.s.log.Lock()
	defer n.s.log.Unlock()
	n.s.log.slabs = images[0].Slabs
	return "of " + n.name, nil
}

func (n switchingNode) Switch(_ context.Context, images []image.Staging, prepared string) error {
	n.s.log.Lock()
	same := slices.Equal(n.s.log.slabs, images[0].Slabs)
	n.s.log.Unlock()
	if prepared != "" && !same {
		return fault.New(fault.Internal, "prepared was another chain than asked for")
	}
	n.call("switch " + prepared)
	return nil
}

func (n switchingNode) Hold(_ context.Context, _ []image.Staging, prepared string) error {
	n.call("hold " + prepared)
	return nil
}

func (n switchingNode) Release(_ context.Context, prepared string) error {
	n.call("release " + prepared)
	return nil
}

func (s *switching) taken() []string {
	s.log.Lock()
	defer s.log.Unlock()
	out := s.log.calls
	s.log.calls = nil
	return out
}

func switchingRig(t *testing.T) (*rig, *switching, *lossy) {
	r := newRig(t, "a")
	s := &switching{}
	s.t, s.merging = t, map[string]string{}
	r.mapAgents = s
	e := &lossy{}
	r.wrap = func(in engine.Engine) engine.Engine { e.Engine = engine.Minimal(in); return e }
	r.start()
	return r, s, e
}

// TestANodeBuildsTheChainBesideTheSeal: the node that has a volume in use is told the chain before it is
// sealed, and switches to just that one.
func TestANodeBuildsTheChainBesideTheSeal(t *testing.T) {
	r, s, _ := switchingRig(t)
	v := r.volume("v", "a", 1<<20)
	r.snapshot("unused", v)
	if got := s.taken(); len(got) > 0 {
		t.Fatalf("a volume that nobody uses: %q", got)
	}
	r.stageOn(v, "n1")
	for _, name := range []string{"s1", "s2"} {
		r.snapshot(name, v)
		if got, want := s.taken(), []string{"prepare n1", "switch of n1 n1"}; !slices.Equal(got, want) {
			t.Fatalf("%q, want %q", got, want)
		}
	}
}

// TestWhatANodePreparedForIsGivenUp when the seal fails.
func TestWhatANodePreparedForIsGivenUp(t *testing.T) {
	r, s, e := switchingRig(t)
	v := r.volume("v", "a", 1<<20)
	r.stageOn(v, "n1")
	mine := "i." + v.Handle.Image + "."
	e.set(func(name string, create func() error) error {
		if strings.HasPrefix(name, mine) {
			return fault.New(fault.Exhausted, "full")
		}
		return create()
	})
	_, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.is(err, fault.Exhausted)
	if got, want := s.taken(), []string{"prepare n1", "release of n1 n1"}; !slices.Equal(got, want) {
		t.Fatalf("%q, want %q", got, want)
	}
}

// TestAllNodesAreReadyBeforeOneHolds: nobody waits while another node still builds.
func TestAllNodesAreReadyBeforeOneHolds(t *testing.T) {
	r, s, _ := switchingRig(t)
	a, b := r.volume("a", "a", 1<<20), r.volume("b", "a", 1<<20)
	r.stageOn(a, "n1")
	r.stageOn(b, "n2")
	_, err := r.CreateGroup(r.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{a.Handle, b.Handle}})
	r.must(err)
	got := s.taken()
	slices.Sort(got[:2])
	slices.Sort(got[2:4])
	slices.Sort(got[4:])
	want := []string{"prepare n1", "prepare n2", "hold of n1 n1", "hold of n2 n2", "release of n1 n1", "release of n2 n2"}
	if !slices.Equal(got, want) {
		t.Fatalf("%q, want %q", got, want)
	}
}

// countedWorker counts the steps in which space is taken, and takes none.
type countedWorker struct {
	image.Worker
	steps *atomic.Int64
}

func (w countedWorker) FormatLayer(ctx context.Context, p image.Place, _, chunk int64) error {
	return w.Worker.FormatLayer(ctx, p, 0, chunk)
}

func (w countedWorker) Allocate(context.Context, image.Place, int64) error {
	w.steps.Add(1)
	return nil
}

// TestTheSpaceOfALayerIsTakenWhileNoSnapshotIsBeingMade, of whatever volume in the domain.
func TestTheSpaceOfALayerIsTakenWhileNoSnapshotIsBeingMade(t *testing.T) {
	r, _, e := switchingRig(t)
	steps := new(atomic.Int64)
	r.worker = func(w image.Worker) image.Worker { return countedWorker{w, steps} }
	r.restart()
	v, other := r.volume("v", "a", 9<<30), r.volume("other", "a", 1<<20)
	going, goOn := make(chan struct{}), make(chan struct{})
	e.set(func(name string, create func() error) error {
		if strings.HasPrefix(name, "i."+other.Handle.Image+".") { // the first seal
			close(going)
			<-goOn
		}
		return create()
	})
	var made sync.WaitGroup
	made.Go(func() {
		if _, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "held", Source: other.Handle}); err != nil {
			t.Error(err)
		}
	})
	<-going
	waits := make(chan struct{})
	made.Go(func() {
		r.snapshot("s", v)
		r.must(r.Collect(r.ctx))
		for {
			if slices.ContainsFunc(r.Operations(), func(o image.Operation) bool { return strings.HasPrefix(o.Step, "waiting for snapshots") }) || steps.Load() > 0 {
				close(waits)
				return
			}
			runtime.Gosched()
		}
	})
	<-waits
	if n := steps.Load(); n > 0 {
		t.Errorf("%d steps beside a snapshot that is being made", n)
	}
	close(goOn)
	made.Wait()
	for slices.ContainsFunc(r.Operations(), func(o image.Operation) bool { return o.Op == "allocate layers" }) {
		runtime.Gosched()
	}
	if n := steps.Load(); n != 3 { // from 1 to 5, to 9 GiB, and metadata
		t.Errorf("%d steps, want 3", n)
	}
}
