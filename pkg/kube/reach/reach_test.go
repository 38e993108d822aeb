package reach_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube/reach"
	"github.com/quarry-csi/quarry/pkg/kube/reach/reachtest"
)

// find looks for the controller as a program does that was called with args.
func find(t *testing.T, args ...string) (*reach.Controller, error) {
	t.Helper()
	var f reach.Flags
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.Bind(fs)
	if f.Given() {
		t.Error("a flag was given before any was")
	}
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	if f.Given() != (len(args) > 0) {
		t.Errorf("%v: given is %t", args, f.Given())
	}
	c, err := reach.Find(t.Context(), &f)
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// inPod is a server as it runs in a pod; its address.
func inPod(t *testing.T) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(w, r.URL.Path+" "+strings.ToUpper(string(body)))
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func ask(t *testing.T, c *reach.Controller, body string) (string, error) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) }, DisableKeepAlives: true}}
	r, err := client.Post("http://quarry/hello", "text/plain", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	out, err := io.ReadAll(r.Body)
	return string(out), err
}

func TestTheControllerThatLeadsIsReached(t *testing.T) {
	for what, old := range map[string]bool{"websocket": false, "SPDY": true} {
		t.Run(what, func(t *testing.T) {
			cluster, config := reachtest.New(t)
			cluster.Old, cluster.Holder = old, "c-2"
			address := inPod(t)
			cluster.Pods = []reachtest.Pod{
				{Namespace: "quarry-system", Name: "c-0", Phase: "Succeeded"}, {Namespace: "quarry-system", Name: "c-1"},
				{Namespace: "quarry-system", Name: "c-2", Serves: map[string]string{"9811": address}},
			}
			c, err := find(t, "--kubeconfig", config)
			if err != nil {
				t.Fatal(err)
			}
			if c.Pod != "c-2" || c.Namespace != "quarry-system" || c.String() != `pod quarry-system/c-2 (context "here")` {
				t.Errorf("found %s", c)
			}
			large := strings.Repeat("quarry ", 1<<17)
			for range 2 { // the second by the same connection to the API server
				got, err := ask(t, c, large)
				if err != nil || got != "/hello "+strings.ToUpper(large) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
			if want := []string{"c-2 9811 by " + what, "c-2 9811 by " + what}; !slices.Equal(cluster.Forwards(), want) {
				t.Errorf("forwarded %v, want %v", cluster.Forwards(), want)
			}
		})
	}
}

func TestAPortThatThePodNamesIsUsed(t *testing.T) {
	cluster, config := reachtest.New(t)
	cluster.Holder = "c-1"
	cluster.Pods = []reachtest.Pod{{Namespace: "q", Name: "c-1", AdminPort: 7, Serves: map[string]string{"7": inPod(t)}}}
	c, err := find(t, "--kubeconfig", config, "--namespace", "q")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ask(t, c, "x"); err != nil || got != "/hello X" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWhyTheControllerIsNotFound(t *testing.T) {
	const (
		everywhere = "GET /api/v1/pods"
		system     = "GET /api/v1/namespaces/quarry-system/pods"
		mine       = "GET /api/v1/namespaces/mine/pods"
		lease      = "GET /apis/coordination.k8s.io/v1/namespaces/quarry-system/leases/quarry-controller"
	)
	one := []reachtest.Pod{{Namespace: "quarry-system", Name: "c-1"}}
	two := append(one, reachtest.Pod{Namespace: "quarry-system", Name: "c-2"})
	for what, x := range map[string]struct {
		pods      []reachtest.Pod
		holder    string
		forbidden []string
		args      []string
		kind      fault.Kind // Unknown where it is found
		want      string
	}{
		"nobody":                      {nil, "", nil, nil, fault.NotFound, `no pod of Quarry's controller runs in any namespace of the cluster (context "here"; labels app.kubernetes.io/name=quarry,app.kubernetes.io/component=controller)`},
		"not there":                   {one, "c-1", nil, []string{"-n", "other"}, fault.NotFound, `no pod of Quarry's controller runs in namespace other of the cluster (context "here"; labels `},
		"two Quarries":                {append(one, reachtest.Pod{Namespace: "a", Name: "c"}), "c-1", nil, nil, fault.Invalid, `the cluster (context "here") has Quarry in several namespaces: say which one with --namespace: a, quarry-system`},
		"nobody leads":                {two, "c-9", nil, nil, fault.Unavailable, `no controller in namespace quarry-system leads now (the Lease quarry-controller names "c-9", which does not run): try again in a moment`},
		"may not look everywhere":     {two, "c-1", []string{everywhere}, nil, 0, ""},
		"may look at one place":       {two, "c-1", []string{everywhere, mine}, nil, 0, ""},
		"may look nowhere":            {two, "c-1", []string{everywhere, mine, system}, nil, fault.Permission, `cannot look for Quarry's controller: Forbidden: /api/v1/namespaces/quarry-system/pods: you need the right to list pods in its namespace, and say which one that is with --namespace`},
		"may not see the Lease":       {two, "c-1", []string{lease}, nil, fault.Permission, `cannot tell which of 2 controllers leads: Forbidden: /apis/coordination.k8s.io/v1/namespaces/quarry-system/leases/quarry-controller: you need the right to get leases.coordination.k8s.io named quarry-controller in namespace quarry-system`},
		"need not see it with one":    {one, "", []string{lease}, nil, 0, ""},
		"bad credentials":             {one, "c-1", nil, []string{"--context", "stranger"}, fault.Permission, `cannot look for Quarry's controller: the cluster (context "stranger") does not accept these credentials: `},
		"unknown context":             {one, "c-1", nil, []string{"--context", "none"}, fault.Invalid, `kubeconfig: context "none" does not exist`},
		"a cluster that is not there": {one, "c-1", nil, []string{"--server", "https://127.0.0.1:1"}, fault.Unavailable, `cannot look for Quarry's controller: the cluster (context "here") cannot be reached: `},
	} {
		t.Run(what, func(t *testing.T) {
			cluster, config := reachtest.New(t)
			cluster.Pods, cluster.Holder = x.pods, x.holder
			for _, f := range x.forbidden {
				cluster.Forbidden[f] = true
			}
			c, err := find(t, append([]string{"--kubeconfig", config}, x.args...)...)
			if x.want == "" {
				if err != nil || c.Pod != "c-1" {
					t.Errorf("%v, %v", c, err)
				}
				return
			}
			if !errors.Is(err, x.kind) || !strings.HasPrefix(err.Error(), x.want) {
				t.Errorf("%v (%v)\nwant %s", err, fault.KindOf(err), x.want)
			}
		})
	}
}

func TestWhyTheControllerIsNotReached(t *testing.T) {
	const forward = "/api/v1/namespaces/quarry-system/pods/c-1/portforward"
	for what, x := range map[string]struct {
		prepare func(c *reachtest.Cluster)
		kind    fault.Kind
		want    string
	}{
		"no right": {func(c *reachtest.Cluster) {
			c.Forbidden["GET "+forward], c.Forbidden["POST "+forward] = true, true
		}, fault.Permission, `port-forward to pod quarry-system/c-1 (context "here"): Forbidden: ` + forward + `: you need the right to get and create pods/portforward in namespace quarry-system`},
		"it is gone": {func(c *reachtest.Cluster) { c.Pods = nil }, fault.NotFound, `port-forward to pod quarry-system/c-1 (context "here"): NotFound: ` + forward},
		"it does not lead any more": {func(c *reachtest.Cluster) { c.Pods[0].Serves = nil }, fault.Unavailable,
			`port 9811 of pod quarry-system/c-1 (context "here"): failed to connect to localhost:9811 inside namespace: connection refused: it may have just stopped to lead: try again in a moment`},
	} {
		t.Run(what, func(t *testing.T) {
			cluster, config := reachtest.New(t)
			cluster.Holder = "c-1"
			cluster.Pods = []reachtest.Pod{{Namespace: "quarry-system", Name: "c-1", Serves: map[string]string{"9811": inPod(t)}}}
			c, err := find(t, "--kubeconfig", config)
			if err != nil {
				t.Fatal(err)
			}
			x.prepare(cluster)
			_, err = ask(t, c, "x")
			if !errors.Is(err, x.kind) || !strings.Contains(err.Error(), x.want) {
				t.Errorf("%v (%v)\nwant %s", err, fault.KindOf(err), x.want)
			}
		})
	}
}

func TestACallerThatGivesUpDoesNotWait(t *testing.T) {
	cluster, config := reachtest.New(t)
	cluster.Holder = "c-1"
	cluster.Pods = []reachtest.Pod{{Namespace: "q", Name: "c-1", Serves: map[string]string{"9811": inPod(t)}}}
	c, err := find(t, "--kubeconfig", config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Dial(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
