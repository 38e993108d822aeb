package agent

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// DomainSpec is a domain that nodes open.
type DomainSpec struct {
	// Name of the entry, by which agents know the domain.
	Name            string
	Engine          string // the type
	Params, Secrets map[string]string
	// Node that alone reaches it, or "": all do.
	Node string
}

// Domain is an engine that runs on nodes: each verb on one whose agent is connected, the
// same one as long as that is so. It implements engine.Engine and every capability.
type Domain struct {
	hub *Hub
	o   *opening
	// caps are what the first node could do natively: the others reach the same storage.
	caps engine.Capabilities
	has  []engine.Capability
}

var _ engine.Narrower = (*Domain)(nil)

// OpenDomain opens a domain on a node that is connected, and by and by on all others
// that reach it. fault.Unavailable: none is connected, or none can open it now.
// Adopt has to be called when its IDs are known.
func (h *Hub) OpenDomain(ctx context.Context, spec DomainSpec) (*Domain, error) {
	o := &opening{name: spec.Name, engine: spec.Engine, params: spec.Params, secret: spec.Secrets, node: spec.Node, opens: map[string]*remote.Engine{}, busy: map[string]chan struct{}{}}
	d := &Domain{hub: h, o: o}
	_, e, err := d.on(ctx)
	if err != nil {
		return nil, err
	}
	d.caps, d.has = engine.Discover(e), engine.Discover(e).List()
	h.mu.Lock()
	key := spec.Name + "@" + spec.Node
	taken := h.domains[key] != nil
	if !taken {
		h.domains[key] = o
	}
	h.mu.Unlock()
	if taken {
		return nil, errors.Join(fault.New(fault.Exists, "domain %s is open already", spec.Name), d.Close())
	}
	return d, nil
}

// adoptLimit is how long Adopt waits for nodes.
const adoptLimit = 10 * time.Second

// Adopt says under which IDs the Image Manager knows the domain, and at which epoch it has
// opened it, and tells the nodes. It waits for those that answer soon.
func (d *Domain) Adopt(ctx context.Context, epoch int64, ids ...string) {
	d.o.mu.Lock()
	d.o.ids, d.o.epoch = slices.Clone(ids), epoch
	d.o.mu.Unlock()
	var told []<-chan struct{}
	for _, n := range d.hub.from(d.o) {
		told = append(told, d.hub.Prepare(n))
	}
	limit := time.NewTimer(adoptLimit)
	defer limit.Stop()
	for _, t := range told {
		select {
		case <-t:
		case <-limit.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// on is the engine on the node that was used last, else on the next on which it can be opened,
// and the context to ask it with.
func (d *Domain) on(ctx context.Context) (context.Context, *remote.Engine, error) {
	ctx = d.o.carry(ctx)
	nodes := d.hub.from(d.o)
	var first error
	for _, n := range nodes {
		p, err := d.hub.peer(n)
		if err != nil {
			return ctx, nil, err
		}
		e, err := d.o.at(ctx, p)
		if err == nil {
			d.o.mu.Lock()
			d.o.last, d.o.opened = n, true
			d.o.mu.Unlock()
			return ctx, e, nil
		}
		if first == nil {
			first = fault.New(fault.KindOf(err), "node %s: %w", n, err)
		}
	}
	d.o.mu.Lock()
	opened := d.o.opened
	d.o.mu.Unlock()
	switch {
	case first != nil && opened: // not a kind that the caller takes for the verb's own
		return ctx, nil, fault.New(fault.Unavailable, "domain %s cannot be opened on another node: %w", d.o.name, first)
	case first != nil:
		return ctx, nil, first
	case len(nodes) == 0 && slices.ContainsFunc(d.hub.Nodes(), d.o.reaches):
		return ctx, nil, fault.New(fault.Unavailable, "domain %s: no agent that is connected knows engine %q: upgrade the DaemonSet", d.o.name, d.o.engine)
	case d.o.node != "":
		return ctx, nil, fault.New(fault.Unavailable, "domain %s belongs to node %s, which has no agent that is connected: look at the quarry pod there", d.o.name, d.o.node)
	}
	return ctx, nil, fault.New(fault.Unavailable, "domain %s: no node that reaches it has an agent that is connected", d.o.name)
}

// Supports implements engine.Narrower.
func (d *Domain) Supports(c engine.Capability) bool { return slices.Contains(d.has, c) }

// Close implements engine.Engine. On the nodes the domain stays open: they use it for what
// they have staged, and the next controller takes it over.
func (d *Domain) Close() error {
	h := d.hub
	h.mu.Lock()
	for key, o := range h.domains {
		if o == d.o {
			delete(h.domains, key)
		}
	}
	h.mu.Unlock()
	d.o.mu.Lock()
	defer d.o.mu.Unlock()
	var errs []error
	for _, e := range d.o.opens {
		errs = append(errs, e.Leave())
	}
	clear(d.o.opens)
	d.o.closed = true
	return errors.Join(errs...)
}
