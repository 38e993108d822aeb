package agent

import (
	"context"
	"errors"
	"maps"
	"slices"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
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
	last string // node; guarded by o.mu
}

var _ engine.Narrower = (*Domain)(nil)

// OpenDomain opens a domain on a node that is connected, and by and by on all others
// that reach it. fault.Unavailable: none is connected, or none can open it now.
// Adopt has to be called when its IDs are known.
func (h *Hub) OpenDomain(ctx context.Context, spec DomainSpec) (*Domain, error) {
	o := &opening{name: spec.Name, engine: spec.Engine, params: spec.Params, secret: spec.Secrets, node: spec.Node, opens: map[string]*remote.Engine{}}
	d := &Domain{hub: h, o: o}
	e, err := d.on(ctx)
	if err != nil {
		return nil, err
	}
	d.caps, d.has = engine.Discover(e), engine.Discover(e).List()
	h.mu.Lock()
	defer h.mu.Unlock()
	key := spec.Name + "@" + spec.Node
	if h.domains[key] != nil {
		return nil, fault.New(fault.Exists, "domain %s is open already", spec.Name)
	}
	h.domains[key] = o
	return d, nil
}

// Adopt says under which IDs the Image Manager knows the domain, and tells the nodes.
func (d *Domain) Adopt(ctx context.Context, ids ...string) {
	d.o.mu.Lock()
	d.o.ids = slices.Clone(ids)
	d.o.mu.Unlock()
	for _, n := range d.hub.Nodes() {
		if d.o.reaches(n) {
			d.hub.Prepare(ctx, n)
		}
	}
}

// Prepare opens all domains on a node that reach it, and tells it their IDs. What
// cannot be opened there is logged: it is tried again when it is needed.
func (h *Hub) Prepare(ctx context.Context, node string) {
	p, err := h.peer(node)
	if err != nil {
		klog.FromContext(ctx).Error(err, "Preparing a node", "node", node)
		return
	}
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.domains))
	h.mu.Unlock()
	r := &agentpb.AdoptRequest{}
	for _, o := range all {
		if !o.reaches(node) {
			continue
		}
		e, err := o.at(ctx, p)
		if err == nil {
			_, err = e.Describe(ctx) // opens it again where the agent was restarted
		}
		if err != nil {
			klog.FromContext(ctx).Error(err, "A domain is not open on a node", "domain", o.name, "node", node)
		}
		o.mu.Lock()
		if len(o.ids) > 0 {
			r.Domains = append(r.Domains, &agentpb.Adopted{Ids: o.ids, Engine: o.engine, Opened: o.name})
		}
		o.mu.Unlock()
	}
	if _, err := p.rpc.Adopt(ctx, r); err != nil {
		klog.FromContext(ctx).Error(err, "Telling a node its domains", "node", node)
	}
}

// places are the connected nodes from which a domain can be reached, by its ID.
func (h *Hub) places(domain string) []string {
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.domains))
	h.mu.Unlock()
	var out []string
	for _, o := range all {
		o.mu.Lock()
		mine := slices.Contains(o.ids, domain)
		o.mu.Unlock()
		if !mine {
			continue
		}
		for _, n := range h.Nodes() {
			if o.reaches(n) {
				out = append(out, n)
			}
		}
	}
	return out
}

// on is the engine on the node that was used last, else on the next that is connected.
func (d *Domain) on(ctx context.Context) (*remote.Engine, error) {
	d.o.mu.Lock()
	last := d.last
	d.o.mu.Unlock()
	nodes := d.hub.Nodes()
	nodes = slices.DeleteFunc(nodes, func(n string) bool { return !d.o.reaches(n) })
	if i := slices.Index(nodes, last); i > 0 {
		nodes[0], nodes[i] = nodes[i], nodes[0]
	}
	var err error = fault.New(fault.Unavailable, "domain %s: no node that reaches it has an agent that is connected", d.o.name)
	if d.o.node != "" {
		err = fault.New(fault.Unavailable, "domain %s belongs to node %s, which has no agent that is connected: look at the quarry pod there", d.o.name, d.o.node)
	}
	for _, n := range nodes {
		p, perr := d.hub.peer(n)
		if perr != nil {
			return nil, perr
		}
		e, oerr := d.o.at(ctx, p)
		if oerr == nil {
			d.o.mu.Lock()
			d.last = n
			d.o.mu.Unlock()
			return e, nil
		}
		err = oerr
		if !errors.Is(oerr, fault.Unavailable) {
			break // the others would say the same
		}
	}
	return nil, err
}

// Supports implements engine.Narrower.
func (d *Domain) Supports(c engine.Capability) bool { return slices.Contains(d.has, c) }

// Close implements engine.Engine.
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
		errs = append(errs, e.Close())
	}
	clear(d.o.opens)
	return errors.Join(errs...)
}
