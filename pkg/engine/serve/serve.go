// Package serve offers an engine to other processes, by the engine protocol
// (package enginepb). Package remote is the other side.
package serve

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
)

// Config of a Server.
type Config struct {
	// Engine is the type of storage, and Release the version of the code.
	Engine, Release string
	// Open opens a domain.
	Open func(ctx context.Context, params, secrets map[string]string) (engine.Engine, error)
}

// Server opens domains for clients and does what they ask. Its methods may be
// called by many goroutines.
type Server struct {
	cfg Config

	mu      sync.Mutex
	domains map[string]*opened       // by what Open answered
	opening map[string]chan struct{} // clients whose Open runs; closed afterwards

	enginepb.UnimplementedEngineServer
	enginepb.UnimplementedSnapshotterServer
	enginepb.UnimplementedClonerServer
	enginepb.UnimplementedCopierServer
	enginepb.UnimplementedMeterServer
	enginepb.UnimplementedQuotaServer
	enginepb.UnimplementedDifferServer
	enginepb.UnimplementedFencerServer
	enginepb.UnimplementedGroupSnapshotterServer
	enginepb.UnimplementedModifierServer
	enginepb.UnimplementedImporterServer
}

// opened is a domain that a client has open.
type opened struct {
	id, client      string
	params, secrets map[string]string
	engine          engine.Engine
	caps            engine.Capabilities
	calls           sync.WaitGroup // no more are added once it is out of Server.domains
}

// New makes a Server.
func New(cfg Config) *Server {
	return &Server{cfg: cfg, domains: map[string]*opened{}, opening: map[string]chan struct{}{}}
}

// stopGrace is how long running calls may take to end.
const stopGrace = 10 * time.Second

// Serve serves on a listener until ctx ends, then closes the domains. More
// options are those of the gRPC server.
func (s *Server) Serve(ctx context.Context, l net.Listener, options ...grpc.ServerOption) error {
	g := grpc.NewServer(append(options, grpc.ChainUnaryInterceptor(unary), grpc.ChainStreamInterceptor(stream))...)
	s.Register(g)
	ok := health.NewServer()
	grpc_health_v1.RegisterHealthServer(g, ok)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		ok.Shutdown()
		grace := time.AfterFunc(stopGrace, g.Stop)
		g.GracefulStop()
		grace.Stop()
		err = <-done
	}
	return errors.Join(err, s.CloseAll())
}

// Register adds the services to a gRPC server. Their errors are those of
// package fault: an interceptor has to translate them.
func (s *Server) Register(g grpc.ServiceRegistrar) {
	enginepb.RegisterEngineServer(g, s)
	enginepb.RegisterSnapshotterServer(g, s)
	enginepb.RegisterClonerServer(g, s)
	enginepb.RegisterCopierServer(g, s)
	enginepb.RegisterMeterServer(g, s)
	enginepb.RegisterQuotaServer(g, s)
	enginepb.RegisterDifferServer(g, s)
	enginepb.RegisterFencerServer(g, s)
	enginepb.RegisterGroupSnapshotterServer(g, s)
	enginepb.RegisterModifierServer(g, s)
	enginepb.RegisterImporterServer(g, s)
}

func unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	return resp, rpcfault.ToStatus(err)
}

func stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return rpcfault.ToStatus(next(srv, ss))
}

// Engine that a client has open here; nil: none.
func (s *Server) Engine(client string) engine.Engine {
	if all := s.of(client); len(all) > 0 {
		return all[0].engine
	}
	return nil
}

// CloseAll closes all domains, when no call runs any more.
func (s *Server) CloseAll() error {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.domains))
	clear(s.domains)
	s.mu.Unlock()
	var errs []error
	for _, o := range all {
		errs = append(errs, o.engine.Close())
	}
	return errors.Join(errs...)
}

// Open implements the protocol.
func (s *Server) Open(ctx context.Context, r *enginepb.OpenRequest) (*enginepb.OpenResponse, error) {
	if !slices.Contains(r.GetVersions(), enginepb.Version) {
		return nil, fault.New(fault.Unsupported, "the client speaks versions %v of the engine protocol, this engine (%s %s) speaks %d only", r.GetVersions(), s.cfg.Engine, s.cfg.Release, enginepb.Version)
	}
	if r.GetClient() == "" {
		return nil, fault.New(fault.Invalid, "client is empty: a name that stays the same is needed")
	}
	leave, err := s.enter(ctx, r.GetClient())
	if err != nil {
		return nil, err
	}
	defer leave()
	for _, o := range s.of(r.GetClient()) {
		if maps.Equal(o.params, r.GetParams()) && maps.Equal(o.secrets, r.GetSecrets()) {
			return s.answer(o), nil
		}
		if err := s.end(ctx, o.id); err != nil {
			return nil, err
		}
	}
	e, err := s.cfg.Open(ctx, maps.Clone(r.GetParams()), maps.Clone(r.GetSecrets()))
	if err != nil {
		return nil, err
	}
	o := &opened{id: name(), client: r.GetClient(), params: r.GetParams(), secrets: r.GetSecrets(), engine: e, caps: engine.Discover(e)}
	s.mu.Lock()
	s.domains[o.id] = o
	s.mu.Unlock()
	return s.answer(o), nil
}

func (s *Server) answer(o *opened) *enginepb.OpenResponse {
	r := &enginepb.OpenResponse{Version: enginepb.Version, Domain: o.id, Engine: s.cfg.Engine, Release: s.cfg.Release}
	for _, c := range o.caps.List() {
		r.Capabilities = append(r.Capabilities, string(c))
	}
	if o.caps.Modifier != nil {
		r.ModifyParams = o.caps.Modifier.ModifyParams()
	}
	return r
}

func name() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // it never fails
	return hex.EncodeToString(b)
}

// enter waits until no other Open of a client runs.
func (s *Server) enter(ctx context.Context, client string) (leave func(), err error) {
	for {
		s.mu.Lock()
		other := s.opening[client]
		if other == nil {
			mine := make(chan struct{})
			s.opening[client] = mine
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				delete(s.opening, client)
				s.mu.Unlock()
				close(mine)
			}, nil
		}
		s.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fault.New(fault.Pending, "another opening by %s runs", client)
		}
	}
}

func (s *Server) of(client string) []*opened {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*opened
	for _, o := range s.domains {
		if o.client == client {
			out = append(out, o)
		}
	}
	return out
}

// end closes a domain when its calls have ended; one that is not open is success.
func (s *Server) end(ctx context.Context, id string) error {
	s.mu.Lock()
	o := s.domains[id]
	delete(s.domains, id)
	s.mu.Unlock()
	if o == nil {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		o.calls.Wait()
		done <- o.engine.Close()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fault.New(fault.Pending, "the domain is closed when its calls have ended")
	}
}

// Close implements the protocol.
func (s *Server) Close(ctx context.Context, r *enginepb.CloseRequest) (*enginepb.CloseResponse, error) {
	return &enginepb.CloseResponse{}, s.end(ctx, r.GetDomain())
}

// domain finds an open domain, which stays open until done is called.
func (s *Server) domain(id string) (o *opened, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o = s.domains[id]; o == nil {
		return nil, nil, fault.New(fault.Unavailable, "domain %q is not open here: call Open", id)
	}
	o.calls.Add(1)
	return o, o.calls.Done, nil
}

// native is a capability of a domain: fault.Unsupported if it has none such.
func native[T any](s *Server, id string, capability engine.Capability, of func(engine.Capabilities) T) (c T, done func(), err error) {
	o, done, err := s.domain(id)
	if err != nil {
		return c, nil, err
	}
	if !slices.Contains(o.caps.List(), capability) {
		done()
		return c, nil, fault.New(fault.Unsupported, "the storage has no native %s", capability)
	}
	return of(o.caps), done, nil
}

// declined tells a capability's "take the default" from its errors.
func declined(err error) (bool, error) {
	if errors.Is(err, engine.ErrDeclined) {
		return true, nil
	}
	return false, err
}
