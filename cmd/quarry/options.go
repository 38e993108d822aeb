package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

const machineID = "/etc/machine-id"

// sockets of a process, as said and as checked.
type sockets struct {
	endpoint, metricsEndpoint string
	adminEndpoints            []string

	csi     admin.Endpoint
	admin   []admin.Endpoint
	metrics string // host:port, or empty
}

// check reads what was said, endpoints for operators by parse.
func (s *sockets) check(parse func(string) (admin.Endpoint, error)) (err error) {
	if s.csi, err = admin.ParseEndpoint(s.endpoint); err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	for _, said := range s.adminEndpoints {
		e, err := parse(said)
		if err != nil {
			return fmt.Errorf("--admin-endpoint: %w", err)
		}
		if e == s.csi {
			return fault.New(fault.Invalid, "--endpoint and --admin-endpoint are both %s: they must differ", s.csi)
		}
		s.admin = append(s.admin, e)
	}
	if s.metrics, err = loopbackByDefault(s.metricsEndpoint); err != nil {
		return fmt.Errorf("--metrics-endpoint: %w", err)
	}
	return nil
}

// listen makes the socket of metrics, nil if there is to be none, and sees to it that
// that of CSI can be made.
func (s *sockets) listen() (net.Listener, error) {
	if err := s.csi.Unused(); err != nil || s.metrics == "" {
		return nil, err
	}
	l, err := net.Listen("tcp", s.metrics)
	if err != nil {
		return nil, fault.New(fault.Invalid, "--metrics-endpoint: %w", err)
	}
	return l, nil
}

// listenAdmin makes the sockets of operators.
func (s *sockets) listenAdmin() (adminSockets, error) {
	var all adminSockets
	for _, e := range s.admin {
		l, err := e.Listen()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("--admin-endpoint: %w", err), all.close())
		}
		all = append(all, l)
	}
	return all, nil
}

// adminSockets are where operators ask.
type adminSockets []net.Listener

// serve answers on all of them until ctx ends.
func (all adminSockets) serve(ctx context.Context, h http.Handler) error {
	var group errgroup.Group
	for _, l := range all {
		group.Go(func() error { return admin.Serve(ctx, l, admin.Guard(l, h), adminGrace) })
	}
	return group.Wait()
}

func (all adminSockets) close() error {
	var errs []error
	for _, l := range all {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// options of quarry standalone, as said and as checked.
type options struct {
	sockets
	nodeID, domains, installation string
	kubeletDir, driverName        string
}

func standaloneCommand() *cobra.Command {
	o := &options{}
	cmd := &cobra.Command{
		Use: "standalone", Short: "Run controller, node and engines in one process, on one machine, without Kubernetes",
		Long: `Run controller, node and engines in one process, on one machine. It needs root,
and no Kubernetes. It logs on stderr, ends with status 0 on SIGTERM after what
is being answered was finished, and with status 1 and one line on stderr when
something about its configuration is wrong.

The domains of one installation belong to it: another one refuses them. Without
--installation the identity is made of this machine's ` + machineID + `, so
that a restart, and another process on this machine, is the same installation.
Name it yourself when a domain is to follow the data to another machine.`,
		Example: `  quarry standalone --domains /etc/quarry/domains.yaml --endpoint unix:///run/quarry/csi.sock`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(machineID); err != nil {
				return err
			}
			return standalone(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.endpoint, "endpoint", "unix:///run/quarry/csi.sock", "where to serve CSI: unix:///path")
	f.StringSliceVar(&o.adminEndpoints, "admin-endpoint", []string{"unix:///run/quarry/admin.sock"}, "where to serve kubectl quarry: unix:///path; empty: nowhere")
	f.StringVar(&o.metricsEndpoint, "metrics-endpoint", "", "where to serve /metrics, /healthz and /readyz: ADDRESS:PORT, or :PORT for 127.0.0.1; empty: nowhere")
	f.StringVar(&o.nodeID, "node-id", "", "name of this node (default: the host's name)")
	f.StringVar(&o.domains, "domains", "/etc/quarry/domains.yaml", "the domains file")
	f.StringVar(&o.installation, "installation", "", "identity that owns the domains (default: made of "+machineID+")")
	f.StringVar(&o.kubeletDir, "kubelet-dir", "", "refuse to stage or publish outside of this directory; set it to /var/lib/kubelet under a kubelet (default: no restriction)")
	f.StringVar(&o.driverName, "driver-name", "", "name of the CSI driver (default: csi.quarry.dev)")
	return cmd
}

// check fills in what was not said and refuses what cannot work.
func (o *options) check(machineID string) (err error) {
	if err := o.sockets.check(admin.ParseEndpoint); err != nil {
		return err
	}
	if o.nodeID, err = checkNodeID(o.nodeID); err != nil {
		return err
	}
	if o.kubeletDir != "" && !filepath.IsAbs(o.kubeletDir) {
		return fault.New(fault.Invalid, "--kubelet-dir %q must be an absolute path", o.kubeletDir)
	}
	if o.installation == "" {
		o.installation, err = machineInstallation(machineID)
		return err
	}
	if len(o.installation) > 128 || strings.ContainsFunc(o.installation, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return fault.New(fault.Invalid, "--installation %q is not allowed: 1 to 128 ASCII characters without spaces", o.installation)
	}
	return nil
}

// checkNodeID gives the node's name, "" being that of the host. It becomes part of a
// tag's name.
func checkNodeID(name string) (_ string, err error) {
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			return "", fault.New(fault.Invalid, "--node-id is not given and the host's name is not known: %w", err)
		}
	}
	if err := engine.CheckName("node", name); err != nil || len(name) > 63 {
		return "", fault.New(fault.Invalid, "--node-id %q is not allowed: 1 to 63 characters of [a-z0-9._-], beginning with a letter or digit", name)
	}
	return name, nil
}

// machineInstallation makes an identity of machine-id(5), which asks not to be
// shown itself.
func machineInstallation(path string) (string, error) {
	data, err := os.ReadFile(path)
	id := strings.TrimSpace(string(data))
	if err != nil || len(id) != 32 {
		if err == nil {
			err = fmt.Errorf("%s does not hold 32 hexadecimal digits", path)
		}
		return "", fault.New(fault.Invalid, "this machine has no identity: give --installation, a name that stays the same: %w", err)
	}
	sum := sha256.Sum256([]byte("quarry installation " + id))
	return "machine-" + hex.EncodeToString(sum[:8]), nil
}

// loopbackByDefault completes an address: metrics name volumes and claims, so
// that only a host given on purpose shows them to others.
func loopbackByDefault(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", fault.New(fault.Invalid, "%q: must be ADDRESS:PORT, or :PORT for 127.0.0.1", s)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", fault.New(fault.Invalid, "%q: port %q: must be 0 to 65535", s, port)
	} else if host == "" {
		return fmt.Sprintf("127.0.0.1:%d", n), nil
	}
	return s, nil
}
