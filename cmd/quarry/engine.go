package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/serve"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// engineOptions of quarry engine, as said.
type engineOptions struct {
	socket string
	// These are for the process that Quarry starts itself.
	inherited bool
	writable  string
	confined  string
}

func engineCommand() *cobra.Command {
	o := &engineOptions{}
	registry := engines.Registry(host.Exec{})
	cmd := &cobra.Command{
		Use: "engine TYPE --socket unix:///path", Short: "Serve an engine as a process of its own, on a Unix socket",
		Long: `Serve an engine (` + strings.Join(registry.Engines(), ", ") + `) as a process of its own, by the engine protocol
on a Unix socket. Whoever may use the socket opens domains there and names their
parameters: its mode is 0600. It logs on stderr, and ends with status 0 on SIGTERM
after what is being answered was finished.

A domain uses it that says "socket:" in the domains file. With "process: true" there
Quarry starts, confines and restarts one by itself, and no socket is needed.`,
		Example: `  quarry engine dir --socket unix:///run/quarry/dir.sock`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return serveEngine(cmd.Context(), registry, args[0], o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.socket, "socket", "", "where to serve: unix:///path (required)")
	f.BoolVar(&o.inherited, "inherited", false, "serve the connection that was inherited, confine the process, and end with the connection")
	f.StringVar(&o.writable, "writable", "", "with --inherited: the only directory to write in")
	f.StringVar(&o.confined, "confined", "", "with --inherited: the process is confined already, and how")
	for _, name := range []string{"inherited", "writable", "confined"} {
		_ = f.MarkHidden(name) // it is defined
	}
	return cmd
}

func serveEngine(ctx context.Context, registry domain.Registry, kind string, o *engineOptions) error {
	if err := registry.CheckParams(kind, nil); err != nil {
		return err
	}
	server := serve.New(serve.Config{Engine: kind, Release: version, Open: func(ctx context.Context, params, secrets map[string]string) (engine.Engine, error) {
		if err := registry.CheckParams(kind, params); err != nil {
			return nil, err
		}
		return registry[kind].Open(ctx, params, secrets)
	}})
	if o.inherited {
		return serveInherited(ctx, server, registry[kind].Needs, kind, o)
	}
	if o.socket == "" {
		return fault.New(fault.Invalid, "--socket is needed: unix:///path")
	}
	at, err := admin.ParseEndpoint(o.socket)
	if err != nil {
		return fmt.Errorf("--socket: %w", err)
	}
	l, err := at.Listen()
	if err != nil {
		return fmt.Errorf("--socket: %w", err)
	}
	klog.FromContext(ctx).Info("Serving", "engine", kind, "version", version, "socket", at.String())
	err = server.Serve(ctx, l)
	klog.FromContext(ctx).Info("Stopped")
	return err
}

// serveInherited serves one connection to its end, confined.
func serveInherited(ctx context.Context, server *serve.Server, needs []uint, kind string, o *engineOptions) error {
	if o.confined == "" && needs != nil {
		args := []string{"engine", kind, "--inherited"}
		if o.writable != "" {
			args = append(args, "--writable", o.writable)
		}
		return host.RunConfined(needs, o.writable, args...)
	}
	conn, err := host.InheritedConn()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	return server.Serve(ctx, newSingle(conn, stop))
}

// single is a listener to which one connection comes; when that is closed, ended is called.
type single struct {
	net.Conn
	closed func() // once
	give   chan net.Conn
	done   chan struct{}
}

func newSingle(conn net.Conn, ended func()) *single {
	s := &single{Conn: conn, give: make(chan net.Conn, 1), done: make(chan struct{})}
	s.closed = sync.OnceFunc(func() { close(s.done); ended() })
	s.give <- closing{conn, ended}
	return s
}

// Accept implements net.Listener.
func (s *single) Accept() (net.Conn, error) {
	select {
	case c := <-s.give:
		return c, nil
	case <-s.done:
		return nil, io.EOF
	}
}

// Close implements net.Listener: the connection itself is closed by whoever serves it.
func (s *single) Close() error {
	s.closed()
	return nil
}

// Addr implements net.Listener.
func (s *single) Addr() net.Addr { return s.LocalAddr() }

// closing says when it is closed.
type closing struct {
	net.Conn
	ended func()
}

func (c closing) Close() error {
	c.ended()
	return c.Conn.Close()
}
