package csi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2/ktesting"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// listing is what a stream of either call gave.
type listing struct {
	messages []int // ranges in each
	ranges   []engine.Extent
	sizes    []int64
}

type message interface {
	GetBlockMetadataType() csi.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

// drain reads a stream to its end.
func drain[M message](t *testing.T, next func() (M, error)) (listing, error) {
	t.Helper()
	var l listing
	for {
		m, err := next()
		if errors.Is(err, io.EOF) {
			return l, nil
		}
		if err != nil {
			return l, err
		}
		if m.GetBlockMetadataType() != csi.BlockMetadataType_VARIABLE_LENGTH {
			t.Errorf("a message of type %s", m.GetBlockMetadataType())
		}
		l.messages = append(l.messages, len(m.GetBlockMetadata()))
		l.sizes = append(l.sizes, m.GetVolumeCapacityBytes())
		for _, b := range m.GetBlockMetadata() {
			l.ranges = append(l.ranges, engine.Extent{Offset: b.GetByteOffset(), Length: b.GetSizeBytes()})
		}
	}
}

// metadata serves a world, with a second snapshot nas/s-2, on a socket.
func metadata(t *testing.T) (csi.SnapshotMetadataClient, *fakeManager, *prometheus.Registry, func() string) {
	t.Helper()
	log := ktesting.NewLogger(t, ktesting.NewConfig(ktesting.Verbosity(9), ktesting.BufferLogs(true)))
	s, m, _ := world(t)
	later := image.Handle{Domain: "nas", Image: "s-2"}
	m.images[later] = image.Image{Handle: later, Size: 1 << 30, Source: "nas/v-1", Ready: true, Created: time.Unix(6, 0)}
	reg := prometheus.NewRegistry()
	cfg := s.cfg
	cfg.Metrics = reg
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	conn, _ := dial(t, s, log)
	return csi.NewSnapshotMetadataClient(conn), m, reg, func() string { return log.GetSink().(ktesting.Underlier).GetBuffer().String() }
}

func allocated(t *testing.T, c csi.SnapshotMetadataClient, req *csi.GetMetadataAllocatedRequest) (listing, error) {
	t.Helper()
	stream, err := c.GetMetadataAllocated(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return drain(t, stream.Recv)
}

func delta(t *testing.T, c csi.SnapshotMetadataClient, req *csi.GetMetadataDeltaRequest) (listing, error) {
	t.Helper()
	stream, err := c.GetMetadataDelta(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return drain(t, stream.Recv)
}

func TestRangesAreStreamed(t *testing.T) {
	c, m, _, said := metadata(t)
	m.extents = [][]engine.Extent{{{Offset: 0, Length: 4096}, {Offset: 8192, Length: 512}, {Offset: 10000, Length: 1}}, {{Offset: 1 << 20, Length: 1 << 20}}}
	all := slices.Concat(m.extents...)
	for _, most := range []int32{0, 1, 2, 3, 1 << 30} {
		want := map[int32][]int{0: {3, 1}, 1: {1, 1, 1, 1}, 2: {2, 1, 1}, 3: {3, 1}, 1 << 30: {3, 1}}[most]
		secrets := map[string]string{"key": "hunter2"}
		a, errA := allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: "nas/s-1", StartingOffset: 7, MaxResults: most, Secrets: secrets})
		d, errD := delta(t, c, &csi.GetMetadataDeltaRequest{BaseSnapshotId: "nas/s-1", TargetSnapshotId: "nas/s-2", StartingOffset: 1 << 30, MaxResults: most, Secrets: secrets})
		if err := errors.Join(errA, errD); err != nil {
			t.Fatal(err)
		}
		for what, l := range map[string]listing{"allocated": a, "delta": d} {
			if !slices.Equal(l.ranges, all) || !slices.Equal(l.messages, want) || slices.ContainsFunc(l.sizes, func(n int64) bool { return n != 1<<30 }) {
				t.Errorf("%s, at most %d: %+v", what, most, l)
			}
		}
	}
	if want := []string{"allocated nas/s-1 from 7", "changed nas/s-1 nas/s-2 from 1073741824"}; !slices.Equal(m.calls[:2], want) {
		t.Errorf("asked %q", m.calls)
	}
	for _, want := range []string{`method="GetMetadataDelta"`, `method="GetMetadataAllocated"`, "nas/s-2", "request="} {
		if !strings.Contains(said(), want) {
			t.Errorf("%s is not in the log", want)
		}
	}
	if strings.Contains(said(), "hunter2") {
		t.Error("a secret is in the log")
	}
}

func TestManyRangesAreSplitWithoutBeingAsked(t *testing.T) {
	c, m, _, _ := metadata(t)
	m.extents = [][]engine.Extent{nil}
	for i := range int64(maxRanges + 5) {
		m.extents[0] = append(m.extents[0], engine.Extent{Offset: 8192 * i, Length: 4096})
	}
	for _, most := range []int32{0, maxRanges + 1} {
		l, err := allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: "nas/s-1", MaxResults: most})
		if err != nil || !slices.Equal(l.messages, []int{maxRanges, 5}) || !slices.Equal(l.ranges, m.extents[0]) {
			t.Errorf("%v, %v", l.messages, err)
		}
	}
}

func TestASnapshotWithoutRangesStillSaysItsSize(t *testing.T) {
	c, _, _, _ := metadata(t)
	a, errA := allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: "nas/s-1"})
	d, errD := delta(t, c, &csi.GetMetadataDeltaRequest{BaseSnapshotId: "nas/s-1", TargetSnapshotId: "nas/s-2"})
	for _, l := range []listing{a, d} {
		if errA != nil || errD != nil || !slices.Equal(l.sizes, []int64{1 << 30}) || len(l.ranges) > 0 {
			t.Errorf("%+v, %v, %v", l, errA, errD)
		}
	}
}

func TestListingsRefuseWhatCannotBe(t *testing.T) {
	c, m, reg, said := metadata(t)
	for _, r := range []struct {
		id     string
		offset int64
		most   int32
		code   string
		says   string
	}{
		{"", 0, 0, "INVALID_ARGUMENT", "snapshot_id is missing"},
		{"nas/s-1", 0, -1, "INVALID_ARGUMENT", "max_results is -1"},
		{"", -1, -1, "INVALID_ARGUMENT", "snapshot_id is missing"},
		{"no handle", 0, 0, "NOT_FOUND", "no handle"},
		{strings.Repeat("x", 200), 0, 0, "NOT_FOUND", "xxx"},
		{"nas/gone", 0, 0, "NOT_FOUND", "nas/gone"},
		{"nas/v-1", 0, 0, "NOT_FOUND", "is a volume"},
		{"nas/s-1", -1, 0, "OUT_OF_RANGE", "starting_offset is -1"},
		{"nas/s-1", 1<<30 + 1, 0, "OUT_OF_RANGE", "0 to 1073741824"},
	} {
		_, a := allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: r.id, StartingOffset: r.offset, MaxResults: r.most})
		_, d := delta(t, c, &csi.GetMetadataDeltaRequest{BaseSnapshotId: "nas/s-2", TargetSnapshotId: r.id, StartingOffset: r.offset, MaxResults: r.most})
		for _, err := range []error{a, d} {
			if rpcfault.CodeName(err) != r.code || !strings.Contains(err.Error(), r.says) {
				t.Errorf("%+v: %v", r, err)
			}
		}
	}
	for base, code := range map[string]string{"": "INVALID_ARGUMENT", "no handle": "NOT_FOUND", "nas/gone": "NOT_FOUND"} {
		_, err := delta(t, c, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: "nas/s-2"})
		if rpcfault.CodeName(err) != code {
			t.Errorf("base %q: %v", base, err)
		}
	}
	// What the Image Manager refuses, and what goes wrong in the middle.
	m.extents = [][]engine.Extent{{{Offset: 0, Length: 1}}}
	for kind, code := range map[fault.Kind]string{
		fault.Invalid: "INVALID_ARGUMENT", fault.Unsupported: "UNIMPLEMENTED", fault.Unavailable: "UNAVAILABLE",
		fault.Corrupt: "DATA_LOSS", fault.InUse: "FAILED_PRECONDITION", fault.Pending: "ABORTED",
	} {
		m.broken = fault.New(kind, "because")
		a, errA := allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: "nas/s-1"})
		d, errD := delta(t, c, &csi.GetMetadataDeltaRequest{BaseSnapshotId: "nas/s-1", TargetSnapshotId: "nas/s-2"})
		if rpcfault.CodeName(errA) != code || rpcfault.CodeName(errD) != code || len(a.ranges) != 1 || len(d.ranges) != 1 {
			t.Errorf("%s: %v %v, %v %v", kind, a, errA, d, errD)
		}
	}
	m.broken, m.panics = nil, true
	if _, err := allocated(t, c, &csi.GetMetadataAllocatedRequest{SnapshotId: "nas/s-1"}); rpcfault.CodeName(err) != "INTERNAL" || !strings.Contains(err.Error(), "boom") {
		t.Errorf("a panic gave %v", err)
	}
	if text := said(); !strings.Contains(text, "metadata_test.go") && !strings.Contains(text, "fake_test.go") {
		t.Error("the log does not say where the panic was")
	}

	got, err := reg.Gather()
	if err != nil || len(got) != 1 {
		t.Fatalf("%v, %v", got, err)
	}
	var seen []string
	for _, metric := range got[0].Metric {
		seen = append(seen, fmt.Sprintf("%s %s", metric.Label[1].GetValue(), metric.Label[0].GetValue()))
	}
	for _, want := range []string{"GetMetadataAllocated OUT_OF_RANGE", "GetMetadataDelta DATA_LOSS", "GetMetadataAllocated INTERNAL"} {
		if !slices.Contains(seen, want) {
			t.Errorf("%q is not in the metrics %q", want, seen)
		}
	}
}

// A client that goes away ends the work for it.
func TestAListingEndsWithItsClient(t *testing.T) {
	c, m, _, _ := metadata(t)
	m.endless = make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: "nas/s-1"})
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-m.endless; fault.KindOf(err) != fault.Canceled && fault.KindOf(err) != fault.Unavailable {
		t.Errorf("it ended with %v", err)
	}
}

func TestThePluginSaysThatItListsBlocks(t *testing.T) {
	s, _, _ := world(t)
	r, err := s.GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil || !slices.ContainsFunc(r.GetCapabilities(), func(c *csi.PluginCapability) bool {
		return c.GetService().GetType() == csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE
	}) {
		t.Errorf("%v, %v", r, err)
	}
}
