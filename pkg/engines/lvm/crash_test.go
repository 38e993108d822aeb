package lvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
)

// dying is an engine whose process dies at one of its changes: before it was
// made, or after.
type dying struct {
	engine.Engine
	zeroed bool // where nothing can be attached, the manager is told that space is zero

	mu    sync.Mutex
	calls int
	at    int // 0: never
	after bool
	dead  bool
}

func (d *dying) change(do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	dead := fault.New(fault.Unavailable, "the process is dead")
	if d.dead || d.calls == d.at && !d.after {
		d.dead = true
		return dead
	}
	err := do()
	if d.calls == d.at {
		d.dead = true
		return dead
	}
	return err
}

func (d *dying) CreateSlab(ctx context.Context, s engine.SlabSpec) error {
	return d.change(func() error { return d.Engine.CreateSlab(ctx, s) })
}
func (d *dying) ResizeSlab(ctx context.Context, id string, size int64) error {
	return d.change(func() error { return d.Engine.ResizeSlab(ctx, id, size) })
}
func (d *dying) DeleteSlab(ctx context.Context, id string) error {
	return d.change(func() error { return d.Engine.DeleteSlab(ctx, id) })
}
func (d *dying) CreateTag(ctx context.Context, t engine.Tag) error {
	return d.change(func() error { return d.Engine.CreateTag(ctx, t) })
}
func (d *dying) DeleteTag(ctx context.Context, name string) error {
	return d.change(func() error { return d.Engine.DeleteTag(ctx, name) })
}
func (d *dying) Describe(ctx context.Context) (engine.Description, error) {
	desc, err := d.Engine.Describe(ctx)
	desc.ZeroedSpace = desc.ZeroedSpace || d.zeroed
	return desc, err
}

type noAgents struct{}

func (noAgents) Agent(node string) (image.Agent, error) {
	return nil, fault.New(fault.NotFound, "there is no node %s", node)
}

func (noAgents) Nodes() []string { return nil }

// world is a manager over a group, one life after the other.
type world struct {
	t     *testing.T
	group *group
	now   time.Time
	*image.Manager
	engine *dying
	as     func(*dying) engine.Engine // what the manager is given; nil: the engine
}

func (w *world) start(at int, after bool) error {
	_, err := os.Stat("/sys/class/misc/device-mapper")
	w.engine = &dying{Engine: w.group.open(w.t, host.Exec{}), at: at, after: after, zeroed: err != nil}
	worker := &mover.Local{Files: mover.New(mover.Options{Workers: 1}), Agents: noAgents{}}
	w.Manager = image.New(image.Config{Installation: "test", Agents: noAgents{}, Worker: worker, Now: func() time.Time { return w.now }, CollectEvery: -1})
	worker.Engines = w.Engine
	var e engine.Engine = w.engine
	if w.as != nil {
		e = w.as(w.engine)
	}
	_, err = w.AddDomain(w.t.Context(), image.DomainConfig{Name: "a", Engine: "lvm", Scope: image.ScopeShared, Overcommit: 1}, e)
	return err
}

// life is everything that the engine's changes come from.
func (w *world) life(name string) error {
	ctx := w.t.Context()
	img, err := w.CreateVolume(ctx, image.CreateRequest{Name: name, Domains: []string{"a"}, Layout: image.LayoutImage, Size: mib,
		Accesses: []image.Access{{Mode: image.SingleNodeWriter, Block: true}}})
	if err != nil {
		return err
	}
	return w.DeleteVolume(ctx, img.Handle)
}

func (w *world) collect() error {
	for range 4 {
		if err := w.Collect(w.t.Context()); err != nil {
			return err
		}
		w.now = w.now.Add(11 * time.Minute)
	}
	return nil
}

// TestCrashesBeneathAManager: whichever change a process dies at, the next one
// finishes the work, and nothing is left. With QUARRY_CRASH=long every change is
// tried, otherwise every third.
func TestCrashesBeneathAManager(t *testing.T) {
	w := &world{t: t, group: newGroup(t, 64), now: time.UnixMilli(1_700_000_000_000)}
	ok(t, w.start(0, false))
	opening := w.engine.calls
	ok(t, w.life("first"))
	ok(t, w.collect())
	points := w.engine.calls - opening
	ok(t, w.Close())
	if points < 5 {
		t.Fatalf("only %d changes", points)
	}
	step := 3
	if os.Getenv("QUARRY_CRASH") == "long" {
		step = 1
	}
	for at := 1; at <= opening+points; at += step {
		for _, after := range []bool{false, true} {
			w.t.Logf("dies at change %d, after it: %v", at, after)
			name := fmt.Sprintf("v%d-%v", at, after)
			err := w.start(at, after)
			if err == nil {
				err = w.life(name)
			}
			if err == nil {
				err = w.collect()
			}
			if err == nil && w.engine.dead {
				t.Errorf("it died at change %d, and nobody noticed", at)
			}
			_ = w.Close()
			ok(t, w.start(0, false))
			ok(t, w.life(name))
			ok(t, w.collect())
			slabs, err := w.engine.ListSlabs(t.Context())
			tags, err2 := w.engine.ListTags(t.Context(), "")
			ok(t, errors.Join(err, err2))
			if len(slabs) != 0 {
				t.Errorf("slabs are left: %v", slabs)
			}
			for _, tag := range tags {
				if strings.HasPrefix(tag.Name, "i.") || strings.HasPrefix(tag.Name, "d.") {
					t.Errorf("tag %s is left", tag.Name)
				}
			}
			ok(t, w.Close())
		}
	}
}
