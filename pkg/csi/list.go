package csi

import (
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/image"
)

// ListVolumes lists volumes in the order of their handles.
func (s *Server) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	after, max, err := page(req.GetMaxEntries(), req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	images, next, err := s.list(ctx, true, after, max, nil)
	if err != nil {
		return nil, err
	}
	r := &csi.ListVolumesResponse{NextToken: next}
	for _, img := range images {
		v, err := s.volume(img)
		if err != nil {
			return nil, err
		}
		r.Entries = append(r.Entries, &csi.ListVolumesResponse_Entry{
			Volume: v,
			Status: &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: publishedNodes(img)},
		})
	}
	return r, nil
}

// ControllerGetVolume describes one volume.
func (s *Server) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	img, err := s.volumeImage(ctx, h)
	if err != nil {
		return nil, err
	}
	v, err := s.volume(img)
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: v,
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{PublishedNodeIds: publishedNodes(img)},
	}, nil
}

// list gives a page of the images that keep says yes to (nil: all), and the
// token of the next page, "" on the last one.
func (s *Server) list(ctx context.Context, mutable bool, after string, max int, keep func(image.Image) bool) (out []image.Image, next string, err error) {
	ask := max
	if keep != nil {
		ask = 0 // how many of them are kept is known only afterwards
	}
	images, more, err := s.cfg.Manager.List(ctx, mutable, after, ask)
	if err != nil {
		return nil, "", err
	}
	for _, img := range images {
		if keep == nil || keep(img) {
			out = append(out, img)
		}
	}
	if max > 0 && len(out) > max {
		out, more = out[:max], true
	}
	if more && len(out) > 0 {
		next = out[len(out)-1].Handle.String()
	}
	return out, next, nil
}

func publishedNodes(img image.Image) []string {
	var out []string
	for _, a := range img.Attachments {
		out = append(out, a.Node)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
