package remote_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not happen: " + what)
		}
	}
}

// relay passes what goes over connections on to a socket until it is told to be silent:
// then the other side is there, and hangs.
type relay struct {
	path   string
	silent atomic.Bool
	made   atomic.Int32
}

func (r *relay) dial(ctx context.Context) (net.Conn, error) {
	c, err := remote.Socket(r.path)(ctx)
	if err != nil {
		return nil, err
	}
	r.made.Add(1)
	r.silent.Store(false) // a new process
	return &relayed{Conn: c, relay: r, closed: make(chan struct{})}, nil
}

type relayed struct {
	net.Conn
	relay  *relay
	closed chan struct{}
	once   sync.Once
}

func (c *relayed) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.relay.silent.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *relayed) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// TestAProcessThatHangsIsGivenUp: who waits for it is told, and the next one is asked.
func TestAProcessThatHangsIsGivenUp(t *testing.T) {
	p := newProcess(t, func(map[string]string) (engine.Engine, error) {
		return &fake{create: func(context.Context, engine.SlabSpec) error { return nil }}, nil
	})
	r := &relay{path: p.path}
	e, err := remote.Open(t.Context(), remote.Config{Dial: r.dial, Client: "c", Watch: 200 * time.Millisecond, Why: func() string { return "the reason" }})
	if err != nil {
		t.Fatal(err)
	}
	r.silent.Store(true)
	if err := e.CreateSlab(t.Context(), slab()); !errors.Is(err, fault.Unavailable) || err.Error()[:10] != "the reason" {
		t.Errorf("while it hangs: %v", err)
	}
	eventually(t, "a slab is created", func() bool { return e.CreateSlab(t.Context(), slab()) == nil })
	if r.made.Load() < 2 {
		t.Error("it was the same connection")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// TestAProcessThatHasEndedIsMissedBeforeItIsNeeded: the domain is opened again without anybody's asking.
func TestAProcessThatHasEndedIsMissedBeforeItIsNeeded(t *testing.T) {
	var opened atomic.Int32
	p := newProcess(t, func(map[string]string) (engine.Engine, error) {
		opened.Add(1)
		return &fake{}, nil
	})
	e, err := remote.Open(t.Context(), remote.Config{Dial: remote.Socket(p.path), Client: "c", Watch: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	p.end()
	p.start()
	eventually(t, "it is opened again", func() bool { return opened.Load() == 2 })
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// TestAProcessThatIsNotWellIsNotAsked, until it is.
func TestAProcessThatIsNotWellIsNotAsked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g, well := grpc.NewServer(), health.NewServer()
	enginepb.RegisterEngineServer(g, &liar{open: &enginepb.OpenResponse{Version: 1, Domain: "d", Engine: "x"}, path: "/dev/x"})
	grpc_health_v1.RegisterHealthServer(g, well)
	go func() { _ = g.Serve(l) }()
	defer g.Stop()
	e, err := remote.Open(t.Context(), remote.Config{Dial: remote.Socket(path), Client: "c", Watch: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	attach := func() error {
		_, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
		return err
	}
	well.SetServingStatus("", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	eventually(t, "it is not asked", func() bool { err = attach(); return err != nil })
	if want := "the engine's process says of its health: NOT_SERVING"; !errors.Is(err, fault.Unavailable) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	well.SetServingStatus("", grpc_health_v1.HealthCheckResponse_SERVING)
	eventually(t, "it is asked again", func() bool { return attach() == nil })
	_ = e.Leave() // the connection alone
}

// TestAProcessComesBackAsTheSameType: what is open stays what it was.
func TestAProcessComesBackAsTheSameType(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	start := func(kind string) *grpc.Server {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		g := grpc.NewServer()
		enginepb.RegisterEngineServer(g, &liar{open: &enginepb.OpenResponse{Version: 1, Domain: "d", Engine: kind}, path: "/dev/x"})
		go func() { _ = g.Serve(l) }()
		return g
	}
	first := start("one")
	e, err := remote.Open(t.Context(), remote.Config{Dial: remote.Socket(path), Client: "c"})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Leave()
	attach := func() error {
		_, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
		return err
	}
	if err := attach(); err != nil {
		t.Fatal(err)
	}
	first.Stop()
	other := start("another")
	const want = `the domain cannot be opened again: the engine says that it is "another": "one" was expected`
	eventually(t, "it is refused", func() bool {
		err := attach()
		if err == nil {
			t.Fatal("an engine of another type was taken for the one before")
		}
		return errors.Is(err, fault.Unavailable) && err.Error() == want
	})
	other.Stop()
	last := start("one")
	defer last.Stop()
	eventually(t, "the right one is asked again", func() bool { return attach() == nil })
}
