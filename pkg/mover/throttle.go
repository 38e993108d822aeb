package mover

import (
	"context"
	"sync"
	"time"
)

// throttle spaces requests so that together they stay at a byte rate. A nil
// throttle lets everything through.
type throttle struct {
	rate int64
	mu   sync.Mutex
	next time.Time // when the next request may start
}

func newThrottle(rate int64) *throttle {
	if rate <= 0 {
		return nil
	}
	return &throttle{rate: rate}
}

// wait returns when n bytes may be moved, or with the context's error.
func (p *pair) wait(ctx context.Context, n int64) error {
	if err := p.throttle.wait(ctx, n); err != nil {
		return err
	}
	return p.own.wait(ctx, n)
}

// wait returns when n bytes may be moved, or with the context's error.
func (t *throttle) wait(ctx context.Context, n int64) error {
	if t == nil {
		return ctx.Err()
	}
	t.mu.Lock()
	now := time.Now()
	if t.next.Before(now) {
		t.next = now
	}
	start := t.next
	t.next = start.Add(time.Duration(float64(n) / float64(t.rate) * float64(time.Second)))
	t.mu.Unlock()
	if !start.After(now) {
		return ctx.Err()
	}
	timer := time.NewTimer(start.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
