package agent_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// nodes opens what a node shows as its own domain of entry b.
func (r *rig) nodes(node, path string, takeOver bool) (id string, err error) {
	d, err := r.hub.OpenDomain(r.ctx, agent.DomainSpec{Name: "b", Engine: "dir", Params: map[string]string{"path": path}, Node: node})
	r.must(err)
	id, err = r.manager.AddDomain(r.ctx, image.DomainConfig{Name: "b", Engine: "dir", Scope: image.ScopeNode, Node: node, Overcommit: 1000, TakeOver: takeOver, BackgroundRate: r.rates[node]}, d)
	if err != nil {
		return "", errors.Join(err, d.Close())
	}
	ids, epoch, err := r.manager.IDs(id)
	d.Adopt(r.ctx, epoch, ids...)
	return id, err
}

// TestADomainBelongsToItsNode: another node that shows the same storage, or a copy, does not get it, and
// does not disturb the one that has it.
func TestADomainBelongsToItsNode(t *testing.T) {
	r := newRig(t)
	r.agent("n1")
	r.agent("n2")
	id, err := r.nodes("n1", r.dirs["b"], false)
	r.must(err)
	r.volume("v", id, 1<<20)
	copied := t.TempDir()
	r.must(os.CopyFS(copied, os.DirFS(r.dirs["b"])))
	for what, path := range map[string]string{"the same storage": r.dirs["b"], "a copy": copied} {
		for _, takeOver := range []bool{false, true} {
			if _, err := r.nodes("n2", path, takeOver); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "n1") {
				t.Errorf("%s, take over %t: %v", what, takeOver, err)
			}
		}
	}
	r.volume("w", id, 1<<20) // as if nothing had been

	// A node that is away keeps what it has.
	next := r.successor()
	next.agent("n2")
	_, err = next.nodes("n2", copied, false)
	if r.is(err, fault.Permission); !strings.Contains(err.Error(), "n1") || !strings.Contains(err.Error(), "takeOver") {
		t.Errorf("a copy on another node: %v", err)
	}
	// A disk that was moved, or a node with another name.
	moved, err := next.nodes("n2", copied, true)
	if next.must(err); moved != id {
		t.Errorf("the ID became %s, was %s", moved, id)
	}
	next.volume("x", id, 1<<20)
	last := next.successor()
	last.agent("n2")
	_, err = last.nodes("n2", copied, false)
	last.must(err)
}

// TestADomainThatIsOpenAlreadyLeavesNoConnection: what was opened to find that out is closed, and
// the first goes on.
func TestADomainThatIsOpenAlreadyLeavesNoConnection(t *testing.T) {
	r := newRig(t)
	r.agent("n1")
	r.open("a", "")
	r.volume("v", "a", 1<<20)
	before := r.hub.Streams("n1")
	_, err := r.hub.OpenDomain(r.ctx, agent.DomainSpec{Name: "a", Engine: "dir", Params: map[string]string{"path": r.dirs["a"]}})
	r.is(err, fault.Exists)
	r.wait("its connection to end", func() bool { return r.hub.Streams("n1") <= before })
	r.volume("w", "a", 1<<20)
}
