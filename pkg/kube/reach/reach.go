// Package reach is how a person's program reaches the controller of a cluster: by
// that person's own kubeconfig and rights, through a port-forward to the pod that leads.
// No port is opened on the person's machine.
//
// It uses no typed client: each of those brings all of Kubernetes' types into the program.
package reach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubeconfigs with auth-provider: oidc
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const (
	// Selector finds the controller's pods.
	Selector = "app.kubernetes.io/name=quarry,app.kubernetes.io/component=controller"
	// lease says which of them leads: its holder is the pod's name.
	lease = "quarry-controller"
	// namespace where they are looked for by somebody who may not look in all.
	namespace = "quarry-system"
	// portName and port are where a controller serves operators: that of a container
	// port of that name, else the usual one.
	portName = "admin"
	port     = 9811
	// requestLimit is how long the API server may take for one answer.
	requestLimit = 30 * time.Second
)

// Flags are those of kubectl that say which cluster, and as whom.
type Flags struct {
	rules     *clientcmd.ClientConfigLoadingRules
	overrides clientcmd.ConfigOverrides
	bound     *pflag.FlagSet
	names     []string
}

// Bind adds them to a program's flags. Those that few use are not shown in its help.
func (f *Flags) Bind(fs *pflag.FlagSet) {
	f.rules = clientcmd.NewDefaultClientConfigLoadingRules()
	f.bound = pflag.NewFlagSet("kubernetes", pflag.ContinueOnError)
	f.bound.StringVar(&f.rules.ExplicitPath, clientcmd.RecommendedConfigPathFlag, "", "the kubeconfig file of the cluster")
	clientcmd.BindOverrideFlags(&f.overrides, f.bound, clientcmd.RecommendedConfigOverrideFlags(""))
	f.bound.Lookup(clientcmd.FlagContext).Usage = "the context of the kubeconfig"
	f.bound.Lookup(clientcmd.FlagNamespace).Usage = "the namespace of the controller (default: where its pods are)"
	shown := []string{clientcmd.RecommendedConfigPathFlag, clientcmd.FlagContext, clientcmd.FlagNamespace}
	f.bound.VisitAll(func(flag *pflag.Flag) {
		flag.Hidden = !slices.Contains(shown, flag.Name)
		f.names = append(f.names, flag.Name)
	})
	fs.AddFlagSet(f.bound)
}

// Given says whether one of them was.
func (f *Flags) Given() bool {
	return slices.ContainsFunc(f.names, func(name string) bool { return f.bound.Lookup(name).Changed })
}

// Controller is the one of a cluster that leads. Close it after use.
type Controller struct {
	Namespace, Pod string

	context string // of the kubeconfig
	port    int
	cfg     *rest.Config
	api     rest.Interface
	link    link
}

// String names it for people.
func (c *Controller) String() string {
	return "pod " + c.Namespace + "/" + c.Pod + " (" + c.cluster() + ")"
}

// cluster names the cluster for people.
func (c *Controller) cluster() string {
	if c.context == "" { // it is said by flags, or by the pod that this runs in
		return c.cfg.Host
	}
	return fmt.Sprintf("context %q", c.context)
}

// Find finds the controller that leads. fault.Invalid: there is no such cluster in the
// kubeconfig, or it has several Quarries; fault.NotFound: no controller;
// fault.Permission: this person may not look; fault.Unavailable: the cluster does not answer, or no
// controller leads.
func Find(ctx context.Context, f *Flags) (*Controller, error) {
	config := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(f.rules, &f.overrides)
	raw, err := config.RawConfig()
	if err != nil {
		return nil, fault.New(fault.Invalid, "kubeconfig: %w", err)
	}
	name := raw.CurrentContext
	if f.overrides.CurrentContext != "" {
		name = f.overrides.CurrentContext
	}
	cfg, err := config.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, fault.New(fault.Invalid, "no kubeconfig names a cluster: give --kubeconfig or KUBECONFIG")
	}
	if err != nil {
		return nil, fault.New(fault.Invalid, "kubeconfig: %w", err)
	}
	in, said, err := config.Namespace()
	if err != nil {
		return nil, fault.New(fault.Invalid, "kubeconfig: %w", err)
	}
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(errorsOnly()).WithoutConversion()
	cfg.UserAgent = "kubectl-quarry"
	api, err := rest.UnversionedRESTClientFor(cfg)
	if err != nil {
		return nil, fault.New(fault.Invalid, "kubeconfig: context %q cannot be used: %w", name, err)
	}
	c := &Controller{context: name, port: port, cfg: cfg, api: api}
	pods, err := c.pods(ctx, in, said)
	if err != nil {
		return nil, err
	}
	return c, c.pick(ctx, pods)
}

// errorsOnly are the types that client-go itself has to know.
func errorsOnly() *runtime.Scheme {
	s := runtime.NewScheme()
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	return s
}

// pod is as much of one as counts here.
type pod struct {
	Metadata struct{ Name, Namespace string }
	Spec     struct {
		Containers []struct {
			Ports []struct {
				Name          string
				ContainerPort int
			}
		}
	}
	Status struct{ Phase string }
}

// pods are the controller's that run: of one namespace if that was said, else of all, or of
// those that this person may look into.
func (c *Controller) pods(ctx context.Context, in string, said bool) ([]pod, error) {
	places := []string{""}
	if said {
		places = []string{in}
	}
	found, err := c.podsOf(ctx, places[0])
	if apierrors.IsForbidden(err) && !said {
		places = slices.Compact([]string{in, namespace})
		for _, place := range places {
			var more []pod
			if more, err = c.podsOf(ctx, place); err == nil {
				found = append(found, more...)
			}
		}
		if len(found) > 0 {
			err = nil
		}
	}
	if err != nil {
		return nil, c.failed(err, "cannot look for Quarry's controller", "list", "pods", "in its namespace, and say which one that is with --namespace")
	}
	var spaces []string
	for _, p := range found {
		spaces = append(spaces, p.Metadata.Namespace)
	}
	slices.Sort(spaces)
	spaces = slices.Compact(spaces)
	if len(spaces) > 1 {
		return nil, fault.New(fault.Invalid, "the cluster (%s) has Quarry in several namespaces: say which one with --namespace: %s", c.cluster(), strings.Join(spaces, ", "))
	}
	if len(found) == 0 {
		where := "in any namespace"
		if places[0] != "" {
			where = "in namespace " + strings.Join(places, " or ")
		}
		return nil, fault.New(fault.NotFound, "no pod of Quarry's controller runs %s of the cluster (%s; labels %s)", where, c.cluster(), Selector)
	}
	return found, nil
}

func (c *Controller) podsOf(ctx context.Context, namespace string) ([]pod, error) {
	path := "/api/v1/pods"
	if namespace != "" {
		path = "/api/v1/namespaces/" + namespace + "/pods"
	}
	var list struct{ Items []pod }
	err := c.get(ctx, path, map[string]string{"labelSelector": Selector}, &list)
	return slices.DeleteFunc(list.Items, func(p pod) bool { return p.Status.Phase != "Running" }), err
}

func (c *Controller) get(ctx context.Context, path string, params map[string]string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	r := c.api.Get().AbsPath(path).SetHeader("Accept", "application/json")
	for k, v := range params {
		r = r.Param(k, v)
	}
	result := r.Do(ctx)
	if err := result.Error(); err != nil {
		return err
	}
	data, err := result.Raw()
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// pick takes the pod that holds the Lease.
func (c *Controller) pick(ctx context.Context, pods []pod) error {
	c.Namespace = pods[0].Metadata.Namespace
	var l struct {
		Spec struct{ HolderIdentity string }
	}
	err := c.get(ctx, "/apis/coordination.k8s.io/v1/namespaces/"+c.Namespace+"/leases/"+lease, nil, &l)
	leader := pods[0]
	switch {
	case (apierrors.IsForbidden(err) || apierrors.IsNotFound(err)) && len(pods) == 1: // who else
	case err != nil:
		return c.failed(err, fmt.Sprintf("cannot tell which of %d controllers leads", len(pods)), "get", "leases.coordination.k8s.io", "named "+lease+" in namespace "+c.Namespace)
	default:
		i := slices.IndexFunc(pods, func(p pod) bool { return p.Metadata.Name == l.Spec.HolderIdentity })
		if i < 0 {
			return fault.New(fault.Unavailable, "no controller in namespace %s leads now (the Lease %s names %q, which does not run): try again in a moment", c.Namespace, lease, l.Spec.HolderIdentity)
		}
		leader = pods[i]
	}
	c.Pod = leader.Metadata.Name
	for _, container := range leader.Spec.Containers {
		for _, p := range container.Ports {
			if p.Name == portName {
				c.port = p.ContainerPort
			}
		}
	}
	return nil
}

// failed says what could not be done, why, and which right would help.
func (c *Controller) failed(err error, what, verb, resource, where string) error {
	switch {
	case errors.Is(err, context.Canceled):
		return fault.New(fault.Canceled, "%s: %w", what, err)
	case apierrors.IsUnauthorized(err):
		return fault.New(fault.Permission, "%s: the cluster (%s) does not accept these credentials: %w", what, c.cluster(), err)
	case apierrors.IsForbidden(err):
		return fault.New(fault.Permission, "%s: %w: you need the right to %s %s %s", what, err, verb, resource, where)
	case apierrors.IsNotFound(err):
		return fault.New(fault.NotFound, "%s: %w", what, err)
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return fault.New(fault.Unavailable, "%s: %w", what, err)
	}
	return fault.New(fault.Unavailable, "%s: the cluster (%s) cannot be reached: %w", what, c.cluster(), err)
}
