package crash_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// mode is what befalls an engine call.
type mode string

const (
	none        mode = "none"
	crashBefore mode = "crash before"       // not done; the process is dead
	crashAfter  mode = "crash after"        // done; the process is dead
	lostReply   mode = "lost reply"         // done, but Unavailable; the process lives
	outage      mode = "lost reply, outage" // done, but Unavailable; so are the next three calls, which are not done
	refused     mode = "refused"            // not done: Exhausted
	misread     mode = "misread"            // a listing answers Corrupt
)

var (
	errDead = fault.New(fault.Unavailable, "the process is dead")
	errLost = fault.New(fault.Unavailable, "the reply was lost")
)

// control decides what befalls the engine calls of one process, which may have
// several domains.
type control struct {
	mu     sync.Mutex
	calls  int // so far
	at     int // the call that is hit, counted from 1; 0: none
	mode   mode
	only   func(verb string) bool // nil: all verbs are counted
	dead   bool
	down   int // calls that are still to fail
	struck string
	hook   func(verb, object string, after bool) // told of each call; may block
}

// arm makes the at-th call from now on the one that is hit.
func (c *control) arm(m mode, at int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls, c.at, c.mode, c.struck, c.down = 0, at, m, "", 0
	c.only = nil
	switch m {
	case refused: // the verbs that can find the storage full
		c.only = func(v string) bool {
			return slices.Contains([]string{"CreateSlab", "ResizeSlab", "CreateTag", "SnapshotSlab", "CloneSlab"}, v)
		}
	case misread:
		c.only = func(v string) bool { return v == "ListTags" }
	}
}

// hit says which call was hit, or "".
func (c *control) hit() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.struck
}

// kill makes the process dead.
func (c *control) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
}

// call runs do, or what befalls it instead.
func (c *control) call(verb, object string, do func() error) error {
	c.mu.Lock()
	hook := c.hook
	if c.dead {
		c.mu.Unlock()
		return errDead
	}
	if c.down > 0 {
		c.down--
		c.mu.Unlock()
		return errLost
	}
	m := none
	if c.only == nil || c.only(verb) {
		c.calls++
		if c.at > 0 && c.calls == c.at {
			m, c.struck = c.mode, verb+" "+object
		}
	}
	if m == crashBefore {
		c.dead = true
	}
	c.mu.Unlock()
	switch m {
	case crashBefore:
		return errDead
	case refused:
		return fault.New(fault.Exhausted, "no space left")
	case misread:
		return fault.New(fault.Corrupt, "the listing cannot be read")
	}
	if hook != nil {
		hook(verb, object, false)
	}
	err := do()
	if hook != nil {
		hook(verb, object, true)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case m == crashAfter:
		c.dead = true
		return errDead
	case c.dead: // somebody else's call was the last one of this process
		return errDead
	case m == lostReply, m == outage:
		if m == outage {
			c.down = 3
		}
		if err == nil {
			return errLost
		}
	}
	return err
}

// faulty is an engine whose calls a control decides about.
type faulty struct {
	inner engine.Engine
	caps  engine.Capabilities
	c     *control
	torn  bool // listings miss what is made or removed while they run
}

func newFaulty(e engine.Engine, c *control) *faulty {
	return &faulty{inner: e, caps: engine.Discover(e), c: c}
}

// Supports keeps engine.Discover honest: only what the inner engine can.
func (f *faulty) Supports(c engine.Capability) bool { return slices.Contains(f.caps.List(), c) }

func (f *faulty) Describe(ctx context.Context) (engine.Description, error) {
	return f.inner.Describe(ctx)
}
func (f *faulty) Close() error { return f.inner.Close() }

func (f *faulty) CreateSlab(ctx context.Context, s engine.SlabSpec) error {
	return f.c.call("CreateSlab", s.ID, func() error { return f.inner.CreateSlab(ctx, s) })
}

func (f *faulty) ResizeSlab(ctx context.Context, id string, size int64) error {
	return f.c.call("ResizeSlab", id, func() error { return f.inner.ResizeSlab(ctx, id, size) })
}

func (f *faulty) DeleteSlab(ctx context.Context, id string) error {
	return f.c.call("DeleteSlab", id, func() error { return f.inner.DeleteSlab(ctx, id) })
}

func (f *faulty) ListSlabs(ctx context.Context) (l []engine.Slab, err error) {
	err = f.c.call("ListSlabs", "", func() (err error) { l, err = f.inner.ListSlabs(ctx); return err })
	return given(l, err)
}

func (f *faulty) CreateTag(ctx context.Context, t engine.Tag) error {
	return f.c.call("CreateTag", t.Name, func() error { return f.inner.CreateTag(ctx, t) })
}

func (f *faulty) DeleteTag(ctx context.Context, name string) error {
	return f.c.call("DeleteTag", name, func() error { return f.inner.DeleteTag(ctx, name) })
}

func (f *faulty) ListTags(ctx context.Context, prefix string) (l []engine.Tag, err error) {
	var first []engine.Tag
	if f.torn {
		if first, err = f.inner.ListTags(ctx, prefix); err != nil {
			return nil, err
		}
	}
	err = f.c.call("ListTags", prefix, func() (err error) { l, err = f.inner.ListTags(ctx, prefix); return err })
	if f.torn {
		had := map[string]bool{}
		for _, t := range first {
			had[t.Name] = true
		}
		l = slices.DeleteFunc(l, func(t engine.Tag) bool { return !had[t.Name] })
	}
	return given(l, err)
}

func given[T any](l []T, err error) ([]T, error) {
	if err != nil {
		return nil, err
	}
	return l, nil
}

func (f *faulty) AttachSlab(ctx context.Context, id string, o engine.AttachOptions) (a engine.Attachment, err error) {
	err = f.c.call("AttachSlab", id, func() (err error) { a, err = f.inner.AttachSlab(ctx, id, o); return err })
	return a, err
}

func (f *faulty) DetachSlab(ctx context.Context, id string) error {
	return f.c.call("DetachSlab", id, func() error { return f.inner.DetachSlab(ctx, id) })
}

func (f *faulty) SnapshotSlab(ctx context.Context, src string, s engine.SlabSpec) error {
	return f.c.call("SnapshotSlab", s.ID, func() error { return f.caps.Snapshotter.SnapshotSlab(ctx, src, s) })
}

func (f *faulty) CloneSlab(ctx context.Context, src string, s engine.SlabSpec) error {
	return f.c.call("CloneSlab", s.ID, func() error { return f.caps.Cloner.CloneSlab(ctx, src, s) })
}

func (f *faulty) CopySlab(ctx context.Context, src string, s engine.SlabSpec, p func(int64)) error {
	return f.c.call("CopySlab", s.ID, func() error { return f.caps.Copier.CopySlab(ctx, src, s, p) })
}

func (f *faulty) DomainUsage(ctx context.Context) (u engine.Usage, err error) {
	err = f.c.call("DomainUsage", "", func() (err error) { u, err = f.caps.Meter.DomainUsage(ctx); return err })
	return u, err
}

func (f *faulty) SlabUsage(ctx context.Context, id string) (u engine.Usage, err error) {
	err = f.c.call("SlabUsage", id, func() (err error) { u, err = f.caps.Meter.SlabUsage(ctx, id); return err })
	return u, err
}

func (f *faulty) SetQuota(ctx context.Context, id string, size int64) error {
	return f.c.call("SetQuota", id, func() error { return f.caps.Quota.SetQuota(ctx, id, size) })
}

var (
	_ engine.Snapshotter = (*faulty)(nil)
	_ engine.Cloner      = (*faulty)(nil)
	_ engine.Copier      = (*faulty)(nil)
	_ engine.Meter       = (*faulty)(nil)
	_ engine.Quota       = (*faulty)(nil)
	_ engine.Narrower    = (*faulty)(nil)
)

// final says whether an error promises that nothing runs and nothing remains.
func final(err error) bool {
	for _, k := range []fault.Kind{fault.Unavailable, fault.Pending, fault.Conflict, fault.Canceled, fault.Deadline} {
		if errors.Is(err, k) {
			return false
		}
	}
	return err != nil
}

func point(m mode, at int) string { return fmt.Sprintf("%s of call %d", m, at) }
