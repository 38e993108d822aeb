package image

import (
	"context"
	"sync/atomic"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// lock is a mutex that gives up with the context, and knows what it is held for.
type lock struct {
	ch     chan struct{}
	holder atomic.Pointer[operation]
}

func newLock() *lock { return &lock{ch: make(chan struct{}, 1)} }

// acquire waits for the lock. The error is fault.Pending and says what holds it.
func (l *lock) acquire(ctx context.Context, for_ *operation) error {
	select {
	case l.ch <- struct{}{}:
	default:
		select {
		case l.ch <- struct{}{}:
		case <-ctx.Done():
			if h := l.holder.Load(); h != nil {
				return fault.New(fault.Pending, "waiting for %s", h.describe())
			}
			return fault.New(fault.Pending, "waiting for another operation on it: %w", ctx.Err())
		}
	}
	l.holder.Store(for_)
	return nil
}

// tryAcquire does not wait.
func (l *lock) tryAcquire() bool {
	select {
	case l.ch <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l *lock) release() {
	l.holder.Store(nil)
	<-l.ch
}
