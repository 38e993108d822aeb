package share

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// limits are how long the storage may take.
type limits struct {
	tag, slab, list, probe, mount, open time.Duration
	// stall is how long a copy may go on without a byte.
	stall time.Duration
}

func usual() limits {
	return limits{tag: 30 * time.Second, slab: 2 * time.Minute, list: engine.ListingLimit, probe: 10 * time.Second,
		mount: time.Minute, open: time.Minute, stall: 2 * time.Minute}
}

// call is one that may hang. Its fields are its engine's to lock.
type call struct{ began, ended, left bool }

// bounded runs f, which may hang, for no longer than limit; object says in words what it is about.
// What still hangs then is left behind and counted, its ctx is done, and nothing is asked of the same object
// until it came back: fault.Unavailable. It may still happen, which harms nobody: names are never used again. What
// f makes then is given to drop, if that is not nil.
func bounded[T any](ctx context.Context, e *Engine, object string, limit time.Duration, f func(ctx context.Context) (T, error), drop func(T)) (T, error) {
	var (
		c    call
		out  T
		fail error
	)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := e.host.Within(ctx, object+" of "+e.storage.Location, limit, func() error {
		if !e.begin(&c) {
			return nil
		}
		t, err := f(ctx)
		if !e.end(&c, func() { out, fail = t, err }) && err == nil && drop != nil {
			drop(t)
		}
		return err
	})
	if e.leave(&c) {
		return out, fail
	}
	var none T
	return none, err
}

func (e *Engine) begin(c *call) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	c.began = !c.left
	return c.began
}

// end takes the outcome over with take if somebody still waits for it.
func (e *Engine) end(c *call, take func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.left {
		e.hanging--
		return false
	}
	c.ended = true
	take()
	return true
}

// leave says whether a call has ended. One that has not is left behind.
func (e *Engine) leave(c *call) (ended bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.left = !c.ended; c.left && c.began {
		e.hanging++
	}
	return c.ended
}

// verb runs f with the directory, bounded. A mount that has gone stale is replaced, and f run once more: all
// verbs may be asked for twice.
func verb[T any](ctx context.Context, e *Engine, object string, limit time.Duration, f func(ctx context.Context, d *posix.Directory) (T, error)) (T, error) {
	var none T
	if err := ctx.Err(); err != nil { // else what is not even begun would count as hanging
		return none, fault.Wrap(fault.KindOf(err), err)
	}
	if e.storage.Ready != nil {
		if err := e.storage.Ready(ctx); err != nil {
			return none, err
		}
	}
	for again := false; ; again = true {
		p, err := e.place()
		if err != nil {
			return none, err
		}
		if err = e.answers(ctx, p); err == nil {
			var out T
			out, err = bounded(ctx, e, object, limit, func(ctx context.Context) (T, error) {
				return using(p, func() (T, error) { return f(ctx, p.dir) })
			}, nil)
			if !stale(err) {
				return out, err
			}
		}
		if !stale(err) || again {
			return none, err
		}
		if err := e.replace(ctx, p, err); err != nil {
			return none, err
		}
	}
}

// act is verb without a result.
func act(ctx context.Context, e *Engine, object string, limit time.Duration, f func(ctx context.Context, d *posix.Directory) error) error {
	_, err := verb(ctx, e, object, limit, func(ctx context.Context, d *posix.Directory) (struct{}, error) {
		return struct{}{}, f(ctx, d)
	})
	return err
}

// answers asks the storage for a sign of life if anything of it hangs, so that not every verb has to
// find out by itself.
func (e *Engine) answers(ctx context.Context, p *place) error {
	e.mu.Lock()
	hanging := e.hanging
	e.mu.Unlock()
	if hanging == 0 {
		return nil
	}
	_, err := bounded(ctx, e, "a sign of life", e.limits.probe, func(ctx context.Context) (struct{}, error) {
		return using(p, func() (struct{}, error) { return struct{}{}, p.dir.Alive() })
	}, nil)
	if errors.Is(err, fault.Unavailable) && !stale(err) {
		return fault.New(fault.Unavailable, "%s does not answer, and %d of its calls hang: %w", e.storage.Location, hanging, err)
	}
	return err
}

// stale says whether a failure is of the mount and not of what was asked: the server has forgotten the
// file handles that it gave out, the FUSE process is gone, or something else was mounted at the path.
func stale(err error) bool {
	return errors.Is(err, posix.ErrElsewhere) || errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, errRetired)
}
