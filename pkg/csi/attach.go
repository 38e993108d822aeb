package csi

import (
	"context"
	"strconv"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// ControllerPublishVolume lets a node use a volume.
func (s *Server) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := checkNode(req.GetNodeId()); err != nil {
		return nil, err
	}
	a, err := access("volume_capability", req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if _, err := s.volumeImage(ctx, h); err != nil {
		return nil, err
	}
	if err := s.cfg.KnownNode(ctx, req.GetNodeId()); err != nil {
		return nil, err
	}
	at, err := s.cfg.Manager.Attach(ctx, h, req.GetNodeId(), a, req.GetReadonly() || a.Mode.ReadOnly())
	if err != nil {
		return nil, err
	}
	// Kubernetes keeps this across reboots and snapshots of its database, so it
	// holds nothing but the number that tells an old attachment from the present one.
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{
		GenerationKey: strconv.FormatInt(at.Generation, 10),
	}}, nil
}

// generation reads what ControllerPublishVolume gave.
func generation(publishContext map[string]string) (int64, error) {
	v := publishContext[GenerationKey]
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return 0, fault.New(fault.Invalid, "publish_context: %s=%q is not the number that ControllerPublishVolume gave", GenerationKey, v)
	}
	return n, nil
}

// ControllerUnpublishVolume ends a node's use of a volume, or that of all
// nodes. A volume that does not exist is used by none: the specification asks
// for success then, and for a node that is not known.
func (s *Server) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetNodeId() != "" {
		if err := checkNode(req.GetNodeId()); err != nil {
			return nil, err
		}
	}
	h, err := handleOf("volume_id", req.GetVolumeId())
	if err == nil {
		err = s.cfg.Manager.Detach(ctx, h, req.GetNodeId())
	}
	if err = ignoreAbsent(err); err != nil {
		return nil, err
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}
