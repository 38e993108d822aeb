package image

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// How nodes go over to other chains: all that have an image in use, at one moment.

// prepared is a switch for which a node is ready.
type prepared struct {
	node  string
	agent ChainAgent
	id    string
}

// drop lets the node forget it, whatever else there is. p may be nil.
func (p *prepared) drop(ctx context.Context) error {
	if p == nil {
		return nil
	}
	err := p.agent.Release(context.WithoutCancel(ctx), p.id)
	if fault.KindOf(err) == fault.Conflict { // it was over
		return nil
	}
	return err
}

// prepare lets the one node that has src in use build a chain beside its present one. nil:
// there is no such node, or it could not; the switch is going to say why, if it cannot either.
func (m *Manager) prepare(ctx context.Context, src *image, chain []SlabRef) *prepared {
	nodes := src.stagedNodes()
	if len(nodes) != 1 {
		return nil
	}
	a, err := m.cfg.Agents.Agent(nodes[0])
	agent, ok := a.(ChainAgent)
	if err != nil || !ok {
		return nil
	}
	images, err := src.d.stagings(src, nodes[0])
	if err != nil {
		return nil
	}
	for i := range images {
		images[i].Slabs = chain
	}
	p := &prepared{node: nodes[0], agent: agent}
	if p.id, err = agent.Prepare(ctx, images); err != nil {
		klog.FromContext(ctx).V(2).Info("A node could not prepare for a layer", "image", src.id, "node", p.node, "err", err)
		return nil
	}
	return p
}

// stagings are what a node needs to build an image's present chain, under each of its names.
func (d *domain) stagings(img *image, node string) ([]Staging, error) {
	st, err := d.staging(img, node)
	if err != nil {
		return nil, err
	}
	var out []Staging
	for _, h := range d.handles(img) {
		st.Handle = h
		out = append(out, st)
	}
	return out, nil
}

// switchChains lets the nodes on which the images are in use build their
// present chains, all at one moment. The caller holds their locks. ready, if it is
// not nil, is a node that has begun with that; it is used or dropped.
func (m *Manager) switchChains(ctx context.Context, ready *prepared, images ...*image) error {
	byNode, agents, err := m.toSwitch(ctx, images)
	if err != nil {
		return errors.Join(err, ready.drop(ctx))
	}
	if ready != nil && (len(agents) > 1 || agents[ready.node] == nil) {
		if err := ready.drop(ctx); err != nil {
			return notSwitched(ready.node, err)
		}
		ready = nil
	}
	if len(agents) > 1 {
		m.holding.Lock() // two groups on the same nodes would wait for each other, each holding one
		defer m.holding.Unlock()
		return holdAll(ctx, agents, byNode)
	}
	for n, agent := range agents {
		id := ""
		if ready != nil {
			id = ready.id
		}
		if err := agent.Switch(ctx, byNode[n], id); err != nil {
			return notSwitched(n, err)
		}
	}
	return nil
}

func (m *Manager) toSwitch(ctx context.Context, images []*image) (map[string][]Staging, map[string]ChainAgent, error) {
	byNode, agents := map[string][]Staging{}, map[string]ChainAgent{}
	for _, img := range images {
		if err := img.d.current(ctx); err != nil {
			return nil, nil, err
		}
		for _, n := range img.stagedNodes() {
			all, err := img.d.stagings(img, n)
			if err != nil {
				return nil, nil, err
			}
			byNode[n] = append(byNode[n], all...)
		}
	}
	for n := range byNode {
		a, err := m.cfg.Agents.Agent(n)
		if err != nil {
			return nil, nil, err
		}
		agent, ok := a.(ChainAgent)
		if !ok {
			return nil, nil, fault.New(fault.Unsupported, "node %s cannot build chains of layers", n)
		}
		agents[n] = agent
	}
	return byNode, agents, nil
}

func notSwitched(node string, err error) error {
	if k := fault.KindOf(err); k == fault.Conflict || k == fault.Pending {
		return fault.New(fault.Pending, "node %s: %w", node, err)
	}
	return fault.New(fault.Unavailable, "node %s has not switched to the new chain yet: %w", node, err)
}

// holdAll lets several nodes switch at one moment: when all of them hold, nobody
// writes anywhere; and that was one moment if none had gone on before it was released.
func holdAll(ctx context.Context, agents map[string]ChainAgent, byNode map[string][]Staging) error {
	var mu sync.Mutex
	ready, errs := map[string]string{}, map[string]error{}
	each := func(do func(node string, agent ChainAgent) error) {
		var all sync.WaitGroup
		for n, agent := range agents {
			all.Go(func() {
				err := do(n, agent)
				mu.Lock()
				defer mu.Unlock()
				if err != nil && errs[n] == nil {
					errs[n] = notSwitched(n, err)
				}
			})
		}
		all.Wait()
	}
	each(func(n string, agent ChainAgent) error { // what takes its time, before anybody waits
		id, err := agent.Prepare(ctx, byNode[n])
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			ready[n] = id
		}
		return err
	})
	if len(errs) == 0 {
		each(func(n string, agent ChainAgent) error { return agent.Hold(ctx, byNode[n], ready[n]) })
	}
	ctx = context.WithoutCancel(ctx) // what is held is released whatever happens
	each(func(n string, agent ChainAgent) error {
		mu.Lock()
		id, have := ready[n]
		mu.Unlock()
		if !have {
			return nil
		}
		return agent.Release(ctx, id)
	})
	var all []error
	for _, n := range slices.Sorted(maps.Keys(errs)) {
		all = append(all, errs[n])
	}
	return errors.Join(all...)
}

// stagedNodes are the nodes that have the image in use, sorted.
func (img *image) stagedNodes() []string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	var out []string
	for n, a := range img.attached {
		if a.Staged {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}
