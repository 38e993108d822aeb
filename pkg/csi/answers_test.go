package csi

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

func TestPublishGivesTheGenerationAndNothingElse(t *testing.T) {
	s, m, n := world(t)
	r, err := s.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "nas/v-1", NodeId: "n1", VolumeCapability: mount("", writer)})
	if err != nil || !reflect.DeepEqual(r.PublishContext, map[string]string{GenerationKey: "42"}) {
		t.Fatalf("%v, %v", r, err)
	}
	if _, err := s.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: "nas/v-1", StagingTargetPath: "/st", VolumeCapability: mount("xfs", writer), PublishContext: r.PublishContext,
	}); err != nil {
		t.Fatal(err)
	}
	if got := n.staged[0]; got.Generation != 42 || got.StagingPath != "/st" || got.Access.Filesystem != "xfs" || got.Handle.String() != "nas/v-1" {
		t.Errorf("staged %+v", got)
	}
	for _, c := range []map[string]string{nil, {GenerationKey: ""}, {GenerationKey: "x"}, {GenerationKey: "99999999999999999999"}, {"device": "/dev/mock"}} {
		_, err := s.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "nas/v-1", StagingTargetPath: "/st", VolumeCapability: mount("", writer), PublishContext: c})
		wantKind(t, fmt.Sprint(c), err, fault.Invalid)
	}
	_, err = s.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "nas/v-1", NodeId: "n2", VolumeCapability: mount("", writer)})
	wantKind(t, "unknown node", err, fault.NotFound)
	_, err = s.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "nas/v-1", NodeId: strings.Repeat("n", 257), VolumeCapability: mount("", writer)})
	wantKind(t, "long node", err, fault.Invalid)
	_, err = s.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: "nas/s-1", NodeId: "n1", VolumeCapability: mount("", writer)})
	wantKind(t, "a snapshot's handle", err, fault.NotFound)
	if len(m.calls) != 1 {
		t.Errorf("calls: %v", m.calls)
	}
	if _, err := s.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: "nas/v-1"}); err != nil || m.calls[1] != "detach nas/v-1 " {
		t.Errorf("all nodes: %v, %v", err, m.calls)
	}
}

func TestUnpublishWaitsForTheAgent(t *testing.T) {
	s, m, _ := world(t)
	m.fail = fault.New(fault.Unavailable, "node n1 has not confirmed")
	_, err := s.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: "nas/v-1", NodeId: "n1"})
	wantKind(t, "unpublish", err, fault.Unavailable)
}

func TestValidateSaysWhyNot(t *testing.T) {
	s, m, _ := world(t)
	for _, c := range []struct {
		what   string
		unfit  error // what the Image Manager says of the capability
		params map[string]string
		ctx    map[string]string
		why    string // "": confirmed
	}{
		{"plain", nil, nil, nil, ""},
		{"an access that does not fit", fault.New(fault.Invalid, "it carries xfs"), nil, nil, "carries xfs"},
		{"same layout", nil, map[string]string{"layout": "image", "domain": "nas", "mode": "0750"}, nil, ""},
		{"other layout", nil, map[string]string{"layout": "directory"}, nil, "layout"},
		{"other domain", nil, map[string]string{"domain": "local"}, nil, "local"},
		{"unknown parameter", nil, map[string]string{"colour": "red"}, nil, "colour"},
		{"the sidecars' context", nil, nil, map[string]string{"storage.kubernetes.io/csiProvisionerIdentity": "x"}, ""},
		{"a stranger's context", nil, nil, map[string]string{"share": "x"}, "share"},
	} {
		m.unfit = c.unfit
		r, err := s.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: "nas/v-1", VolumeCapabilities: []*csi.VolumeCapability{mount("ext4", writer)}, Parameters: c.params, VolumeContext: c.ctx,
		})
		switch {
		case err != nil:
			t.Errorf("%s: %v", c.what, err)
		case c.why == "" && (r.Confirmed == nil || len(r.Confirmed.VolumeCapabilities) != 1):
			t.Errorf("%s: not confirmed: %s", c.what, r.Message)
		case c.why != "" && (r.Confirmed != nil || !strings.Contains(r.Message, c.why)):
			t.Errorf("%s: %v, want a message with %q", c.what, r, c.why)
		}
	}
	if !reflect.DeepEqual(m.checked, []image.Access{{Filesystem: "ext4", Mode: image.SingleNodeWriter}}) {
		t.Errorf("checked %+v", m.checked)
	}
}

func TestPagesAreStableWhileVolumesComeAndGo(t *testing.T) {
	s, m, _ := world(t)
	add := func(id string, mutable bool) {
		h := image.Handle{Domain: "nas", Image: id}
		m.images[h] = image.Image{Handle: h, Mutable: mutable, Source: "nas/v-1", State: image.Optimized}
	}
	clear(m.images)
	for i := range 7 {
		add(fmt.Sprintf("v-%d", i), true)
		add(fmt.Sprintf("s-%d", i), false)
	}
	var got []string
	token := ""
	for {
		r, err := s.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 3, StartingToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Entries {
			got = append(got, e.Volume.VolumeId)
		}
		if token = r.NextToken; token == "" {
			break
		}
		// What was given already, and the token's own volume, go; something new comes.
		delete(m.images, image.Handle{Domain: "nas", Image: strings.TrimPrefix(token, "nas/")})
		add("v-00", true)
	}
	want := []string{"nas/v-0", "nas/v-1", "nas/v-2", "nas/v-3", "nas/v-4", "nas/v-5", "nas/v-6"}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	exact, err := s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: 7})
	if err != nil || len(exact.Entries) != 7 || exact.NextToken != "" {
		t.Errorf("a list that just fits: %v, %v", exact, err)
	}
	for _, bad := range []string{"invalid-token", "7", "nas", "../x"} {
		_, err := s.ListVolumes(ctx, &csi.ListVolumesRequest{StartingToken: bad})
		wantKind(t, bad, err, fault.Conflict)
		_, err = s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{StartingToken: bad})
		wantKind(t, bad, err, fault.Conflict)
		_, err = s.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{StartingToken: bad})
		wantKind(t, bad, err, fault.Conflict)
	}
	_, err = s.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: -1})
	wantKind(t, "negative", err, fault.Invalid)
}

func TestListNamesTheNodes(t *testing.T) {
	s, m, _ := world(t)
	h := image.Handle{Domain: "nas", Image: "v-1"}
	img := m.images[h]
	img.Attachments = []image.Attachment{{Node: "n2"}, {Node: "n1"}, {Node: "n2"}}
	m.images[h] = img
	l, err := s.ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil || !slices.Equal(l.Entries[0].Status.PublishedNodeIds, []string{"n1", "n2"}) {
		t.Errorf("%v, %v", l, err)
	}
	g, err := s.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: "nas/v-1"})
	if err != nil || !slices.Equal(g.Status.PublishedNodeIds, []string{"n1", "n2"}) {
		t.Errorf("%v, %v", g, err)
	}
}

// A domain that was renamed: what was made before keeps the former name as its
// source, and whoever asks may use either.
func TestSnapshotsOfAVolumeAreFoundUnderEveryNameOfItsDomain(t *testing.T) {
	s, m, _ := world(t)
	m.domains[0].Config.Aliases = []string{"old", "older"}
	h := image.Handle{Domain: "nas", Image: "s-0"}
	m.images[h] = image.Image{Handle: h, Source: "old/v-1"}
	for _, source := range []string{"nas/v-1", "old/v-1", "older/v-1"} {
		r, err := s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: source})
		if err != nil || len(r.Entries) != 2 || r.Entries[0].Snapshot.SnapshotId != "nas/s-0" || r.Entries[1].Snapshot.SnapshotId != "nas/s-1" {
			t.Errorf("of %s: %v, %v", source, r, err)
		}
		for _, id := range []string{"nas/s-0", "nas/s-1"} {
			r, err := s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id, SourceVolumeId: source})
			if err != nil || len(r.Entries) != 1 {
				t.Errorf("%s of %s: %v, %v", id, source, r, err)
			}
		}
	}
	for _, source := range []string{"other/v-1", "nas/v-2", "old/v-2", "nonsense"} {
		if r, err := s.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: source}); err != nil || len(r.Entries) != 0 {
			t.Errorf("of %s: %v, %v", source, r, err)
		}
	}
}

// Repeated after the domain was renamed, a request must be the one that runs.
func TestTheSourceOfAVolumeIsAskedForUnderItsPresentName(t *testing.T) {
	s, m, _ := world(t)
	m.domains[0].Config.Aliases = []string{"old"}
	for _, id := range []string{"nas/s-1", "old/s-1"} {
		req := create()
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
		}}
		if _, err := s.CreateVolume(ctx, req); err != nil {
			t.Fatal(err)
		}
	}
	if len(m.created) != 2 || m.created[0].Source != "nas/s-1" || m.created[1].Source != "nas/s-1" {
		t.Errorf("asked for %+v", m.created)
	}
}

func TestSnapshotsAreFound(t *testing.T) {
	s, m, _ := world(t)
	for i := range 4 {
		h := image.Handle{Domain: "nas", Image: fmt.Sprintf("s-other%d", i)}
		m.images[h] = image.Image{Handle: h, Source: fmt.Sprintf("nas/v-%d", i%2+1)}
	}
	ids := func(r *csi.ListSnapshotsResponse, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range r.Entries {
			out = append(out, e.Snapshot.SnapshotId)
		}
		return strings.Join(out, " ") + "|" + r.NextToken
	}
	for _, c := range []struct {
		req  *csi.ListSnapshotsRequest
		want string
	}{
		{&csi.ListSnapshotsRequest{SnapshotId: "nas/s-1"}, "nas/s-1|"},
		{&csi.ListSnapshotsRequest{SnapshotId: "nas/s-1", SourceVolumeId: "nas/v-1"}, "nas/s-1|"},
		{&csi.ListSnapshotsRequest{SnapshotId: "nas/s-1", SourceVolumeId: "nas/v-2"}, "|"},
		{&csi.ListSnapshotsRequest{SnapshotId: "none-exist-id"}, "|"},
		{&csi.ListSnapshotsRequest{SnapshotId: "nas/v-1"}, "|"}, // a volume
		{&csi.ListSnapshotsRequest{SourceVolumeId: "fake-vol-id"}, "|"},
		{&csi.ListSnapshotsRequest{SourceVolumeId: "nas/v-1"}, "nas/s-1 nas/s-other0 nas/s-other2|"},
		{&csi.ListSnapshotsRequest{SourceVolumeId: "nas/v-1", MaxEntries: 2}, "nas/s-1 nas/s-other0|nas/s-other0"},
		{&csi.ListSnapshotsRequest{SourceVolumeId: "nas/v-1", MaxEntries: 2, StartingToken: "nas/s-other0"}, "nas/s-other2|"},
	} {
		if got := ids(s.ListSnapshots(ctx, c.req)); got != c.want {
			t.Errorf("%v: %q, want %q", c.req, got, c.want)
		}
	}
	g, err := s.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: "nas/s-1"})
	if err != nil || g.Snapshot.SourceVolumeId != "nas/v-1" || !g.Snapshot.ReadyToUse || g.Snapshot.SizeBytes != 1<<30 || g.Snapshot.CreationTime.AsTime().Unix() != 5 {
		t.Errorf("%v, %v", g, err)
	}
	_, err = s.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: "nas/v-1"})
	wantKind(t, "a volume's handle", err, fault.NotFound)
}

func TestSnapshotClass(t *testing.T) {
	s, m, _ := world(t)
	_, err := s.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "nas/v-1", Parameters: map[string]string{
		"inexact": "allow", "requireNative": "snapshot", "csi.storage.k8s.io/volumesnapshot/name": "daily", "csi.storage.k8s.io/volumesnapshot/namespace": "shop",
	}})
	want := image.SnapshotRequest{
		Name: "s", Source: image.Handle{Domain: "nas", Image: "v-1"}, Inexact: true, RequireNative: []engine.Capability{engine.CapSnapshot},
		Described: image.Described{Namespace: "shop", Claim: "daily"},
	}
	if err != nil || !reflect.DeepEqual(m.snapped, []image.SnapshotRequest{want}) {
		t.Errorf("%v: %+v", err, m.snapped)
	}
	_, err = s.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "nas/v-1", AccessibilityRequirements: &csi.TopologyRequirement{}})
	wantKind(t, "topology", err, fault.Invalid)
}

func TestGroupsCompareTheirMembers(t *testing.T) {
	s, m, _ := world(t)
	for _, c := range []struct {
		ids []string
		ok  bool
	}{{[]string{"nas/m-1", "nas/m-2"}, true}, {[]string{"nas/m-2", "nas/m-1"}, true}, {nil, false}, {[]string{"nas/m-1"}, false}, {[]string{"nas/m-1", "nas/m-2", "nas/m-3"}, false}, {[]string{"nas/m-1", "nas/m-1"}, false}} {
		m.calls = nil
		_, gerr := s.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: "nas/g-1", SnapshotIds: c.ids})
		_, derr := s.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: "nas/g-1", SnapshotIds: c.ids})
		if c.ok && (gerr != nil || derr != nil || len(m.calls) != 1) {
			t.Errorf("%v: %v, %v, %v", c.ids, gerr, derr, m.calls)
		}
		if !c.ok {
			wantKind(t, "get", gerr, fault.Invalid)
			wantKind(t, "delete", derr, fault.Invalid)
			if len(m.calls) != 0 {
				t.Errorf("%v: deleted all the same", c.ids)
			}
		}
	}
	g, err := s.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: "nas/g-1", SnapshotIds: []string{"nas/m-1", "nas/m-2"}})
	if err != nil || g.GroupSnapshot.ReadyToUse { // one member is not ready
		t.Errorf("%v, %v", g, err)
	}
	for _, sn := range g.GetGroupSnapshot().GetSnapshots() {
		if sn.GroupSnapshotId != "nas/g-1" {
			t.Errorf("member %v without its group", sn)
		}
	}
	for _, ids := range [][]string{nil, {"nas/v-1", "nas/v-1"}} {
		_, err = s.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: ids})
		wantKind(t, fmt.Sprint(ids), err, fault.Invalid)
	}
	_, err = s.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{"nas/v-1", "nas/v-2"},
		Parameters: map[string]string{"deletionpolicy": "Delete"}})
	wantKind(t, "a parameter that is unknown", err, fault.Invalid)
	r, err := s.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{"nas/v-1", "nas/v-2"},
		Parameters: map[string]string{"deletionPolicy": "Delete"}})
	if err != nil || len(r.GroupSnapshot.Snapshots) != 2 || r.GroupSnapshot.Snapshots[1].SourceVolumeId != "nas/v-2" {
		t.Errorf("%v, %v", r, err)
	}
}

func TestModifyChangesOnlyWhatIsNamed(t *testing.T) {
	s, m, _ := world(t)
	_, err := s.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: "nas/v-1", MutableParameters: map[string]string{"quiesceLimit": "20s", "iops": "5"}})
	if err != nil || m.modified[0] != (image.Tuning{QuiesceLimit: 20 * time.Second}) || !reflect.DeepEqual(m.params, map[string]string{"iops": "5"}) {
		t.Errorf("%v: %+v %v", err, m.modified, m.params)
	}
	for _, p := range []map[string]string{nil, {"chainLimit": "x"}} {
		_, err := s.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: "nas/v-1", MutableParameters: p})
		wantKind(t, fmt.Sprint(p), err, fault.Invalid)
	}
}

func TestExpandTellsTheNodeWhereThereIsADevice(t *testing.T) {
	s, m, _ := world(t)
	for layout, want := range map[image.Layout]bool{image.LayoutImage: true, image.LayoutDirectory: false} {
		h := image.Handle{Domain: "nas", Image: "v-1"}
		m.images[h] = image.Image{Handle: h, Mutable: true, Layout: layout}
		r, err := s.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: "nas/v-1", CapacityRange: &csi.CapacityRange{RequiredBytes: 5}})
		if err != nil || r.CapacityBytes != 5 || r.NodeExpansionRequired != want {
			t.Errorf("%s: %v, %v", layout, r, err)
		}
	}
	m.unfit = fault.New(fault.Invalid, "a directory is no block device")
	_, err := s.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: "nas/v-1", CapacityRange: &csi.CapacityRange{RequiredBytes: 5}, VolumeCapability: block(writer)})
	wantKind(t, "a directory as block", err, fault.Invalid)
}

func TestCapacityCountsOnlyDomainsThatFit(t *testing.T) {
	s, m, _ := world(t)
	m.domains[0].Description.Kinds = []engine.Kind{engine.Tree}
	for _, c := range []struct {
		req  *csi.GetCapacityRequest
		want int64
	}{
		{&csi.GetCapacityRequest{}, 100},
		{&csi.GetCapacityRequest{Parameters: map[string]string{"layout": "directory"}}, 100},
		{&csi.GetCapacityRequest{Parameters: map[string]string{"layout": "image"}}, 0},
		{&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{block(writer)}}, 0},
		{&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{mount("", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)}}, 100},
		{&csi.GetCapacityRequest{Parameters: map[string]string{"layout": "directory", "requireNative": "snapshot"}}, 0},
	} {
		r, err := s.GetCapacity(ctx, c.req)
		if err != nil || r.AvailableCapacity != c.want {
			t.Errorf("%v: %v, %v; want %d", c.req, r, err, c.want)
		}
	}
}

func TestCapacityOfAContradiction(t *testing.T) {
	s, _, _ := world(t)
	for layout, c := range map[string]*csi.VolumeCapability{
		"directory": block(writer), "image": mount("", csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER),
	} {
		_, err := s.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: map[string]string{"layout": layout}, VolumeCapabilities: []*csi.VolumeCapability{c}})
		wantKind(t, layout, err, fault.Invalid)
	}
}

func TestNativeOnlyDomainsTakeCapabilitiesAway(t *testing.T) {
	s, m, _ := world(t)
	has := func(want csi.ControllerServiceCapability_RPC_Type) bool {
		r, err := s.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(r.Capabilities, func(c *csi.ControllerServiceCapability) bool { return c.GetRpc().GetType() == want })
	}
	const snap, clone = csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT, csi.ControllerServiceCapability_RPC_CLONE_VOLUME
	if !has(snap) || !has(clone) {
		t.Error("the defaults do not count")
	}
	m.domains[0].Config.NativeOnly = true
	m.domains[0].Capabilities = []engine.Capability{engine.CapSnapshot}
	if !has(snap) || has(clone) {
		t.Error("a native-only domain with snapshots and without clones is not told")
	}
	m.domains = append(m.domains, image.DomainInfo{ID: "other", Open: true})
	if !has(clone) {
		t.Error("another domain's default does not count")
	}
	m.domains = nil
	if !has(snap) {
		t.Error("without domains nothing is known to be missing")
	}
}

func TestHealth(t *testing.T) {
	s, m, n := world(t)
	state := func(st image.State) *csi.VolumeHealth {
		h := image.Handle{Domain: "nas", Image: "v-1"}
		m.images[h] = image.Image{Handle: h, Mutable: true, State: st, Reason: "because"}
		r, err := s.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: "nas/v-1"})
		if err != nil {
			t.Fatal(err)
		}
		l, err := s.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
		if err != nil || len(l.Entries) != min(1, len(r.VolumeHealth.HealthStatuses)) {
			t.Errorf("list: %v, %v", l, err)
		}
		return r.VolumeHealth
	}
	if h := state(image.Optimized); h.VolumeId != "nas/v-1" || len(h.HealthStatuses) != 0 {
		t.Errorf("optimized: %v", h)
	}
	if h := state(image.Degraded); len(h.HealthStatuses) != 1 || h.HealthStatuses[0].Status != csi.VolumeHealthErrorType_DEGRADED || h.HealthStatuses[0].Message != "because" {
		t.Errorf("degraded: %v", h)
	}
	if h := state(image.Broken); len(h.HealthStatuses) != 1 || h.HealthStatuses[0].Status != csi.VolumeHealthErrorType_INACCESSIBLE {
		t.Errorf("broken: %v", h)
	}
	h := image.Handle{Domain: "nas", Image: "v-1"}
	m.images[h] = image.Image{Handle: h, Mutable: true, State: image.Broken, Reason: "because", Warning: "the pool is nearly full"}
	full, err := s.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
	if err != nil || len(full.Entries) != 1 || len(full.Entries[0].HealthStatuses) != 2 || full.Entries[0].HealthStatuses[1].Status != csi.VolumeHealthErrorType_DEGRADED ||
		full.Entries[0].HealthStatuses[1].Reason != "StorageDegraded" || full.Entries[0].HealthStatuses[1].Message != "the pool is nearly full" {
		t.Errorf("on a pool that is nearly full: %v, %v", full, err)
	}
	n.conditions = []node.Condition{{Status: node.Inaccessible, Reason: "DeviceGone", Message: "m"}}
	r, err := s.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: "nas/v-1"})
	if err != nil || r.VolumeHealth.VolumeId != "nas/v-1" || r.VolumeHealth.HealthStatuses[0].Status != csi.VolumeHealthErrorType_INACCESSIBLE || r.VolumeHealth.HealthStatuses[0].Reason != "DeviceGone" {
		t.Errorf("%v, %v", r, err)
	}
	n.conditions = nil
	st, err := s.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(st.BackendHealth) != 0 || !slices.Equal(n.asked, []string{"nas"}) {
		t.Errorf("%v, %v", st, err)
	}
	n.conditions = []node.Condition{{Status: node.StorageDegraded, Reason: "CallsHang"}}
	m.domains = append(m.domains,
		image.DomainInfo{ID: "a", Problem: "gone"}, image.DomainInfo{Config: image.DomainConfig{Name: "b"}, Problem: "read-only"},
		image.DomainInfo{ID: "c", Problem: "elsewhere", Config: image.DomainConfig{Scope: "node", Node: "n2"}})
	st, err = s.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(st.BackendHealth) != 2 || st.BackendHealth[0].Status != csi.StorageHealthErrorType_STORAGE_DEGRADED ||
		st.BackendHealth[1].Status != csi.StorageHealthErrorType_STORAGE_UNREACHABLE || st.BackendHealth[1].Message != "domain a: gone; domain b: read-only" {
		t.Errorf("%v, %v", st, err)
	}
}

// The fake clock stands for the seconds that a dead server would cost.
func TestADeadServerHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, m, n := world(t)
		m.dead = make(chan struct{})
		defer close(m.dead)
		n.conditions = []node.Condition{{Status: node.StorageUnreachable, Reason: "CallsHang"}}
		began := time.Now()
		r, err := s.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
		if err != nil || len(r.BackendHealth) != 1 || r.BackendHealth[0].Status != csi.StorageHealthErrorType_STORAGE_UNREACHABLE {
			t.Errorf("%v, %v", r, err)
		}
		c, err := s.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
		if err != nil || len(c.Capabilities) < 16 {
			t.Errorf("%v, %v", c, err)
		}
		if time.Since(began) > 0 {
			t.Errorf("%v were spent on asking a storage about what is known", time.Since(began))
		}
		_, err = s.GetCapacity(ctx, &csi.GetCapacityRequest{})
		wantKind(t, "capacity", err, fault.Unavailable)
		gone, cancel := context.WithCancel(ctx)
		cancel()
		_, err = s.GetCapacity(gone, &csi.GetCapacityRequest{})
		wantKind(t, "a caller that gave up", err, fault.Canceled)
	})
}

func TestNodePathsAreVerified(t *testing.T) {
	s, _, n := world(t)
	for _, p := range []string{"rel/ative", "/a/../b", "/a//b", "/a/./b", "/a\x00b", "/" + strings.Repeat("a", 4096)} {
		_, err := s.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "nas/v-1", StagingTargetPath: p, VolumeCapability: mount("", writer), PublishContext: map[string]string{GenerationKey: "1"}})
		wantKind(t, "stage", err, fault.Invalid)
		_, err = s.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "nas/v-1", StagingTargetPath: p})
		wantKind(t, "unstage", err, fault.Invalid)
		_, err = s.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "nas/v-1", StagingTargetPath: "/st", TargetPath: p, VolumeCapability: mount("", writer)})
		wantKind(t, "publish", err, fault.Invalid)
		_, err = s.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "nas/v-1", StagingTargetPath: p, TargetPath: "/t", VolumeCapability: mount("", writer)})
		wantKind(t, "publish", err, fault.Invalid)
		_, err = s.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "nas/v-1", TargetPath: p})
		wantKind(t, "unpublish", err, fault.Invalid)
		_, err = s.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "nas/v-1", VolumePath: p})
		wantKind(t, "stats", err, fault.NotFound)
	}
	_, err := s.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "nas/v-1", TargetPath: "/t", VolumeCapability: mount("", writer)})
	wantKind(t, "publish without staging", err, fault.InUse)
	if len(n.staged)+len(n.published)+len(n.undone) != 0 {
		t.Errorf("the node was called: %+v", n)
	}
	// 128 bytes at the least must be taken, and a trailing slash is harmless.
	long := "/" + strings.Repeat("p", 254) + "/" + strings.Repeat("q", 254) + "/"
	if _, err := s.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "nas/v-1", StagingTargetPath: long, TargetPath: long, Readonly: true, VolumeCapability: mount("", writer)}); err != nil || !n.published[0].ReadOnly || n.published[0].TargetPath+"/" != long {
		t.Errorf("%v: %+v", err, n.published)
	}
}

func TestStats(t *testing.T) {
	s, _, n := world(t)
	get := func() []*csi.VolumeUsage {
		r, err := s.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "nas/v-1", VolumePath: "/t"})
		if err != nil {
			t.Fatal(err)
		}
		return r.Usage
	}
	n.stats = node.Stats{Usage: host.Usage{Total: 10, Used: 3, Available: 6, Inodes: 5, InodesUsed: 1, InodesFree: 4}}
	if u := get(); len(u) != 2 || u[0].Unit != csi.VolumeUsage_BYTES || u[0].Available != 6 || u[1].Unit != csi.VolumeUsage_INODES || u[1].Total != 5 {
		t.Errorf("%v", u)
	}
	n.stats = node.Stats{Block: true, Usage: host.Usage{Total: 10}}
	if u := get(); len(u) != 1 || u[0].Total != 10 {
		t.Errorf("%v", u)
	}
}

func TestEveryStatusOfTheNodeIsOneOfCSI(t *testing.T) {
	for _, st := range []node.Status{node.Degraded, node.Inaccessible, node.DataLoss} {
		if csi.VolumeHealthErrorType_value[string(st)] == 0 {
			t.Errorf("%s is no status of a volume in CSI", st)
		}
	}
	for _, st := range []node.Status{node.StorageDegraded, node.StorageUnreachable} {
		if csi.StorageHealthErrorType_value[string(st)] == 0 {
			t.Errorf("%s is no status of storage in CSI", st)
		}
	}
}
