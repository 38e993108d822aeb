package csi

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/image"
)

// ControllerGetVolumeHealth says what is wrong with a volume; nothing, if
// nothing is.
func (s *Server) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	img, err := s.volumeImage(ctx, h)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: health(img)}, nil
}

// ControllerListVolumeHealth lists the volumes with which something is wrong.
func (s *Server) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	after, max, err := page(req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	images, next, err := s.list(ctx, true, after, max, func(img image.Image) bool { return len(health(img).HealthStatuses) > 0 })
	if err != nil {
		return nil, err
	}
	r := &csi.ControllerListVolumeHealthResponse{NextToken: next}
	for _, img := range images {
		r.Entries = append(r.Entries, health(img))
	}
	return r, nil
}

// health translates an image's state. A broken image may still be mended, so
// it is inaccessible; that data is lost is nothing that a state can know.
func health(img image.Image) *csi.VolumeHealth {
	out := &csi.VolumeHealth{VolumeId: img.Handle.String()}
	add := func(status csi.VolumeHealthErrorType, reason, message string) {
		out.HealthStatuses = append(out.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: message})
	}
	switch img.State {
	case image.Degraded:
		add(csi.VolumeHealthErrorType_DEGRADED, "ImageDegraded", img.Reason)
	case image.Broken:
		add(csi.VolumeHealthErrorType_INACCESSIBLE, "ImageBroken", img.Reason)
	}
	if img.Warning != "" {
		add(csi.VolumeHealthErrorType_DEGRADED, "StorageDegraded", img.Warning)
	}
	return out
}
