package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/csi"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/kube"
)

// controllerOptions of quarry controller, as said and as checked.
type controllerOptions struct {
	sockets
	agentsEndpoint, certFile, keyFile     string
	own                                   kube.CertificateConfig
	domains, driverName, installation     string
	kubeconfig, namespace, serviceAccount string
	identity                              string
	nodeWait                              time.Duration
	lease                                 kube.LeaseConfig
}

func controllerCommand() *cobra.Command {
	o := &controllerOptions{}
	cmd := &cobra.Command{
		Use: "controller", Short: "Run the controller of a Kubernetes cluster: all image work, by agents on nodes",
		Long: `Run the controller of a Kubernetes cluster. It serves CSI to its sidecars, and does
all work on storage through the agents of nodes ("quarry node"), which connect to it.
It needs no privilege. Of several, one leads, by a Lease; the others answer Probe
with "not ready", so that their sidecars wait. One that loses the Lease ends.`,
		Example: `  quarry controller --domains /etc/quarry/domains.yaml --tls-cert-file tls.crt --tls-private-key-file tls.key`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return controller(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.endpoint, "endpoint", "unix:///csi/csi.sock", "where to serve CSI to the sidecars: unix:///path")
	f.StringSliceVar(&o.adminEndpoints, "admin-endpoint", []string{"unix:///run/quarry/admin.sock"}, "where to serve kubectl quarry while leading: unix:///path, or tcp://ADDRESS:PORT of a loopback address, which a port-forward reaches; may be repeated; empty: nowhere")
	f.StringVar(&o.metricsEndpoint, "metrics-endpoint", "", "where to serve /metrics, /healthz and /readyz: ADDRESS:PORT, or :PORT for 127.0.0.1; empty: nowhere")
	f.StringVar(&o.agentsEndpoint, "agents-endpoint", ":9810", "where agents connect, while leading: ADDRESS:PORT")
	f.StringVar(&o.certFile, "tls-cert-file", "", "certificate that agents see, PEM; or see --tls-secret")
	f.StringVar(&o.keyFile, "tls-private-key-file", "", "its private key, PEM")
	f.StringVar(&o.own.Secret, "tls-secret", "", "existing Secret in --namespace, which may be empty, to keep a certificate in that the leader makes and renews itself")
	f.StringVar(&o.own.ConfigMap, "tls-ca-config-map", "", "existing ConfigMap in --namespace, for the CA of that certificate: what agents know it by (ca.crt)")
	f.StringVar(&o.own.Host, "tls-host", "", "name in that certificate: the host that agents connect to")
	f.StringVar(&o.domains, "domains", "/etc/quarry/domains.yaml", "the domains file")
	f.StringVar(&o.driverName, "driver-name", "", "name of the CSI driver (default: csi.quarry.dev)")
	f.StringVar(&o.installation, "installation", "", "identity that owns the domains (default: the UID of namespace kube-system)")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach Kubernetes (default: as a pod of the cluster)")
	f.StringVar(&o.namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace of the Lease and of the agents' ServiceAccount (default: $POD_NAMESPACE)")
	f.StringVar(&o.serviceAccount, "agent-service-account", "quarry-node", "ServiceAccount of the agents, in that namespace")
	f.StringVar(&o.identity, "leader-election-identity", "", "name of this candidate (default: $POD_NAME, else the host's name)")
	f.DurationVar(&o.nodeWait, "node-wait", 5*time.Minute, "how long a controller that has begun to lead waits for a node that is ready and has not connected, before it leaves out what that has for itself; one that is not ready: a minute at most")
	f.StringVar(&o.lease.Name, "leader-election-lease", "quarry-controller", "name of the Lease")
	f.DurationVar(&o.lease.LeaseDuration, "leader-election-lease-duration", 15*time.Second, "how long others wait for a leader that does not renew its Lease")
	f.DurationVar(&o.lease.RenewDeadline, "leader-election-renew-deadline", 10*time.Second, "how long a leader tries to renew before it gives up and ends")
	f.DurationVar(&o.lease.RetryPeriod, "leader-election-retry-period", 2*time.Second, "pause between two attempts")
	return cmd
}

func (o *controllerOptions) check() (err error) {
	if err := o.sockets.check(admin.ParseLoopback); err != nil {
		return err
	}
	if _, _, err := net.SplitHostPort(o.agentsEndpoint); err != nil {
		return fault.New(fault.Invalid, "--agents-endpoint %q: must be ADDRESS:PORT or :PORT", o.agentsEndpoint)
	}
	if err := o.checkTLS(); err != nil {
		return err
	}
	if o.namespace == "" {
		return fault.New(fault.Invalid, "--namespace is needed, or $POD_NAMESPACE: that of the Lease and of the agents' ServiceAccount")
	}
	if o.identity = cmp.Or(o.identity, os.Getenv("POD_NAME")); o.identity == "" {
		if o.identity, err = os.Hostname(); err != nil {
			return fault.New(fault.Invalid, "--leader-election-identity is not given and the host's name is not known: %w", err)
		}
	}
	if o.nodeWait < 0 {
		return fault.New(fault.Invalid, "--node-wait %s must not be negative", o.nodeWait)
	}
	o.own.Namespace = o.namespace
	o.lease.Namespace, o.lease.Identity = o.namespace, o.identity
	if err := o.lease.Check(); err != nil {
		return fmt.Errorf("--leader-election flags: %w", err)
	}
	return nil
}

// checkTLS wants a certificate of files, or one of its own.
func (o *controllerOptions) checkTLS() error {
	files, own := o.certFile != "" || o.keyFile != "", o.own.Secret != "" || o.own.ConfigMap != "" || o.own.Host != ""
	switch {
	case files && own:
		return fault.New(fault.Invalid, "--tls-cert-file and --tls-private-key-file exclude --tls-secret, --tls-ca-config-map and --tls-host")
	case own && (o.own.Secret == "" || o.own.ConfigMap == "" || o.own.Host == ""):
		return fault.New(fault.Invalid, "--tls-secret, --tls-ca-config-map and --tls-host are needed together")
	case !own && (o.certFile == "" || o.keyFile == ""):
		return fault.New(fault.Invalid, "--tls-cert-file and --tls-private-key-file are needed, or --tls-secret: agents send their tokens to nobody else")
	}
	return nil
}

// controller runs until ctx ends, or until it has led and does not any more.
func controller(ctx context.Context, o *controllerOptions) (err error) {
	registry := engines.Registry(host.Exec{})
	entries, err := domain.Load(o.domains, registry)
	if err != nil {
		return err
	}
	metricsSocket, err := o.listen()
	if err != nil {
		return err
	}
	if metricsSocket != nil {
		defer metricsSocket.Close()
	}
	client, err := kube.Connect(o.kubeconfig)
	if err != nil {
		return err
	}
	c := &leader{options: o, entries: entries, metrics: newMetrics(), list: func(ctx context.Context) ([]kube.TopologyNode, error) {
		return client.TopologyNodes(ctx, csi.TopologyKey)
	}, cluster: references{client, cmp.Or(o.driverName, csi.DriverName)}}
	if o.own.Secret != "" {
		if c.own, err = kube.NewCertificate(client, o.own); err != nil {
			return err
		}
		c.tls = tlsConfig(c.own.Get)
	} else if c.tls, err = (&certificate{cert: o.certFile, key: o.keyFile}).config(); err != nil {
		return err
	}
	if o.installation == "" {
		if o.installation, err = client.Installation(ctx); err != nil {
			return err
		}
	}
	tracer, flush, err := tracing(ctx, o.identity)
	if err != nil {
		return err
	}
	defer flush()

	c.stand("this controller does not lead: ask the one that does")
	admit, err := kube.NewAdmitter(client, kube.AdmitConfig{Namespace: o.namespace, ServiceAccount: o.serviceAccount, Audience: agent.Audience})
	if err != nil {
		return err
	}
	c.hub = agent.NewHub(agent.HubConfig{Release: version, Admit: admit.Admit, Joined: c.joined})
	teller := kube.NewTeller(client)
	c.manager = image.New(image.Config{Installation: o.installation, Agents: c.hub, Worker: c.hub, Observe: c.metrics.observe, OutOfService: client.OutOfService,
		WaitFor: c.waitsFor, BindNodes: true, Tell: tell(teller)})
	follow := &reloader{load: func() ([]domain.Entry, error) { return domain.Load(o.domains, registry) }, apply: c.follow, failed: func(err error) {
		if err != nil {
			teller.TellPod(o.namespace, os.Getenv("POD_NAME"), os.Getenv("POD_UID"), "QuarryDomainsNotInForce", err.Error())
		}
	}}
	follow.watch(c.metrics)
	c.metrics.watchDomains(c.manager)
	c.opening = &openers{manager: c.manager, open: c.open}
	// The sidecars' questions end with the process, too, or it would wait for them.
	waiting, settled := context.WithCancel(ctx)
	defer settled()
	c.settled = settled
	service, err := csi.New(csi.Config{DriverName: o.driverName, Version: version, Manager: c.manager, Standby: c.waits, Settled: waiting.Done(),
		KnownNode: client.Node, Metrics: c.metrics.registry, Tracer: tracer})
	if err != nil {
		return err
	}

	group, ctx := errgroup.WithContext(ctx)
	if metricsSocket != nil {
		group.Go(func() error {
			return admin.Serve(ctx, metricsSocket, c.metrics.handler(&c.ready, domainsOf(c.manager)), adminGrace)
		})
	}
	group.Go(func() error {
		teller.Run(ctx)
		return nil
	})
	group.Go(func() error {
		follow.run(ctx, entries)
		return nil
	})
	served := make(chan struct{})
	group.Go(func() error {
		defer close(served)
		return service.Serve(ctx, o.csi.String())
	})
	group.Go(func() error {
		return kube.Lead(ctx, client, o.lease, func(leads context.Context) error { return c.lead(ctx, leads, served) })
	})
	klog.FromContext(ctx).Info("Started", "version", version, "identity", o.identity, "installation", o.installation,
		"endpoint", o.csi.String(), "domains", len(entries))
	err = group.Wait()
	if !c.led {
		err = errors.Join(err, c.manager.Close(), c.hub.Close())
	}
	klog.FromContext(ctx).Info("Stopped")
	return err
}

// leader is what the controller that leads consists of.
type leader struct {
	options *controllerOptions
	entries []domain.Entry
	tls     *tls.Config
	own     *kube.Certificate // nil: it is in files, and somebody else's to renew
	metrics *metrics
	cluster admin.Cluster
	hub     *agent.Hub
	manager *image.Manager
	opening *openers
	standby atomic.Pointer[string] // why it does not work; nil: it does
	settled func()                 // to be called when it works
	ready   atomic.Bool
	led     bool // it has begun to lead; to be read when that has ended

	list func(ctx context.Context) ([]kube.TopologyNode, error)

	mu    sync.Mutex
	ctx   context.Context          // of leading; nil before and after
	nodes map[string]chan struct{} // that have been here; to be told that one is again
	expecting
}

func (c *leader) stand(why string) { c.standby.Store(&why) }

func (c *leader) waits() error {
	if why := c.standby.Load(); why != nil {
		return fault.New(fault.Unavailable, "%s", *why)
	}
	return nil
}

// lead works until leads ends: with process, then what is being answered ends first; or by itself
// when the Lease is lost.
func (c *leader) lead(process, leads context.Context, served <-chan struct{}) error {
	log := klog.FromContext(leads)
	if c.own != nil {
		if err := c.own.Renew(leads); err != nil {
			return err
		}
	}
	l, err := tls.Listen("tcp", c.options.agentsEndpoint, c.tls)
	if err != nil {
		return fault.New(fault.Invalid, "--agents-endpoint: %w", err)
	}
	operators, err := c.options.listenAdmin()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	c.led = true
	work, stop := context.WithCancel(context.WithoutCancel(leads))
	defer stop()
	c.mu.Lock()
	c.ctx, c.nodes, c.began = leads, map[string]chan struct{}{}, time.Now()
	for _, e := range c.entries {
		c.begin(e)
	}
	c.mu.Unlock()
	var group errgroup.Group
	group.Go(func() error {
		c.expect(leads)
		return nil
	})
	group.Go(func() error { return c.hub.Serve(work, l, c.manager) })
	about := admin.Version{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Node: c.options.identity, Installation: c.options.installation, Driver: cmp.Or(c.options.driverName, csi.DriverName)}
	group.Go(func() error { return operators.serve(leads, admin.Handler(c.manager, about, c.cluster)) })
	if c.own != nil {
		group.Go(func() error { c.own.Keep(leads); return nil })
	}
	c.standby.Store(nil)
	c.settled()
	c.ready.Store(true)
	log.Info("This controller leads", "agents", l.Addr().String())
	<-leads.Done()
	if process.Err() != nil {
		<-served
	} else {
		stop() // another one leads, or soon will: agents are its own now, and what runs here ends without them
	}
	c.stand("this controller leads no longer: ask the one that does")
	c.ready.Store(false)
	c.mu.Lock()
	c.ctx = nil // nothing more is begun
	c.mu.Unlock()
	c.opening.wait()
	err = c.manager.Close()
	stop()
	return errors.Join(err, group.Wait(), c.hub.Close())
}

// begin opens an entry, or changes what is open of it, on all nodes that have been here. The
// caller holds c.mu.
func (c *leader) begin(e domain.Entry) {
	if e.Scope == domain.ScopeShared {
		c.opening.one(c.ctx, e, "", c.told(""), nil)
		return
	}
	if len(c.opening.nodesOf(e.Name)) == 0 {
		c.manager.Unopened(e.Config(""), fault.New(fault.Unavailable, "no node that has it has an agent that is connected yet"))
	}
	for node, now := range c.nodes {
		if node != "" {
			c.opening.one(c.ctx, e, node, now, nil)
		}
	}
	if c.expected != nil { // it is known which nodes there are
		c.tellMissing(e)
	}
}

// follow makes the entries of a changed domains file those in force. One who does not lead
// only takes note.
func (c *leader) follow(_ context.Context, want []domain.Entry) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil {
		c.entries = want
		return nil
	}
	d := compare(c.entries, want)
	c.entries, err = d.keep(want, c.manager.AttachedIn)
	for _, e := range d.removed {
		c.opening.remove(c.ctx, e.Name, func() {
			c.mu.Lock()
			if !slices.ContainsFunc(c.entries, func(o domain.Entry) bool { return o.Name == e.Name }) { // else it is back already
				c.manager.Forget(e.Name)
			}
			c.mu.Unlock()
			for _, n := range c.hub.Nodes() { // they are told the domains that are left
				c.hub.Prepare(n)
			}
		})
	}
	for _, e := range append(d.changed, d.added...) {
		c.begin(e)
	}
	return err
}

// told is the channel on which those who open domains of a node ("": of all) hear that
// an agent has connected. The caller holds c.mu.
func (c *leader) told(node string) chan struct{} {
	ch := c.nodes[node]
	if ch == nil {
		ch = make(chan struct{}, len(c.entries))
		c.nodes[node] = ch
	}
	return ch
}

// joined is agent.HubConfig.Joined: the node's own domains are opened there, and all
// others that it reaches.
func (c *leader) joined(node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil {
		return
	}
	ctx, known := c.ctx, c.nodes[node] != nil
	own := c.told(node)
	for _, ch := range []chan struct{}{own, c.told("")} {
		for range c.entries { // each of those that wait
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}
	if !known {
		for _, e := range c.entries {
			if e.Scope == domain.ScopeNode {
				c.opening.one(ctx, e, node, own, nil)
			}
		}
	}
}

// open opens a domain on nodes.
func (c *leader) open(ctx context.Context, e domain.Entry, node string) (engine.Engine, func(context.Context, string) error, error) {
	kind, params := e.ForNode()
	d, err := c.hub.OpenDomain(ctx, agent.DomainSpec{Name: e.Name, Engine: kind, Params: params, Secrets: e.Secrets, Node: node})
	if err != nil {
		return nil, nil, fault.In(err, "open", e.Name, "")
	}
	return d, func(ctx context.Context, id string) error {
		ids, epoch, err := c.manager.IDs(id)
		if err == nil {
			d.Adopt(ctx, epoch, ids...)
		}
		return err
	}, nil
}

// tell is image.Config.Tell: events of Kubernetes.
func tell(t *kube.Teller) func(image.Event) {
	return func(e image.Event) {
		about := kube.Subject{Name: e.Name, Snapshot: e.Snapshot, Namespace: e.Described.Namespace, Claim: e.Described.Claim, Volume: e.Described.Volume}
		if e.Snapshot {
			about.Volume = "" // of its content
		}
		t.Tell(about, e.Warning, e.Reason, e.Message)
	}
}

// references is admin.Cluster.
type references struct {
	client *kube.Client
	driver string
}

// References implements admin.Cluster.
func (r references) References(ctx context.Context) ([]admin.Reference, error) {
	list, err := r.client.References(ctx, r.driver)
	out := make([]admin.Reference, 0, len(list))
	for _, x := range list {
		out = append(out, admin.Reference(x))
	}
	return out, err
}
