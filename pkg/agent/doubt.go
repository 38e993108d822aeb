package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Work that writes a slab of a shared domain may go on at a node after the controller has
// lost that node, or has taken over from another one. It must not meet what another node
// is told to do next: so work on such a slab begins when no node can have any of
// before. A node that is connected is asked (Settle). One that is not ends its work by
// itself when it notices that its connection is lost, and is waited for.

// lostLimit is how long a node without a connection may go on with its work: until it
// notices, and has ended what it does, twice over.
const lostLimit = 2 * (keepAlive + written)

// doubts are the slabs that somebody may be writing of whom the controller does not know.
type doubts struct {
	limit time.Duration

	mu      sync.Mutex
	began   time.Time // when nodes could connect
	at      map[image.Place]doubt
	settled map[image.Place]int64 // at which epoch those with an older name were settled
}

// doubt is work on a node that has not said that it ended.
type doubt struct {
	node  string
	since time.Time
}

func newDoubts(limit time.Duration) *doubts {
	if limit == 0 {
		limit = lostLimit
	}
	return &doubts{limit: limit, at: map[image.Place]doubt{}, settled: map[image.Place]int64{}}
}

// note is told how work has ended: with some errors it may not have.
func (d *doubts) note(p image.Place, node string, err error) {
	switch fault.KindOf(err) {
	case fault.Unavailable, fault.Canceled, fault.Deadline:
	default:
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at[p] = doubt{node, time.Now()}
}

func (d *doubts) of(p image.Place) (doubt, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x, ok := d.at[p]
	return x, ok
}

func (d *doubts) end(p image.Place) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.at, p)
}

// forget drops what was kept of a slab that does not exist any more: its name is not used again.
func (h *Hub) forget(o *opening, slab string) {
	o.mu.Lock()
	ids := o.ids
	o.mu.Unlock()
	if len(ids) == 0 {
		return
	}
	p := image.Place{Domain: ids[0], Slab: slab}
	h.doubts.mu.Lock()
	defer h.doubts.mu.Unlock()
	delete(h.doubts.at, p)
	delete(h.doubts.settled, p)
}

// settle waits until nobody else can be writing a slab. old: also of work that an earlier
// controller asked for. fault.Unavailable: somebody is, and cannot be stopped.
func (h *Hub) settle(ctx context.Context, p image.Place, old bool) error {
	if old {
		if err := h.settleOld(ctx, p); err != nil {
			return err
		}
	}
	for {
		x, ok := h.doubts.of(p)
		if !ok {
			return nil
		}
		if h.isConnected(x.node) {
			if err := h.settleOn(ctx, p, x.node); err != nil {
				return err
			}
			h.doubts.end(p)
			return nil
		}
		left, come := time.Until(x.since.Add(h.doubts.limit)), h.comes()
		if left <= 0 {
			h.doubts.end(p)
			return nil
		}
		if err := pause(ctx, left, come); err != nil {
			return err
		}
	}
}

// settleOld asks all nodes that reach a slab which has its name from an earlier
// epoch, once. Those that are not here yet may still be at work for that one.
func (h *Hub) settleOld(ctx context.Context, p image.Place) error {
	_, epoch := h.epoch(p.Domain)
	h.doubts.mu.Lock()
	done := h.doubts.settled[p] == epoch
	left := time.Until(h.doubts.began.Add(h.doubts.limit))
	h.doubts.mu.Unlock()
	if done || image.EpochOf(p.Slab) >= epoch || h.ofOneNode(p.Domain) {
		return nil // an agent itself keeps work of earlier connections and of the next one apart
	}
	if left > 0 {
		if err := pause(ctx, left, nil); err != nil {
			return err
		}
	}
	var g errgroup.Group
	for _, n := range h.places(p.Domain) {
		g.Go(func() error { return h.settleOn(ctx, p, n) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	h.doubts.mu.Lock()
	defer h.doubts.mu.Unlock()
	h.doubts.settled[p] = epoch
	return nil
}

func (h *Hub) settleOn(ctx context.Context, p image.Place, node string) error {
	peer, err := h.peer(node)
	if err != nil {
		return err
	}
	if ctx, err = h.carry(ctx, p.Domain); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, 2*drainLimit)
	defer cancel()
	if _, err := peer.rpc.Settle(limited, &agentpb.SettleRequest{Place: toPlace(p)}); err != nil {
		return fault.New(fault.Unavailable, "node %s may still be writing slab %s of domain %s: %w", node, p.Slab, p.Domain, rpcfault.FromStatus(err))
	}
	return nil
}

// settleChain is settle, without old, for all slabs of a chain that a node is going to write.
func (h *Hub) settleChain(ctx context.Context, st image.Staging) error {
	for _, s := range st.Slabs {
		if err := h.settle(ctx, image.Place{Domain: st.Domain, Slab: s.ID}, false); err != nil {
			return err
		}
	}
	return nil
}

// pause waits for so long, or until come is closed.
func pause(ctx context.Context, for_ time.Duration, come <-chan struct{}) error {
	t := time.NewTimer(for_)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-come:
		return nil
	case <-ctx.Done():
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
	}
}

// ofOneNode says whether a domain belongs to a single node.
func (h *Hub) ofOneNode(domain string) bool {
	return slices.ContainsFunc(h.openings(), func(o *opening) bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.node != "" && slices.Contains(o.ids, domain)
	})
}

// writing does work that writes a slab on a node that reaches it, and all of domains.
func (h *Hub) writing(ctx context.Context, p image.Place, node string, domains []string, work func(ctx context.Context, p *peer) error) error {
	if err := h.settle(ctx, p, true); err != nil {
		return err
	}
	peer, err := h.worker(node, domains...)
	if err != nil {
		return err
	}
	if ctx, err = h.carry(ctx, domains...); err != nil {
		return err
	}
	err = work(ctx, peer)
	h.doubts.note(p, peer.node, err)
	return err
}
