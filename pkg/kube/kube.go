// Package kube is what Quarry asks of Kubernetes: who an agent is
// (TokenReview), which controller leads (Lease), which installation this is,
// which Nodes there are and whether one is out of service, and, on a node, that the
// kubelet takes the driver up, and a Secret for the controller's own certificate.
//
// It keeps nothing and caches nothing: every answer is of the moment it was
// asked for. Errors of the API get their kind in one place, kindOf.
package kube

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"
	coordinationv1client "k8s.io/client-go/kubernetes/typed/coordination/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// requestLimit is how long the API server may take for one answer. Nothing is
// watched here: no request is long.
const requestLimit = 10 * time.Second

// API is the part of Kubernetes that Quarry uses. kubernetes.Interface has it.
type API interface {
	AuthenticationV1() authenticationv1client.AuthenticationV1Interface
	CoordinationV1() coordinationv1client.CoordinationV1Interface
	CoreV1() corev1client.CoreV1Interface
}

// Client asks Kubernetes. It is safe for concurrent use.
type Client struct{ api API }

// New makes a Client of an API, such as that of a test.
func New(api API) *Client { return &Client{api: api} }

// Connect makes a Client of the cluster that a kubeconfig file names, or of
// the one this pod runs in when there is none (""). It sends nothing yet.
// fault.Invalid: there is no such cluster to be found.
func Connect(kubeconfig string) (*Client, error) {
	cfg, err := load(kubeconfig)
	if err != nil {
		return nil, err
	}
	cfg.UserAgent = userAgent()
	cfg.Timeout = requestLimit
	// The API server itself shares its time out among its clients. A limit here
	// would have the Lease wait behind the agents, which all come back at once
	// after a takeover.
	cfg.QPS = -1
	api, err := newClients(cfg)
	if err != nil {
		return nil, fault.New(fault.Invalid, "%s cannot be used: %w", origin(kubeconfig), err)
	}
	return New(api), nil
}

func load(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		cfg, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, fault.New(fault.Invalid, "not in a cluster: give --kubeconfig")
		}
		if err != nil {
			return nil, fault.New(fault.Invalid, "this pod has no credentials for its cluster: %w: see automountServiceAccountToken, or give --kubeconfig", err)
		}
		return cfg, nil
	}
	// Not clientcmd.BuildConfigFromFlags: it takes the pod's own cluster when the
	// file has none.
	rules := clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig}
	raw, err := rules.Load()
	if err != nil {
		return nil, fault.New(fault.Invalid, "%s: %w", origin(kubeconfig), err)
	}
	cfg, err := clientcmd.NewDefaultClientConfig(*raw, &clientcmd.ConfigOverrides{}).ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, fault.New(fault.Invalid, "%s names no cluster: it needs clusters, contexts and current-context", origin(kubeconfig))
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "%s: %w", origin(kubeconfig), err)
	}
	return cfg, nil
}

// origin names where the configuration came from, for errors.
func origin(kubeconfig string) string {
	if kubeconfig == "" {
		return "the configuration of this pod's cluster"
	}
	return "kubeconfig " + kubeconfig
}

// userAgent is what the API server's log says of us.
func userAgent() string {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		version = info.Main.Version
	}
	return fmt.Sprintf("quarry/%s (%s/%s)", version, runtime.GOOS, runtime.GOARCH)
}

// clients are those of the three groups that are used: a kubernetes.Clientset
// would bring more than fifty others into every binary.
type clients struct {
	authentication *authenticationv1client.AuthenticationV1Client
	coordination   *coordinationv1client.CoordinationV1Client
	core           *corev1client.CoreV1Client
}

func newClients(cfg *rest.Config) (*clients, error) {
	h, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, err
	}
	var c clients
	var errs [3]error
	c.authentication, errs[0] = authenticationv1client.NewForConfigAndClient(cfg, h)
	c.coordination, errs[1] = coordinationv1client.NewForConfigAndClient(cfg, h)
	c.core, errs[2] = corev1client.NewForConfigAndClient(cfg, h)
	for _, err := range errs {
		if err != nil {
			return nil, err // they fail for the same reason: one is enough
		}
	}
	return &c, nil
}

func (c *clients) AuthenticationV1() authenticationv1client.AuthenticationV1Interface {
	return c.authentication
}

func (c *clients) CoordinationV1() coordinationv1client.CoordinationV1Interface {
	return c.coordination
}

func (c *clients) CoreV1() corev1client.CoreV1Interface { return c.core }

// Installation is the UID of the namespace kube-system: it is there in every
// cluster, stays for its life, and differs between any two.
func (c *Client) Installation(ctx context.Context) (string, error) {
	ns, err := c.api.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	if err != nil {
		return "", failed(err, "cannot read the namespace %s, whose UID names the installation", metav1.NamespaceSystem)
	}
	if ns.UID == "" {
		return "", fault.New(fault.Internal, "the namespace %s has no UID: Kubernetes promises one", metav1.NamespaceSystem)
	}
	return string(ns.UID), nil
}
