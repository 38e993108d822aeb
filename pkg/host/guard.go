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
	stuck map[string]int
}

// refusal is why a Guard did not even begin.
type refusal string

func (r refusal) Error() string { return string(r) }

const stillHangs = refusal("an earlier attempt still hangs: the storage does not answer")

// Do runs f, which must change nothing that the caller shares with it except
// through a result that is read only when Do returned nil. key names what is
// asked ("statfs /mnt"). fault.Unavailable: it did not answer within limit, or
// an earlier attempt still hangs; a done context ends the wait as well.
func (g *Guard) Do(ctx context.Context, key string, limit time.Duration, f func() error) error {
	return g.offer(ctx, key, limit, func(_ context.Context, hand func(error) bool) { hand(f()) })
}

// offer is Do for an f that makes something. f hands its outcome over once,
// before it returns. If hand says false nobody waits any more: then what was
// made has no owner, and f undoes it. f's context is done from then on, so that
// it need not make anything.
func (g *Guard) offer(ctx context.Context, key string, limit time.Duration, f func(ctx context.Context, hand func(error) (taken bool))) error {
	g.mu.Lock()
	hangs := g.stuck[key] > 0
	g.mu.Unlock()
	if hangs {
		return fault.New(fault.Unavailable, "%s: %w", key, stillHangs)
	}
	done := make(chan error)
	left, leave := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		taken := false
		f(left, func(err error) bool {
			select {
			case done <- err:
				taken = true
			case <-left.Done():
			}
			return taken
		})
		if taken {
			leave()
			return
		}
		<-left.Done()
		g.mu.Lock()
		if g.stuck[key]--; g.stuck[key] == 0 {
			delete(g.stuck, key)
		}
		g.mu.Unlock()
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
		g.stuck = map[string]int{}
	}
	g.stuck[key]++
	g.mu.Unlock()
	leave()
	return why
}

// Abandoned is how many calls hang now.
func (g *Guard) Abandoned() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, calls := range g.stuck {
		n += calls
	}
	return n
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
