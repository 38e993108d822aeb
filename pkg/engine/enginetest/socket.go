package enginetest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/engine/serve"
)

// distant is an engine behind a socket, and what serves it.
type distant struct {
	*remote.Engine
	stop func() error
}

// Close closes both.
func (d distant) Close() error { return errors.Join(d.Engine.Close(), d.stop()) }

// overSocket serves an engine on a socket, as another process would, and opens it there.
func overSocket(t testing.TB, e engine.Engine) engine.Engine {
	t.Helper()
	dir, err := os.MkdirTemp("", "q-") // short, because the path of a socket may have 107 bytes only
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "engine.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := serve.New(serve.Config{Engine: "tested", Release: "0", Open: func(context.Context, map[string]string, map[string]string) (engine.Engine, error) { return e, nil }})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	stop := func() error {
		cancel()
		return errors.Join(<-ended, os.RemoveAll(dir))
	}
	far, err := remote.Open(t.Context(), remote.Config{Dial: remote.Socket(path), Client: "enginetest"})
	if err != nil {
		t.Fatal(errors.Join(err, stop()))
	}
	return distant{far, stop}
}
