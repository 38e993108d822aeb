package kube

import (
	"context"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// What the API server says of a token that is bound to a pod; the node since
// Kubernetes 1.30 (KEP-4193). Only the API server's own packages have the names.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
)

// AdmitConfig says whose tokens are good.
type AdmitConfig struct {
	// Namespace and ServiceAccount of the agents.
	Namespace, ServiceAccount string
	// Audience that tokens must be for.
	Audience string
}

// Admitter lets agents in. It is safe for concurrent use.
type Admitter struct {
	client *Client
	cfg    AdmitConfig
}

// NewAdmitter makes an Admitter. fault.Invalid: a field is empty.
func NewAdmitter(client *Client, cfg AdmitConfig) (*Admitter, error) {
	if err := filled("Namespace", cfg.Namespace, "ServiceAccount", cfg.ServiceAccount, "Audience", cfg.Audience); err != nil {
		return nil, err
	}
	return &Admitter{client: client, cfg: cfg}, nil
}

// Admit returns nil if a token proves that its bearer is the agent of a node:
// a token for our audience, of the agents' ServiceAccount, bound to a pod that
// runs on that node. It asks the API server each time: a token ends with its
// pod. fault.Permission: it proves something else, and the error says what;
// fault.Unavailable: the API server cannot be asked. The token is in no error.
func (a *Admitter) Admit(ctx context.Context, token, node string) error {
	refused := func(why string, args ...any) error {
		return fault.New(fault.Permission, "the agent of node %q is not let in: "+why, append([]any{node}, args...)...)
	}
	switch {
	case node == "":
		return refused("it does not say which node that is")
	case token == "":
		return refused("it has sent no token")
	}
	status, err := a.review(ctx, token)
	if err != nil {
		return failed(err, "cannot have the token of the agent of node %q reviewed", node)
	}
	if !status.Authenticated {
		return refused("the API server does not accept its token: %s", hide(reason(status.Error), token))
	}
	if !slices.Contains(status.Audiences, a.cfg.Audience) {
		return refused("its token is for the audiences %q, not for %q: see the serviceAccountToken volume of its pod", status.Audiences, a.cfg.Audience)
	}
	if want := "system:serviceaccount:" + a.cfg.Namespace + ":" + a.cfg.ServiceAccount; status.User.Username != want {
		return refused("its token is of user %q, not of %q", status.User.Username, want)
	}
	for _, key := range []string{extraPodName, extraPodUID} {
		if v := []string(status.User.Extra[key]); len(v) != 1 || v[0] == "" {
			return refused("its token is not bound to a pod (%s is %q): use a serviceAccountToken volume of its pod", key, v)
		}
	}
	switch on := []string(status.User.Extra[extraNodeName]); {
	case len(on) == 0:
		return refused("its token does not say which node its pod runs on: that needs Kubernetes 1.30 or newer")
	case len(on) > 1 || on[0] != node:
		return refused("its token is of a pod on the node %q", on)
	}
	return nil
}

func (a *Admitter) review(ctx context.Context, token string) (authenticationv1.TokenReviewStatus, error) {
	// With -v=8 client-go logs what it sends and receives: here, the token.
	quiet := klog.NewContext(ctx, klog.Logger{})
	r, err := a.client.api.AuthenticationV1().TokenReviews().Create(quiet, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{a.cfg.Audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		if text := err.Error(); strings.Contains(text, token) {
			err = fault.New(kindOf(err), "%s", hide(text, token))
		}
		return authenticationv1.TokenReviewStatus{}, err
	}
	return r.Status, nil
}

// hide takes a token out of the words of others.
func hide(text, token string) string { return strings.ReplaceAll(text, token, "[token]") }

func reason(text string) string {
	if text == "" {
		return "it does not say why"
	}
	return text
}
