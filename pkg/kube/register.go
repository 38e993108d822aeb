package kube

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// PluginsRegistry is where a kubelet looks for plugins, unless its --root-dir
// is another one.
const PluginsRegistry = "/var/lib/kubelet/plugins_registry"

// registeredVersion is what kubelets ask for: they understand CSI 1.x, and all
// drivers that use node-driver-registrar say this.
const registeredVersion = "1.0.0"

// RegistrationConfig of a CSI driver on a node.
type RegistrationConfig struct {
	// SocketDir is the kubelet's plugins_registry as this process sees it.
	// "": PluginsRegistry.
	SocketDir  string
	DriverName string
	// Endpoint is the absolute path of the CSI socket as the kubelet sees it.
	Endpoint string
	// Versions of the registration that are offered. None: "1.0.0".
	Versions []string
}

// Register offers the driver to the kubelet of this node until ctx ends, on
// the socket <SocketDir>/<DriverName>-reg.sock, which only this user may use;
// then it removes the socket, whereupon the kubelet forgets the driver. The
// kubelet comes back when it was restarted.
//
// The CSI socket must be served before: the kubelet asks there at once.
// registered is told each outcome: nil, or fault.Unavailable with what the
// kubelet says; the kubelet tries again by itself. It may be nil, must not
// wait, and is not called after Register has returned.
//
// fault.Invalid: a field is wrong. fault.Unavailable: SocketDir is not there.
// fault.InUse: another process serves the socket.
func Register(ctx context.Context, cfg RegistrationConfig, registered func(error)) error {
	if cfg.SocketDir == "" {
		cfg.SocketDir = PluginsRegistry
	}
	if len(cfg.Versions) == 0 {
		cfg.Versions = []string{registeredVersion}
	}
	if err := cfg.check(); err != nil {
		return err
	}
	socket, err := admin.ParseEndpoint(filepath.Join(cfg.SocketDir, cfg.DriverName+"-reg.sock"))
	if err != nil {
		return err
	}
	l, err := socket.Listen()
	if err != nil {
		return err
	}
	log := klog.FromContext(ctx).WithValues("driver", cfg.DriverName)
	g := grpc.NewServer(grpc.WaitForHandlers(true))
	registration.RegisterRegistrationServer(g, &registrar{cfg: cfg, log: log, registered: registered})
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	log.Info("Offering the driver to the kubelet", "socket", socket.Path(), "endpoint", cfg.Endpoint)
	select {
	case err = <-served:
		g.Stop()
	case <-ctx.Done():
		g.Stop() // closes the socket, which removes it
		err = <-served
	}
	if err == nil || errors.Is(err, grpc.ErrServerStopped) { // before it had begun
		return nil
	}
	return fault.New(fault.Internal, "serving %s: %w", socket.Path(), err)
}

func (c *RegistrationConfig) check() error {
	if c.DriverName == "" || strings.ContainsAny(c.DriverName, "/\x00") || strings.HasPrefix(c.DriverName, ".") {
		return fault.New(fault.Invalid, "DriverName %q: it must be the name of a CSI driver, which is part of a file's name", c.DriverName)
	}
	if !filepath.IsAbs(c.Endpoint) {
		return fault.New(fault.Invalid, "Endpoint %q: it must be the absolute path of the CSI socket as the kubelet sees it", c.Endpoint)
	}
	if slices.Contains(c.Versions, "") {
		return fault.New(fault.Invalid, "Versions %q: a version cannot be empty", c.Versions)
	}
	if info, err := os.Stat(c.SocketDir); err != nil {
		return fault.New(fault.Unavailable, "the kubelet's directory of plugins cannot be used: %w: its plugins_registry must be mounted there", err)
	} else if !info.IsDir() {
		return fault.New(fault.Unavailable, "the kubelet's directory of plugins cannot be used: %s is no directory: its plugins_registry must be mounted there", c.SocketDir)
	}
	return nil
}

// registrar answers the kubelet.
type registrar struct {
	registration.UnimplementedRegistrationServer
	cfg        RegistrationConfig
	log        klog.Logger
	registered func(error)
}

// GetInfo says what is offered.
func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: r.cfg.DriverName, Endpoint: r.cfg.Endpoint, SupportedVersions: r.cfg.Versions,
	}, nil
}

// NotifyRegistrationStatus hears what became of it.
func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	var err error
	if s.GetPluginRegistered() {
		r.log.Info("The kubelet has registered the driver")
	} else {
		err = fault.New(fault.Unavailable, "the kubelet has not registered the driver %s at %s: %s", r.cfg.DriverName, r.cfg.Endpoint, reason(s.GetError()))
		r.log.Error(err, "The kubelet has not registered the driver; it will try again")
	}
	if r.registered != nil {
		r.registered(err)
	}
	return &registration.RegistrationStatusResponse{}, nil
}
