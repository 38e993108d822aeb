package kube_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube"
)

const driver = "csi.quarry.dev"

// registering is a driver that is being offered.
type registering struct {
	socket string
	told   chan error
	stop   func() error // ends it and returns what Register returned
}

// register offers a driver in dir, and waits until a kubelet can see it.
func register(t *testing.T, ctx context.Context, dir string) *registering {
	t.Helper()
	r := &registering{socket: filepath.Join(dir, driver+"-reg.sock"), told: make(chan error, 10)}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- kube.Register(ctx, kube.RegistrationConfig{
			SocketDir: dir, DriverName: driver, Endpoint: "/var/lib/kubelet/plugins/csi.quarry.dev/csi.sock",
		}, func(err error) { r.told <- err })
	}()
	r.stop = func() error { cancel(); return <-ended }
	t.Cleanup(cancel)
	return r
}

// kubelet connects as a kubelet does that has found a socket.
func kubelet(t *testing.T, socket string) registration.RegistrationClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return registration.NewRegistrationClient(conn)
}

// shortDir is a directory whose path leaves room for the name of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestTheKubeletRegistersTheDriver(t *testing.T) {
	ctx, logs := logged(t)
	r := register(t, ctx, shortDir(t))
	k := kubelet(t, r.socket)
	info, err := k.GetInfo(limited(t), &registration.InfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetType() != "CSIPlugin" || info.GetName() != driver || !slices.Equal(info.GetSupportedVersions(), []string{"1.0.0"}) ||
		info.GetEndpoint() != "/var/lib/kubelet/plugins/csi.quarry.dev/csi.sock" {
		t.Fatalf("offered %v", info)
	}
	if s, err := os.Stat(r.socket); err != nil || s.Mode() != os.ModeSocket|0o600 {
		t.Fatalf("socket %v, %v", s, err)
	}
	if _, err := k.NotifyRegistrationStatus(limited(t), &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Fatal(err)
	}
	if err := <-r.told; err != nil {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(r.socket); !os.IsNotExist(err) {
		t.Fatalf("the socket is still there: %v", err)
	}
	if !strings.Contains(logs(), "has registered the driver") {
		t.Fatal(logs())
	}
}

func TestARegistrationThatFailedIsToldAndOfferedAgain(t *testing.T) {
	ctx, logs := logged(t)
	r := register(t, ctx, shortDir(t))
	k := kubelet(t, r.socket)
	for _, status := range []*registration.RegistrationStatus{{Error: "no CSINode"}, {PluginRegistered: true}} {
		if _, err := k.GetInfo(limited(t), &registration.InfoRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := k.NotifyRegistrationStatus(limited(t), status); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, <-r.told, fault.Unavailable, driver, "no CSINode")
	if err := <-r.told; err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(logs(), "no CSINode") {
		t.Fatal(logs())
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
}

func TestTheSocketOfADeadPredecessorIsReplaced(t *testing.T) {
	dir := shortDir(t)
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, driver+"-reg.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	ctx, _ := logged(t)
	r := register(t, ctx, dir)
	// It is refused until it was replaced, which the client waits for.
	if _, err := kubelet(t, r.socket).GetInfo(limited(t), &registration.InfoRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
}

func TestASocketThatIsServedIsNotTaken(t *testing.T) {
	dir := shortDir(t)
	ctx, _ := logged(t)
	first := register(t, ctx, dir)
	k := kubelet(t, first.socket)
	if _, err := k.GetInfo(limited(t), &registration.InfoRequest{}); err != nil {
		t.Fatal(err)
	}
	err := kube.Register(ctx, kube.RegistrationConfig{SocketDir: dir, DriverName: driver, Endpoint: "/csi.sock"}, nil)
	expect(t, err, fault.InUse, first.socket, "another process")
	// The first one still serves, on a socket that is still there.
	if _, err := kubelet(t, first.socket).GetInfo(limited(t), &registration.InfoRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
}

func TestARegistrationThatNobodyIsToldOf(t *testing.T) {
	dir := shortDir(t)
	ctx, cancel := context.WithCancel(limited(t))
	ended := make(chan error, 1)
	go func() {
		ended <- kube.Register(ctx, kube.RegistrationConfig{SocketDir: dir, DriverName: "a", Endpoint: "/csi.sock", Versions: []string{"1.0.0", "2.0.0"}}, nil)
	}()
	k := kubelet(t, filepath.Join(dir, "a-reg.sock"))
	info, err := k.GetInfo(ctx, &registration.InfoRequest{})
	if err != nil || !slices.Equal(info.GetSupportedVersions(), []string{"1.0.0", "2.0.0"}) {
		t.Fatalf("offered %v, %v", info, err)
	}
	if _, err := k.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{Error: "no"}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

func TestARegistrationThatCannotBeginSaysWhy(t *testing.T) {
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo-reg.sock"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing")
	for name, c := range map[string]struct {
		cfg  kube.RegistrationConfig
		kind fault.Kind
		says []string
	}{
		"no directory":      {kube.RegistrationConfig{SocketDir: missing, DriverName: driver, Endpoint: "/s"}, fault.Unavailable, []string{missing, "must be mounted"}},
		"a file":            {kube.RegistrationConfig{SocketDir: file, DriverName: driver, Endpoint: "/s"}, fault.Unavailable, []string{file, "must be mounted"}},
		"no socket":         {kube.RegistrationConfig{SocketDir: dir, DriverName: "fifo", Endpoint: "/s"}, fault.Invalid, []string{"fifo-reg.sock", "not a socket"}},
		"no driver":         {kube.RegistrationConfig{SocketDir: dir, Endpoint: "/s"}, fault.Invalid, []string{"DriverName"}},
		"a path":            {kube.RegistrationConfig{SocketDir: dir, DriverName: "../x", Endpoint: "/s"}, fault.Invalid, []string{"DriverName"}},
		"hidden":            {kube.RegistrationConfig{SocketDir: dir, DriverName: ".x", Endpoint: "/s"}, fault.Invalid, []string{"DriverName"}}, // kubelets do not look at it
		"too long":          {kube.RegistrationConfig{SocketDir: dir, DriverName: strings.Repeat("x", 100), Endpoint: "/s"}, fault.Invalid, []string{"bytes"}},
		"relative endpoint": {kube.RegistrationConfig{SocketDir: dir, DriverName: driver, Endpoint: "csi.sock"}, fault.Invalid, []string{"Endpoint", "csi.sock"}},
		"a URL":             {kube.RegistrationConfig{SocketDir: dir, DriverName: driver, Endpoint: "unix:///csi.sock"}, fault.Invalid, []string{"Endpoint"}},
		"empty version":     {kube.RegistrationConfig{SocketDir: dir, DriverName: driver, Endpoint: "/s", Versions: []string{""}}, fault.Invalid, []string{"Versions"}},
	} {
		t.Run(name, func(t *testing.T) {
			expect(t, kube.Register(t.Context(), c.cfg, nil), c.kind, c.says...)
		})
	}
}
