package main

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/fault"
)

func named(list []domain.Entry) string {
	var out []string
	for _, e := range list {
		out = append(out, e.Name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestWhatHasChangedInTheDomainsFile(t *testing.T) {
	have := []domain.Entry{{Name: "same", Overcommit: 1}, {Name: "settings", Overcommit: 1}, {Name: "storage", Params: map[string]string{"path": "/a"}},
		{Name: "secret", Secrets: domain.Secrets{"k": "1"}}, {Name: "gone"}, {Name: "used"}, {Name: "scope", Scope: domain.ScopeNode}, {Name: "usedscope", Scope: domain.ScopeNode}}
	want := []domain.Entry{{Name: "new"}, {Name: "same", Overcommit: 1}, {Name: "settings", Overcommit: 2}, {Name: "storage", Params: map[string]string{"path": "/b"}},
		{Name: "secret", Secrets: domain.Secrets{"k": "2"}}, {Name: "scope", Scope: domain.ScopeShared}, {Name: "usedscope", Scope: domain.ScopeShared}}
	d := compare(have, want)
	inForce, err := d.keep(want, func(name string) []string {
		if strings.HasPrefix(name, "used") {
			return []string{"n1", "n2"}
		}
		return nil
	})
	if named(d.added) != "new scope" || named(d.changed) != "secret settings storage" || named(d.removed) != "gone scope" {
		t.Errorf("added %s, changed %s, removed %s", named(d.added), named(d.changed), named(d.removed))
	}
	if !errors.Is(err, fault.InUse) || !strings.HasSuffix(err.Error(), "attached: used (attached to n1, n2); usedscope (attached to n1, n2)") {
		t.Errorf("what stays: %v", err)
	}
	if named(inForce) != "new same scope secret settings storage used usedscope" {
		t.Errorf("in force: %s", named(inForce))
	}
	for _, e := range inForce {
		if e.Name == "usedscope" && e.Scope != domain.ScopeNode || e.Name == "scope" && e.Scope != domain.ScopeShared {
			t.Errorf("%s has scope %s", e.Name, e.Scope)
		}
	}
	for _, e := range d.changed {
		i := slices.IndexFunc(have, func(o domain.Entry) bool { return o.Name == e.Name })
		if have[i].SameStorage(e) != (e.Name == "settings") {
			t.Errorf("%s: same storage is %t", e.Name, have[i].SameStorage(e))
		}
	}
}

// TestAnEntryMovesWhenNoneOfItsImagesIsAttached: at another storage they would count as deleted.
func TestAnEntryMovesWhenNoneOfItsImagesIsAttached(t *testing.T) {
	at := func(name, engine, path string, overcommit float64) domain.Entry {
		return domain.Entry{Name: name, Engine: engine, Params: map[string]string{"path": path}, Overcommit: overcommit}
	}
	have := []domain.Entry{at("engine", "dir", "/a", 1), at("free", "dir", "/a", 1), at("params", "dir", "/a", 1), at("secret", "dir", "/a", 1), at("settings", "dir", "/a", 1)}
	want := []domain.Entry{at("engine", "lvm", "/a", 1), at("free", "dir", "/b", 1), at("params", "dir", "/b", 2), at("secret", "dir", "/a", 1), at("settings", "dir", "/a", 2)}
	want[3].Secrets = domain.Secrets{"k": "2"}
	attached := func(name string) []string {
		if name == "free" {
			return nil
		}
		return []string{"n1"}
	}
	d := compare(have, want)
	inForce, err := d.keep(want, attached)
	if named(d.changed) != "free secret settings" || len(d.added)+len(d.removed) > 0 {
		t.Errorf("while it is attached: added %s, changed %s, removed %s", named(d.added), named(d.changed), named(d.removed))
	}
	if !errors.Is(err, fault.InUse) || !strings.HasSuffix(err.Error(), "attached: engine (attached to n1); params (attached to n1)") {
		t.Errorf("what stays: %v", err)
	}
	find := func(list []domain.Entry, name string) domain.Entry {
		return list[slices.IndexFunc(list, func(e domain.Entry) bool { return e.Name == name })]
	}
	if len(inForce) != len(want) {
		t.Errorf("in force: %s", named(inForce))
	}
	for _, e := range inForce {
		as := want
		if e.Name == "engine" || e.Name == "params" {
			as = have
		}
		if !e.Equal(find(as, e.Name)) {
			t.Errorf("in force: %+v", e)
		}
	}

	// The file is applied again until all of it is in force.
	d = compare(inForce, want)
	if _, err := d.keep(want, attached); !errors.Is(err, fault.InUse) || len(d.changed) > 0 {
		t.Errorf("again: changed %s, %v", named(d.changed), err)
	}
	d = compare(inForce, want)
	inForce, err = d.keep(want, func(string) []string { return nil })
	if err != nil || named(d.changed) != "engine params" || !slices.EqualFunc(inForce, want, domain.Entry.Equal) {
		t.Errorf("detached: changed %s, in force %+v, %v", named(d.changed), inForce, err)
	}
	for _, e := range d.changed {
		if !e.Equal(find(want, e.Name)) {
			t.Errorf("detached: it becomes %+v", e)
		}
	}
}

func TestAWrongDomainsFileChangesNothingAndIsToldOnce(t *testing.T) {
	var mu sync.Mutex
	entries, loadErr, applied, told := []domain.Entry{{Name: "a"}}, error(nil), []string{}, []string{}
	var applyErr error
	loads := 0
	r := &reloader{
		load: func() ([]domain.Entry, error) {
			mu.Lock()
			defer mu.Unlock()
			loads++
			return slices.Clone(entries), loadErr
		},
		apply: func(_ context.Context, e []domain.Entry) error {
			mu.Lock()
			defer mu.Unlock()
			applied = append(applied, named(e))
			return applyErr
		},
		failed: func(err error) {
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				err = errors.New("well")
			}
			told = append(told, err.Error())
		},
	}
	r.watch(newMetrics())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { r.run(ctx, entries); close(ended) }()
	defer func() { cancel(); <-ended }()
	until := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			mu.Lock()
			ok := is()
			mu.Unlock()
			if ok {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("waited for %s: applied %q, told %q", what, applied, told)
			}
		}
	}
	until("the first look", func() bool { return loads > 0 })
	mu.Lock()
	loadErr = fault.New(fault.Invalid, "line 3 is wrong")
	before := loads
	mu.Unlock()
	until("three looks at a wrong file", func() bool { return loads >= before+3 })
	mu.Lock()
	if len(applied) > 0 || !slices.Equal(told, []string{"line 3 is wrong"}) || testutil.ToFloat64(r.successful) != 0 {
		t.Errorf("a wrong file: applied %q, told %q, metric %v", applied, told, testutil.ToFloat64(r.successful))
	}
	loadErr, entries, applyErr = nil, []domain.Entry{{Name: "a"}, {Name: "b"}}, fault.New(fault.InUse, "c is in use")
	mu.Unlock()
	until("what cannot be done yet to be tried again", func() bool { return len(applied) >= 2 && len(told) == 2 })
	mu.Lock()
	if told[1] != "c is in use" || testutil.ToFloat64(r.successful) != 0 {
		t.Errorf("told %q, metric %v", told, testutil.ToFloat64(r.successful))
	}
	applyErr = nil
	mu.Unlock()
	until("the rest", func() bool { return len(told) == 3 })
	mu.Lock()
	n := len(applied)
	if told[2] != "well" || testutil.ToFloat64(r.successful) != 1 || applied[n-1] != "a b" {
		t.Errorf("told %q, applied %q", told, applied)
	}
	before = loads
	mu.Unlock()
	until("two looks at the same file", func() bool { return loads >= before+2 })
	mu.Lock()
	if len(applied) != n {
		t.Errorf("applied again: %q", applied)
	}
	mu.Unlock()
}

// TestTheDomainsFileIsFollowedWhileVolumesAreInUse: by a controller, without its agent being
// started again, as a mounted ConfigMap changes: by another link.
func TestTheDomainsFileIsFollowedWhileVolumesAreInUse(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, "domains:\n- {name: nas, engine: dir, scope: shared, params: {path: \"{STORAGE}\"}}\n")
	versions := 0
	write := func(text string) {
		t.Helper()
		versions++
		folder := c.path("..v" + string(rune('0'+versions)))
		c.must(os.Mkdir(folder, 0o755))
		c.must(os.WriteFile(folder+"/domains.yaml", []byte(strings.ReplaceAll(strings.ReplaceAll(text, "{STORAGE}", c.storage), "{DIR}", c.dir)), 0o600))
		c.must(os.Symlink(folder+"/domains.yaml", c.path("new")))
		c.must(os.Rename(c.path("new"), c.path("domains.yaml")))
	}
	controller := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	agent := c.agent("n1")
	e, err := admin.ParseEndpoint(c.path("c1-admin.sock"))
	c.must(err)
	domains := func() map[string]admin.Domain {
		out := map[string]admin.Domain{}
		list, err := admin.NewClient(e).Domains(t.Context())
		c.must(err)
		for _, d := range list {
			out[d.Name] = d
		}
		return out
	}
	create := func(name, in string) string {
		t.Helper()
		return again(t, csi.NewControllerClient(c.at("c1")).CreateVolume, &csi.CreateVolumeRequest{Name: name, Parameters: map[string]string{"domain": in},
			VolumeCapabilities: []*csi.VolumeCapability{blockWriter()}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}}).GetVolume().GetVolumeId()
	}
	v := create("v", "nas")
	device := c.publish("c1", "n1", v)
	readable := func() {
		t.Helper()
		f, err := os.Open(device)
		c.must(err)
		defer f.Close()
		if _, err := f.Read(make([]byte, 4096)); err != nil {
			t.Errorf("the volume in use: %v", err)
		}
	}

	// A new domain, and settings of one that is in use.
	c.must(os.Mkdir(c.path("more"), 0o755))
	c.file("keys.yaml", "password: one\n")
	more := "- {name: more, engine: dir, scope: shared, params: {path: \"{DIR}/more\"}, secretsFile: \"{DIR}/keys.yaml\"}\n"
	write("domains:\n- {name: nas, engine: dir, scope: shared, params: {path: \"{STORAGE}\"}, capacityLimit: 1Gi, aliases: [old]}\n" + more)
	c.wait("both domains", func() bool { d := domains(); return d["more"].Open && d["nas"].CapacityLimit == 1<<30 })
	if d := domains()["nas"]; d.Epoch != 1 || !slices.Equal(d.Aliases, []string{"old"}) {
		t.Errorf("nas was opened again, or has no alias: %+v", d)
	}
	w := create("w", "more")
	c.publish("c1", "n1", w)

	// Secrets of a domain that is in use: it is opened again, and its volumes stay in use.
	c.file("keys.yaml", "password: two\n")
	c.wait("the domain to be opened again", func() bool { d := domains()["more"]; return d.Open && d.Epoch == 2 })
	c.unpublish("c1", "n1", w)

	// A wrong file changes nothing.
	write("domains:\n- {name: nas, engine: zfs}\n")
	c.wait("the log", func() bool { return strings.Contains(controller.said(), `engine \"zfs\" is unknown`) })
	if d := domains(); !d["nas"].Open || !d["more"].Open {
		t.Errorf("after a wrong file: %+v", d)
	}
	readable()

	// What is removed while it is in use stays, until it is not.
	write("domains:\n" + more)
	c.wait("the log", func() bool { return strings.Contains(controller.said(), "nas (attached to n1)") })
	readable()
	if !domains()["nas"].Open {
		t.Error("a domain with a volume in use was closed")
	}
	c.unpublish("c1", "n1", v)
	c.wait("the domain to go", func() bool { _, there := domains()["nas"]; return !there })
	_, err = csi.NewControllerClient(c.at("c1")).DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v})
	if err == nil || !strings.Contains(err.Error(), "is not configured") {
		t.Errorf("deleting a volume of a domain that is not configured: %v", err)
	}

	// It comes back with what was in it.
	write("domains:\n- {name: nas, engine: dir, scope: shared, params: {path: \"{STORAGE}\"}}\n" + more)
	c.wait("the domain to be back", func() bool { d := domains()["nas"]; return d.Open && d.Volumes == 1 })
	again(t, csi.NewControllerClient(c.at("c1")).DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v})
	again(t, csi.NewControllerClient(c.at("c1")).DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: w})
	if strings.Count(agent.said(), "Connected to the controller") != 1 {
		t.Errorf("the agent has connected again:\n%s", agent.said())
	}
	agent.stop(t)
	controller.stop(t)
}

func TestStandaloneReadsTheDomainsFileOnSIGHUP(t *testing.T) {
	needRoot(t, "quarry standalone")
	p := newPlace(t, oneDomain)
	r := begin(t, "Serving CSI", p.args()...)
	if err := os.Mkdir(p.dir+"/more", 0o755); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(oneDomain, "{STORAGE}", p.storage) + "- name: more\n  engine: dir\n  params: {path: \"" + p.dir + "/more\"}\n"
	if err := os.WriteFile(p.dir+"/domains.yaml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	endpoint, err := admin.ParseEndpoint(p.dir + "/admin.sock")
	if err != nil {
		t.Fatal(err)
	}
	open := func() (n int) {
		domains, err := admin.NewClient(endpoint).Domains(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range domains {
			if d.Open {
				n++
			}
		}
		return n
	}
	for end := time.Now().Add(time.Minute); open() != 2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the new domain is not open:\n%s", r.said())
		}
	}
	r.stop(t)
}
