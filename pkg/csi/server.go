// Package csi serves the Container Storage Interface 1.13: Identity,
// Controller, GroupController, SnapshotMetadata and Node. Its services validate a request,
// translate it, call the Image Manager or the node, and translate the answer.
// They hold no logic of their own and return errors of package fault; one
// interceptor turns those into gRPC codes.
package csi

import (
	"context"
	"errors"
	"net"
	"regexp"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

const (
	// DriverName is what Quarry calls itself in CSI unless configured otherwise.
	DriverName = "csi.quarry.dev"
	// TopologyKey is the one topology key: a node's own name.
	TopologyKey = "csi.quarry.dev/node"
	// GenerationKey is the only key of a publish context: the attachment's generation.
	GenerationKey = "csi.quarry.dev/generation"
	// shutdownGrace is how long running calls may take to end after a stop is
	// asked for: less than the 30 s that Kubernetes gives a pod.
	shutdownGrace = 20 * time.Second
	// measureLimit is how long the domains may take to be measured: sidecars ask
	// with a limit of about 10 s, also while a server is dead.
	measureLimit = 8 * time.Second
)

// Manager is what the services use of image.Manager.
type Manager interface {
	CreateVolume(ctx context.Context, r image.CreateRequest) (image.Image, error)
	DeleteVolume(ctx context.Context, h image.Handle) error
	CreateSnapshot(ctx context.Context, r image.SnapshotRequest) (image.Image, error)
	DeleteSnapshot(ctx context.Context, h image.Handle) error
	CreateGroup(ctx context.Context, r image.GroupRequest) (image.Group, error)
	GetGroup(ctx context.Context, h image.Handle) (image.Group, error)
	DeleteGroup(ctx context.Context, h image.Handle) error
	Expand(ctx context.Context, h image.Handle, size, limit int64) (image.Image, error)
	Modify(ctx context.Context, h image.Handle, t image.Tuning, engineParams map[string]string) error
	Get(ctx context.Context, h image.Handle) (image.Image, error)
	List(ctx context.Context, mutable bool, after string, max int) ([]image.Image, bool, error)
	Attach(ctx context.Context, h image.Handle, node string, a image.Access, readOnly bool) (image.Attachment, error)
	Detach(ctx context.Context, h image.Handle, node string) error
	CheckAccess(ctx context.Context, h image.Handle, accesses []image.Access) error
	Capacity(ctx context.Context, domains []string, node string) (available, maxVolume, minVolume int64, err error)
	Topology(domain string) (node string, err error)
	Canonical(h image.Handle) image.Handle
	KnownDomains() []image.DomainInfo
	Allocated(ctx context.Context, h image.Handle, from int64, emit func([]engine.Extent) error) error
	Changed(ctx context.Context, base, target image.Handle, from int64, emit func([]engine.Extent) error) error
}

var _ Manager = (*image.Manager)(nil)

// Domains lists the domains that are configured, without asking their storage.
type Domains interface{ KnownDomains() []image.DomainInfo }

// Config of a Server.
type Config struct {
	// DriverName; "" means the constant DriverName.
	DriverName string
	Version    string
	// NodeID is the name of the node that this process runs on: the CSI node ID
	// and the value of TopologyKey. 1 to 63 characters as in a Kubernetes label's value.
	NodeID string
	// Manager serves Controller, GroupController and SnapshotMetadata; nil: they are not
	// served here.
	Manager Manager
	// Node serves Node; nil: it is not served here.
	Node Node
	// Domains are those that Node tells the health of; nil: Manager's.
	Domains Domains
	// Standby says why this process only waits: it then answers Identity alone, and Probe
	// that it is not ready, so that sidecars wait, too. nil, or a nil error: it works.
	Standby func() error
	// Settled is closed when this process works, or will not any more. Until then Probe
	// takes its time: sidecars ask again each second, and log each answer. nil: it does not.
	Settled <-chan struct{}
	// KnownNode says whether a volume may be attached to a node: fault.NotFound
	// if there is no such node. nil: NodeID is the only one.
	KnownNode func(ctx context.Context, node string) error
	// Tracer makes spans of calls; nil: none.
	Tracer trace.TracerProvider
	// Metrics takes the histogram of calls; nil: none.
	Metrics prometheus.Registerer
}

// Server serves CSI.
type Server struct {
	cfg   Config
	calls *prometheus.HistogramVec // nil without Config.Metrics
	// asking makes one question of all that are asked about the same domains at a
	// time: while a storage does not answer, at most one waits for it.
	asking singleflight.Group

	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedSnapshotMetadataServer
	csi.UnimplementedNodeServer
}

// New makes a Server. The error is fault.Invalid and names the field.
func New(cfg Config) (*Server, error) {
	if cfg.DriverName == "" {
		cfg.DriverName = DriverName
	}
	if cfg.Node != nil && (!label.MatchString(cfg.NodeID) || len(cfg.NodeID) > 63) {
		return nil, fault.New(fault.Invalid, "node ID %q: 1 to 63 letters, digits, '-', '_' and '.' are allowed, beginning and ending with a letter or digit", cfg.NodeID)
	}
	if cfg.Manager == nil && cfg.Node == nil {
		return nil, fault.New(fault.Invalid, "a CSI server needs an Image Manager or a node")
	}
	if cfg.Domains == nil {
		cfg.Domains = cfg.Manager
	}
	if cfg.Node != nil && cfg.Domains == nil {
		return nil, fault.New(fault.Invalid, "a CSI server of a node needs to know the domains")
	}
	if cfg.Standby == nil {
		cfg.Standby = func() error { return nil }
	}
	if cfg.KnownNode == nil {
		cfg.KnownNode = func(_ context.Context, node string) error {
			if node != cfg.NodeID {
				return fault.New(fault.NotFound, "node_id %q is not a node of this installation: the only one is %q", node, cfg.NodeID)
			}
			return nil
		}
	}
	s := &Server{cfg: cfg}
	if cfg.Metrics != nil {
		s.calls = newCallHistogram()
		if err := cfg.Metrics.Register(s.calls); err != nil {
			return nil, fault.New(fault.Internal, "registering the metrics of CSI calls: %w", err)
		}
	}
	return s, nil
}

// capacity is what can be promised, in bytes; see image.Manager.Capacity.
type capacity struct{ available, largest, smallest int64 }

// measure asks the Image Manager for capacity, which asks the storage, but never
// waits long for a dead server: fault.Unavailable then.
func (s *Server) measure(ctx context.Context, domains []string, node string) (capacity, error) {
	answer := s.asking.DoChan(strings.Join(domains, ",")+" "+node, func() (any, error) {
		var c capacity
		var err error
		c.available, c.largest, c.smallest, err = s.cfg.Manager.Capacity(context.WithoutCancel(ctx), domains, node)
		return c, err
	})
	limit := time.NewTimer(measureLimit)
	defer limit.Stop()
	select {
	case r := <-answer:
		return r.Val.(capacity), r.Err
	case <-limit.C:
		return capacity{}, fault.New(fault.Unavailable, "the storage of a domain does not answer within %s", measureLimit)
	case <-ctx.Done():
		return capacity{}, ctx.Err()
	}
}

// label is the alphabet of a topology segment (CSI) and of a label's value (Kubernetes).
var label = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9._-]*[a-zA-Z0-9])?$`)

// Serve answers calls at endpoint, "unix:///path/of/socket", until ctx ends;
// then running calls may finish for a short time. A socket that nobody serves
// any more is replaced. fault.InUse: another process serves there.
// fault.Invalid: the endpoint is none, or something else is there.
func (s *Server) Serve(ctx context.Context, endpoint string) error {
	l, err := listen(endpoint)
	if err != nil {
		return err
	}
	return s.serve(ctx, l)
}

func (s *Server) serve(ctx context.Context, l net.Listener) error {
	log := klog.FromContext(ctx)
	opts := []grpc.ServerOption{grpc.UnaryInterceptor(s.intercept(log)), grpc.StreamInterceptor(s.interceptStream(log))}
	if s.cfg.Tracer != nil {
		opts = append(opts, grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(s.cfg.Tracer))))
	}
	g := grpc.NewServer(opts...)
	csi.RegisterIdentityServer(g, s)
	if s.cfg.Manager != nil {
		csi.RegisterControllerServer(g, s)
		csi.RegisterGroupControllerServer(g, s)
		csi.RegisterSnapshotMetadataServer(g, s)
	}
	if s.cfg.Node != nil {
		csi.RegisterNodeServer(g, s)
	}

	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	log.Info("Serving CSI", "driver", s.cfg.DriverName, "version", s.cfg.Version, "node", s.cfg.NodeID, "address", l.Addr().String())
	select {
	case err := <-served:
		return fault.Wrap(fault.Internal, err)
	case <-ctx.Done():
	}
	hard := time.AfterFunc(shutdownGrace, g.Stop)
	defer hard.Stop()
	g.GracefulStop()
	err := <-served
	if errors.Is(err, grpc.ErrServerStopped) { // before it had begun
		err = nil
	}
	return fault.Wrap(fault.Internal, err)
}

// listen makes the socket: whoever may connect commands the storage, so it is
// for the owner and the group only.
func listen(endpoint string) (net.Listener, error) {
	e, err := admin.ParseEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	return e.ListenGroup()
}
