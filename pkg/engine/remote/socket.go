package remote

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Silence is how long an engine's process may leave a question about its health unanswered before it is
// taken for one that hangs. hack/adr/0026.
const Silence = 30 * time.Second

// OpenSocket opens a domain in the process that listens on the Unix socket path. It sees to cfg.Dial and cfg.Why,
// and its errors name the socket. fault.Unavailable: nothing is there, or does not answer. fault.Invalid: it is
// no socket, or the engine refuses what cfg says. fault.Unsupported: it is no engine of this protocol.
func OpenSocket(ctx context.Context, path string, cfg Config) (*Engine, error) {
	switch info, err := os.Stat(path); {
	case errors.Is(err, os.ErrNotExist): // it may come
		return nil, fault.New(fault.Unavailable, "socket %s: nothing is there: start the engine's process, or correct the path", path)
	case err != nil:
		return nil, fault.New(fault.Unavailable, "socket: %w", err)
	case info.Mode().Type() != os.ModeSocket:
		return nil, fault.New(fault.Invalid, "socket %s is not a socket: the path at which an engine's process listens is needed", path)
	}
	cfg.Dial, cfg.Why = Socket(path), func() string { return "socket " + path }
	e, err := Open(ctx, cfg)
	switch {
	case err == nil:
		return e, nil
	case errors.Is(err, fault.Unsupported):
		return nil, fault.New(fault.Unsupported, "socket %s: what listens there does not serve version 1 of quarry.engine.v1: %w", path, err)
	case errors.Is(err, fault.Unavailable): // says so already
		return nil, err
	}
	return nil, fault.New(fault.KindOf(err), "socket %s: %w", path, err)
}
