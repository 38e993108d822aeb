package kube_test

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube"
)

// patience is how long a state is waited for: far beyond what it takes.
const patience = time.Minute

// logged is a context whose logger keeps all that is logged, of every level.
func logged(t *testing.T) (context.Context, func() string) {
	t.Helper()
	log := ktesting.NewLogger(t, ktesting.NewConfig(ktesting.BufferLogs(true), ktesting.Verbosity(10)))
	sink, ok := log.GetSink().(ktesting.Underlier)
	if !ok {
		t.Fatal("the logger has no buffer")
	}
	return klog.NewContext(t.Context(), log), sink.GetBuffer().String
}

// expect wants an error of a kind that says all of some words.
func expect(t *testing.T, err error, kind fault.Kind, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s", kind)
	}
	if !errors.Is(err, kind) {
		t.Fatalf("%v: is %s, want %s", err, fault.KindOf(err), kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: does not say %q", err, w)
		}
	}
}

// failing answers a request with an error.
func failing(api *fake.Clientset, verb, resource string, err error) {
	api.PrependReactor(verb, resource, func(k8stesting.Action) (bool, runtime.Object, error) { return true, nil, err })
}

func TestTheInstallationIsTheUIDOfKubeSystem(t *testing.T) {
	client := kube.New(fake.NewClientset(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system", UID: types.UID("u-1")}}))
	if got, err := client.Installation(t.Context()); got != "u-1" || err != nil {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestANamespaceWithoutUIDNamesNoInstallation(t *testing.T) {
	client := kube.New(fake.NewClientset(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}}))
	_, err := client.Installation(t.Context())
	expect(t, err, fault.Internal, "kube-system")
}

func TestErrorsOfTheAPIHaveKinds(t *testing.T) {
	namespaces := schema.GroupResource{Resource: "namespaces"}
	cause := errors.New("because")
	for name, c := range map[string]struct {
		err  error
		kind fault.Kind
	}{
		"not found":       {apierrors.NewNotFound(namespaces, "kube-system"), fault.NotFound},
		"forbidden":       {apierrors.NewForbidden(namespaces, "kube-system", cause), fault.Permission},
		"unauthorized":    {apierrors.NewUnauthorized("because"), fault.Permission},
		"timeout":         {apierrors.NewTimeoutError("because", 1), fault.Unavailable},
		"server timeout":  {apierrors.NewServerTimeout(namespaces, "get", 1), fault.Unavailable},
		"too many":        {apierrors.NewTooManyRequests("because", 1), fault.Unavailable},
		"unavailable":     {apierrors.NewServiceUnavailable("because"), fault.Unavailable},
		"its own failure": {apierrors.NewInternalError(cause), fault.Unavailable},
		"a proxy's 404":   {apierrors.NewGenericServerResponse(404, "GET", namespaces, "kube-system", "nginx", 0, true), fault.Unavailable},
		"conflict":        {apierrors.NewConflict(namespaces, "kube-system", cause), fault.Conflict},
		"exists":          {apierrors.NewAlreadyExists(namespaces, "kube-system"), fault.Exists},
		"invalid":         {apierrors.NewInvalid(schema.GroupKind{Kind: "Namespace"}, "kube-system", nil), fault.Invalid},
		"bad request":     {apierrors.NewBadRequest("because"), fault.Invalid},
		"refused":         {&url.Error{Op: "Get", URL: "https://api", Err: &net.OpError{Op: "dial", Err: cause}}, fault.Unavailable},
		"no such host":    {&net.DNSError{Err: "no such host", Name: "api"}, fault.Unavailable},
		"too late":        {context.DeadlineExceeded, fault.Unavailable},
		"given up":        {&url.Error{Op: "Get", URL: "https://api", Err: context.Canceled}, fault.Canceled},
		"anything else":   {cause, fault.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			api := fake.NewClientset()
			failing(api, "get", "namespaces", c.err)
			_, err := kube.New(api).Installation(t.Context())
			expect(t, err, c.kind, "namespace kube-system", c.err.Error())
			if kind := fault.KindOf(err); kind != c.kind {
				t.Fatalf("kind %s", kind)
			}
		})
	}
}

func TestNodesExistOrNot(t *testing.T) {
	client := kube.New(fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}))
	if err := client.Node(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"n2", "", "N1", "n1/status", "..", "n1?"} {
		expect(t, client.Node(t.Context(), name), fault.NotFound, name)
	}
}

func TestANodeThatCannotBeReadIsNotMissing(t *testing.T) {
	api := fake.NewClientset()
	failing(api, "get", "nodes", apierrors.NewServiceUnavailable("restarting"))
	expect(t, kube.New(api).Node(t.Context(), "n1"), fault.Unavailable, "n1", "restarting")
	_, err := kube.New(api).OutOfService(t.Context(), "n1")
	expect(t, err, fault.Unavailable, "n1", "restarting")
}

func TestNodesOfTheDriverCarryItsTopologyLabel(t *testing.T) {
	const key = "csi.quarry.dev/node"
	node := func(name, label string, ready corev1.ConditionStatus, taints ...corev1.Taint) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: taints},
			Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
		if label != "" {
			n.Labels = map[string]string{key: label}
		}
		return n
	}
	api := fake.NewClientset(node("n1", "n1", corev1.ConditionTrue), node("n2", "", corev1.ConditionTrue), node("n3", "n3", corev1.ConditionUnknown),
		node("n4", "n4", corev1.ConditionTrue, corev1.Taint{Key: "node.kubernetes.io/out-of-service"}))
	list, err := kube.New(api).TopologyNodes(t.Context(), key)
	got := map[string]bool{}
	for _, n := range list {
		got[n.Name] = n.Ready
	}
	if want := map[string]bool{"n1": true, "n3": false, "n4": false}; err != nil || !maps.Equal(got, want) {
		t.Errorf("nodes are %v, %v; want %v", got, err, want)
	}
	failing(api, "list", "nodes", apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", errors.New("no")))
	_, err = kube.New(api).TopologyNodes(t.Context(), key)
	expect(t, err, fault.Permission, key, "RBAC")
}

func TestOutOfServiceIsATaintOfAnyEffect(t *testing.T) {
	node := func(name string, taints ...corev1.Taint) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: taints}}
	}
	const key = "node.kubernetes.io/out-of-service"
	client := kube.New(fake.NewClientset(
		node("healthy"),
		node("unreachable", corev1.Taint{Key: "node.kubernetes.io/unreachable", Effect: corev1.TaintEffectNoExecute}),
		node("execute", corev1.Taint{Key: "a"}, corev1.Taint{Key: key, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute}),
		node("schedule", corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule}),
	))
	for name, want := range map[string]bool{"healthy": false, "unreachable": false, "execute": true, "schedule": true} {
		if got, err := client.OutOfService(t.Context(), name); got != want || err != nil {
			t.Errorf("%s: got %t, %v", name, got, err)
		}
	}
	_, err := client.OutOfService(t.Context(), "gone")
	expect(t, err, fault.NotFound, "gone")
}

// kubeconfig writes a file that names a server.
func kubeconfig(t *testing.T, server string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := `apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "` + server + `"}}]
users: [{name: u, user: {}}]
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConnectAsksTheClusterOfTheFile(t *testing.T) {
	agent := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		agent <- r.UserAgent()
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system", "uid": "u-2"}}`))
	}))
	defer server.Close()
	client, err := kube.Connect(kubeconfig(t, server.URL))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := client.Installation(t.Context()); got != "u-2" || err != nil {
		t.Fatalf("got %q, %v", got, err)
	}
	if got := <-agent; !strings.HasPrefix(got, "quarry/") {
		t.Fatalf("user agent %q", got)
	}
}

func TestAClusterThatDoesNotAnswerIsUnavailable(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	client, err := kube.Connect(kubeconfig(t, server.URL))
	if err != nil {
		t.Fatal(err)
	}
	// What answers is no API server: its 404 is no answer to whether a Node exists.
	expect(t, client.Node(t.Context(), "n1"), fault.Unavailable, "n1")
	server.Close()
	expect(t, client.Node(t.Context(), "n1"), fault.Unavailable, "n1", "refused")
}

func TestConnectSaysInOneLineWhyItCannot(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	missing := filepath.Join(dir, "missing")
	empty, broken := write("empty", ""), write("broken", "a: [\n")
	noContext := write("dangling", "apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters: [{name: c, cluster: {server: 'https://h'}}]\n")
	badServer, badCA := kubeconfig(t, "https://h:port:port"), write("ca", "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {}}]\nclusters: [{name: c, cluster: {server: 'https://h', certificate-authority-data: AAAA}}]\n")
	for path, words := range map[string][]string{
		"":        {"not in a cluster: give --kubeconfig"},
		missing:   {missing, "no such file"},
		empty:     {empty, "names no cluster"},
		broken:    {broken},
		noContext: {noContext, "context: x"},
		badServer: {badServer},
		badCA:     {badCA, "certificate"},
	} {
		_, err := kube.Connect(path)
		expect(t, err, fault.Invalid, words...)
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("several lines: %v", err)
		}
	}
}

func TestAPodWithoutCredentialsIsToldSo(t *testing.T) {
	if _, err := os.Stat("/var/run/secrets/kubernetes.io/serviceaccount/token"); err == nil {
		t.Skip("this is a pod with credentials")
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	_, err := kube.Connect("")
	expect(t, err, fault.Invalid, "automountServiceAccountToken", "--kubeconfig")
}
