package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/node"
)

// dial serves s on a socket until the test ends. stop ends it sooner and
// returns what Serve returned.
func dial(t *testing.T, s *Server, log klog.Logger) (conn *grpc.ClientConn, stop func() error) {
	t.Helper()
	endpoint := "unix://" + filepath.Join(t.TempDir(), "csi.sock")
	l, err := listen(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(klog.NewContext(context.Background(), log))
	done := make(chan error, 1)
	go func() { done <- s.serve(ctx, l) }()
	conn, err = grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	var stopped bool
	var result error
	stop = func() error {
		if !stopped {
			stopped = true
			cancel()
			result = <-done
		}
		return result
	}
	t.Cleanup(func() {
		if err := errors.Join(stop(), conn.Close()); err != nil {
			t.Error(err)
		}
	})
	return conn, stop
}

func TestACallOverTheSocket(t *testing.T) {
	log := ktesting.NewLogger(t, ktesting.NewConfig(ktesting.Verbosity(9), ktesting.BufferLogs(true)))
	said := func() string { return log.GetSink().(ktesting.Underlier).GetBuffer().String() }
	s, m, _ := world(t)
	reg := prometheus.NewRegistry()
	cfg := s.cfg
	cfg.Metrics = reg
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	conn, stop := dial(t, s, log)
	c := csi.NewControllerClient(conn)

	req := create()
	req.Secrets = map[string]string{"password": "hunter2"}
	req.VolumeCapabilities[0].GetMount().MountFlags = []string{"password=hunter3"}
	if _, err := c.CreateVolume(ctx, req); err != nil {
		t.Fatal(err)
	}
	if len(m.created) != 1 {
		t.Fatal("the call did not arrive")
	}

	// An error: its kind becomes a code.
	_, err = c.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: "nas/v-gone"})
	if rpcfault.CodeName(err) != "NOT_FOUND" || !strings.Contains(err.Error(), "v-gone") {
		t.Errorf("got %v", err)
	}

	// A bug in one call does not end the others.
	m.images = nil
	s.cfg.KnownNode = func(context.Context, string) error { panic("boom") }
	m2, _, _ := world(t)
	m.images = m2.cfg.Manager.(*fakeManager).images
	_, err = c.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "nas/v-1", NodeId: "n1", VolumeCapability: mount("", writer)})
	if rpcfault.CodeName(err) != "INTERNAL" || !strings.Contains(err.Error(), "boom") {
		t.Errorf("a panic gave %v", err)
	}
	if _, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}); err != nil {
		t.Errorf("after a panic: %v", err)
	}

	text := said()
	for _, secret := range []string{"hunter2", "hunter3"} {
		if strings.Contains(text, secret) {
			t.Errorf("%s is in the log", secret)
		}
	}
	for _, want := range []string{"pvc-1", `method="CreateVolume"`, "request=", "server_test.go", "NOT_FOUND"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in the log:\n%s", want, text)
		}
	}
	got, err := reg.Gather()
	if err != nil || len(got) != 1 || *got[0].Name != "quarry_csi_call_duration_seconds" {
		t.Fatalf("%v, %v", got, err)
	}
	var seen []string
	for _, metric := range got[0].Metric {
		seen = append(seen, fmt.Sprintf("%s %s %d", metric.Label[1].GetValue(), metric.Label[0].GetValue(), metric.Histogram.GetSampleCount()))
	}
	for _, want := range []string{"CreateVolume OK 1", "ControllerGetVolume NOT_FOUND 1", "ControllerPublishVolume INTERNAL 1", "Probe OK 1"} {
		if !strings.Contains(strings.Join(seen, "\n"), want) {
			t.Errorf("%q is not in the metrics %q", want, seen)
		}
	}
	if err := stop(); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

// slowNode holds Stage until it is released.
type slowNode struct {
	fakeNode
	entered, release chan struct{}
}

func (n *slowNode) Stage(ctx context.Context, r node.StageRequest) error {
	close(n.entered)
	<-n.release
	return n.fakeNode.Stage(ctx, r)
}

func TestAStopLetsRunningCallsFinish(t *testing.T) {
	s, _, _ := world(t)
	slow := &slowNode{entered: make(chan struct{}), release: make(chan struct{})}
	s.cfg.Node = slow
	conn, stop := dial(t, s, ktesting.NewLogger(t, ktesting.DefaultConfig))
	answered := make(chan error, 1)
	go func() {
		_, err := csi.NewNodeClient(conn).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: "nas/v-1", StagingTargetPath: "/st", VolumeCapability: mount("", writer), PublishContext: map[string]string{GenerationKey: "1"},
		})
		answered <- err
	}()
	<-slow.entered
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	select {
	case err := <-stopped:
		t.Fatalf("stopped before the call ended: %v", err)
	default:
	}
	close(slow.release)
	if err := errors.Join(<-answered, <-stopped); err != nil {
		t.Error(err)
	}
}

// A server that is told to end before it has begun ends as well as any other.
func TestAServerEndsBeforeItHasBegun(t *testing.T) {
	s, _, _ := world(t)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range 200 {
		if err := s.Serve(over, "unix://"+filepath.Join(t.TempDir(), "csi.sock")); err != nil {
			t.Fatal(err)
		}
	}
}

// The rules of sockets are tested where they are made, in package admin.
func TestTheSocketIsForOwnerAndGroup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "csi.sock")
	first, err := listen("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	s, _, _ := world(t)
	wantKind(t, "a socket in use", s.Serve(ctx, "unix://"+path), fault.InUse)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket stays behind: %v", err)
	}

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, e := range []string{"unix://" + file, "", "tcp://127.0.0.1:1", "unix://relative", "unix:"} {
		wantKind(t, e, s.Serve(ctx, e), fault.Invalid)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file holds %q, %v", text, err)
	}
}

func TestNodeIDsThatCannotBeLabels(t *testing.T) {
	s, _, _ := world(t)
	for _, id := range []string{"", "-n", "n.", "n/1", "n 1", strings.Repeat("n", 64), "ñ"} {
		cfg := s.cfg
		cfg.NodeID = id
		_, err := New(cfg)
		wantKind(t, id, err, fault.Invalid)
	}
	cfg := s.cfg
	cfg.NodeID = "ip-10-0-0-1.eu-west-1.compute.internal"
	if _, err := New(cfg); err != nil {
		t.Error(err)
	}
}
