package image

import (
	"context"
	"sync"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// cutsLimit is how long a step of background work waits for the snapshots that are being made.
const cutsLimit = 10 * time.Second

// cuts are the snapshots that are being made in a domain. The zero value is for none.
type cuts struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when there are none any more; nil: there are none
}

// begin is one more, until end.
func (c *cuts) begin() (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n++; c.n == 1 {
		c.none = make(chan struct{})
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.n--; c.n == 0 {
			close(c.none)
			c.none = nil
		}
	}
}

// wait waits until there are none, or for cutsLimit: others may always follow.
func (c *cuts) wait(ctx context.Context) error {
	c.mu.Lock()
	none := c.none
	c.mu.Unlock()
	if none == nil {
		return ctx.Err()
	}
	limit := time.NewTimer(cutsLimit)
	defer limit.Stop()
	select {
	case <-none:
	case <-limit.C:
	case <-ctx.Done():
		return fault.New(fault.KindOf(ctx.Err()), "wait for snapshots: %w", ctx.Err())
	}
	return nil
}
