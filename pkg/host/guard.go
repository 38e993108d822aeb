package host

import (
	"context"
	"sync"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Guard runs system calls that may never return, such as stat on a dead
// server. Nobody waits longer than the limit: what still hangs is left behind
// and counted, and the same thing is not tried again until it came back, so
// that a dead server costs one thread per object and not one per attempt. The
// zero Guard is ready for use.
type Guard struct {
	mu    sync.Mutex
	stuck map[string]struct{}
}

// Do runs f, which must change nothing that the caller shares with it except
// through a result that is read only when Do returned nil. key names what is
// asked ("statfs /mnt"). fault.Unavailable: it did not answer within limit, or
// an earlier attempt still hangs; a done context ends the wait as well.
func (g *Guard) Do(ctx context.Context, key string, limit time.Duration, f func() error) error {
	g.mu.Lock()
	_, hangs := g.stuck[key]
	g.mu.Unlock()
	if hangs {
		return fault.New(fault.Unavailable, "%s: an earlier attempt still hangs: the storage does not answer", key)
	}
	done := make(chan error)
	left := make(chan struct{})
	go func() {
		err := f()
		select {
		case done <- err:
		case <-left:
			g.mu.Lock()
			delete(g.stuck, key)
			g.mu.Unlock()
		}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	var why error
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		why = fault.New(fault.KindOf(ctx.Err()), "%s: %w", key, ctx.Err())
	case <-timer.C:
		why = fault.New(fault.Unavailable, "%s: no answer within %s: the storage does not answer", key, limit)
	}
	g.mu.Lock()
	if g.stuck == nil {
		g.stuck = map[string]struct{}{}
	}
	g.stuck[key] = struct{}{}
	g.mu.Unlock()
	close(left)
	return why
}

// Abandoned is how many calls hang now.
func (g *Guard) Abandoned() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.stuck)
}

// guarded is Do for a function with a result.
func guarded[T any](ctx context.Context, g *Guard, key string, limit time.Duration, f func() (T, error)) (T, error) {
	var out T
	err := g.Do(ctx, key, limit, func() error {
		t, err := f()
		if err == nil {
			out = t
		}
		return err
	})
	if err != nil {
		var none T // out may still be written by what was left behind
		return none, err
	}
	return out, nil
}
