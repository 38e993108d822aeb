package reach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// reasonLimit is how long a stream that has ended is asked for the reason.
const reasonLimit = 2 * time.Second

// link is the port-forward to a pod, made when it is first needed.
type link struct {
	mu      sync.Mutex
	conn    httpstream.Connection
	counter int
}

// Dial opens a connection to the controller's endpoint for operators.
func (c *Controller) Dial(ctx context.Context) (net.Conn, error) {
	conn, id, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	header := http.Header{}
	header.Set(corev1.PortHeader, strconv.Itoa(c.port))
	header.Set(corev1.PortForwardRequestIDHeader, strconv.Itoa(id))
	header.Set(corev1.StreamType, corev1.StreamTypeError)
	reasons, err := conn.CreateStream(header)
	if err == nil {
		err = reasons.Close() // nothing is written to it
	}
	if err != nil {
		return nil, fault.New(fault.Unavailable, "port-forward to %s: %w", c, err)
	}
	header.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := conn.CreateStream(header)
	if err != nil {
		conn.RemoveStreams(reasons)
		return nil, fault.New(fault.Unavailable, "port-forward to %s: %w", c, err)
	}
	f := &forwarded{Stream: data, conn: conn, of: c, ended: make(chan struct{})}
	go func() {
		defer close(f.ended)
		said, err := io.ReadAll(io.LimitReader(reasons, 4<<10))
		if f.reason = strings.TrimSpace(string(said)); f.reason == "" && err != nil {
			f.reason = err.Error()
		}
		conn.RemoveStreams(reasons)
	}()
	return f, nil
}

// connect gives the connection to the API server, and a number for a pair of streams.
func (c *Controller) connect(ctx context.Context) (httpstream.Connection, int, error) {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	c.link.counter++
	if c.link.conn != nil {
		return c.link.conn, c.link.counter, nil
	}
	type result struct {
		conn httpstream.Connection
		err  error
	}
	made := make(chan result, 1)
	go func() { // client-go's dialers know no context
		conn, err := c.upgrade()
		made <- result{conn, err}
	}()
	select {
	case r := <-made:
		c.link.conn = r.conn
		return r.conn, c.link.counter, r.err
	case <-ctx.Done():
		go func() {
			if r := <-made; r.conn != nil {
				_ = r.conn.Close() // nobody waits for it any more
			}
		}()
		return nil, 0, ctx.Err()
	}
}

// upgrade makes a port-forward as kubectl does: over a WebSocket, and by SPDY where
// something on the way does not know that.
func (c *Controller) upgrade() (httpstream.Connection, error) {
	url := c.api.Post().AbsPath(c.path()).URL()
	transport, upgrader, err := spdy.RoundTripperFor(c.cfg)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err)
	}
	older := spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, url)
	newer, err := portforward.NewSPDYOverWebsocketDialerForStreaming(url, c.cfg)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err)
	}
	dialer := portforward.NewFallbackDialerForStreaming(newer, older, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	conn, protocol, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, c.notForwarded(err)
	}
	if protocol != portforward.PortForwardProtocolV1Name {
		return nil, errors.Join(fault.New(fault.Unavailable, "port-forward to %s: the API server speaks %q, not %q", c, protocol, portforward.PortForwardProtocolV1Name), conn.Close())
	}
	return conn, nil
}

// notForwarded says why there is no port-forward. An upgrade that is refused says so only in
// words: the same request without an upgrade is refused with a reason.
func (c *Controller) notForwarded(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), requestLimit)
	defer cancel()
	plain := c.api.Post().AbsPath(c.path()).Do(ctx).Error()
	if apierrors.IsForbidden(plain) || apierrors.IsUnauthorized(plain) || apierrors.IsNotFound(plain) {
		err = plain
	}
	return c.failed(err, fmt.Sprintf("port-forward to %s", c), "get and create", "pods/portforward", "in namespace "+c.Namespace)
}

func (c *Controller) path() string {
	return "/api/v1/namespaces/" + c.Namespace + "/pods/" + c.Pod + "/portforward"
}

// Close ends the port-forward.
func (c *Controller) Close() error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	if c.link.conn == nil {
		return nil
	}
	err := c.link.conn.Close()
	c.link.conn = nil
	return err
}

// forwarded is a connection through a port-forward.
type forwarded struct {
	httpstream.Stream
	conn   httpstream.Connection
	of     *Controller
	ended  chan struct{}
	reason string // why nothing comes any more, if anybody says so; when ended is closed
}

var _ net.Conn = (*forwarded)(nil)

// Read implements net.Conn. The end of a stream is an error if the node has a reason for it:
// nobody listens on the port, say.
func (f *forwarded) Read(b []byte) (int, error) {
	n, err := f.Stream.Read(b)
	if n > 0 || err == nil {
		return n, err
	}
	limit := time.NewTimer(reasonLimit)
	defer limit.Stop()
	select {
	case <-f.ended:
		if f.reason != "" {
			return 0, fault.New(fault.Unavailable, "port %d of %s: %s: it may have just stopped to lead: try again in a moment", f.of.port, f.of, f.reason)
		}
	case <-limit.C:
	}
	return 0, err
}

// Close implements net.Conn.
func (f *forwarded) Close() error {
	defer f.conn.RemoveStreams(f.Stream)
	return errors.Join(f.Stream.Close(), f.Reset())
}

// LocalAddr implements net.Conn.
func (f *forwarded) LocalAddr() net.Addr { return address("kubectl-quarry") }

// RemoteAddr implements net.Conn.
func (f *forwarded) RemoteAddr() net.Addr { return address(f.of.String()) }

// SetDeadline implements net.Conn; a stream has none.
func (f *forwarded) SetDeadline(time.Time) error { return os.ErrNoDeadline }

// SetReadDeadline implements net.Conn; a stream has none.
func (f *forwarded) SetReadDeadline(time.Time) error { return os.ErrNoDeadline }

// SetWriteDeadline implements net.Conn; a stream has none.
func (f *forwarded) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type address string

func (address) Network() string  { return "port-forward" }
func (a address) String() string { return string(a) }
