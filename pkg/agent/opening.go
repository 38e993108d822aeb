package agent

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
)

const (
	// openLimit is how long a node may take to open a domain, before others are tried.
	openLimit = time.Minute
	// prepareFirst and prepareLast are the pauses before a node is prepared again on
	// which something could not be opened.
	prepareFirst, prepareLast = time.Second, time.Minute
)

// opening is a domain whose engine runs on nodes.
type opening struct {
	name   string // of the entry: what the agent knows it by
	engine string
	params map[string]string
	secret map[string]string
	node   string // "": all nodes

	mu     sync.Mutex
	ids    []string
	epoch  int64                     // at which the Image Manager has opened it
	opens  map[string]*remote.Engine // by node
	busy   map[string]chan struct{}  // nodes on which it is being opened; closed afterwards
	opened bool                      // somewhere, once
	last   string                    // the node that was used last
	closed bool
}

// carry adds the domain's epoch, where that is known, to what is going to be asked.
func (o *opening) carry(ctx context.Context) context.Context {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.ids) == 0 {
		return ctx
	}
	return carry(ctx, map[string]int64{o.ids[0]: o.epoch})
}

// reaches says whether a domain can be reached from a node.
func (o *opening) reaches(node string) bool { return o.node == "" || o.node == node }

// at is the engine on one node, opened there if it was not yet. It stays for as long
// as the Hub does: remote.Engine finds the agent's next connection.
func (o *opening) at(ctx context.Context, p *peer) (*remote.Engine, error) {
	for {
		o.mu.Lock()
		if e := o.opens[p.node]; e != nil {
			o.mu.Unlock()
			return e, nil
		}
		other := o.busy[p.node]
		if other == nil {
			break
		}
		o.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fault.New(fault.Unavailable, "node %s is opening domain %s: %w", p.node, o.name, ctx.Err())
		}
	}
	mine := make(chan struct{})
	o.busy[p.node] = mine
	o.mu.Unlock()
	limited, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	e, err := remote.Open(limited, remote.Config{
		Dial:   func(context.Context) (net.Conn, error) { return p.dial(enginePrefix + o.engine) },
		Client: o.name, Params: o.params, Secrets: o.secret,
	})
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.busy, p.node)
	close(mine)
	if err != nil {
		return nil, err
	}
	if o.closed {
		return nil, errors.Join(fault.New(fault.Unavailable, "domain %s was closed", o.name), e.Leave())
	}
	o.opens[p.node] = e
	return e, nil
}

func (o *opening) reconnect(node string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if e := o.opens[node]; e != nil {
		e.Reconnect()
	}
}

// order puts those nodes first that are known to be able to open the domain, and of
// these the one that was used last.
func (o *opening) order(nodes []string) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	rank := func(n string) int {
		switch {
		case n == o.last:
			return 0
		case o.opens[n] != nil:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(nodes, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	return nodes
}

func (h *Hub) openings() []*opening {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Values(h.domains))
}

// places are the connected nodes from which a domain can be reached, by its ID, best first.
func (h *Hub) places(domain string) []string {
	var out []string
	for _, o := range h.openings() {
		o.mu.Lock()
		mine := slices.Contains(o.ids, domain)
		o.mu.Unlock()
		if !mine {
			continue
		}
		out = append(out, h.from(o)...)
	}
	return out
}

// from are the connected nodes from which a domain can be reached, by agents that know its type
// of storage, best first.
func (h *Hub) from(o *opening) []string {
	return o.order(slices.DeleteFunc(h.Nodes(), func(n string) bool {
		p, err := h.peer(n)
		return err != nil || !o.reaches(n) || !p.knows(o.engine)
	}))
}

// Prepare tells a node the IDs of all domains that it reaches, and opens them there. What
// cannot be opened is tried again for as long as the node is connected. done is closed
// when a first round that began after this call has ended.
func (h *Hub) Prepare(node string) (done <-chan struct{}) {
	mine := make(chan struct{})
	p, err := h.peer(node)
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil || h.closed {
		close(mine)
		return mine
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting = append(p.waiting, mine)
	select {
	case p.wake <- struct{}{}:
	default: // somebody has said so already
	}
	if !p.preparing {
		p.preparing = true
		h.beside.Go(func() { h.prepareAlways(p) })
	}
	return mine
}

// prepareAlways prepares a node until nobody waits and all is done, or it has left.
func (h *Hub) prepareAlways(p *peer) {
	for pause, ok := prepareFirst, true; ; {
		p.mu.Lock()
		waiting := p.waiting
		p.waiting = nil
		if len(waiting) == 0 && ok || p.session == nil || h.ctx.Err() != nil {
			p.preparing = false
			p.mu.Unlock()
			for _, w := range waiting {
				close(w)
			}
			return
		}
		p.mu.Unlock()
		ok = h.prepare(h.ctx, p)
		for _, w := range waiting {
			close(w)
		}
		if ok {
			pause = prepareFirst
			continue
		}
		select {
		case <-time.After(pause):
		case <-p.wake:
		case <-h.ctx.Done():
		}
		pause = min(2*pause, prepareLast)
	}
}

// prepare is one round of it. false: something is missing.
func (h *Hub) prepare(ctx context.Context, p *peer) (ok bool) {
	log := klog.FromContext(ctx)
	r := &agentpb.AdoptRequest{}
	var reached []*opening
	for _, o := range h.openings() {
		if !o.reaches(p.node) {
			continue
		}
		if !p.knows(o.engine) { // which would refuse to hear of any
			p.mu.Lock()
			log.Info("A node's agent does not know a domain's type of storage: the domain cannot be used there before the agent is upgraded", "domain", o.name, "engine", o.engine, "node", p.node, "release", p.release)
			p.mu.Unlock()
			continue
		}
		reached = append(reached, o)
		o.mu.Lock()
		if len(o.ids) > 0 {
			r.Domains = append(r.Domains, &agentpb.Adopted{Ids: o.ids, Engine: o.engine, Opened: o.name, Epoch: o.epoch})
		}
		o.mu.Unlock()
	}
	// First: one that hangs below must not keep the others from being used.
	limited, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	if _, err := p.rpc.Adopt(limited, r); err != nil {
		log.Error(err, "Telling a node its domains", "node", p.node)
		return false
	}
	var all sync.WaitGroup
	errs := make([]error, len(reached))
	for i, o := range reached {
		all.Go(func() {
			e, err := o.at(limited, p)
			if err == nil {
				_, err = e.Describe(o.carry(limited)) // opens it again where the agent was restarted
			}
			if err != nil {
				log.Error(err, "A domain is not open on a node", "domain", o.name, "node", p.node)
			}
			errs[i] = err
		})
	}
	all.Wait()
	return errors.Join(errs...) == nil
}
