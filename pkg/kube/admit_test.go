package kube_test

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube"
)

const (
	token    = "header.payload.signature"
	audience = "quarry-controller"
	agents   = "system:serviceaccount:quarry:quarry-node"
	podName  = "authentication.kubernetes.io/pod-name"
	podUID   = "authentication.kubernetes.io/pod-uid"
	nodeName = "authentication.kubernetes.io/node-name"
)

// good is what the API server says of an agent's token on node n1.
func good() *authenticationv1.TokenReviewStatus {
	return &authenticationv1.TokenReviewStatus{
		Authenticated: true,
		Audiences:     []string{audience},
		User: authenticationv1.UserInfo{
			Username: agents,
			Extra: map[string]authenticationv1.ExtraValue{
				podName: {"quarry-node-x"}, podUID: {"p-1"}, nodeName: {"n1"},
				"authentication.kubernetes.io/credential-id": {"JTI=1"},
			},
		},
	}
}

// admitter asks an API that answers with status, or with err, and notes what it is asked.
func admitter(t *testing.T, status *authenticationv1.TokenReviewStatus, err error) (*kube.Admitter, *[]authenticationv1.TokenReviewSpec) {
	t.Helper()
	asked := &[]authenticationv1.TokenReviewSpec{}
	api := fake.NewClientset()
	api.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		review := a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		*asked = append(*asked, review.Spec)
		if err != nil {
			return true, nil, err
		}
		review.Status = *status
		return true, review, nil
	})
	return newAdmitter(t, kube.New(api)), asked
}

func newAdmitter(t *testing.T, client *kube.Client) *kube.Admitter {
	t.Helper()
	a, err := kube.NewAdmitter(client, kube.AdmitConfig{Namespace: "quarry", ServiceAccount: "quarry-node", Audience: audience})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// silent wants a token in no error and no log.
func silent(t *testing.T, err error, logs string) {
	t.Helper()
	if err != nil && strings.Contains(err.Error(), token) {
		t.Errorf("the error has the token: %v", err)
	}
	if strings.Contains(logs, token) {
		t.Errorf("the log has the token:\n%s", logs)
	}
}

func TestAnAgentIsLetInOnItsOwnNode(t *testing.T) {
	a, asked := admitter(t, good(), nil)
	for range 2 {
		if err := a.Admit(t.Context(), token, "n1"); err != nil {
			t.Fatal(err)
		}
	}
	if len(*asked) != 2 { // nothing is remembered: the pod may have ended
		t.Fatalf("asked %d times", len(*asked))
	}
	if got := (*asked)[0]; got.Token != token || len(got.Audiences) != 1 || got.Audiences[0] != audience {
		t.Fatalf("asked for audiences %q", got.Audiences)
	}
}

func TestATokenMayBeForOtherAudiencesToo(t *testing.T) {
	status := good()
	status.Audiences = []string{"other", audience}
	a, _ := admitter(t, status, nil)
	if err := a.Admit(t.Context(), token, "n1"); err != nil {
		t.Fatal(err)
	}
}

func TestAnythingElseIsRefusedWithItsReason(t *testing.T) {
	type status = authenticationv1.TokenReviewStatus
	extra := func(key string, values ...string) func(*status) {
		return func(s *status) {
			s.User.Extra = maps.Clone(s.User.Extra)
			s.User.Extra[key] = values
			if values == nil {
				delete(s.User.Extra, key)
			}
		}
	}
	for name, c := range map[string]struct {
		change func(*status)
		says   string
	}{
		"not authenticated":      {func(s *status) { s.Authenticated, s.Error = false, "service account token has expired" }, "has expired"},
		"no reason given":        {func(s *status) { s.Authenticated = false }, "does not say why"},
		"the error has it":       {func(s *status) { s.Authenticated, s.Error = false, `cannot parse "`+token+`"` }, `cannot parse "[token]"`},
		"other audience":         {func(s *status) { s.Audiences = []string{"https://kubernetes.default.svc"} }, `["https://kubernetes.default.svc"], not for "quarry-controller"`},
		"part of the audience":   {func(s *status) { s.Audiences = []string{audience + "-2"} }, `["quarry-controller-2"]`},
		"no audience":            {func(s *status) { s.Audiences = nil }, "audiences []"},
		"other account":          {func(s *status) { s.User.Username = "system:serviceaccount:quarry:default" }, `"system:serviceaccount:quarry:default", not of "` + agents + `"`},
		"other namespace":        {func(s *status) { s.User.Username = "system:serviceaccount:evil:quarry-node" }, `user "system:serviceaccount:evil:quarry-node"`},
		"longer name":            {func(s *status) { s.User.Username = agents + "-2" }, "quarry-node-2"},
		"no service account":     {func(s *status) { s.User.Username = "system:node:n1" }, `user "system:node:n1"`},
		"no extras":              {func(s *status) { s.User.Extra = nil }, "not bound to a pod"},
		"no pod":                 {extra(podName), "not bound to a pod (" + podName},
		"no pod UID":             {extra(podUID), "not bound to a pod (" + podUID},
		"an empty pod":           {extra(podName, ""), "not bound to a pod"},
		"two pods":               {extra(podUID, "p-1", "p-2"), `["p-1" "p-2"]`},
		"no node":                {extra(nodeName), "Kubernetes 1.30"},
		"other node":             {extra(nodeName, "n2"), `pod on the node ["n2"]`},
		"two nodes, one is ours": {extra(nodeName, "n1", "n2"), `["n1" "n2"]`},
		"an empty node":          {extra(nodeName, ""), `pod on the node [""]`},
		"almost the node":        {extra(nodeName, "N1"), `pod on the node ["N1"]`},
	} {
		t.Run(name, func(t *testing.T) {
			answer := good()
			c.change(answer)
			a, _ := admitter(t, answer, nil)
			ctx, logs := logged(t)
			err := a.Admit(ctx, token, "n1")
			expect(t, err, fault.Permission, `"n1"`, c.says)
			silent(t, err, logs())
		})
	}
}

func TestWithoutTokenOrNodeNobodyIsAsked(t *testing.T) {
	status := good()
	status.User.Extra[nodeName] = authenticationv1.ExtraValue{""}
	a, asked := admitter(t, status, nil)
	expect(t, a.Admit(t.Context(), "", "n1"), fault.Permission, "no token")
	expect(t, a.Admit(t.Context(), token, ""), fault.Permission, "which node")
	if len(*asked) != 0 {
		t.Fatal("the API server was asked")
	}
}

func TestNobodyIsLetInWhenTheAPICannotBeAsked(t *testing.T) {
	reviews := schema.GroupResource{Group: "authentication.k8s.io", Resource: "tokenreviews"}
	for name, c := range map[string]struct {
		err  error
		kind fault.Kind
		says string
	}{
		"down":         {apierrors.NewServiceUnavailable("restarting"), fault.Unavailable, "restarting"},
		"too late":     {context.DeadlineExceeded, fault.Unavailable, "deadline"},
		"our own RBAC": {apierrors.NewForbidden(reviews, "", errors.New("no")), fault.Permission, "Quarry's own ServiceAccount"},
		"repeats it":   {apierrors.NewServiceUnavailable("no backend for " + token), fault.Unavailable, "no backend for [token]"},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := admitter(t, nil, c.err)
			ctx, logs := logged(t)
			err := a.Admit(ctx, token, "n1")
			expect(t, err, c.kind, `"n1"`, c.says)
			silent(t, err, logs())
		})
	}
}

// client-go logs the bodies of requests and answers at -v=8, and a TokenReview
// has the token in both.
func TestTheTokenIsInNoLogOfAnyLevel(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.WriteHeader(http.StatusCreated)
		_, _ = io.Copy(w, r.Body) // what was asked, with no status: not authenticated
	}))
	defer server.Close()
	client, err := kube.Connect(kubeconfig(t, server.URL))
	if err != nil {
		t.Fatal(err)
	}
	ctx, logs := logged(t)
	err = newAdmitter(t, client).Admit(ctx, token, "n1")
	expect(t, err, fault.Permission, "does not accept")
	silent(t, err, logs())
	// A body may be logged as a hex dump, which the token is not to be found in.
	if strings.Contains(logs(), "Body") {
		t.Fatalf("client-go has logged what it sent:\n%s", logs())
	}
	// The log is one that would have had it.
	_, _ = client.Installation(ctx)
	if !strings.Contains(logs(), "Response Body") {
		t.Fatalf("client-go logs no bodies:\n%s", logs())
	}
}

func TestAnAdmitterNeedsToKnowWhoseTokensAreGood(t *testing.T) {
	for field, cfg := range map[string]kube.AdmitConfig{
		"Namespace":      {ServiceAccount: "a", Audience: "b"},
		"ServiceAccount": {Namespace: "a", Audience: "b"},
		"Audience":       {Namespace: "a", ServiceAccount: "b"},
	} {
		_, err := kube.NewAdmitter(kube.New(fake.NewClientset()), cfg)
		expect(t, err, fault.Invalid, field+":")
	}
}
