package csi

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// CreateSnapshot makes a snapshot. It answers only after the cut.
func (s *Server) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := checkName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := required("source_volume_id", req.GetSourceVolumeId()); err != nil {
		return nil, err
	}
	c, err := parseSnapshotClass(req.GetParameters())
	if err != nil {
		return nil, err
	}
	if req.GetAccessibilityRequirements() != nil {
		return nil, fault.New(fault.Invalid, "accessibility_requirements: a snapshot lives where its source does; create the volume where it is needed instead")
	}
	source, err := handleOf("source_volume_id", req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	img, err := s.cfg.Manager.CreateSnapshot(ctx, image.SnapshotRequest{
		Name: req.GetName(), Source: source, Inexact: c.inexact, RequireNative: c.requireNative, Described: c.described,
	})
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshot(img)}, nil
}

// DeleteSnapshot deletes. What does not exist is deleted already.
func (s *Server) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	h, err := handleOf("snapshot_id", req.GetSnapshotId())
	if err == nil {
		err = s.cfg.Manager.DeleteSnapshot(ctx, h)
	}
	if err = ignoreAbsent(err); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// GetSnapshot describes one snapshot.
func (s *Server) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	h, err := handleOf("snapshot_id", req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	img, err := s.snapshotImage(ctx, h)
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshot(img)}, nil
}

// ListSnapshots lists all snapshots, one, or those of a volume, in the order of
// their handles. An ID that names nothing gives an empty list.
func (s *Server) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	after, max, err := page(req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	r := &csi.ListSnapshotsResponse{}
	if id := req.GetSnapshotId(); id != "" {
		h, err := handleOf("snapshot_id", id)
		var img image.Image
		if err == nil {
			img, err = s.snapshotImage(ctx, h)
		}
		switch {
		case err != nil && fault.KindOf(err) == fault.NotFound:
			return r, nil
		case err != nil:
			return nil, err
		}
		source := req.GetSourceVolumeId()
		if (source == "" || s.madeOf(source)(img)) && img.Handle.String() > req.GetStartingToken() {
			r.Entries = append(r.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshot(img)})
		}
		return r, nil
	}
	var keep func(image.Image) bool
	if source := req.GetSourceVolumeId(); source != "" {
		keep = s.madeOf(source)
	}
	images, next, err := s.list(ctx, false, after, max, keep)
	if err != nil {
		return nil, err
	}
	r.NextToken = next
	for _, img := range images {
		r.Entries = append(r.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshot(img)})
	}
	return r, nil
}

// madeOf says of snapshots whether they were made of a volume, whose domain may
// have had another name then, or when its ID was given.
func (s *Server) madeOf(volume string) func(image.Image) bool {
	want, err := image.ParseHandle(volume)
	if err != nil {
		return func(image.Image) bool { return false } // it can never have existed
	}
	want = s.cfg.Manager.Canonical(want)
	return func(img image.Image) bool {
		h, err := image.ParseHandle(img.Source)
		return err == nil && s.cfg.Manager.Canonical(h) == want
	}
}

// snapshotImage finds a snapshot. A volume's handle is not a snapshot's.
func (s *Server) snapshotImage(ctx context.Context, h image.Handle) (image.Image, error) {
	img, err := s.cfg.Manager.Get(ctx, h)
	if err == nil && img.Mutable {
		err = fault.New(fault.NotFound, "%q is a volume, not a snapshot", h)
	}
	return img, err
}

// snapshot translates an image.
func snapshot(img image.Image) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: img.Handle.String(), SourceVolumeId: img.Source, SizeBytes: img.Size,
		CreationTime: timestamppb.New(img.Created), ReadyToUse: img.Ready, GroupSnapshotId: img.Group,
	}
}
