// Package agent is the link between the controller and the agents of nodes.
//
// An agent dials the controller, over TLS, and proves who it is. That one connection
// carries streams in both directions (yamux), and each of them gRPC: the controller asks
// the agent (Agent, and one service for each type of storage), the agent asks the
// controller (Controller). So nodes open no port. docs/ARCHITECTURE.md.
//
// Hub is the controller's side: it is image.Agents and image.Worker, and gives domains
// engines that run on nodes. Link is the agent's side: it is node.Manager, and finds
// the node the engines that the controller has opened there.
package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
)

const (
	// version of the link's protocol.
	version = 1
	// Audience of the tokens with which agents prove who they are.
	Audience = "quarry-controller"
	// helloLimit is how long a new connection may take to introduce itself, and
	// maxHello how long its introduction may be: a token has a kilobyte or two.
	helloLimit = 10 * time.Second
	maxHello   = 64 << 10
	// keepAlive is how often an idle connection is tried, and written how long a write
	// may take: a peer that is gone is noticed after at most both.
	keepAlive, written = 5 * time.Second, 10 * time.Second
	// maxMessage is how long a message may be: the extents of a large, scattered image.
	maxMessage = 64 << 20
	// Names of services, which streams begin with, and the longest.
	agentService, controllerService, enginePrefix = "agent", "controller", "engine/"
	maxService                                    = 100
)

// introduce sends a message in its frame.
func introduce(c net.Conn, m proto.Message) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	_, err = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return fault.Wrap(fault.Unavailable, err)
}

// hear reads a message in its frame.
func hear(c net.Conn, m proto.Message) error {
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return fault.Wrap(fault.Unavailable, err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxHello {
		return fault.New(fault.Invalid, "an introduction of %d bytes: at most %d are allowed", n, maxHello)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		return fault.Wrap(fault.Unavailable, err)
	}
	return fault.Wrap(fault.Invalid, proto.Unmarshal(b, m))
}

func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive, c.KeepAliveInterval, c.ConnectionWriteTimeout = true, keepAlive, written
	c.MaxStreamWindowSize = 1 << 20
	c.StreamCloseTimeout = written
	c.LogOutput = io.Discard // what matters comes back as an error
	return c
}

// openStream opens a stream to a service of the peer.
func openStream(s *yamux.Session, service string) (net.Conn, error) {
	c, err := s.Open()
	if err != nil {
		return nil, fault.Wrap(fault.Unavailable, err)
	}
	if _, err := c.Write(append([]byte{byte(len(service))}, service...)); err != nil {
		return nil, fault.Wrap(fault.Unavailable, errors.Join(err, c.Close()))
	}
	return c, nil
}

// serveStreams gives the streams that the peer opens to services, by name, until the
// session ends. Then it ends the calls that run, and waits for them, but not for ever.
func serveStreams(s *yamux.Session, services map[string]*grpc.Server, drain time.Duration) error {
	listeners := map[string]*listener{}
	var running sync.WaitGroup
	for name, g := range services {
		l := &listener{streams: make(chan net.Conn), done: make(chan struct{}), at: s.LocalAddr()}
		listeners[name] = l
		running.Go(func() { _ = g.Serve(l) })
	}
	var err error
	for {
		var c net.Conn
		if c, err = s.Accept(); err != nil {
			break
		}
		running.Go(func() {
			name, err := serviceOf(c)
			l := listeners[name]
			if err != nil || l == nil || !l.give(c) {
				_ = c.Close()
			}
		})
	}
	_ = s.Close()
	for name, g := range services {
		_ = listeners[name].Close()
		running.Go(g.Stop)
	}
	ended := make(chan struct{})
	go func() { running.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(drain):
	}
	if errors.Is(err, io.EOF) || errors.Is(err, yamux.ErrSessionShutdown) {
		return nil
	}
	return fault.Wrap(fault.Unavailable, err)
}

// drainLimit is how long the calls of a lost connection are waited for before the
// next one is served: a call that hangs on a dead server must not cut the node off.
const drainLimit = 15 * time.Second

func serviceOf(c net.Conn) (string, error) {
	if err := c.SetReadDeadline(time.Now().Add(helloLimit)); err != nil {
		return "", err
	}
	var n [1]byte
	if _, err := io.ReadFull(c, n[:]); err != nil {
		return "", err
	}
	b := make([]byte, min(int(n[0]), maxService))
	if _, err := io.ReadFull(c, b); err != nil {
		return "", err
	}
	return string(b), c.SetReadDeadline(time.Time{})
}

// listener is a net.Listener of streams.
type listener struct {
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
	at      net.Addr
}

func (l *listener) give(c net.Conn) bool {
	select {
	case l.streams <- c:
		return true
	case <-l.done:
		return false
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.streams:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *listener) Addr() net.Addr { return l.at }

// newServer makes a gRPC server whose errors keep their kinds. Stop waits for its calls.
func newServer(more ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(maxMessage),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			resp, err := next(ctx, req)
			return resp, rpcfault.ToStatus(err)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return rpcfault.ToStatus(next(srv, ss))
		})}, more...)...)
}

// newClient makes a gRPC client over streams that dial opens. It lasts over connections.
func newClient(dial func(context.Context) (net.Conn, error)) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///link", grpc.WithTransportCredentials(insecure.NewCredentials()), // inside TLS
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: time.Second}, MinConnectTimeout: written}),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
	return conn, fault.Wrap(fault.Internal, err)
}

// nodeNames: what a node may be called; the same as in the name of a tag.
func checkHello(h *agentpb.Hello) error {
	if h.GetVersion() != version {
		return fault.New(fault.Unsupported, "the agent of node %q (%s) speaks version %d of the link, this controller %d: a controller serves agents of its own version and the one before; upgrade the DaemonSet", h.GetNode(), h.GetRelease(), h.GetVersion(), version)
	}
	if h.GetNode() == "" || strings.ContainsAny(h.GetNode(), "/ \n") {
		return fault.New(fault.Invalid, "node %q: a node's name is needed", h.GetNode())
	}
	return nil
}
