package csi

import (
	"context"
	"strings"

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
	add := func(status csi.VolumeHealthErrorType, reason string) {
		out.HealthStatuses = append(out.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: reason, Message: img.Reason})
	}
	switch img.State {
	case image.Degraded:
		add(csi.VolumeHealthErrorType_DEGRADED, "ImageDegraded")
	case image.Broken:
		add(csi.VolumeHealthErrorType_INACCESSIBLE, "ImageBroken")
	}
	return out
}

// NodeGetStorageHealth says which domains cannot be used from this node. It
// asks what the Image Manager knows already: no server is waited for.
func (s *Server) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	var problems []string
	for _, d := range s.cfg.Manager.Domains(ctx) {
		if d.Open || d.Config.Scope == image.ScopeNode && d.Config.Node != s.cfg.NodeID {
			continue
		}
		name := d.ID
		if name == "" {
			name = d.Config.Name
		}
		problems = append(problems, "domain "+name+": "+d.Problem)
	}
	r := &csi.NodeGetStorageHealthResponse{}
	if len(problems) > 0 { // one entry: a status and reason must not come twice
		r.BackendHealth = []*csi.NodeGetStorageHealthResponse_StorageBackendHealth{{
			Status: csi.StorageHealthErrorType_STORAGE_UNREACHABLE, Reason: "DomainNotOpen", Message: strings.Join(problems, "; "),
		}}
	}
	return r, nil
}
