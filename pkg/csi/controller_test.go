package csi

import (
	"context"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

var ctx = context.Background()

func mount(fs string, mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

func block(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

const writer = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER

func create() *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: "pvc-1", VolumeCapabilities: []*csi.VolumeCapability{mount("xfs", writer)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30},
	}
}

func TestCreateVolumeTranslates(t *testing.T) {
	s, m, _ := world(t)
	req := create()
	req.CapacityRange.LimitBytes = 2 << 30
	req.VolumeCapabilities = append(req.VolumeCapabilities, mount("", csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY))
	req.Parameters = map[string]string{
		"domains": "nas, local", "layout": "image", "requireNative": "snapshot,clone", "restorePlacement": "source",
		"chainLimit": "3", "mode": "0750", "thinLayers": "true",
		"csi.storage.k8s.io/pvc/namespace": "shop", "csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/pv/name": "pv-1",
		"csi.storage.k8s.io/fstype": "xfs",
	}
	req.MutableParameters = map[string]string{"chainLimit": "4", "quiesceLimit": "3s"}
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "nas/s-1"},
	}}
	topology := func(n string) *csi.Topology { return &csi.Topology{Segments: map[string]string{TopologyKey: n}} }
	req.AccessibilityRequirements = &csi.TopologyRequirement{
		Requisite: []*csi.Topology{topology("n1"), topology("n2")}, Preferred: []*csi.Topology{topology("n2")},
	}
	r, err := s.CreateVolume(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	want := image.CreateRequest{
		Name: "pvc-1", Domains: []string{"nas", "local"}, Layout: image.LayoutImage, Size: 1 << 30, Limit: 2 << 30,
		Accesses: []image.Access{
			{Filesystem: "xfs", Mode: image.SingleNodeWriter}, {Mode: image.MultiNodeReaderOnly},
		},
		Source: "nas/s-1", RequireNative: []engine.Capability{engine.CapSnapshot, engine.CapClone}, RestoreToSource: true, ThinLayers: true,
		Params: map[string]string{"mode": "0750"}, Tuning: image.Tuning{ChainLimit: 4, QuiesceLimit: 3 * time.Second},
		Described: image.Described{Namespace: "shop", Claim: "data", Volume: "pv-1", Filesystem: "xfs", Modes: []string{"SINGLE_NODE_WRITER", "MULTI_NODE_READER_ONLY"}},
		Nodes:     []string{"n2", "n1"},
	}
	if !reflect.DeepEqual(m.created[0], want) {
		t.Errorf("asked for\n%+v\nwant\n%+v", m.created[0], want)
	}
	if r.Volume.VolumeId != "nas/v-new" || r.Volume.CapacityBytes != 1<<30 || r.Volume.AccessibleTopology != nil ||
		!proto.Equal(r.Volume.ContentSource, req.VolumeContentSource) {
		t.Errorf("answered %v", r.Volume)
	}
}

func TestVolumeOfANodeSaysWhereItIs(t *testing.T) {
	s, m, _ := world(t)
	m.node = "n1"
	r, err := s.CreateVolume(ctx, create())
	if err != nil || len(r.Volume.AccessibleTopology) != 1 || r.Volume.AccessibleTopology[0].Segments[TopologyKey] != "n1" {
		t.Fatalf("%v, %v", r, err)
	}
}

func TestNamesWithinTheSpecificationAreTaken(t *testing.T) {
	s, m, _ := world(t)
	for _, name := range []string{
		"a", strings.Repeat("n", 128), "with/slashes/../and/./dots", "...", "..", "/", "größe-漢字-🪨", "tab\tline\nreturn\r", " ", "\u00a0", strings.Repeat("é", 64), "A%00b", "\x7e",
	} {
		req := create()
		req.Name = name
		if _, err := s.CreateVolume(ctx, req); err != nil {
			t.Errorf("volume %q: %v", name, err)
		} else if got := m.created[len(m.created)-1].Name; got != name {
			t.Errorf("%q became %q", name, got)
		}
		if _, err := s.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: "nas/v-1"}); err != nil {
			t.Errorf("snapshot %q: %v", name, err)
		}
	}
}

func TestBadNamesAreRefused(t *testing.T) {
	s, m, _ := world(t)
	names := []string{"", strings.Repeat("n", 129), strings.Repeat("é", 65), "not\xffutf8"}
	for r := rune(0); r < 0xa0; r++ {
		if r <= 0x08 || r == 0x0b || r == 0x0c || r >= 0x0e && r <= 0x1f || r >= 0x7f {
			names = append(names, "x"+string(r)+"y")
		}
	}
	for _, name := range names {
		req := create()
		req.Name = name
		_, err := s.CreateVolume(ctx, req)
		wantKind(t, "volume "+name, err, fault.Invalid)
		_, err = s.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: "nas/v-1"})
		wantKind(t, "snapshot "+name, err, fault.Invalid)
		_, err = s.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: []string{"nas/v-1"}})
		wantKind(t, "group "+name, err, fault.Invalid)
	}
	if len(m.calls) != 0 {
		t.Errorf("the Image Manager was called: %v", m.calls)
	}
}

func TestBadSizesAreRefused(t *testing.T) {
	s, m, _ := world(t)
	for _, c := range []struct {
		size, limit int64
		want        fault.Kind
	}{
		{-1, 0, fault.Invalid}, {math.MinInt64, 0, fault.Invalid}, {0, -1, fault.Invalid},
		{2, 1, fault.OutOfRange}, {math.MaxInt64, 0, fault.OutOfRange}, {1<<60 + 1, 0, fault.OutOfRange},
	} {
		r := &csi.CapacityRange{RequiredBytes: c.size, LimitBytes: c.limit}
		req := create()
		req.CapacityRange = r
		_, err := s.CreateVolume(ctx, req)
		wantKind(t, r.String(), err, c.want)
		_, err = s.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: "nas/v-1", CapacityRange: r})
		wantKind(t, "expand "+r.String(), err, c.want)
		_, err = s.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "nas/v-1", VolumePath: "/mnt", CapacityRange: r})
		wantKind(t, "node expand "+r.String(), err, c.want)
	}
	if len(m.calls) != 0 {
		t.Errorf("the Image Manager was called: %v", m.calls)
	}
	for _, r := range []*csi.CapacityRange{nil, {}} {
		req := create()
		req.CapacityRange = r
		if _, err := s.CreateVolume(ctx, req); err != nil || m.created[len(m.created)-1].Size != 0 {
			t.Errorf("no size: %v, %+v", err, m.created)
		}
		_, err := s.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: "nas/v-1", CapacityRange: r})
		wantKind(t, "expand without a size", err, fault.Invalid)
	}
}

func TestBadClassesAreRefused(t *testing.T) {
	s, m, _ := world(t)
	for _, p := range []map[string]string{
		{"layout": "dir"}, {"layout": ""}, {"layout": "Directory"},
		{"domain": "a", "domains": "b"}, {"domain": ""}, {"domain": "../etc"}, {"domain": "a,b"}, {"domains": "a,,b"}, {"domains": "a,a"},
		{"requireNative": "teleport"}, {"requireNative": ""}, {"restorePlacement": "here"},
		{"thinLayers": ""}, {"thinLayers": "yes"}, {"thinLayers": "True"}, {"encrypted": "no"},
		{"chainLimit": "0"}, {"chainLimit": "-1"}, {"chainLimit": "65"}, {"chainLimit": "8.5"}, {"chainLimit": "99999999999999999999"},
		{"quiesceLimit": "10"}, {"quiesceLimit": "-1s"}, {"quiesceLimit": "0s"}, {"quiesceLimit": "11m"},
		{"mode": strings.Repeat("x", 4096)},
	} {
		req := create()
		req.Parameters = p
		_, err := s.CreateVolume(ctx, req)
		wantKind(t, "class", err, fault.Invalid)
		if err != nil {
			for k := range p {
				if len(p) == 1 && !strings.Contains(err.Error(), k) && k != "mode" {
					t.Errorf("%v: the message does not name the field: %v", p, err)
				}
			}
		}
		_, err = s.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: p})
		wantKind(t, "capacity of the class", err, fault.Invalid)
	}
	for _, p := range []map[string]string{{"XXX_FakeKey": "v"}, {"chainLimit": "many"}, {"domain": "nas"}, {"mode": "0750"}} {
		req := create()
		req.MutableParameters = p
		_, err := s.CreateVolume(ctx, req)
		wantKind(t, "mutable parameters", err, fault.Invalid)
	}
	for _, p := range []map[string]string{{"inexact": "yes"}, {"inexact": ""}, {"domain": "nas"}, {"requireNative": "x"}} {
		_, err := s.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "nas/v-1", Parameters: p})
		wantKind(t, "snapshot class", err, fault.Invalid)
	}
	if len(m.calls) != 0 {
		t.Errorf("the Image Manager was called: %v", m.calls)
	}
}

func TestUnknownParametersAreNamedWithTheKnownOnes(t *testing.T) {
	s, m, _ := world(t)
	for _, p := range []map[string]string{{"colour": "red"}, {"domain": "nas", "colour": "red"}} {
		_, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: p})
		wantKind(t, "capacity", err, fault.Invalid)
		for _, word := range []string{"colour", "layout", "mode", "restorePlacement"} {
			if err != nil && !strings.Contains(err.Error(), word) {
				t.Errorf("%q does not say %q", err, word)
			}
		}
	}
	// At creation the Image Manager refuses them, knowing the domain: they must reach it.
	req := create()
	req.Parameters = map[string]string{"colour": "red"}
	if _, err := s.CreateVolume(ctx, req); err != nil || m.created[0].Params["colour"] != "red" {
		t.Errorf("%v: %+v", err, m.created)
	}
	m.domains[0].Open = false // cannot say what it takes
	if _, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: map[string]string{"colour": "red"}}); err != nil {
		t.Errorf("a domain that is not open: %v", err)
	}
}

func TestBadCapabilitiesAreRefused(t *testing.T) {
	s, m, _ := world(t)
	for what, caps := range map[string][]*csi.VolumeCapability{
		"none":                nil,
		"nil":                 {nil},
		"no access type":      {{AccessMode: &csi.VolumeCapability_AccessMode{Mode: writer}}},
		"no access mode":      {{AccessType: mount("", writer).AccessType}},
		"unknown mode":        {mount("", csi.VolumeCapability_AccessMode_UNKNOWN)},
		"mode of the future":  {mount("", 99)},
		"unknown filesystem":  {mount("ntfs", writer)},
		"filesystem in caps":  {mount("EXT4", writer)},
		"second one is bad":   {mount("", writer), mount("zfs", writer)},
		"a mount group":       {{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{VolumeMountGroup: "1000"}}, AccessMode: mount("", writer).AccessMode}},
		"too many mount flag": {{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{MountFlags: []string{strings.Repeat("x", 4097)}}}, AccessMode: mount("", writer).AccessMode}},
	} {
		req := create()
		req.VolumeCapabilities = caps
		_, err := s.CreateVolume(ctx, req)
		wantKind(t, what, err, fault.Invalid)
		_, err = s.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: "nas/v-1", VolumeCapabilities: caps})
		wantKind(t, "validate "+what, err, fault.Invalid)
		if len(caps) == 1 {
			_, err = s.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "nas/v-1", NodeId: "n1", VolumeCapability: caps[0]})
			wantKind(t, "publish "+what, err, fault.Invalid)
		}
	}
	if len(m.calls) != 0 {
		t.Errorf("the Image Manager was called: %v", m.calls)
	}
}

func TestBadTopologyIsRefused(t *testing.T) {
	s, _, _ := world(t)
	for _, seg := range []map[string]string{nil, {"zone": "a"}, {TopologyKey: ""}, {TopologyKey: "n1", "zone": "a"}} {
		req := create()
		req.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: seg}}}
		_, err := s.CreateVolume(ctx, req)
		wantKind(t, "topology", err, fault.Invalid)
		_, err = s.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: seg}})
		wantKind(t, "capacity", err, fault.Invalid)
	}
}

// forged are IDs that cannot have come from Quarry.
var forged = []string{
	"fake", "/", "nas/", "/v-1", "nas/v/1", "nas//v-1", "../v-1", "nas/..", "NAS/V-1", "nas/v-1\x00", "nas/v-1 ", "nas\n/v-1", "nás/v-1",
	"nas/" + strings.Repeat("v", 125), strings.Repeat("x/", 4096), "nas/.v", "nas/v-1/../v-2",
}

func TestForgedHandles(t *testing.T) {
	s, m, n := world(t)
	for _, id := range forged {
		errs := everyCall(s, id)
		for what, err := range errs {
			switch what {
			case "DeleteVolume", "DeleteSnapshot", "DeleteVolumeGroupSnapshot", "ControllerUnpublishVolume", "NodeUnstageVolume", "NodeUnpublishVolume", "ListSnapshots":
				if err != nil {
					t.Errorf("%s of %q: %v", what, id, err)
				}
			default:
				wantKind(t, what+" of "+id, err, fault.NotFound)
			}
		}
	}
	if len(m.calls) != 0 || len(n.staged)+len(n.published)+len(n.undone) != 0 {
		t.Errorf("something was called: %v %v", m.calls, n)
	}
}

func TestHandlesOfWhatIsGone(t *testing.T) {
	s, _, n := world(t)
	n.fail = fault.New(fault.NotFound, "no such volume")
	errs := everyCall(s, "nas/v-gone")
	for what, err := range errs {
		switch what {
		case "CreateVolume from snapshot", "CreateVolume from volume", "CreateSnapshot", "CreateVolumeGroupSnapshot": // the Image Manager looks for the source
		case "DeleteVolume", "DeleteSnapshot", "DeleteVolumeGroupSnapshot", "ControllerUnpublishVolume", "NodeUnstageVolume", "NodeUnpublishVolume", "ListSnapshots":
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		default:
			wantKind(t, what, err, fault.NotFound)
		}
	}
}

func TestADomainThatIsNotOpenIsNotAbsent(t *testing.T) {
	s, m, n := world(t)
	m.fail = fault.New(fault.Unavailable, "domain nas is not open")
	n.fail = m.fail
	m.groups = map[image.Handle]image.Group{{Domain: "nas", Image: "v-1"}: {}}
	errs := everyCall(s, "nas/v-1")
	for what, err := range errs {
		wantKind(t, what, err, fault.Unavailable)
	}
	for what, call := range map[string]func() error{
		"ListVolumes":   func() error { _, err := s.ListVolumes(ctx, &csi.ListVolumesRequest{}); return err },
		"ListSnapshots": func() error { _, err := s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{}); return err },
		"GetCapacity":   func() error { _, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{}); return err },
	} {
		wantKind(t, what, call(), fault.Unavailable)
	}
}

// everyCall makes every call that takes an ID with id, and nothing else wrong.
func everyCall(s *Server, id string) map[string]error {
	errs := map[string]error{}
	try := func(name string, err error) { errs[name] = err }
	c := mount("", writer)
	req := create()
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
	_, err := s.CreateVolume(ctx, req)
	try("CreateVolume from snapshot", err)
	req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
	_, err = s.CreateVolume(ctx, req)
	try("CreateVolume from volume", err)
	_, err = s.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	try("DeleteVolume", err)
	_, err = s.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "n1", VolumeCapability: c})
	try("ControllerPublishVolume", err)
	_, err = s.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: id, NodeId: "n1"})
	try("ControllerUnpublishVolume", err)
	_, err = s.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: []*csi.VolumeCapability{c}})
	try("ValidateVolumeCapabilities", err)
	_, err = s.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
	try("ControllerGetVolume", err)
	_, err = s.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
	try("ControllerGetVolumeHealth", err)
	_, err = s.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 1}})
	try("ControllerExpandVolume", err)
	_, err = s.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: map[string]string{"chainLimit": "3"}})
	try("ControllerModifyVolume", err)
	_, err = s.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	try("CreateSnapshot", err)
	_, err = s.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	try("DeleteSnapshot", err)
	_, err = s.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: id})
	try("GetSnapshot", err)
	_, err = s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id})
	try("ListSnapshots", err)
	_, err = s.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{id}})
	try("CreateVolumeGroupSnapshot", err)
	_, err = s.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id})
	try("GetVolumeGroupSnapshot", err)
	_, err = s.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id})
	try("DeleteVolumeGroupSnapshot", err)
	_, err = s.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: "/st", VolumeCapability: c, PublishContext: map[string]string{GenerationKey: "1"}})
	try("NodeStageVolume", err)
	_, err = s.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: "/st"})
	try("NodeUnstageVolume", err)
	_, err = s.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: "/st", TargetPath: "/t", VolumeCapability: c})
	try("NodePublishVolume", err)
	_, err = s.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: "/t"})
	try("NodeUnpublishVolume", err)
	_, err = s.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: "/t"})
	try("NodeGetVolumeStats", err)
	_, err = s.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: "/t"})
	try("NodeExpandVolume", err)
	_, err = s.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	try("NodeGetVolumeHealth", err)
	return errs
}

func TestMissingIDsAreRefused(t *testing.T) {
	s, m, _ := world(t)
	errs := everyCall(s, "")
	for what, err := range errs {
		if what == "ListSnapshots" { // without an ID: all of them
			continue
		}
		wantKind(t, what, err, fault.Invalid)
	}
	if len(m.calls) != 0 {
		t.Errorf("the Image Manager was called: %v", m.calls)
	}
}
