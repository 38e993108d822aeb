package agent

import (
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

// HubConfig of the controller's side.
type HubConfig struct {
	Release string
	// Admit says whether a token proves that its bearer is the agent of a node: nil,
	// or fault.Permission with the reason.
	Admit func(ctx context.Context, token, node string) error
	// Joined is told of a node; may be nil. It must not wait for the Hub.
	Joined func(node string)
	// Lost is how long a node without a connection may go on with its work; 0: 30 s.
	Lost time.Duration
}

// Hub is the controller's side: it takes the agents' connections, finds a node's agent
// for the Image Manager, and opens engines on nodes. It implements image.Agents.
type Hub struct {
	cfg HubConfig

	ctx    context.Context // of what is done on nodes beside calls
	cancel context.CancelFunc
	beside sync.WaitGroup

	doubts *doubts
	moves  moves

	mu      sync.Mutex
	closed  bool
	come    chan struct{}       // closed, and replaced, when a node connects
	peers   map[string]*peer    // by node; they stay when a node has left
	domains map[string]*opening // by name of entry and node: see OpenDomain
}

var _ image.Agents = (*Hub)(nil)

// peer is an agent, connected or not.
type peer struct {
	hub  *Hub
	node string
	conn *grpc.ClientConn
	rpc  agentpb.AgentClient

	mu      sync.Mutex
	session *yamux.Session // nil: it has left
	engines []string       // the types of storage that it knows, by its last hello
	release string
	// preparing: somebody prepares the node, and does it again for those who wait.
	preparing bool
	waiting   []chan struct{}
	wake      chan struct{} // ends the pause before the next round
}

// NewHub makes a Hub.
func NewHub(cfg HubConfig) *Hub {
	ctx, cancel := context.WithCancel(context.Background())
	return &Hub{cfg: cfg, ctx: ctx, cancel: cancel, doubts: newDoubts(cfg.Lost), moves: moves{ends: map[string]*end{}}, come: make(chan struct{}), peers: map[string]*peer{}, domains: map[string]*opening{}}
}

// Serve takes connections until ctx ends, then closes all. manager answers what agents
// ask, each of which speaks for its own node only.
func (h *Hub) Serve(ctx context.Context, l net.Listener, manager node.Manager) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	h.doubts.mu.Lock()
	h.doubts.began = time.Now()
	h.doubts.mu.Unlock()
	var running sync.WaitGroup
	defer running.Wait()
	ended := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		conn, err := l.Accept()
		if ended.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fault.Wrap(fault.Internal, err)
			}
			klog.FromContext(ctx).Error(err, "Taking an agent's connection")
			select {
			case <-time.After(time.Second): // out of file descriptors, say
			case <-ctx.Done():
			}
			continue
		}
		running.Go(func() {
			defer conn.Close()
			end := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer end()
			if err := h.serve(ctx, conn, manager); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Info("An agent's connection has ended", "address", conn.RemoteAddr().String(), "err", err)
			}
		})
	}
}

// serve is the life of one connection.
func (h *Hub) serve(ctx context.Context, conn net.Conn, manager node.Manager) error {
	hello, data, err := h.welcome(ctx, conn)
	if err != nil {
		return err
	}
	if data != nil {
		data.serve(ctx, conn)
		return nil
	}
	s, err := yamux.Server(conn, muxConfig())
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	p, err := h.join(hello, s)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	log := klog.FromContext(ctx)
	log.Info("An agent has connected", "node", p.node, "release", hello.GetRelease(), "address", conn.RemoteAddr().String())
	g := newServer()
	agentpb.RegisterControllerServer(g, &upstream{hub: h, manager: manager, node: p.node})
	err = serveStreams(s, map[string]*grpc.Server{controllerService: g}, drainLimit)
	p.leave(s)
	return err
}

// welcome lets an agent in, or says why not. data: the connection is the end of a move.
func (h *Hub) welcome(ctx context.Context, conn net.Conn) (hello *agentpb.Hello, data *end, err error) {
	if err := conn.SetDeadline(time.Now().Add(helloLimit)); err != nil {
		return nil, nil, fault.Wrap(fault.Unavailable, err)
	}
	hello = &agentpb.Hello{}
	if err := hear(conn, hello); err != nil {
		return nil, nil, err
	}
	err = checkHello(hello)
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, helloLimit)
		err = h.cfg.Admit(limited, hello.GetToken(), hello.GetNode())
		cancel()
	}
	if err == nil {
		data, err = h.admitMove(hello)
	}
	answer := &agentpb.Welcome{Version: version, Release: h.cfg.Release}
	if err != nil {
		answer.Refused = err.Error()
	}
	return hello, data, errors.Join(err, introduce(conn, answer), untimed(conn))
}

// join makes a session that of its node. An earlier one is ended: a node has one agent.
func (h *Hub) join(hello *agentpb.Hello, s *yamux.Session) (*peer, error) {
	p, err := h.peer(hello.GetNode())
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	old := p.session
	p.session, p.engines, p.release = s, hello.GetEngines(), hello.GetRelease()
	p.mu.Unlock()
	if old != nil {
		_ = old.Close()
	}
	p.conn.ResetConnectBackoff()
	for _, o := range h.openings() {
		o.reconnect(p.node)
	}
	h.mu.Lock()
	close(h.come)
	h.come = make(chan struct{})
	h.mu.Unlock()
	h.Prepare(p.node)
	if h.cfg.Joined != nil {
		h.cfg.Joined(p.node)
	}
	return p, nil
}

func (p *peer) leave(s *yamux.Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == s {
		p.session = nil
	}
}

// peer of a node, which may not be connected.
func (h *Hub) peer(name string) (*peer, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.peers[name]; p != nil {
		return p, nil
	}
	p := &peer{hub: h, node: name, wake: make(chan struct{}, 1)}
	conn, err := newClient(func(context.Context) (net.Conn, error) { return p.dial(agentService) })
	if err != nil {
		return nil, err
	}
	p.conn, p.rpc = conn, agentpb.NewAgentClient(conn)
	h.peers[name] = p
	return p, nil
}

// dial opens a stream to a service of the agent.
func (p *peer) dial(service string) (net.Conn, error) {
	p.mu.Lock()
	s := p.session
	p.mu.Unlock()
	if s == nil {
		return nil, fault.New(fault.Unavailable, "node %s has no agent that is connected: look at the quarry pod there", p.node)
	}
	return openStream(s, service)
}

func (p *peer) connected() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.session != nil && !p.session.IsClosed()
}

// knows says whether the agent can open domains of a type: one of an older release, during an
// upgrade, may not.
func (p *peer) knows(engine string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.engines, engine)
}

// isConnected says whether a node's agent is.
func (h *Hub) isConnected(node string) bool {
	h.mu.Lock()
	p := h.peers[node]
	h.mu.Unlock()
	return p != nil && p.connected()
}

// comes is closed when the next node connects.
func (h *Hub) comes() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.come
}

// Agent implements image.Agents.
func (h *Hub) Agent(name string) (image.Agent, error) {
	h.mu.Lock()
	p := h.peers[name]
	h.mu.Unlock()
	if !h.isConnected(name) {
		return nil, fault.New(fault.Unavailable, "node %s has no agent that is connected: look at the quarry pod there", name)
	}
	return p, nil
}

// Nodes implements image.Agents.
func (h *Hub) Nodes() []string {
	h.mu.Lock()
	peers := slices.Collect(maps.Values(h.peers))
	h.mu.Unlock()
	var out []string
	for _, p := range peers {
		if p.connected() {
			out = append(out, p.node)
		}
	}
	slices.Sort(out)
	return out
}

// Close ends the clients. Serve has ended.
func (h *Hub) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	h.beside.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for _, p := range h.peers {
		errs = append(errs, p.conn.Close())
	}
	return errors.Join(errs...)
}

// upstream answers an agent. It speaks for its own node only.
type upstream struct {
	agentpb.UnimplementedControllerServer
	hub     *Hub
	manager node.Manager
	node    string
}

func (u *upstream) Stage(ctx context.Context, r *agentpb.StageRequest) (*agentpb.StageResponse, error) {
	st, err := u.manager.Stage(ctx, fromHandle(r.GetHandle()), u.node, r.GetGeneration())
	if err == nil {
		err = u.hub.settleChain(ctx, st)
	}
	return &agentpb.StageResponse{Staging: toStaging(st)}, err
}

func (u *upstream) Formatted(ctx context.Context, r *agentpb.FormattedRequest) (*agentpb.FormattedResponse, error) {
	return &agentpb.FormattedResponse{}, u.manager.Formatted(ctx, fromHandle(r.GetHandle()), u.node, r.GetFilesystem())
}

func (u *upstream) Built(ctx context.Context, r *agentpb.BuiltRequest) (*agentpb.BuiltResponse, error) {
	return &agentpb.BuiltResponse{}, u.manager.Built(ctx, fromHandle(r.GetHandle()), u.node, r.GetTold())
}

func (u *upstream) Outline(ctx context.Context, r *agentpb.OutlineRequest) (*agentpb.OutlineResponse, error) {
	o, err := u.manager.Outline(ctx, fromHandle(r.GetHandle()), u.node)
	return &agentpb.OutlineResponse{Size: o.Size, Slabs: toSlabs(o.Slabs), Told: o.Told}, err
}

func (u *upstream) Unstaged(ctx context.Context, r *agentpb.UnstagedRequest) (*agentpb.UnstagedResponse, error) {
	return &agentpb.UnstagedResponse{}, u.manager.Unstaged(ctx, fromHandle(r.GetHandle()), u.node, r.GetTold())
}
