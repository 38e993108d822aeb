package csi

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

func TestEncryptedIsAParameterOfTheClass(t *testing.T) {
	s, m, _ := world(t)
	create := func(params map[string]string) error {
		_, err := s.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "v", VolumeCapabilities: []*csi.VolumeCapability{mount("", writer)}, Parameters: params})
		return err
	}
	for v, want := range map[string]bool{"true": true, "false": false} {
		if err := create(map[string]string{"encrypted": v}); err != nil {
			t.Fatal(err)
		}
		if r := m.created[len(m.created)-1]; r.Encrypted != want || len(r.Params) > 0 {
			t.Errorf("%q: %+v", v, r)
		}
	}
	for _, v := range []string{"", "yes", "True", "1"} {
		wantKind(t, v, create(map[string]string{"encrypted": v}), fault.Invalid)
	}
	for h, img := range m.images {
		img.Encrypted = true
		m.images[h] = img
	}
	for v, confirmed := range map[string]bool{"true": true, "false": false} {
		r, err := s.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: "nas/v-1",
			VolumeCapabilities: []*csi.VolumeCapability{mount("", writer)}, Parameters: map[string]string{"encrypted": v}})
		if err != nil || (r.Confirmed != nil) != confirmed {
			t.Errorf("%q: %v %v", v, r, err)
		}
	}
	plain, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: map[string]string{"encrypted": "true"}})
	if err != nil || r.AvailableCapacity != max(0, plain.AvailableCapacity-image.EncryptionHeader) {
		t.Errorf("%v %v", r, err)
	}
}

// chatty logs its request, as nobody should.
type chatty struct{ fakeNode }

func (c *chatty) Stage(ctx context.Context, r node.StageRequest) error {
	klog.FromContext(ctx).Info("staging", "request", r, "text", fmt.Sprintf("%+v %#v", r, r))
	_ = c.fakeNode.Stage(ctx, r)
	return fault.New(fault.Permission, "refused %v", r)
}

func TestAPassphraseReachesTheNodeAndNoLog(t *testing.T) {
	const secret = "correct horse battery"
	s, _, _ := world(t)
	n := &chatty{}
	s.cfg.Node = n
	log := ktesting.NewLogger(t, ktesting.NewConfig(ktesting.Verbosity(10), ktesting.BufferLogs(true)))
	conn, stop := dial(t, s, log)
	_, err := csi.NewNodeClient(conn).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: "nas/v-1", StagingTargetPath: "/st", VolumeCapability: mount("", writer), PublishContext: map[string]string{GenerationKey: "1"},
		Secrets: map[string]string{node.PassphraseKey: secret},
	})
	if err == nil || strings.Contains(err.Error(), secret) {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if len(n.staged) != 1 || n.staged[0].Passphrase != secret {
		t.Fatal("the passphrase did not arrive")
	}
	text := log.GetSink().(ktesting.Underlier).GetBuffer().String()
	if !strings.Contains(text, "staging") || strings.Contains(text, secret) {
		t.Errorf("the log: %s", text)
	}
}
