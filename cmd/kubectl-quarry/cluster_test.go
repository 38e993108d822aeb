package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube/reach/reachtest"
)

// inCluster serves m as the controller of a cluster does, and returns the cluster and its kubeconfig.
func inCluster(t *testing.T, m admin.Manager) (*reachtest.Cluster, string) {
	t.Helper()
	e, err := admin.ParseLoopback("tcp://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- admin.Serve(ctx, l, admin.Guard(l, admin.Handler(m, admin.Version{Version: "v1", Driver: "csi.quarry.dev"}, nil)), time.Minute)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	c, config := reachtest.New(t)
	c.Holder = "quarry-controller-0"
	c.Pods = []reachtest.Pod{{Namespace: "quarry-system", Name: "quarry-controller-0", Serves: map[string]string{"9811": l.Addr().String()}}}
	return c, config
}

func TestAClusterIsAskedWithoutASocket(t *testing.T) {
	cluster, config := inCluster(t, &fake{})
	endpoint := serve(t, &fake{})
	for _, args := range []string{"domains", "images -o json", "chain snap-1", "operations", "check local", "version -o yaml"} {
		wantOut, wantErr, want := do(append(strings.Fields(args), "--admin-endpoint", endpoint)...)
		out, errOut, err := do(append(strings.Fields(args), "--kubeconfig", config)...)
		if out != wantOut || errOut != wantErr || (err == nil) != (want == nil) || out == "" {
			t.Errorf("%s says\n%s%s%v\nby a cluster, and\n%s%s%v\nby a socket", args, out, errOut, err, wantOut, wantErr, want)
		}
	}
	if len(cluster.Forwards()) == 0 {
		t.Error("nothing was forwarded")
	}
	t.Setenv("KUBECONFIG", config)
	if out, _, err := do("domains", "--context", "here"); err != nil || !strings.Contains(out, "local.0000002a") {
		t.Errorf("by KUBECONFIG: %s, %v", out, err)
	}
	t.Setenv(endpointVariable, "unix:///nonexistent")
	if out, _, err := do("domains", "-n", "quarry-system"); err != nil || !strings.Contains(out, "local.0000002a") {
		t.Errorf("a flag that chooses a cluster comes before the variable: %s, %v", out, err)
	}
	if _, _, err := do("domains", "--context", "here", "--admin-endpoint", endpoint); !errors.Is(err, fault.Invalid) || err.Error() != "--admin-endpoint and the flags that choose a cluster exclude each other" {
		t.Errorf("both: %v", err)
	}
	cluster.Forbidden["GET /api/v1/namespaces/quarry-system/pods/quarry-controller-0/portforward"] = true
	cluster.Forbidden["POST /api/v1/namespaces/quarry-system/pods/quarry-controller-0/portforward"] = true
	_, _, err := do("domains", "--kubeconfig", config)
	if err == nil || !strings.Contains(err.Error(), "you need the right to get and create pods/portforward in namespace quarry-system") {
		t.Errorf("without the right: %v", err)
	}
}
