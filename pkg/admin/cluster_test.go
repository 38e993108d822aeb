package admin

import (
	"context"
	"errors"
	"maps"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// kubes is a Cluster.
type kubes struct {
	refs []Reference
	err  error
}

func (k *kubes) References(context.Context) ([]Reference, error) { return k.refs, k.err }

func overHTTP(t *testing.T, f *fake, k Cluster) *Client {
	t.Helper()
	s := httptest.NewServer(Handler(f, Version{Version: "v1"}, k))
	t.Cleanup(s.Close)
	e, err := ParseLoopback("tcp://" + s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return NewClient(e)
}

func TestWhatKubernetesDoesNotKnowAndWhatQuarryDoesNot(t *testing.T) {
	old := time.Now().Add(-time.Hour)
	img := func(id, name string, mutable bool, state image.State) image.Image {
		return image.Image{Handle: handle(id), Name: name, Mutable: mutable, State: state, Created: old}
	}
	f := &fake{
		domains: []image.DomainInfo{
			{ID: "local.1", Open: true, Config: image.DomainConfig{Name: "local", Aliases: []string{"old"}}},
			{ID: "other", Open: true, Config: image.DomainConfig{Name: "other"}},
			{ID: "nas", Config: image.DomainConfig{Name: "nas"}, Problem: "the server is away"},
		},
		images: []image.Image{
			img("v1", "pvc-1", true, image.Optimized), img("v2", "pvc-2", true, image.Degraded), img("v3", "pvc-3", true, image.Broken),
			img("s1", "snap-1", false, image.Optimized), img("s2", "snap-2", false, image.Optimized),
			img("h", "", false, image.Optimized), img("c", "pvc-c", true, image.Creating), img("d", "pvc-d", true, image.Deleting),
			{Handle: handle("new"), Name: "pvc-new", Mutable: true, State: image.Optimized, Created: time.Now()},
		},
	}
	pv := func(name, h string) Reference { return Reference{Kind: "PersistentVolume", Name: name, Handle: h} }
	going := pv("going", "local.1/gone")
	going.Going = true
	k := &kubes{refs: []Reference{
		pv("pvc-1", "local.1/v1"), pv("pvc-2", "old.1/v2"), // by a former name
		pv("lost", "local.1/v9"), pv("dead", "local.1/d"), pv("unknown", "nas/v1"), pv("foreign", "gone.9/v1"), pv("mixed", "local.1/s2"), pv("bad", "nonsense"), going,
		{Kind: "VolumeSnapshotContent", Name: "snapcontent-1", Handle: "local.1/s1", Snapshot: true},
	}}
	c := overHTTP(t, f, k)
	want := map[string]string{
		"local.1:Kubernetes:v3":                      `no PersistentVolume names volume "pvc-3"`,
		"local.1:Kubernetes:PersistentVolume/lost":   "PersistentVolume lost names image local.1/v9, which is not there",
		"local.1:Kubernetes:PersistentVolume/dead":   "PersistentVolume dead names image local.1/d, which is not there",
		"local.1:Kubernetes:PersistentVolume/mixed":  "PersistentVolume mixed names image local.1/s2, which is a snapshot",
		"gone.9:Kubernetes:PersistentVolume/foreign": "PersistentVolume foreign names image gone.9/v1, whose domain is not configured",
		"nonsense:Kubernetes:PersistentVolume/bad":   "PersistentVolume bad names image nonsense, whose domain is not configured",
	}
	check := func(domain string, want map[string]string) {
		t.Helper()
		got, err := c.Check(t.Context(), domain)
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		for _, x := range got.Findings {
			found[x.ID] = x.Message
			if x.Kind != "report" || x.Fix != "" {
				t.Errorf("somebody may act upon %+v", x)
			}
			if !strings.HasPrefix(x.Message, want[x.ID]) {
				t.Errorf("%s: %s", x.ID, x.Message)
			}
		}
		if ids := slices.Sorted(maps.Keys(found)); !slices.Equal(ids, slices.Sorted(maps.Keys(want))) {
			t.Errorf("domain %q: found %v", domain, ids)
		}
	}
	check("", want)
	delete(want, "gone.9:Kubernetes:PersistentVolume/foreign")
	delete(want, "nonsense:Kubernetes:PersistentVolume/bad")
	check("old", want)
	check("other", nil)

	r, err := c.Fix(t.Context(), FixRequest{IDs: []string{"local.1:Kubernetes:v3"}, Apply: true})
	if err != nil || f.fixed != nil || len(r.Results) != 1 || r.Results[0].Error != "only a person can help here" {
		t.Errorf("fix: %+v, %v, fixed %v", r, err, f.fixed)
	}
	k.err = fault.New(fault.Permission, "forbidden")
	if got, err := c.Check(t.Context(), ""); err != nil || len(got.Findings) != 0 || got.Unchecked[Kubernetes] != "forbidden" {
		t.Errorf("without rights: %+v, %v", got, err)
	}
	if _, err := c.Check(t.Context(), "none"); !errors.Is(err, fault.NotFound) {
		t.Errorf("%v", err)
	}
}

func TestUsageIsAddedUpByNamespaceAndDomain(t *testing.T) {
	use := func(domain, ns string, mutable bool, state image.State, size, alloc int64, measured bool) image.Use {
		return image.Use{Image: image.Image{Handle: image.Handle{Domain: domain, Image: "x"}, Mutable: mutable, State: state, Size: size, Promised: size, Described: image.Described{Namespace: ns}}, Allocated: alloc, Measured: measured}
	}
	f := &fake{usage: []image.Use{
		use("b", "shop", true, image.Optimized, 10, 4, true), use("a", "shop", true, image.Optimized, 20, 5, true), use("a", "shop", false, image.Degraded, 7, 1, true),
		use("a", "", true, image.Deleting, 3, 2, true), use("a", "shop", true, image.Creating, 100, 0, false),
	}}
	got, err := overHTTP(t, f, nil).Usage(t.Context())
	want := []NamespaceUsage{
		{Domain: "a", Promised: 3, Allocated: 2},
		{Namespace: "shop", Domain: "a", Volumes: 1, Snapshots: 1, Size: 27, Promised: 127, Allocated: 6, Unmeasured: 1},
		{Namespace: "shop", Domain: "b", Volumes: 1, Size: 10, Promised: 10, Allocated: 4},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestImportIsHandedOn(t *testing.T) {
	f := &fake{}
	s := httptest.NewServer(Handler(f, Version{Version: "v1", Driver: "csi.quarry.dev"}, nil))
	t.Cleanup(s.Close)
	e, err := ParseLoopback("tcp://" + s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	got, err := NewClient(e).Import(t.Context(), ImportRequest{Name: "v", Domain: "local", Source: "a.img", Filesystem: "ext4", Namespace: "shop", Claim: "data", DryRun: true})
	want := image.ImportRequest{Name: "v", Domain: "local", Source: "a.img", Filesystem: "ext4", DryRun: true, Described: image.Described{Namespace: "shop", Claim: "data", Volume: "v"}}
	if err != nil || len(f.imported) != 1 || !reflect.DeepEqual(f.imported[0], want) {
		t.Errorf("%+v, %v", f.imported, err)
	}
	if got.Image.Handle != "local.1/v1" || got.Node != "n1" || got.Driver != "csi.quarry.dev" || !got.DryRun {
		t.Errorf("%+v", got)
	}
}
