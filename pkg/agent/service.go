package agent

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// service is what an agent does for the controller.
type service struct {
	agentpb.UnimplementedAgentServer
	link *Link
	node Node
	work Work
}

const (
	// progressEvery is how often a copy says how far it is, at most.
	progressEvery = 500 * time.Millisecond
	// extentsPage is how many extents a message has.
	extentsPage = 10_000
)

func (s *service) Adopt(ctx context.Context, r *agentpb.AdoptRequest) (*agentpb.AdoptResponse, error) {
	return &agentpb.AdoptResponse{}, s.link.adopt(ctx, r)
}

func (s *service) Settle(ctx context.Context, r *agentpb.SettleRequest) (*agentpb.SettleResponse, error) {
	return &agentpb.SettleResponse{}, s.link.gate.settle(ctx, fromPlace(r.GetPlace()))
}

// writing does work that writes a slab, and that nobody else may write meanwhile.
func (s *service) writing(ctx context.Context, p *agentpb.Place, work func(image.Place) error) error {
	at := fromPlace(p)
	release, err := s.link.gate.write(ctx, at)
	if err != nil {
		return err
	}
	defer release()
	return work(at)
}

func (s *service) Freeze(ctx context.Context, r *agentpb.FreezeRequest) (*agentpb.FreezeResponse, error) {
	state, err := s.node.Freeze(ctx, fromHandle(r.GetHandle()), time.Duration(r.GetLimitNanoseconds()))
	return &agentpb.FreezeResponse{State: string(state)}, err
}

func (s *service) Thaw(ctx context.Context, r *agentpb.ImageRequest) (*agentpb.ThawResponse, error) {
	return &agentpb.ThawResponse{}, s.node.Thaw(ctx, fromHandle(r.GetHandle()))
}

func (s *service) Staged(ctx context.Context, r *agentpb.ImageRequest) (*agentpb.StagedResponse, error) {
	staged, err := s.node.Staged(ctx, fromHandle(r.GetHandle()))
	return &agentpb.StagedResponse{Staged: staged}, err
}

func (s *service) Layers(ctx context.Context, r *agentpb.ImageRequest) (*agentpb.LayersResponse, error) {
	return &agentpb.LayersResponse{}, s.node.Layers(ctx, fromHandle(r.GetHandle()))
}

func (s *service) Encrypts(ctx context.Context, _ *agentpb.EncryptsRequest) (*agentpb.EncryptsResponse, error) {
	return &agentpb.EncryptsResponse{}, s.node.Encrypts(ctx)
}

func (s *service) Switch(ctx context.Context, r *agentpb.SwitchRequest) (*agentpb.SwitchResponse, error) {
	return &agentpb.SwitchResponse{}, s.node.Switch(ctx, fromSwitch(r), r.GetPrepared())
}

func fromSwitch(r *agentpb.SwitchRequest) (images []image.Staging) {
	for _, st := range r.GetImages() {
		images = append(images, fromStaging(st))
	}
	return images
}

func (s *service) Prepare(ctx context.Context, r *agentpb.SwitchRequest) (*agentpb.PrepareResponse, error) {
	prepared, err := s.node.Prepare(ctx, fromSwitch(r))
	return &agentpb.PrepareResponse{Prepared: prepared}, err
}

func (s *service) Hold(ctx context.Context, r *agentpb.SwitchRequest) (*agentpb.HoldResponse, error) {
	return &agentpb.HoldResponse{}, s.node.Hold(ctx, fromSwitch(r), r.GetPrepared())
}

func (s *service) Release(ctx context.Context, r *agentpb.ReleaseRequest) (*agentpb.ReleaseResponse, error) {
	return &agentpb.ReleaseResponse{}, s.node.Release(ctx, r.GetPrepared())
}

func (s *service) Merge(ctx context.Context, r *agentpb.ChainRequest) (*agentpb.MergeResponse, error) {
	m, err := s.node.Merge(ctx, fromStaging(r.GetChain()))
	return &agentpb.MergeResponse{Left: m.Left, Done: m.Done}, err
}

func (s *service) StopMerge(ctx context.Context, r *agentpb.ChainRequest) (*agentpb.StopMergeResponse, error) {
	return &agentpb.StopMergeResponse{}, s.node.StopMerge(ctx, fromStaging(r.GetChain()))
}

// teller sends messages from callbacks that may come from several goroutines, and
// also after the end.
type teller struct {
	mu    sync.Mutex
	last  time.Time
	ended bool
}

// now and then calls send, unless it was called a moment ago.
func (t *teller) sometimes(send func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if at := time.Now(); !t.ended && at.Sub(t.last) >= progressEvery {
		t.last = at
		send()
	}
}

func (t *teller) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
}

func (s *service) CopyBlock(stream grpc.BidiStreamingServer[agentpb.CopyBlockRequest, agentpb.CopyBlockResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	b := first.GetBegin()
	if b == nil {
		return fault.New(fault.Invalid, "the first message of a copy must begin it")
	}
	var t teller
	defer t.end()
	opts := image.BlockCopy{Size: b.GetSize(), From: b.GetFrom(), DstZeroed: b.GetTargetZeroed(), Rate: b.GetRate(), Progress: func(done, total int64) {
		t.sometimes(func() { _ = stream.Send(&agentpb.CopyBlockResponse{Done: done, Total: total}) }) // a client that has gone ends the context
	}}
	if b.GetCheckpoints() {
		opts.Checkpoint = func(offset int64) error {
			t.mu.Lock()
			err := stream.Send(&agentpb.CopyBlockResponse{Checkpoint: true, Durable: offset})
			t.mu.Unlock()
			if err != nil {
				return err
			}
			sealed := make(chan error, 1)
			go func() {
				m, err := stream.Recv() // ends with the stream at the latest
				if err == nil && !m.GetSealed() {
					err = fault.New(fault.Invalid, "a checkpoint must be answered by sealed")
				}
				sealed <- err
			}()
			select {
			case err := <-sealed:
				return err
			case <-stream.Context().Done(): // the gate ends calls, too
				return stream.Context().Err()
			}
		}
	}
	return s.writing(stream.Context(), b.GetTarget(), func(to image.Place) error {
		if b.GetTicket() != "" {
			return s.moved(stream.Context(), b.GetTicket(), func(conn net.Conn) error { return s.work.ReceiveBlock(stream.Context(), to, opts, conn) })
		}
		return s.work.CopyBlock(stream.Context(), fromContent(b.GetSource()), to, opts)
	})
}

func (s *service) CopyTree(r *agentpb.CopyTreeRequest, stream grpc.ServerStreamingServer[agentpb.CopyTreeResponse]) error {
	var t teller
	defer t.end()
	return s.writing(stream.Context(), r.GetTarget(), func(to image.Place) error {
		progress := func(done, total int64) {
			t.sometimes(func() { _ = stream.Send(&agentpb.CopyTreeResponse{Done: done, Total: total}) })
		}
		if r.GetTicket() != "" {
			return s.moved(stream.Context(), r.GetTicket(), func(conn net.Conn) error { return s.work.ReceiveTree(stream.Context(), to, progress, conn) })
		}
		return s.work.CopyTree(stream.Context(), fromContent(r.GetSource()), to, progress)
	})
}

func (s *service) Zero(ctx context.Context, r *agentpb.ZeroRequest) (*agentpb.ZeroResponse, error) {
	return &agentpb.ZeroResponse{}, s.writing(ctx, r.GetPlace(), func(p image.Place) error { return s.work.Zero(ctx, p, r.GetFrom(), r.GetTo()) })
}

func (s *service) FormatLayer(ctx context.Context, r *agentpb.FormatLayerRequest) (*agentpb.FormatLayerResponse, error) {
	return &agentpb.FormatLayerResponse{}, s.writing(ctx, r.GetPlace(), func(p image.Place) error { return s.work.FormatLayer(ctx, p, r.GetSize(), r.GetChunk()) })
}

func (s *service) Allocate(ctx context.Context, r *agentpb.AllocateRequest) (*agentpb.AllocateResponse, error) {
	return &agentpb.AllocateResponse{}, s.work.Allocate(ctx, fromPlace(r.GetPlace()), r.GetSize())
}

func (s *service) TrimLayer(ctx context.Context, r *agentpb.TrimLayerRequest) (*agentpb.TrimLayerResponse, error) {
	return &agentpb.TrimLayerResponse{}, s.writing(ctx, r.GetPlace(), func(p image.Place) error { return s.work.TrimLayer(ctx, p, r.GetSize()) })
}

func (s *service) CheckLayer(ctx context.Context, r *agentpb.CheckLayerRequest) (*agentpb.CheckLayerResponse, error) {
	looked, err := s.work.CheckLayer(ctx, fromPlace(r.GetPlace()))
	if !looked {
		return &agentpb.CheckLayerResponse{}, nil
	}
	return &agentpb.CheckLayerResponse{Looked: true}, err
}

func (s *service) RepairLayer(ctx context.Context, r *agentpb.RepairLayerRequest) (*agentpb.RepairLayerResponse, error) {
	resp := &agentpb.RepairLayerResponse{}
	return resp, s.writing(ctx, r.GetPlace(), func(p image.Place) (err error) {
		resp.Chunks, err = s.work.RepairLayer(ctx, p, r.GetSize())
		return err
	})
}

func (s *service) LayerExtents(r *agentpb.ExtentsRequest, stream grpc.ServerStreamingServer[agentpb.ExtentsResponse]) error {
	list, err := s.work.LayerExtents(stream.Context(), fromPlace(r.GetPlace()), r.GetSize())
	return sendExtents(list, err, stream.Send)
}

func (s *service) DataExtents(r *agentpb.ExtentsRequest, stream grpc.ServerStreamingServer[agentpb.ExtentsResponse]) error {
	list, err := s.work.DataExtents(stream.Context(), fromPlace(r.GetPlace()), r.GetSize())
	return sendExtents(list, err, stream.Send)
}

func (s *service) Compare(r *agentpb.CompareRequest, stream grpc.ServerStreamingServer[agentpb.ExtentsResponse]) error {
	return s.work.Compare(stream.Context(), fromContent(r.GetA()), fromContent(r.GetB()), fromExtents(r.GetRanges()), func(list []engine.Extent) error {
		return sendExtents(list, nil, stream.Send)
	})
}

func sendExtents(list []engine.Extent, err error, send func(*agentpb.ExtentsResponse) error) error {
	for part := range slices.Chunk(list, extentsPage) {
		if err == nil {
			err = send(&agentpb.ExtentsResponse{Extents: toExtents(part)})
		}
	}
	return err
}
