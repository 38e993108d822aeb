package agent_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// successor is another controller, at an address of its own, while the first one still
// runs and believes that it leads.
func (r *rig) successor() *rig {
	r.t.Helper()
	serverTLS, clientTLS := certificate(r.t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS)
	r.must(err)
	next := &rig{t: r.t, ctx: r.ctx, dirs: r.dirs, tokens: r.tokens, lost: r.lost, copies: r.copies, tls: clientTLS, address: l.Addr().String()}
	next.control(l)
	r.t.Cleanup(func() { next.stop() })
	return next
}

// moves lets an agent go over to a controller.
func (w *worker) moves(to *rig) {
	w.mu.Lock()
	w.r = to
	w.mu.Unlock()
	w.cut()
	to.wait(w.name+" to go over", func() bool { _, err := to.hub.Agent(w.name); return err == nil && w.link.Connected() })
}

// TestAnOlderControllerIsRefused: an agent that has heard of a newer one does nothing more for
// an older one that wakes up, whatever that asks.
func TestAnOlderControllerIsRefused(t *testing.T) {
	r := newRig(t)
	one := r.agent("n1")
	spec := agent.DomainSpec{Name: "a", Engine: "dir", Params: map[string]string{"path": r.dirs["a"]}}
	d, err := r.hub.OpenDomain(r.ctx, spec)
	r.must(err)
	id, err := r.manager.AddDomain(r.ctx, image.DomainConfig{Name: "a", Engine: "dir", Overcommit: 1000}, d)
	r.must(err)
	_, epoch, err := r.manager.IDs(id)
	r.must(err)
	d.Adopt(r.ctx, epoch, id)
	v := r.volume("v", "a", 1<<20)
	attached, err := r.manager.Attach(r.ctx, v.Handle, "n1", writer(), false)
	r.must(err)
	_, err = one.link.Stage(r.ctx, v.Handle, "", attached.Generation)
	r.must(err)
	next := r.successor()
	one.moves(next)
	next.open("a", "")
	one.moves(r)
	at := image.Place{Domain: "a", Slab: v.Slab}
	for what, do := range map[string]func(n image.ChainAgent) error{
		"zero":     func(image.ChainAgent) error { return r.hub.Zero(r.ctx, at, 0, 1<<20) },
		"format":   func(image.ChainAgent) error { return r.hub.FormatLayer(r.ctx, at, 1<<20, 32<<10) },
		"trim":     func(image.ChainAgent) error { return r.hub.TrimLayer(r.ctx, at, 1<<20) },
		"allocate": func(image.ChainAgent) error { return r.hub.Allocate(r.ctx, at, 1<<20) },
		"copy": func(image.ChainAgent) error {
			return r.hub.CopyBlock(r.ctx, image.Content{Place: at}, at, image.BlockCopy{})
		},
		"read":   func(image.ChainAgent) error { _, err := r.hub.DataExtents(r.ctx, at, 1<<20); return err },
		"freeze": func(n image.ChainAgent) error { _, err := n.Freeze(r.ctx, v.Handle, time.Second); return err },
		"thaw":   func(n image.ChainAgent) error { return n.Thaw(r.ctx, v.Handle) },
		"staged": func(n image.ChainAgent) error { _, err := n.Staged(r.ctx, v.Handle); return err },
		"layers": func(n image.ChainAgent) error { return n.Layers(r.ctx, v.Handle) },
		"switch": func(n image.ChainAgent) error {
			return n.Switch(r.ctx, []image.Staging{{Handle: v.Handle, Domain: "a", Epoch: 1}}, "")
		},
		"stage": func(image.ChainAgent) error {
			_, err := one.link.Stage(r.ctx, v.Handle, "", attached.Generation)
			return err
		},
		"delete slab": func(image.ChainAgent) error { return d.DeleteSlab(r.ctx, v.Slab) },
		"create tag":  func(image.ChainAgent) error { return d.CreateTag(r.ctx, engine.Tag{Name: "x.y"}) },
	} {
		t.Run(what, func(t *testing.T) {
			n, err := r.hub.Agent("n1")
			r.must(err)
			err = do(n.(image.ChainAgent))
			if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "newer") {
				t.Errorf("an older controller gets %v", err)
			}
		})
	}
	if _, err := os.Stat(r.slab("a", v)); err != nil {
		t.Error(err)
	}
	one.moves(next)
	next.volume("w", "a", 1<<20)
}

// copying begins a copy of a snapshot into domain b whose work on a node is stuck.
func (r *rig) copying(w *worker) (request image.CreateRequest, content []byte, done <-chan error) {
	r.t.Helper()
	v := r.volume("v", "a", 2<<20)
	content = r.fill("a", v)
	snap, err := r.manager.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.must(err)
	w.stuck = make(chan struct{})
	request = image.CreateRequest{Name: "c", Domains: []string{"b"}, Accesses: []image.Access{writer()}, Size: 2 << 20, Source: snap.Handle.String()}
	ended := make(chan error, 1)
	manager := r.manager
	go func() {
		_, err := manager.CreateVolume(context.Background(), request)
		ended <- err
	}()
	r.wait("the copy to be stuck", func() bool { return r.copies.stuck.Load() == 1 })
	return request, content, ended
}

// repeated waits until somebody has asked for the copy again, and it is about to be made.
func (r *rig) repeated(request image.CreateRequest) (done <-chan error) {
	r.t.Helper()
	ended := make(chan error, 1)
	manager := r.manager
	go func() {
		_, err := manager.CreateVolume(context.Background(), request)
		ended <- err
	}()
	r.wait("the copy to be asked for again", func() bool {
		for _, op := range manager.Operations() {
			if strings.Contains(op.Step, "copying from") {
				return true
			}
		}
		return false
	})
	return ended
}

// again asks until it is done.
func (r *rig) again(request image.CreateRequest) (out image.Image) {
	r.t.Helper()
	r.wait("the copy to be made", func() (done bool) {
		var err error
		if out, err = r.manager.CreateVolume(r.ctx, request); err != nil && !errors.Is(err, fault.Unavailable) && !errors.Is(err, fault.Pending) {
			r.t.Fatal(err)
		}
		return err == nil
	})
	return out
}

func (r *rig) holds(domain string, img image.Image, content []byte) {
	r.t.Helper()
	got, err := os.ReadFile(r.slab(domain, img))
	r.must(err)
	if !bytes.Equal(got, content) {
		r.t.Errorf("%s in domain %s holds something else", img.Name, domain)
	}
}

// zeroing begins work on a slab of domain a that is stuck on a node.
func (r *rig) zeroing(w *worker) (at image.Place, done <-chan error) {
	r.t.Helper()
	at = image.Place{Domain: "a", Slab: r.volume("v", "a", 1<<20).Slab}
	w.stuck = make(chan struct{})
	ended := make(chan error, 1)
	hub := r.hub
	go func() { ended <- hub.Zero(context.Background(), at, 0, 1<<20) }()
	r.wait("the work to be stuck", func() bool { return r.copies.stuck.Load() == 1 })
	return at, ended
}

// waits says whether work waits for what is stuck.
func (r *rig) waits(at image.Place) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, 100*time.Millisecond) // in which it would run if it did
	defer cancel()
	if err := r.hub.Zero(ctx, at, 0, 1<<20); !errors.Is(err, fault.Deadline) && !errors.Is(err, fault.Unavailable) {
		r.t.Errorf("work did not wait for what may still run: %v", err)
	}
	if n := r.copies.atOnce(); n != 1 {
		r.t.Errorf("%d worked on it at the same time", n)
	}
}

// TestWorkIsTriedAgainWhereItStillRuns: the first one's has to end before.
func TestWorkIsTriedAgainWhereItStillRuns(t *testing.T) {
	r := newRig(t)
	one := r.agent("n1")
	r.open("a", "")
	at, first := r.zeroing(one)
	one.cut()
	r.is(<-first, fault.Unavailable)
	r.wait("the agent to come back", func() bool { _, err := r.hub.Agent("n1"); return err == nil })
	r.waits(at)
	close(one.stuck)
	r.wait("the work to be done", func() bool { return r.hub.Zero(r.ctx, at, 0, 1<<20) == nil })
	if n := r.copies.atOnce(); n != 1 {
		t.Errorf("%d worked on it at the same time", n)
	}
}

// TestWorkIsTriedAgainOnAnotherNode: the first node cannot be asked, and may still be
// writing. So it is waited for, until it says that it does not any more.
func TestWorkIsTriedAgainOnAnotherNode(t *testing.T) {
	r := newRig(t)
	r.restart(time.Hour)
	one := r.agent("n1")
	r.open("a", "")
	at, first := r.zeroing(one)
	r.agent("n2")
	one.lose(true)
	r.is(<-first, fault.Unavailable)
	r.wait("n1 to be gone", func() bool { return len(r.hub.Nodes()) == 1 })
	r.waits(at)
	one.lose(false)
	r.wait("n1 to come back", func() bool { return len(r.hub.Nodes()) == 2 })
	r.waits(at)
	close(one.stuck)
	r.wait("the work to be done", func() bool { return r.hub.Zero(r.ctx, at, 0, 1<<20) == nil })
	if n := r.copies.atOnce(); n != 1 {
		t.Errorf("%d worked on it at the same time", n)
	}
}

// TestANodeThatStaysLostHoldsUpNoWork for longer than it may take to notice that it is lost.
func TestANodeThatStaysLostHoldsUpNoWork(t *testing.T) {
	r := newRig(t)
	r.restart(time.Millisecond)
	one := r.agent("n1")
	r.open("a", "")
	at, first := r.zeroing(one)
	one.lose(true)
	r.is(<-first, fault.Unavailable)
	close(one.stuck)
	r.wait("n1 to have ended", func() bool { return r.copies.running() == 0 })
	r.agent("n2")
	r.wait("the work to be done", func() bool { return r.hub.Zero(r.ctx, at, 0, 1<<20) == nil })
}

// TestTheNextControllerResumesACopyOnAnotherNode: of what an earlier controller asked for it
// knows nothing, so it asks all nodes.
func TestTheNextControllerResumesACopyOnAnotherNode(t *testing.T) {
	r := newRig(t)
	r.restart(time.Millisecond)
	two := r.agent("n2")
	r.open("a", "")
	r.open("b", "")
	request, content, first := r.copying(two)
	next := r.successor()
	one := next.agent("n1")
	two.moves(next)
	r.is(<-first, fault.Unavailable)
	next.open("a", "")
	next.open("b", "")
	if one.name != next.hub.Nodes()[0] {
		t.Fatal("the next copy would run on the same node")
	}
	again := next.repeated(request)
	close(two.stuck)
	if err := <-again; err != nil {
		r.is(err, fault.Unavailable)
	}
	r.holds("b", next.again(request), content)
	if n := r.copies.atOnce(); n != 1 {
		t.Errorf("%d worked on it at the same time", n)
	}
}
