package agent

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Streams is how many there are over a node's connection, for the tests of whole agents.
func (h *Hub) Streams(node string) int {
	p, err := h.peer(node)
	if err != nil {
		return -1
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil {
		return 0
	}
	return p.session.NumStreams()
}

// asked is a node's agent that says that nothing writes a slab.
type asked struct {
	agentpb.AgentClient
	n int
}

func (a *asked) Settle(context.Context, *agentpb.SettleRequest, ...grpc.CallOption) (*agentpb.SettleResponse, error) {
	a.n++
	return &agentpb.SettleResponse{}, nil
}

// hubWith has a node n1 with that agent, over a connection of its own.
func hubWith(t *testing.T, a *asked) (*Hub, *yamux.Session) {
	t.Helper()
	ours, theirs := net.Pipe()
	s, err := yamux.Server(ours, muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	c, err := yamux.Client(theirs, muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	h := NewHub(HubConfig{})
	t.Cleanup(func() { s.Close(); c.Close(); h.cancel() })
	h.peers["n1"] = &peer{hub: h, node: "n1", rpc: a, session: s, engines: []string{"dir"}}
	return h, s
}

// TestNodesAreAskedAtEachEpochForWorkOfEarlierOnes, once: those who wrote at an epoch that was the
// last when they were asked before may still do so.
func TestNodesAreAskedAtEachEpochForWorkOfEarlierOnes(t *testing.T) {
	a := &asked{}
	h, _ := hubWith(t, a)
	o := &opening{ids: []string{"a"}, engine: "dir"}
	h.domains["a@"] = o
	p := image.Place{Domain: "a", Slab: "s"}
	for epoch := int64(1); epoch < 4; epoch++ {
		o.epoch = epoch
		for range 2 {
			if err := h.settle(t.Context(), p, true); err != nil {
				t.Fatal(err)
			}
		}
		if a.n != int(epoch) {
			t.Fatalf("the node was asked %d times at %d epochs", a.n, epoch)
		}
	}
}

// TestANodeWhoseConnectionHasEndedIsNotConnected: not for that moment either until the Hub takes note.
func TestANodeWhoseConnectionHasEndedIsNotConnected(t *testing.T) {
	h, s := hubWith(t, &asked{})
	if _, err := h.Agent("n1"); err != nil || len(h.Nodes()) != 1 {
		t.Fatalf("it is not connected: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Agent("n1"); !errors.Is(err, fault.Unavailable) || len(h.Nodes()) > 0 {
		t.Errorf("it is connected: %v, %q", err, h.Nodes())
	}
}
