package admin

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// maxSocketPath is what fits into a Linux sockaddr_un with its closing zero.
const maxSocketPath = 107

// Endpoint is where something is served: a Unix socket, as CSI writes it
// ("unix:///path"), or for operators also a loopback address ("tcp://127.0.0.1:9811").
type Endpoint struct {
	path    string
	address string // host:port, instead of path
}

// ParseLoopback reads "tcp://ADDRESS:PORT" of a loopback address, beside what
// ParseEndpoint reads. Whoever is in the same network namespace can connect there,
// and nobody else. The error is fault.Invalid.
func ParseLoopback(s string) (Endpoint, error) {
	rest, ok := strings.CutPrefix(s, "tcp://")
	if !ok {
		return ParseEndpoint(s)
	}
	a, err := netip.ParseAddrPort(rest)
	if err != nil {
		return Endpoint{}, fault.New(fault.Invalid, "endpoint %q: must be tcp://ADDRESS:PORT with an address in digits, such as tcp://127.0.0.1:9811", s)
	}
	if !a.Addr().IsLoopback() {
		return Endpoint{}, fault.New(fault.Invalid, "endpoint %q: %s is not a loopback address: whoever reaches it may delete images, so only 127.0.0.0/8 and [::1] are allowed", s, a.Addr())
	}
	return Endpoint{address: a.String()}, nil
}

// ParseEndpoint reads "unix:///path" or "/path". The error is fault.Invalid.
func ParseEndpoint(s string) (Endpoint, error) {
	path := s
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		if scheme != "unix" {
			return Endpoint{}, fault.New(fault.Invalid, "endpoint %q: scheme %q is not allowed: unix:///path", s, scheme)
		}
		path = rest
	}
	if !strings.HasPrefix(path, "/") || strings.HasSuffix(path, "/") || strings.ContainsRune(path, 0) {
		return Endpoint{}, fault.New(fault.Invalid, "endpoint %q: must be unix:// and the absolute path of a socket, such as unix:///run/quarry/admin.sock", s)
	}
	path = filepath.Clean(path)
	if len(path) > maxSocketPath {
		return Endpoint{}, fault.New(fault.Invalid, "endpoint %q: the path has %d bytes: a socket's may have %d", s, len(path), maxSocketPath)
	}
	return Endpoint{path: path}, nil
}

// String renders "unix:///path" or "tcp://address:port".
func (e Endpoint) String() string {
	if e.address != "" {
		return "tcp://" + e.address
	}
	return "unix://" + e.path
}

// Path of the socket; "" of a loopback address.
func (e Endpoint) Path() string { return e.path }

func (e Endpoint) dial(ctx context.Context) (net.Conn, error) {
	if e.address != "" {
		return new(net.Dialer).DialContext(ctx, "tcp", e.address)
	}
	return new(net.Dialer).DialContext(ctx, "unix", e.path)
}

// Listen makes the socket, with its directory, for this user only (mode 0600).
// A socket that nobody serves any more is replaced; closing the listener
// removes it. fault.InUse: somebody answers there. fault.Invalid: something
// else than a socket is there.
func (e Endpoint) Listen() (net.Listener, error) { return e.listen(0o600) }

// ListenGroup is Listen for this user and the socket's group (mode 0660): a
// sidecar need not be root.
func (e Endpoint) ListenGroup() (net.Listener, error) { return e.listen(0o660) }

func (e Endpoint) listen(mode os.FileMode) (net.Listener, error) {
	if e.address != "" {
		l, err := net.Listen("tcp", e.address)
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fault.New(fault.InUse, "endpoint %s: another process serves it: stop that one or choose another port", e)
		}
		if err != nil {
			return nil, fault.New(fault.Invalid, "endpoint %s: %w", e, err)
		}
		return l, nil
	}
	if err := os.MkdirAll(filepath.Dir(e.path), 0o750); err != nil {
		return nil, fault.New(fault.Invalid, "endpoint %s: %w", e, err)
	}
	if err := e.Unused(); err != nil {
		return nil, err
	}
	if err := os.Remove(e.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(fault.Invalid, "endpoint %s: %w", e, err)
	}
	// Linux gives the socket's file the mode that the descriptor has at bind:
	// unlike a chmod afterwards, that leaves no moment in which others may connect.
	var failed error
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return errors.Join(c.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), uint32(mode)) }), failed)
	}}
	l, err := cfg.Listen(context.Background(), "unix", e.path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "endpoint %s: %w", e, err)
	}
	if err := e.widen(mode); err != nil {
		return nil, errors.Join(fault.New(fault.Invalid, "endpoint %s: %w", e, err), l.Close())
	}
	return l, nil
}

// widen gives the socket what the process's umask has taken away at bind.
func (e Endpoint) widen(mode os.FileMode) error {
	info, err := os.Lstat(e.path)
	if err != nil || info.Mode().Perm() == mode {
		return err
	}
	return os.Chmod(e.path, mode)
}

// Unused says whether a socket can be made: nothing is there, or one that
// nobody serves any more. The errors are those of Listen.
func (e Endpoint) Unused() error {
	info, err := os.Lstat(e.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fault.New(fault.Invalid, "endpoint %s: %w", e, err)
	case info.Mode().Type() != os.ModeSocket:
		return fault.New(fault.Invalid, "endpoint %s: there is a file that is not a socket: remove it or choose another path", e)
	}
	end := time.After(orphanLimit)
	tick := time.NewTicker(10 * time.Millisecond) // the kernel tells nobody when the last one closes it
	defer tick.Stop()
	for {
		conn, err := net.DialTimeout("unix", e.path, time.Second)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if err != nil {
			return fault.New(fault.InUse, "endpoint %s: a socket is there that cannot be told to be unused: %w", e, err)
		}
		orphan := orphaned(conn)
		_ = conn.Close() // only a probe
		inUse := fault.New(fault.InUse, "endpoint %s: another process serves it: stop that one or choose another path", e)
		if !orphan {
			return inUse
		}
		select {
		case <-tick.C:
		case <-end:
			return inUse
		}
	}
}

// orphanLimit is how long a socket is waited for whose server was killed while it
// was starting a program: until that has begun it holds all that its parent had open.
const orphanLimit = 5 * time.Second

// orphaned says whether the process that made the socket at the other end is gone.
func orphaned(conn net.Conn) bool {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		gone = err == nil && cred.Pid > 0 && errors.Is(unix.Kill(int(cred.Pid), 0), unix.ESRCH)
	})
	return err == nil && gone
}
