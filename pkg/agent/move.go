package agent

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Data that has to go from one node to another goes over two connections of its own, which
// the nodes make to the controller, as they do for the link: nodes open no port, and a
// long copy keeps no command waiting. The controller tells each node a ticket, and
// passes on what comes: as fast as the slower of both, and with no more memory than a
// buffer. It keeps nothing: a move that is broken off goes on from its checkpoint.

// moveBuffer is how much of a move the controller holds at most, beside the kernel.
const moveBuffer = 256 << 10

// moveGrace is how long the other parts of a move have to say what ended it.
const moveGrace = 5 * time.Second

// moves are the connections that are expected.
type moves struct {
	mu   sync.Mutex
	ends map[string]*end // by ticket
}

// end of a move: the node that is going to connect.
type end struct {
	node string
	conn chan net.Conn // gets the connection, once
	over chan struct{} // closed when the move is over
}

// expect makes a ticket for a node.
func (m *moves) expect(node string, over chan struct{}) (ticket string, e *end) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ticket, e = rand.Text(), &end{node: node, conn: make(chan net.Conn, 1), over: over}
	m.ends[ticket] = e
	return ticket, e
}

func (m *moves) forget(ticket string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.ends, ticket)
}

// take finds the end of a ticket that a node shows; it is good once.
func (m *moves) take(ticket, node string) (*end, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.ends[ticket]
	if e == nil || subtle.ConstantTimeCompare([]byte(e.node), []byte(node)) != 1 {
		return nil, fault.New(fault.Permission, "no data is expected from or for node %s with this ticket", node)
	}
	delete(m.ends, ticket)
	return e, nil
}

// serve gives the move a node's connection, and keeps it until the move is over.
func (e *end) serve(ctx context.Context, conn net.Conn) {
	e.conn <- conn
	select {
	case <-e.over:
	case <-ctx.Done():
	}
}

// relay passes on what comes from one end to the other.
func relay(ctx context.Context, from, to *end) error {
	var conns [2]net.Conn
	for i, e := range []*end{from, to} {
		select {
		case conns[i] = <-e.conn:
			stop := context.AfterFunc(ctx, func() { _ = conns[i].Close() })
			defer stop()
			defer conns[i].Close()
		case <-ctx.Done():
			return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
		}
	}
	// Not by their own ReadFrom and WriteTo: those would not keep to the buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{conns[1]}, struct{ io.Reader }{conns[0]}, make([]byte, moveBuffer))
	return fault.Wrap(fault.Unavailable, err)
}

// apart says whether no connected node reaches both sides of a copy, but some reach each.
func (h *Hub) apart(src image.Content, dst image.Place) bool {
	if _, err := h.worker(src.Node, src.Domain, dst.Domain); err == nil {
		return false
	}
	_, errSrc := h.worker(src.Node, src.Domain)
	_, errDst := h.worker("", dst.Domain)
	return errSrc == nil && errDst == nil
}

// move lets the node that has src send it to the node to, which writes dst. receive is what that
// does with its ticket. When it returns nothing is written any more, or the error is
// fault.Unavailable.
func (h *Hub) move(ctx context.Context, src image.Content, dst image.Place, to *peer, send *agentpb.SendRequest, receive func(ctx context.Context, ticket string) error) error {
	from, err := h.worker(src.Node, src.Domain)
	if err != nil {
		return err
	}
	if ctx, err = h.carry(ctx, src.Domain); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	defer close(over)
	sends, a := h.moves.expect(from.node, over)
	defer h.moves.forget(sends)
	receives, b := h.moves.expect(to.node, over)
	defer h.moves.forget(receives)
	send.Source, send.Ticket = toContent(src), sends

	var all sync.WaitGroup
	var mu sync.Mutex
	var why error // the error that counts
	var late *time.Timer
	part := func(what string, do func() error) {
		all.Go(func() {
			err := do()
			if err == nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if fault.KindOf(err) != fault.Unavailable {
				cancel()
			} else if late == nil { // a connection that ended: another part knows why, and its answer is under way
				late = time.AfterFunc(moveGrace, cancel)
			}
			if why == nil || blame(err) > blame(why) {
				why = fault.New(fault.KindOf(err), "%s: %w", what, err)
			}
		})
	}
	part("send from node "+from.node, func() error {
		_, err := from.rpc.Send(ctx, send)
		return rpcfault.FromStatus(err)
	})
	part("receive on node "+to.node, func() error { return receive(ctx, receives) })
	part("pass on from node "+from.node+" to node "+to.node, func() error { return relay(ctx, a, b) })
	all.Wait()
	if late != nil {
		late.Stop()
	}
	if why == nil {
		return nil
	}
	// What failed may be the other half: then this one was canceled, and has yet to end.
	if still := h.settleOn(context.WithoutCancel(ctx), dst, to.node); still != nil {
		return fault.New(fault.Unavailable, "%w (%w)", why, still)
	}
	return why
}

// blame ranks errors of the parts of a move: when one fails, the others are canceled, or see
// their connection end.
func blame(err error) int {
	switch fault.KindOf(err) {
	case fault.Canceled:
		return 0
	case fault.Unavailable:
		return 1
	}
	return 2
}

// dialMove connects to the controller with a ticket. The connection ends with ctx.
func (l *Link) dialMove(ctx context.Context, ticket string) (_ net.Conn, err error) {
	limited, cancel := context.WithTimeout(ctx, helloLimit)
	defer cancel()
	conn, err := l.cfg.Dial(limited)
	if err != nil {
		return nil, fault.Wrap(fault.Unavailable, err)
	}
	if _, err := l.hello(conn, ticket); err != nil {
		return nil, fault.New(fault.Unavailable, "connect for the data of a copy: %w", errors.Join(err, conn.Close()))
	}
	return &moving{Conn: conn, stop: context.AfterFunc(ctx, func() { _ = conn.Close() })}, nil
}

// moving is a connection for data that ends with a context.
type moving struct {
	net.Conn
	stop func() bool
}

// Close implements net.Conn.
func (m *moving) Close() error {
	m.stop()
	return m.Conn.Close()
}

// moved connects for the data of a copy, and does it.
func (s *service) moved(ctx context.Context, ticket string, do func(net.Conn) error) error {
	conn, err := s.link.dialMove(ctx, ticket)
	if err != nil {
		return err
	}
	err = do(conn)
	if errors.Is(err, fault.Unavailable) && ctx.Err() != nil {
		err = fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err()) // that is why it ended
	}
	return errors.Join(err, s.ended(err, conn.Close()))
}

// ended is the error of closing a connection, where that tells more than what was done on it.
func (s *service) ended(done, closed error) error {
	if done != nil || closed == nil || errors.Is(closed, net.ErrClosed) {
		return nil
	}
	return fault.Wrap(fault.Unavailable, closed)
}

// Send implements agentpb.AgentServer.
func (s *service) Send(ctx context.Context, r *agentpb.SendRequest) (*agentpb.SendResponse, error) {
	src := fromContent(r.GetSource())
	return &agentpb.SendResponse{}, s.moved(ctx, r.GetTicket(), func(conn net.Conn) error {
		if r.GetTree() {
			return s.work.SendTree(ctx, src, conn)
		}
		return s.work.SendBlock(ctx, src, image.BlockCopy{Size: r.GetSize(), From: r.GetFrom(), Rate: r.GetRate()}, conn)
	})
}

// Work is what an agent does on slabs: image.Worker, and the halves of copies between
// nodes. *mover.Local does it. What they read from and write to ends with ctx.
type Work interface {
	image.Worker
	SendBlock(ctx context.Context, src image.Content, opts image.BlockCopy, to io.Writer) error
	ReceiveBlock(ctx context.Context, dst image.Place, opts image.BlockCopy, from io.Reader) error
	SendTree(ctx context.Context, src image.Content, to io.Writer) error
	ReceiveTree(ctx context.Context, dst image.Place, progress func(done, total int64), from io.Reader) error
}

// admitMove lets a connection for data in.
func (h *Hub) admitMove(hello *agentpb.Hello) (*end, error) {
	if hello.GetTicket() == "" {
		return nil, nil
	}
	return h.moves.take(hello.GetTicket(), hello.GetNode())
}

// untimed takes the deadline off a connection that was let in.
func untimed(conn net.Conn) error {
	return fault.Wrap(fault.Unavailable, conn.SetDeadline(time.Time{}))
}
