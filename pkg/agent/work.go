package agent

import (
	"context"
	"errors"
	"io"
	"slices"

	"google.golang.org/grpc"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

var _ image.Worker = (*Hub)(nil)

// worker is a node from which all these domains can be reached. node, if not "", has to
// be it.
func (h *Hub) worker(node string, domains ...string) (*peer, error) {
	var common []string
	for i, d := range domains {
		at := h.places(d)
		if len(at) == 0 {
			return nil, fault.New(fault.Unavailable, "domain %s: no node that reaches it has an agent that is connected", d)
		}
		if i == 0 {
			common = at
		}
		common = slices.DeleteFunc(common, func(n string) bool { return !slices.Contains(at, n) })
	}
	if node != "" && !slices.Contains(common, node) {
		common = nil
	} else if node != "" {
		common = []string{node}
	}
	if len(common) == 0 {
		return nil, fault.New(fault.Unavailable, "no node whose agent is connected reaches all of the domains %q", domains)
	}
	return h.peer(common[0])
}

// reader is a worker, and the context to ask it with.
func (h *Hub) reader(ctx context.Context, node string, domains ...string) (context.Context, *peer, error) {
	p, err := h.worker(node, domains...)
	if err != nil {
		return ctx, nil, err
	}
	ctx, err = h.carry(ctx, domains...)
	return ctx, p, err
}

// CopyBlock implements image.Worker.
func (h *Hub) CopyBlock(ctx context.Context, src image.Content, dst image.Place, opts image.BlockCopy) error {
	if h.apart(src, dst) {
		return h.writing(ctx, dst, "", []string{dst.Domain}, func(ctx context.Context, p *peer) error {
			send := &agentpb.SendRequest{Size: opts.Size, From: opts.From, Rate: opts.Rate}
			return h.move(ctx, src, dst, p, send, func(ctx context.Context, ticket string) error { return p.copyBlock(ctx, src, dst, opts, ticket) })
		})
	}
	return h.writing(ctx, dst, src.Node, []string{src.Domain, dst.Domain}, func(ctx context.Context, p *peer) error {
		return p.copyBlock(ctx, src, dst, opts, "")
	})
}

// copyBlock copies on a node. ticket, if not "", is for the connection by which the content comes.
func (p *peer) copyBlock(ctx context.Context, src image.Content, dst image.Place, opts image.BlockCopy, ticket string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.rpc.CopyBlock(ctx)
	if err != nil {
		return rpcfault.FromStatus(err)
	}
	// What sending fails of, receiving says.
	_ = stream.Send(&agentpb.CopyBlockRequest{Begin: &agentpb.CopyBlockBegin{Source: toContent(src), Target: toPlace(dst), Size: opts.Size, From: opts.From,
		TargetZeroed: opts.DstZeroed, Rate: opts.Rate, Checkpoints: opts.Checkpoint != nil, Ticket: ticket}})
	for {
		m, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return rpcfault.FromStatus(err)
		case m.GetCheckpoint() && opts.Checkpoint != nil:
			if err := opts.Checkpoint(m.GetDurable()); err != nil {
				cancel()
				if still := p.hub.settleOn(context.WithoutCancel(ctx), dst, p.node); still != nil {
					p.hub.doubts.note(dst, p.node, still)
				}
				return err
			}
			_ = stream.Send(&agentpb.CopyBlockRequest{Sealed: true})
		case opts.Progress != nil && !m.GetCheckpoint():
			opts.Progress(m.GetDone(), m.GetTotal())
		}
	}
}

// CopyTree implements image.Worker.
func (h *Hub) CopyTree(ctx context.Context, src image.Content, dst image.Place, progress func(done, total int64)) error {
	if h.apart(src, dst) {
		return h.writing(ctx, dst, "", []string{dst.Domain}, func(ctx context.Context, p *peer) error {
			return h.move(ctx, src, dst, p, &agentpb.SendRequest{Tree: true}, func(ctx context.Context, ticket string) error {
				return p.copyTree(ctx, src, dst, progress, ticket)
			})
		})
	}
	return h.writing(ctx, dst, src.Node, []string{src.Domain, dst.Domain}, func(ctx context.Context, p *peer) error {
		return p.copyTree(ctx, src, dst, progress, "")
	})
}

func (p *peer) copyTree(ctx context.Context, src image.Content, dst image.Place, progress func(done, total int64), ticket string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.rpc.CopyTree(ctx, &agentpb.CopyTreeRequest{Source: toContent(src), Target: toPlace(dst), Ticket: ticket})
	return each(stream, err, func(m *agentpb.CopyTreeResponse) error {
		progress(m.GetDone(), m.GetTotal())
		return nil
	})
}

// each takes all messages of a stream; began is the error of beginning it.
func each[M any](stream grpc.ServerStreamingClient[M], began error, take func(*M) error) error {
	if began != nil {
		return rpcfault.FromStatus(began)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return rpcfault.FromStatus(err)
		}
		if err := take(m); err != nil {
			return err
		}
	}
}

// Zero implements image.Worker.
func (h *Hub) Zero(ctx context.Context, at image.Place, from, to int64) error {
	return h.writing(ctx, at, "", []string{at.Domain}, func(ctx context.Context, p *peer) error {
		_, err := p.rpc.Zero(ctx, &agentpb.ZeroRequest{Place: toPlace(at), From: from, To: to})
		return rpcfault.FromStatus(err)
	})
}

// FormatLayer implements image.Worker.
func (h *Hub) FormatLayer(ctx context.Context, at image.Place, size, chunk int64) error {
	return h.writing(ctx, at, "", []string{at.Domain}, func(ctx context.Context, p *peer) error {
		_, err := p.rpc.FormatLayer(ctx, &agentpb.FormatLayerRequest{Place: toPlace(at), Size: size, Chunk: chunk})
		return rpcfault.FromStatus(err)
	})
}

// Allocate implements image.Worker.
func (h *Hub) Allocate(ctx context.Context, at image.Place, size int64) error {
	ctx, p, err := h.reader(ctx, "", at.Domain)
	if err != nil {
		return err
	}
	_, err = p.rpc.Allocate(ctx, &agentpb.AllocateRequest{Place: toPlace(at), Size: size})
	return rpcfault.FromStatus(err)
}

// TrimLayer implements image.Worker.
func (h *Hub) TrimLayer(ctx context.Context, at image.Place, size int64) error {
	return h.writing(ctx, at, "", []string{at.Domain}, func(ctx context.Context, p *peer) error {
		_, err := p.rpc.TrimLayer(ctx, &agentpb.TrimLayerRequest{Place: toPlace(at), Size: size})
		return rpcfault.FromStatus(err)
	})
}

// CheckLayer implements image.Worker.
func (h *Hub) CheckLayer(ctx context.Context, at image.Place) (looked bool, err error) {
	ctx, p, err := h.reader(ctx, "", at.Domain)
	if err != nil {
		return false, err
	}
	r, err := p.rpc.CheckLayer(ctx, &agentpb.CheckLayerRequest{Place: toPlace(at)})
	if err = rpcfault.FromStatus(err); err == nil {
		return r.GetLooked(), nil
	}
	gone := errors.Is(err, fault.Canceled) || errors.Is(err, fault.Deadline) || !p.connected()
	return !gone, err
}

// RepairLayer implements image.Worker.
func (h *Hub) RepairLayer(ctx context.Context, at image.Place, size int64) (chunks int64, err error) {
	err = h.writing(ctx, at, "", []string{at.Domain}, func(ctx context.Context, p *peer) error {
		r, err := p.rpc.RepairLayer(ctx, &agentpb.RepairLayerRequest{Place: toPlace(at), Size: size})
		chunks = r.GetChunks()
		return rpcfault.FromStatus(err)
	})
	return chunks, err
}

// LayerExtents implements image.Worker.
func (h *Hub) LayerExtents(ctx context.Context, at image.Place, size int64) ([]engine.Extent, error) {
	ctx, p, err := h.reader(ctx, "", at.Domain)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.rpc.LayerExtents(ctx, &agentpb.ExtentsRequest{Place: toPlace(at), Size: size})
	return gather(stream, err)
}

// DataExtents implements image.Worker.
func (h *Hub) DataExtents(ctx context.Context, at image.Place, size int64) ([]engine.Extent, error) {
	ctx, p, err := h.reader(ctx, "", at.Domain)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.rpc.DataExtents(ctx, &agentpb.ExtentsRequest{Place: toPlace(at), Size: size})
	return gather(stream, err)
}

func gather(stream grpc.ServerStreamingClient[agentpb.ExtentsResponse], began error) (out []engine.Extent, err error) {
	err = each(stream, began, func(m *agentpb.ExtentsResponse) error {
		out = append(out, fromExtents(m.GetExtents())...)
		return nil
	})
	return out, err
}

// Compare implements image.Worker.
func (h *Hub) Compare(ctx context.Context, a, b image.Content, ranges []engine.Extent, emit func([]engine.Extent) error) error {
	node := a.Node
	if node == "" {
		node = b.Node
	}
	if b.Node != "" && b.Node != node {
		return fault.New(fault.Unavailable, "one side is a chain on node %s, the other one on node %s: they cannot be compared now", a.Node, b.Node)
	}
	ctx, p, err := h.reader(ctx, node, a.Domain, b.Domain)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.rpc.Compare(ctx, &agentpb.CompareRequest{A: toContent(a), B: toContent(b), Ranges: toExtents(ranges)})
	return each(stream, err, func(m *agentpb.ExtentsResponse) error { return emit(fromExtents(m.GetExtents())) })
}
