package image_test

import (
	"context"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// held lets no tag come into being while it is closed.
type held struct {
	engine.Engine
	arrived chan struct{}
	release chan struct{} // nil: open
}

func (h *held) CreateTag(ctx context.Context, t engine.Tag) error {
	if h.release != nil {
		select {
		case h.arrived <- struct{}{}:
		default:
		}
		<-h.release
	}
	return h.Engine.CreateTag(ctx, t)
}

// A call under the former name of the domain joins the one under its present
// name that is running: beside it it would wait for it, and then do it again.
func TestACallUnderAFormerNameOfTheDomainJoins(t *testing.T) {
	r := newRig(t, "new")
	gate := &held{}
	r.wrap = func(e engine.Engine) engine.Engine { gate.Engine = engine.Minimal(e); return gate }
	r.config = func(c *image.DomainConfig) { c.Aliases = []string{"old"} }
	r.start()
	v := r.volume("v", "new", 32*mib)
	old := image.Handle{Domain: "old", Image: v.Handle.Image}
	for _, c := range []struct {
		what string
		call func(context.Context, image.Handle) error
	}{
		{"attach", func(ctx context.Context, h image.Handle) error {
			_, err := r.Attach(ctx, h, "n1", mount, false)
			return err
		}},
		{"detach", func(ctx context.Context, h image.Handle) error { return r.Detach(ctx, h, "n1") }},
		{"expand", func(ctx context.Context, h image.Handle) error {
			_, err := r.Expand(ctx, h, 64*mib, 0)
			return err
		}},
		{"modify", func(ctx context.Context, h image.Handle) error {
			return r.Modify(ctx, h, image.Tuning{QuiesceLimit: time.Second}, nil)
		}},
		{"delete", func(ctx context.Context, h image.Handle) error { return r.DeleteVolume(ctx, h) }},
	} {
		t.Run(c.what, func(t *testing.T) {
			gate.arrived, gate.release = make(chan struct{}, 1), make(chan struct{})
			first := make(chan error, 1)
			go func() { first <- c.call(r.ctx, v.Handle) }()
			select {
			case <-gate.arrived:
			case err := <-first:
				t.Fatalf("ended before it made a tag: %v", err)
			}
			impatient, cancel := context.WithCancel(r.ctx)
			cancel()
			if err := c.call(impatient, old); fault.KindOf(err) != fault.Pending {
				t.Errorf("error %v, want %s", err, fault.Pending)
			}
			if ops := r.Operations(); len(ops) != 1 {
				t.Errorf("the second call did not join the first: %+v", ops)
			}
			close(gate.release)
			if err := <-first; err != nil {
				t.Error(err)
			}
		})
	}
}

// The name of a volume may look like a handle: it stays a name.
func TestANameThatLooksLikeAHandleIsNoHandle(t *testing.T) {
	r := newRig(t, "new")
	gate := &held{}
	r.wrap = func(e engine.Engine) engine.Engine { gate.Engine = engine.Minimal(e); return gate }
	r.config = func(c *image.DomainConfig) { c.Aliases = []string{"old"} }
	r.start()
	gate.arrived, gate.release = make(chan struct{}, 1), make(chan struct{})
	create := func(ctx context.Context, name string) error {
		_, err := r.CreateVolume(ctx, image.CreateRequest{Name: name, Domains: []string{"new"}, Accesses: []image.Access{mount}, Size: 32 * mib})
		return err
	}
	first := make(chan error, 1)
	go func() { first <- create(r.ctx, "new/x") }()
	<-gate.arrived
	impatient, cancel := context.WithCancel(r.ctx)
	cancel()
	r.is(create(impatient, "old/x"), fault.Pending)
	if ops := r.Operations(); len(ops) != 2 {
		t.Errorf("volumes of two names became one operation: %+v", ops)
	}
	close(gate.release)
	r.must(<-first)
	r.must(create(r.ctx, "old/x"))
	all, _, err := r.List(r.ctx, true, "", 0)
	r.must(err)
	if len(all) != 2 {
		t.Errorf("%d volumes, want 2", len(all))
	}
}
