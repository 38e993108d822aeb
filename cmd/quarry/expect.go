package main

import (
	"context"
	"maps"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube"
)

// What a node has for itself is not known to a controller that has begun to lead before
// that node's agent has connected. Kubernetes tells which nodes there are: those that carry
// the driver's topology label. Until they have come, or for as long as it makes sense to
// wait, lists and the creation of volumes wait. hack/adr/0021.

const (
	// expectEvery is how often Kubernetes is asked which nodes there are.
	expectEvery = 5 * time.Second
	// notReadyWait is how long a node is waited for that is not ready, at most.
	notReadyWait = time.Minute
)

// expecting is what a leader knows of nodes; guarded by its mu.
type expecting struct {
	began    time.Time       // when it began to lead
	expected map[string]bool // node: it is ready
	missing  map[string]bool // nodes of which the Image Manager was told that they are missing
	left     map[string]bool // of these the ones that are not waited for any more, as logged
}

// waitsFor is image.Config.WaitFor.
func (c *leader) waitsFor(node string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.awaits(node)
}

// awaits is waitsFor for one who holds c.mu.
func (c *leader) awaits(node string) bool {
	limit := c.options.nodeWait
	if !c.expected[node] {
		limit = min(limit, notReadyWait)
	}
	return time.Since(c.began) < limit
}

// expect keeps the Image Manager informed of the nodes that it has to wait for, while this
// controller leads.
func (c *leader) expect(ctx context.Context) {
	tick := time.NewTicker(expectEvery)
	defer tick.Stop()
	for {
		var nodes []kube.TopologyNode
		var err error
		concerned := c.hasNodes()
		if concerned {
			nodes, err = c.list(ctx)
		}
		switch {
		case !concerned:
		case ctx.Err() != nil:
			return
		case err != nil:
			klog.FromContext(ctx).Error(err, "Which nodes there are is not known")
			c.unlisted(err)
		default:
			ready := map[string]bool{}
			for _, n := range nodes {
				ready[n.Name] = n.Ready
			}
			c.listed(ctx, ready)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// hasNodes says whether any domain belongs to a node.
func (c *leader) hasNodes() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.entries, func(e domain.Entry) bool { return e.Scope == domain.ScopeNode })
}

// unlisted says why it is not known which nodes there are, as long as that never was.
func (c *leader) unlisted(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.expected != nil {
		return
	}
	for _, e := range c.entries {
		if e.Scope == domain.ScopeNode {
			c.manager.Unopened(e.Config(""), fault.New(fault.Unavailable, "which nodes have it is not known: %w", err))
		}
	}
}

// listed takes note of all nodes that there are.
func (c *leader) listed(ctx context.Context, ready map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expected = ready
	missing := map[string]bool{}
	for node := range ready {
		if c.nodes[node] == nil { // who has been here has its domains looked after
			missing[node] = true
		}
	}
	left := map[string]bool{}
	for node := range missing {
		if !c.awaits(node) {
			left[node] = true
		}
	}
	was := c.missing
	c.missing = missing
	for _, e := range c.entries {
		if e.Scope != domain.ScopeNode {
			continue
		}
		for node := range was {
			if !missing[node] && c.nodes[node] == nil {
				c.manager.Gone(e.Config(node))
			}
		}
		c.tellMissing(e)
	}
	if len(left) > 0 && !maps.Equal(left, c.left) {
		klog.FromContext(ctx).Info("What these nodes have for themselves is left out until their agents connect", "nodes", slices.Sorted(maps.Keys(left)))
	}
	c.left = left
}

// tellMissing tells the Image Manager which nodes are missing that may have a domain of an entry,
// and that these are all. The caller holds c.mu.
func (c *leader) tellMissing(e domain.Entry) {
	for node := range c.missing {
		c.manager.Unopened(e.Config(node), fault.New(fault.Unavailable, "no agent of node %s has connected since this controller leads: look at the quarry pod there", node))
	}
	c.manager.Listed(e.Name)
}
