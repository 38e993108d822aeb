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

	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/serve"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

// LinkConfig of an agent's side.
type LinkConfig struct {
	Node    string
	Release string
	// Dial connects to the controller that leads.
	Dial func(ctx context.Context) (net.Conn, error)
	// Token proves who the agent is; it is read for each connection, since it expires.
	Token func() (string, error)
	// Engines are the types of storage, and Open opens a domain of one.
	Engines []string
	Open    func(ctx context.Context, engineType string, params, secrets map[string]string) (engine.Engine, error)
	// Drain is how long the calls of a lost connection are waited for; 0: 15 s.
	Drain time.Duration
}

// Link is the agent's side: it keeps a connection to the controller, and does what
// that asks. It implements node.Manager. One connection is served at a time, and its
// calls have ended before the next one begins: what an earlier controller asked does
// not meet what its successor does.
type Link struct {
	cfg        LinkConfig
	upstream   *grpc.ClientConn
	controller agentpb.ControllerClient
	engines    map[string]*serve.Server
	gate       *gate

	mu      sync.Mutex
	session *yamux.Session // nil: not connected
	adopted map[string]adopted
	users   map[string]*engine.Users // by type and client, of engines that are open
}

// adopted is where a domain was opened.
type adopted struct{ engine, client string }

var _ node.Manager = (*Link)(nil)

// NewLink makes a Link. Run connects it.
func NewLink(cfg LinkConfig) (*Link, error) {
	cfg.Drain = cmp.Or(cfg.Drain, drainLimit)
	l := &Link{cfg: cfg, engines: map[string]*serve.Server{}, gate: newGate(cfg.Drain), adopted: map[string]adopted{}, users: map[string]*engine.Users{}}
	for _, kind := range cfg.Engines {
		l.engines[kind] = serve.New(serve.Config{Engine: kind, Release: cfg.Release, Open: func(ctx context.Context, params, secrets map[string]string) (engine.Engine, error) {
			return cfg.Open(ctx, kind, params, secrets)
		}})
	}
	var err error
	l.upstream, err = newClient(func(context.Context) (net.Conn, error) {
		l.mu.Lock()
		s := l.session
		l.mu.Unlock()
		if s == nil {
			return nil, fault.New(fault.Unavailable, "this node has no connection to the controller")
		}
		return openStream(s, controllerService)
	})
	if err != nil {
		return nil, err
	}
	l.controller = agentpb.NewControllerClient(l.upstream)
	return l, nil
}

// Pauses before the next attempt to connect.
const retryFirst, retryLast = 200 * time.Millisecond, 5 * time.Second

// Node is what the agent's own node does.
type Node interface {
	image.ChainAgent
	image.Encrypter
}

// Run connects until ctx ends, and serves what work and nodeAgent do. Domains stay open
// between connections.
func (l *Link) Run(ctx context.Context, nodeAgent Node, work Work) error {
	log := klog.FromContext(ctx)
	for pause := retryFirst; ; pause = min(2*pause, retryLast) {
		began := time.Now()
		err := l.connect(ctx, nodeAgent, work)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > retryLast {
			pause = retryFirst
		}
		log.Info("No connection to the controller", "err", err, "again", pause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	errs := []error{l.upstream.Close()}
	for _, s := range l.engines {
		errs = append(errs, s.CloseAll())
	}
	return errors.Join(errs...)
}

// connect makes one connection and serves it to its end.
func (l *Link) connect(ctx context.Context, nodeAgent Node, work Work) error {
	conn, err := l.cfg.Dial(ctx)
	if err != nil {
		return fault.Wrap(fault.Unavailable, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	welcome, err := l.hello(conn, "")
	if err != nil {
		return err
	}
	s, err := yamux.Client(conn, muxConfig())
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	klog.FromContext(ctx).Info("Connected to the controller", "address", conn.RemoteAddr().String(), "release", welcome.GetRelease())
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()
	l.upstream.ResetConnectBackoff()
	defer func() {
		l.mu.Lock()
		l.session = nil
		l.mu.Unlock()
	}()
	// These say in another way whose they are, or are about no domain.
	bare := []string{agentpb.Agent_Adopt_FullMethodName, agentpb.Agent_Release_FullMethodName, agentpb.Agent_Encrypts_FullMethodName}
	services := map[string]*grpc.Server{agentService: l.gate.server(func(method string) bool { return slices.Contains(bare, method) })}
	agentpb.RegisterAgentServer(services[agentService], &service{link: l, node: nodeAgent, work: work})
	for kind, e := range l.engines {
		g := l.gate.server(func(string) bool { return true }) // what opens a domain
		e.Register(g)
		services[enginePrefix+kind] = g
	}
	return serveStreams(s, services, l.cfg.Drain)
}

// hello introduces this agent, for the link or with the ticket of a move.
func (l *Link) hello(conn net.Conn, ticket string) (*agentpb.Welcome, error) {
	token, err := l.cfg.Token()
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(helloLimit)); err != nil {
		return nil, fault.Wrap(fault.Unavailable, err)
	}
	if err := introduce(conn, &agentpb.Hello{Version: version, Node: l.cfg.Node, Token: token, Release: l.cfg.Release, Engines: slices.Sorted(slices.Values(l.cfg.Engines)), Ticket: ticket}); err != nil {
		return nil, err
	}
	w := &agentpb.Welcome{}
	if err := hear(conn, w); err != nil {
		return nil, err
	}
	if w.GetRefused() != "" {
		return nil, fault.New(fault.Permission, "the controller does not let this agent in: %s", w.GetRefused())
	}
	return w, untimed(conn)
}

// Engine of a domain that the controller has opened here. fault.Unavailable: it has not.
func (l *Link) Engine(domain string) (*engine.Users, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok := l.adopted[domain]
	if !ok {
		return nil, fault.New(fault.Unavailable, "domain %s is not open on node %s: the controller has not opened it here yet, or cannot", domain, l.cfg.Node)
	}
	e := l.engines[a.engine].Engine(a.client)
	if e == nil {
		return nil, fault.New(fault.Unavailable, "domain %s is not open on node %s: it is being opened again", domain, l.cfg.Node)
	}
	key := a.engine + "/" + a.client
	if u := l.users[key]; u != nil && u.Engine == e {
		return u, nil
	}
	u := engine.NewUsers(e)
	l.users[key] = u
	return u, nil
}

// KnownDomains are those that the controller has opened here, by their IDs.
func (l *Link) KnownDomains() []image.DomainInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []image.DomainInfo
	for _, id := range slices.Sorted(maps.Keys(l.adopted)) {
		out = append(out, image.DomainInfo{ID: id, Open: true, Config: image.DomainConfig{Name: l.adopted[id].client, Engine: l.adopted[id].engine}})
	}
	return out
}

// adopt notes under which IDs the controller knows what it has opened, and ends what earlier
// controllers still have running there.
func (l *Link) adopt(ctx context.Context, r *agentpb.AdoptRequest) error {
	all := map[string]adopted{}
	for _, d := range r.GetDomains() {
		if l.engines[d.GetEngine()] == nil {
			return fault.New(fault.Unsupported, "engine %q is unknown to node %s", d.GetEngine(), l.cfg.Node)
		}
		for _, id := range d.GetIds() {
			all[id] = adopted{d.GetEngine(), d.GetOpened()}
		}
	}
	if err := l.gate.adopt(ctx, epochsOf(r)); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.adopted = all
	return nil
}

// Connected says whether there is a connection to a controller.
func (l *Link) Connected() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session != nil
}

// Stage implements node.Manager. Which node asks is known to the controller.
func (l *Link) Stage(ctx context.Context, h image.Handle, _ string, generation int64) (image.Staging, error) {
	r, err := l.controller.Stage(ctx, &agentpb.StageRequest{Handle: toHandle(h), Generation: generation})
	if err != nil {
		return image.Staging{}, rpcfault.FromStatus(err)
	}
	st := fromStaging(r.GetStaging())
	if err := l.gate.heard(st.Domain, st.Epoch); err != nil {
		return image.Staging{}, err
	}
	return st, nil
}

// Formatted implements node.Manager.
func (l *Link) Formatted(ctx context.Context, h image.Handle, _, filesystem string) error {
	_, err := l.controller.Formatted(ctx, &agentpb.FormattedRequest{Handle: toHandle(h), Filesystem: filesystem})
	return rpcfault.FromStatus(err)
}

// Built implements node.Manager.
func (l *Link) Built(ctx context.Context, h image.Handle, _ string, told int64) error {
	_, err := l.controller.Built(ctx, &agentpb.BuiltRequest{Handle: toHandle(h), Told: told})
	return rpcfault.FromStatus(err)
}

// Outline implements node.Manager.
func (l *Link) Outline(ctx context.Context, h image.Handle, _ string) (image.Outline, error) {
	r, err := l.controller.Outline(ctx, &agentpb.OutlineRequest{Handle: toHandle(h)})
	if err != nil {
		return image.Outline{}, rpcfault.FromStatus(err)
	}
	return image.Outline{Size: r.GetSize(), Slabs: fromSlabs(r.GetSlabs()), Told: r.GetTold()}, nil
}

// Unstaged implements node.Manager.
func (l *Link) Unstaged(ctx context.Context, h image.Handle, _ string, told int64) error {
	_, err := l.controller.Unstaged(ctx, &agentpb.UnstagedRequest{Handle: toHandle(h), Told: told})
	return rpcfault.FromStatus(err)
}
