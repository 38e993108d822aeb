package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/csi"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/kube"
	"github.com/quarry-csi/quarry/pkg/mover"
	"github.com/quarry-csi/quarry/pkg/node"
)

// nodeOptions of quarry node, as said and as checked.
type nodeOptions struct {
	sockets
	nodeID, driverName, kubeletDir   string
	controller, caFile, tokenFile    string
	registrationDir, kubeletEndpoint string
	dataDir                          string
}

func nodeCommand() *cobra.Command {
	o := &nodeOptions{}
	cmd := &cobra.Command{
		Use: "node", Short: "Run the agent of a Kubernetes node: mounts, devices, and the engines near their storage",
		Long: `Run the agent of a node. It serves CSI to the kubelet and registers itself there,
connects to the controller ("quarry controller") and does what that asks on this
node's storage. It needs root, the host's /dev, and the kubelet's folder with mounts
that are propagated. When it ends, what is mounted stays in use.`,
		Example: `  quarry node --controller quarry-controller:9810 --controller-ca-file ca.crt --token-file token`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return runNode(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.endpoint, "endpoint", "unix:///csi/csi.sock", "where to serve CSI to the kubelet: unix:///path")
	f.StringVar(&o.metricsEndpoint, "metrics-endpoint", "", "where to serve /metrics, /healthz and /readyz: ADDRESS:PORT, or :PORT for 127.0.0.1; empty: nowhere")
	f.StringVar(&o.nodeID, "node-id", os.Getenv("NODE_NAME"), "name of this node (default: $NODE_NAME, else the host's name)")
	f.StringVar(&o.driverName, "driver-name", "", "name of the CSI driver (default: csi.quarry.dev)")
	f.StringVar(&o.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "the kubelet's folder: nothing is staged or published outside of it")
	f.StringVar(&o.controller, "controller", "", "where controllers take agents: HOST:PORT, of which all addresses are tried (required)")
	f.StringVar(&o.caFile, "controller-ca-file", "", "certificates by which the controller is known, PEM (required)")
	f.StringVar(&o.tokenFile, "token-file", "/var/run/secrets/quarry/token", "this pod's ServiceAccount token for the audience "+agent.Audience)
	f.StringVar(&o.registrationDir, "registration-dir", "", "the kubelet's plugins_registry, as seen here, to register in; empty: do not")
	f.StringVar(&o.kubeletEndpoint, "kubelet-registration-path", "", "the path of --endpoint's socket as the kubelet sees it (default: as seen here)")
	f.StringVar(&o.dataDir, "data-dir", "", "the folder for domains of this node: a directory below it that a domain names is made when it is missing; empty: none is made")
	return cmd
}

func (o *nodeOptions) check() (err error) {
	if err := o.sockets.check(admin.ParseEndpoint); err != nil {
		return err
	}
	if o.nodeID, err = checkNodeID(o.nodeID); err != nil {
		return err
	}
	if !filepath.IsAbs(o.kubeletDir) {
		return fault.New(fault.Invalid, "--kubelet-dir %q must be an absolute path", o.kubeletDir)
	}
	if o.dataDir != "" && (!filepath.IsAbs(o.dataDir) || filepath.Clean(o.dataDir) == "/") {
		return fault.New(fault.Invalid, "--data-dir %q must be an absolute path, and not that of everything", o.dataDir)
	}
	if h, _, err := net.SplitHostPort(o.controller); err != nil || h == "" {
		return fault.New(fault.Invalid, "--controller %q: must be HOST:PORT", o.controller)
	}
	if o.caFile == "" {
		return fault.New(fault.Invalid, "--controller-ca-file is needed: this agent's token is for the real controller only")
	}
	o.kubeletEndpoint = cmp.Or(o.kubeletEndpoint, o.csi.Path())
	return nil
}

// runNode runs until ctx ends.
func runNode(ctx context.Context, o *nodeOptions) error {
	metricsSocket, err := o.listen()
	if err != nil {
		return err
	}
	if metricsSocket != nil {
		defer metricsSocket.Close()
	}
	tracer, flush, err := tracing(ctx, o.nodeID)
	if err != nil {
		return err
	}
	defer flush()
	registry, metrics := engines.Registry(host.Exec{}), newMetrics()
	storages := storages{registry: registry, node: o.nodeID, watch: remote.Silence, local: host.NewLocal(host.Exec{}), started: metrics.engineStarted}
	link, err := agent.NewLink(agent.LinkConfig{Node: o.nodeID, Release: version, Engines: registry.OnNodes(),
		Dial: dialer(o.controller, o.caFile), Token: tokenFrom(o.tokenFile),
		Open: func(ctx context.Context, kind string, params, secrets map[string]string) (engine.Engine, error) {
			e, err := registry.FromNode(kind, params, secrets)
			if err != nil {
				return nil, err
			}
			if e.Socket == "" {
				if err := makeBelow(o.dataDir, e.Params[registry[kind].Directory]); err != nil {
					return nil, err
				}
			}
			return storages.open(ctx, e)
		}})
	if err != nil {
		return err
	}
	agents := &node.Agents{}
	n := node.New(node.Config{NodeID: o.nodeID, Manager: link, Engines: link.Engine, Domains: link, KubeletDir: o.kubeletDir})
	agents.Set(n)
	work := &mover.Local{Files: mover.New(mover.Options{}), Agents: agents, Engines: link.Engine}
	metrics.watchHost(n)
	service, err := csi.New(csi.Config{DriverName: o.driverName, Version: version, NodeID: o.nodeID, Node: n, Domains: link,
		Metrics: metrics.registry, Tracer: tracer})
	if err != nil {
		return err
	}
	n.Start(ctx)

	group, ctx := errgroup.WithContext(ctx)
	// What is being answered may need the controller to its end.
	linked, unlink := context.WithCancel(context.WithoutCancel(ctx))
	group.Go(func() error { return n.Guard(linked) })
	ready := &atomic.Bool{}
	if metricsSocket != nil {
		group.Go(func() error {
			return admin.Serve(ctx, metricsSocket, metrics.handler(ready, func(_ context.Context, w io.Writer) {
				if !link.Connected() {
					fmt.Fprintln(w, "there is no connection to a controller")
				}
			}), adminGrace)
		})
	}
	if err := n.Clean(ctx); err != nil {
		unlink()
		group.Go(func() error { return err }) // ends the others
		return group.Wait()
	}
	ready.Store(true)
	group.Go(func() error {
		defer unlink()
		return service.Serve(ctx, o.csi.String())
	})
	group.Go(func() error { return link.Run(linked, n, work) })
	if o.registrationDir != "" {
		group.Go(func() error {
			return kube.Register(ctx, kube.RegistrationConfig{SocketDir: o.registrationDir, DriverName: cmp.Or(o.driverName, csi.DriverName), Endpoint: o.kubeletEndpoint}, nil)
		})
	}
	klog.FromContext(ctx).Info("Started", "version", version, "node", o.nodeID, "endpoint", o.csi.String(), "controller", o.controller)
	err = group.Wait()
	klog.FromContext(ctx).Info("Stopped")
	return err
}

// makeBelow makes a domain's directory if it is to be below dir. Elsewhere a missing one
// may be the mount point of a disk that is not there.
func makeBelow(dir, path string) error {
	if dir == "" || !filepath.IsAbs(path) {
		return nil
	}
	below, err := filepath.Rel(dir, path)
	if err != nil || below == "." || !filepath.IsLocal(below) {
		return nil
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fault.New(fault.Unavailable, "make a domain's directory below --data-dir %s: %w", dir, err)
	}
	return nil
}
