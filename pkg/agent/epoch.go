package agent

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Every command carries, in epochKey, "<domain ID>=<epoch>" for each domain that it is
// about. Only what opens a domain cannot: its epoch is being claimed then.
const epochKey = "quarry-epoch"

// carry adds the epochs of domains to what is going to be asked. fault.Unavailable: one is
// not open, or the nodes are just being told of it.
func (h *Hub) carry(ctx context.Context, domains ...string) (context.Context, error) {
	all := map[string]int64{}
	for _, d := range domains {
		id, epoch := h.epoch(d)
		if id == "" {
			return nil, fault.New(fault.Unavailable, "domain %s: the nodes do not know of it yet", d)
		}
		all[id] = epoch
	}
	return carry(ctx, all), nil
}

func carry(ctx context.Context, epochs map[string]int64) context.Context {
	for id, epoch := range epochs {
		ctx = metadata.AppendToOutgoingContext(ctx, epochKey, id+"="+strconv.FormatInt(epoch, 10))
	}
	return ctx
}

// epoch of a domain, by any of its IDs, and the first of these; "": it is not known.
func (h *Hub) epoch(domain string) (id string, epoch int64) {
	for _, o := range h.openings() {
		o.mu.Lock()
		ids, epoch := o.ids, o.epoch
		o.mu.Unlock()
		if slices.Contains(ids, domain) {
			return ids[0], epoch
		}
	}
	return "", 0
}

// carried reads what carry added.
func carried(ctx context.Context) (map[string]int64, error) {
	all := map[string]int64{}
	in, _ := metadata.FromIncomingContext(ctx)
	for _, v := range in.Get(epochKey) {
		id, n, _ := strings.Cut(v, "=")
		epoch, err := strconv.ParseInt(n, 10, 64)
		if err != nil || id == "" {
			return nil, fault.New(fault.Invalid, "%s %q: must be <domain>=<epoch>", epochKey, v)
		}
		all[id] = epoch
	}
	return all, nil
}

// gate lets in what the newest controller of each domain asks, and ends what an earlier
// one still has running. It lasts over connections.
type gate struct {
	drain time.Duration // how long what was canceled is waited for

	mu      sync.Mutex
	highest map[string]int64      // by domain: the highest that a controller has told
	running map[*call]struct{}    // what runs
	targets map[image.Place]*call // of which slab each writes
}

// call is something that a controller asked, and that runs.
type call struct {
	epochs map[string]int64
	ctx    context.Context
	cancel context.CancelCauseFunc
	ended  chan struct{} // closed
}

func newGate(drain time.Duration) *gate {
	return &gate{drain: drain, highest: map[string]int64{}, running: map[*call]struct{}{}, targets: map[image.Place]*call{}}
}

// enter lets a call in; leave has to be called when it has ended. fault.Unavailable: a newer
// controller is known for one of the domains.
func (g *gate) enter(ctx context.Context, epochs map[string]int64) (_ context.Context, leave func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(epochs)) {
		if epochs[id] < g.highest[id] {
			return nil, nil, overtaken(id, g.highest[id], epochs[id])
		}
	}
	g.raise(epochs)
	c := &call{epochs: epochs, ended: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	g.running[c] = struct{}{}
	return context.WithValue(c.ctx, callKey{}, c), func() {
		c.cancel(nil)
		g.mu.Lock()
		delete(g.running, c)
		g.mu.Unlock()
		close(c.ended)
	}, nil
}

type callKey struct{}

func overtaken(domain string, highest, epoch int64) error {
	return fault.New(fault.Unavailable, "domain %s has a newer controller (epoch %d, this one has %d): ask that one; or, if its storage was emptied and begun anew, restart the agent of this node", domain, highest, epoch)
}

// raise notes epochs, and ends what runs for earlier ones; it returns these calls. The
// caller holds g.mu.
func (g *gate) raise(epochs map[string]int64) (older []*call) {
	for id, epoch := range epochs {
		g.highest[id] = max(g.highest[id], epoch)
	}
	for c := range g.running {
		for id, epoch := range c.epochs {
			if epoch < g.highest[id] {
				c.cancel(overtaken(id, g.highest[id], epoch))
				older = append(older, c)
				break
			}
		}
	}
	return older
}

// heard takes note of the epoch of an answer. fault.Unavailable: it is of a controller that
// was overtaken.
func (g *gate) heard(domain string, epoch int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if epoch < g.highest[domain] {
		return overtaken(domain, g.highest[domain], epoch)
	}
	g.raise(map[string]int64{domain: epoch})
	return nil
}

// adopt is raise for a controller that has come. It waits until what earlier ones asked
// has ended, but not for ever: what hangs on a dead server must not cut the node off.
func (g *gate) adopt(ctx context.Context, epochs map[string]int64) error {
	g.mu.Lock()
	older := g.raise(epochs)
	g.mu.Unlock()
	limit := time.NewTimer(g.drain)
	defer limit.Stop()
	for _, c := range older {
		select {
		case <-c.ended:
		case <-limit.C:
			return nil
		case <-ctx.Done():
			return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
		}
	}
	return nil
}

// write makes the call of ctx the one that writes a slab, until release is called. An
// earlier one that nobody waits for any more, because its connection or its controller
// went, ends first. fault.InUse: another one is writing. fault.Unavailable: one hangs.
func (g *gate) write(ctx context.Context, p image.Place) (release func(), err error) {
	mine, _ := ctx.Value(callKey{}).(*call)
	if mine == nil {
		return nil, fault.New(fault.Internal, "nobody is known to ask for work on slab %s", p.Slab)
	}
	for {
		g.mu.Lock()
		other := g.targets[p]
		if mine.ctx.Err() != nil { // given up before it began: whoever settled the slab was told that it has ended
			g.mu.Unlock()
			return nil, fault.New(fault.Canceled, "work on slab %s was given up: %w", p.Slab, context.Cause(mine.ctx))
		}
		if other == nil {
			g.targets[p] = mine
			g.mu.Unlock()
			return func() {
				g.mu.Lock()
				defer g.mu.Unlock()
				delete(g.targets, p)
			}, nil
		}
		g.mu.Unlock()
		if other.ctx.Err() == nil {
			return nil, fault.New(fault.InUse, "slab %s of domain %s is being written by other work on this node", p.Slab, p.Domain)
		}
		if err := other.end(ctx, p); err != nil {
			return nil, err
		}
	}
}

// end waits until a call that was canceled has ended.
func (c *call) end(ctx context.Context, p image.Place) error {
	limit := time.NewTimer(drainLimit)
	defer limit.Stop()
	select {
	case <-c.ended:
		return nil
	case <-ctx.Done():
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
	case <-limit.C:
		return fault.New(fault.Unavailable, "earlier work on slab %s of domain %s hangs on this node and cannot be ended: see whether its storage answers", p.Slab, p.Domain)
	}
}

// settle ends the call that writes a slab, if there is one.
func (g *gate) settle(ctx context.Context, p image.Place) error {
	g.mu.Lock()
	c := g.targets[p]
	g.mu.Unlock()
	if c == nil {
		return nil
	}
	c.cancel(fault.New(fault.Canceled, "the controller has given up this work"))
	return c.end(ctx, p)
}

// server makes a gRPC server for what controllers ask. Its calls pass the gate; bare are
// methods that may come without an epoch.
func (g *gate) server(bare func(method string) bool) *grpc.Server {
	enter := func(ctx context.Context, method string) (context.Context, func(), error) {
		epochs, err := carried(ctx)
		if err == nil && len(epochs) == 0 && !bare(method) {
			err = fault.New(fault.Invalid, "%s carries no epoch", method)
		}
		if err != nil {
			return nil, nil, err
		}
		return g.enter(ctx, epochs)
	}
	return newServer(grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		ctx, leave, err := enter(ctx, info.FullMethod)
		if err != nil {
			return nil, rpcfault.ToStatus(err)
		}
		defer leave()
		resp, err := next(ctx, req)
		return resp, rpcfault.ToStatus(because(ctx, err))
	}), grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		ctx, leave, err := enter(ss.Context(), info.FullMethod)
		if err != nil {
			return rpcfault.ToStatus(err)
		}
		defer leave()
		return rpcfault.ToStatus(because(ctx, next(srv, &within{ss, ctx})))
	}))
}

// because says why a call was canceled, if it was.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil && fault.KindOf(err) == fault.Canceled {
		return cause
	}
	return err
}

// within is a stream with another context.
type within struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *within) Context() context.Context { return s.ctx }

// epochsOf what is adopted.
func epochsOf(r *agentpb.AdoptRequest) map[string]int64 {
	all := map[string]int64{}
	for _, d := range r.GetDomains() {
		if ids := d.GetIds(); len(ids) > 0 {
			all[ids[0]] = d.GetEpoch()
		}
	}
	return all
}
