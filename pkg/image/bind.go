package image

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// The domain that a node has for itself says which node that is. So a disk that was
// copied, or a node that shows what is another's, is not taken for the domain whose ID it
// has: handles lead to where their data is, and to one place only.

// nodeRecord is the content of an n.node. tag.
type nodeRecord struct {
	Node  string `json:"node"`
	Nonce string `json:"no"`
}

// bound finds the node that a domain belongs to, "" if it says none, and the tag
// that counts. fault.Corrupt: it cannot be read.
func bound(tags []engine.Tag) (node, tag string, err error) {
	var last *engine.Tag
	for i, t := range tags {
		if _, ok := parseNodeTag(t.Name); ok && (last == nil || t.Name > last.Name) {
			last = &tags[i]
		}
	}
	if last == nil {
		return "", "", nil
	}
	var r nodeRecord
	if err := json.Unmarshal(last.Record, &r); err != nil || r.Node == "" {
		return "", last.Name, fault.New(fault.Corrupt, "tag %s, which names the node that the domain belongs to, cannot be read; if it is this one, set takeOver: true on the domain once", last.Name)
	}
	return r.Node, last.Name, nil
}

func parseNodeTag(name string) (uint32, bool) {
	s, ok := strings.CutPrefix(name, prefixDomainNode)
	if !ok {
		return 0, false
	}
	return parseEpochTag(prefixEpoch + s)
}

// checkNode refuses a node's own domain that is another node's. It comes before anything is
// claimed: a claim would end the work of the manager, this one perhaps, that rightly has it open.
func (d *domain) checkNode(ctx context.Context) error {
	if d.cfg.Scope != ScopeNode || !d.m.cfg.BindNodes {
		return nil
	}
	tags, err := d.engine.ListTags(ctx, prefixDomain)
	if err != nil {
		return fault.In(err, "read the domain's ID", d.cfg.Name, "")
	}
	for _, t := range tags {
		if t.Name != nameDomainID {
			continue
		}
		id := d.cfg.Name + "." + string(t.Record)
		d.m.mu.Lock()
		other := d.m.domains[id]
		d.m.mu.Unlock()
		if other != nil && other.cfg.Node != d.cfg.Node {
			return d.double(id, other)
		}
	}
	node, _, err := bound(tags)
	if d.cfg.TakeOver {
		return nil
	}
	if err != nil {
		return fault.In(err, "read the domain's node", d.cfg.Name, "")
	}
	if node != "" && node != d.cfg.Node {
		return fault.New(fault.Permission, "domain %s on node %s belongs to node %s: if its disk was moved, or the node renamed, set takeOver: true on the domain once; if it is a copy, empty it", d.cfg.Name, d.cfg.Node, node)
	}
	return nil
}

// double is the error of a domain whose ID another one has.
func (d *domain) double(id string, other *domain) error {
	if d.cfg.Scope == ScopeNode && other.cfg.Scope == ScopeNode {
		return fault.New(fault.Invalid, "domain %s on node %s has the ID %s, which is that of node %s, whose domain is open: one is a copy of the other, or both are the same storage; empty the copy, or give the entry scope: shared", d.cfg.Name, d.cfg.Node, id, other.cfg.Node)
	}
	return fault.New(fault.Invalid, "domain %s: the ID %q is that of another open domain", d.cfg.Name, id)
}

// bind writes down that a node's own domain is that node's, where it does not say so.
func (d *domain) bind(ctx context.Context, tags []engine.Tag) error {
	if d.cfg.Scope != ScopeNode || !d.m.cfg.BindNodes {
		return nil
	}
	node, counts, err := bound(tags)
	now := d.m.cfg.Now()
	d.mu.Lock()
	for _, t := range tags {
		if _, ok := parseNodeTag(t.Name); ok && (t.Name != counts || node != d.cfg.Node) {
			d.oldTags[t.Name] = now
		}
	}
	d.mu.Unlock()
	if err == nil && node == d.cfg.Node {
		return nil
	}
	if node != "" && !d.cfg.TakeOver || err != nil && !d.cfg.TakeOver { // it was moved since checkNode
		return fault.New(fault.Unavailable, "domain %s on node %s became another node's just now", d.cfg.Name, d.cfg.Node)
	}
	body, err := marshal(nodeRecord{Node: d.cfg.Node, Nonce: nonce()})
	if err != nil {
		return err
	}
	name := prefixDomainNode + strings.TrimPrefix(epochTag(d.epoch), prefixEpoch)
	return fault.In(d.createTag(ctx, engine.Tag{Name: name, Record: body}), "store the domain's node", d.cfg.Name, "")
}
