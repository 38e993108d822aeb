package csi

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// maxRanges is how many ranges are sent in one message at most: about 300 KiB,
// where gRPC allows 4 MiB.
const maxRanges = 16384

// GetMetadataAllocated lists the ranges of a snapshot that may hold data.
func (s *Server) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest, stream csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	q, err := s.listed(stream.Context(), "snapshot_id", req.GetSnapshotId(), req.GetStartingOffset(), req.GetMaxResults())
	if err != nil {
		return err
	}
	q.send = func(list []*csi.BlockMetadata) error {
		return stream.Send(&csi.GetMetadataAllocatedResponse{
			BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: q.size, BlockMetadata: list,
		})
	}
	return q.finish(s.cfg.Manager.Allocated(stream.Context(), q.handle, req.GetStartingOffset(), q.emit))
}

// GetMetadataDelta lists the ranges in which a snapshot may differ from an
// earlier one.
func (s *Server) GetMetadataDelta(req *csi.GetMetadataDeltaRequest, stream csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	if err := required("target_snapshot_id", req.GetTargetSnapshotId()); err != nil {
		return err
	}
	base, err := handleOf("base_snapshot_id", req.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	q, err := s.listed(stream.Context(), "target_snapshot_id", req.GetTargetSnapshotId(), req.GetStartingOffset(), req.GetMaxResults())
	if err != nil {
		return err
	}
	q.send = func(list []*csi.BlockMetadata) error {
		return stream.Send(&csi.GetMetadataDeltaResponse{
			BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: q.size, BlockMetadata: list,
		})
	}
	return q.finish(s.cfg.Manager.Changed(stream.Context(), base, q.handle, req.GetStartingOffset(), q.emit))
}

// ranges is a stream of ranges of a snapshot.
type ranges struct {
	handle image.Handle
	size   int64 // of the snapshot, in bytes
	most   int   // ranges in a message
	send   func([]*csi.BlockMetadata) error
	sent   bool
}

// listed checks what the two calls have in common.
func (s *Server) listed(ctx context.Context, field, id string, offset int64, most int32) (*ranges, error) {
	if err := required(field, id); err != nil {
		return nil, err
	}
	if most < 0 {
		return nil, fault.New(fault.Invalid, "max_results is %d: it must not be negative", most)
	}
	h, err := handleOf(field, id)
	if err != nil {
		return nil, err
	}
	img, err := s.snapshotImage(ctx, h)
	if err != nil {
		return nil, err
	}
	if offset < 0 || offset > img.Size {
		return nil, fault.New(fault.OutOfRange, "starting_offset is %d: 0 to %d, the size of snapshot %s, are allowed", offset, img.Size, id)
	}
	q := &ranges{handle: h, size: img.Size, most: maxRanges}
	if most > 0 {
		q.most = min(q.most, int(most))
	}
	return q, nil
}

// emit sends ranges in as many messages as are needed.
func (q *ranges) emit(list []engine.Extent) error {
	for len(list) > 0 {
		n := min(len(list), q.most)
		out := make([]*csi.BlockMetadata, n)
		for i, e := range list[:n] {
			out[i] = &csi.BlockMetadata{ByteOffset: e.Offset, SizeBytes: e.Length}
		}
		if err := q.message(out); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

func (q *ranges) message(list []*csi.BlockMetadata) error {
	q.sent = true
	return rpcfault.FromStatus(q.send(list)) // the error of a client that has gone
}

// finish ends a stream well: one without ranges still says how large the snapshot is.
func (q *ranges) finish(err error) error {
	if err == nil && !q.sent {
		err = q.message(nil)
	}
	return err
}
