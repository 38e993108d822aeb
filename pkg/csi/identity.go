package csi

import (
	"context"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// GetPluginInfo says who this is.
func (s *Server) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: s.cfg.DriverName, VendorVersion: s.cfg.Version}, nil
}

// Probe answers that the process is there, and whether it works or waits. A domain
// that is missing is no reason to restart it, so it never fails a probe.
func (s *Server) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	if s.cfg.Settled != nil {
		wait := time.NewTimer(probeWait(ctx))
		defer wait.Stop()
		select {
		case <-s.cfg.Settled:
		case <-wait.C:
		case <-ctx.Done():
		}
	}
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(s.cfg.Standby() == nil)}, nil
}

// GetPluginCapabilities lists the services.
func (s *Server) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	r := &csi.GetPluginCapabilitiesResponse{}
	for _, t := range []csi.PluginCapability_Service_Type{
		csi.PluginCapability_Service_CONTROLLER_SERVICE,
		csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE,
		csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS,
		csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE,
	} {
		r.Capabilities = append(r.Capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_Service_{
			Service: &csi.PluginCapability_Service{Type: t},
		}})
	}
	// ONLINE alone: OFFLINE would forbid growing a volume in use.
	r.Capabilities = append(r.Capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_VolumeExpansion_{
		VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE},
	}})
	return r, nil
}

// longestProbe is how long a process that waits takes to say so.
const longestProbe = 20 * time.Second

// probeWait leaves half of the caller's time for the answer.
func probeWait(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return min(longestProbe, time.Until(end)/2)
	}
	return longestProbe
}
