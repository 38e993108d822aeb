package admin

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// fake is a Manager that answers what it holds.
type fake struct {
	domains    []image.DomainInfo
	images     []image.Image
	operations []image.Operation
	usage      []image.Use
	imported   []image.ImportRequest
	findings   map[string][]image.Finding
	checkErr   error
	fixErr     error
	fixed      []string
	block      chan struct{} // not nil: Domains waits for it
}

func (f *fake) Domains(context.Context) []image.DomainInfo {
	if f.block != nil {
		<-f.block
	}
	return f.domains
}
func (f *fake) All(context.Context) []image.Image { return f.images }
func (f *fake) Operations() []image.Operation     { return f.operations }
func (f *fake) Topology(string) (string, error)   { return "n1", nil }
func (f *fake) Import(_ context.Context, r image.ImportRequest) (image.Image, error) {
	f.imported = append(f.imported, r)
	return image.Image{Handle: handle("v1"), Name: r.Name, Mutable: true, Size: 7}, f.fixErr
}
func (f *fake) Usage(context.Context) []image.Use { return f.usage }
func (f *fake) Check(_ context.Context, domain string) ([]image.Finding, error) {
	return f.findings[domain], f.checkErr
}
func (f *fake) Fix(_ context.Context, x image.Finding) (string, error) {
	if f.fixErr != nil {
		return "", f.fixErr
	}
	f.fixed = append(f.fixed, x.ID)
	return "did " + x.Fix, nil
}

// start serves f on a socket and returns a client and the endpoint.
func start(t *testing.T, f *fake) (*Client, Endpoint) {
	t.Helper()
	e, err := ParseEndpoint("unix://" + filepath.Join(t.TempDir(), "run", "a.sock"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, Handler(f, Version{Version: "v1", Node: "n1"}, nil), 5*time.Second) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return NewClient(e), e
}

func handle(s string) image.Handle { return image.Handle{Domain: "local.1", Image: s} }

func TestEverythingComesThroughTheSocketUnchanged(t *testing.T) {
	made := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	f := &fake{
		domains: []image.DomainInfo{{
			Config: image.DomainConfig{Name: "nas", Engine: "share", Scope: "shared"}, Problem: "the server is away",
		}, {
			ID: "local.1", Open: true, Epoch: 7, Owner: "me", Promised: 5, Capacity: 6, Volumes: 1, Snapshots: 2, Operations: 3,
			Config: image.DomainConfig{
				Name: "local", Engine: "dir", Scope: "node", Node: "n1", NativeOnly: true, Overcommit: 1.5,
				CapacityLimit: 9, Aliases: []string{"old"},
			},
			Description:  engine.Description{Kinds: []engine.Kind{engine.Block}, Location: "/srv (ext4)", Notes: []string{"no reflink"}},
			Capabilities: []engine.Capability{engine.CapMeter},
			Usage:        &engine.Usage{Total: 3, Used: 1, Available: 2},
		}},
		images: []image.Image{{
			Handle: handle("v1"), Name: "pvc-1", Layout: image.LayoutImage, Mutable: true, Size: 1 << 30, Slab: "s1",
			Source: "local.1/x", Created: made, State: image.Optimized, Reason: "r", Ready: true, Fresh: true, Filesystem: "ext4",
			Group: "g", Inexact: true, How: "default: copy", Params: map[string]string{"a": "b"}, Children: []string{"c"},
			Attachments: []image.Attachment{{Node: "n1", Mode: image.SingleNodeWriter, Block: true, ReadOnly: true, Staged: true}},
			Described:   image.Described{Namespace: "ns", Claim: "data", Volume: "pv", Class: "fast"},
		}},
		operations: []image.Operation{
			{ID: "2", Started: made.Add(time.Second)},
			{ID: "1", Op: "create volume", Domain: "local.1", Image: "v1", Name: "pvc-1", Step: "copying", Done: 1, Total: 2, Started: made, Path: "default", Reason: "no reflink"},
		},
	}
	c, _ := start(t, f)
	ctx := t.Context()

	if v, err := c.Version(ctx); err != nil || v != (Version{Version: "v1", Node: "n1"}) {
		t.Errorf("version %+v, %v", v, err)
	}
	wantDomains := []Domain{{
		ID: "local.1", Name: "local", Engine: "dir", Scope: "node", Node: "n1", Aliases: []string{"old"}, NativeOnly: true,
		Overcommit: 1.5, CapacityLimit: 9, Open: true, Location: "/srv (ext4)", Notes: []string{"no reflink"},
		Kinds: []string{"block"}, Capabilities: []string{"meter"}, Epoch: 7, Owner: "me",
		Usage: &Usage{Total: 3, Used: 1, Available: 2}, Promised: 5, Capacity: 6, Volumes: 1, Snapshots: 2, Operations: 3,
	}, {Name: "nas", Engine: "share", Scope: "shared", Problem: "the server is away"}}
	if got, err := c.Domains(ctx); err != nil || !reflect.DeepEqual(got, wantDomains) {
		t.Errorf("domains %+v, %v", got, err)
	}
	wantImage := Image{
		Handle: "local.1/v1", Name: "pvc-1", Kind: "volume", Layout: "image", Size: 1 << 30, Slab: "s1", Source: "local.1/x",
		Created: made, State: "optimized", Reason: "r", Ready: true, Fresh: true, Filesystem: "ext4", Group: "g", Inexact: true,
		How: "default: copy", Params: map[string]string{"a": "b"}, Children: []string{"c"},
		Nodes:     []Attachment{{Node: "n1", Mode: "SINGLE_NODE_WRITER", Block: true, ReadOnly: true, Staged: true}},
		Namespace: "ns", Claim: "data", Volume: "pv", Class: "fast",
	}
	if got, err := c.Images(ctx); err != nil || !reflect.DeepEqual(got, []Image{wantImage}) {
		t.Errorf("images %+v, %v", got, err)
	}
	wantOperations := []Operation{
		{ID: "1", Op: "create volume", Domain: "local.1", Image: "v1", Name: "pvc-1", Step: "copying", Done: 1, Total: 2, Started: made, Path: "default", Reason: "no reflink"},
		{ID: "2", Started: made.Add(time.Second)},
	}
	if got, err := c.Operations(ctx); err != nil || !reflect.DeepEqual(got, wantOperations) {
		t.Errorf("operations %+v, %v", got, err)
	}
}

func family() []image.Image {
	at := func(i int) time.Time { return time.Unix(int64(i), 0).UTC() }
	list := []image.Image{
		{Handle: handle("aa1"), Name: "pvc-1", Mutable: true, Slab: "s-aa1", Source: "local.1/gone", Created: at(1)},
		{Handle: handle("ab2"), Name: "snap-1", Slab: "s-ab2", Source: "local.1/aa1", Created: at(2)},
		{Handle: handle("b4"), Name: "pvc-3", Mutable: true, Slab: "s-b4", Source: "local.1/ab2", Created: at(4)},
		{Handle: handle("b3"), Name: "pvc-2", Mutable: true, Slab: "s-b3", Source: "local.1/ab2", Created: at(3)},
		{Handle: handle("c5"), Name: "snap-2", Source: "local.1/b3", Created: at(5)},
		{Handle: handle("d6"), Name: "pvc-1", Mutable: true, State: image.Deleting, Created: at(0)},
		{Handle: handle("e7"), Name: "twin", Mutable: true}, {Handle: handle("e8"), Name: "twin"},
		{Handle: handle("f1"), Source: "local.1/f2"}, {Handle: handle("f2"), Source: "local.1/f1"},
	}
	for i, img := range list {
		if img.Slab != "" {
			list[i].Chain = []image.SlabRef{{ID: img.Slab}}
		}
	}
	return list
}

func TestChainFindsTheImageAndItsFamily(t *testing.T) {
	c, _ := start(t, &fake{images: family()})
	for said, want := range map[string]struct{ image, lineage string }{
		"local.1/ab2": {"local.1/ab2", "aa1 ab2 b3 c5 b4"},
		"ab":          {"local.1/ab2", "aa1 ab2 b3 c5 b4"},
		"local.1/b3":  {"local.1/b3", "aa1 ab2 b3 c5"},
		"pvc-1":       {"local.1/aa1", "aa1 ab2 b3 c5 b4"}, // its first life is being deleted
		"snap-2":      {"local.1/c5", "aa1 ab2 b3 c5"},
		"f1":          {"local.1/f1", "f2 f1"}, // a forged circle ends
	} {
		got, err := c.Chain(t.Context(), said)
		if err != nil {
			t.Errorf("%s: %v", said, err)
			continue
		}
		var line []string
		for _, i := range got.Lineage {
			line = append(line, strings.TrimPrefix(i.Handle, "local.1/"))
		}
		if got.Image.Handle != want.image || strings.Join(line, " ") != want.lineage {
			t.Errorf("%s: %s in %v, want %v", said, got.Image.Handle, line, want)
		}
		if slab := got.Image.Slab; slab != "" && !slices.Equal(got.Slabs, []string{slab}) {
			t.Errorf("%s: slabs %v", said, got.Slabs)
		}
	}
	for said, want := range map[string]struct {
		kind fault.Kind
		text string
	}{
		"":      {fault.Invalid, "no image is named: its handle, the beginning of it, or its name"},
		"zzz":   {fault.NotFound, `image "zzz": no image of an open domain has this handle, beginning of a handle, or name`},
		"a":     {fault.Invalid, `image "a" may be any of 2: say which: local.1/aa1, local.1/ab2`},
		"twin":  {fault.Invalid, `image "twin" may be any of 2: say which: local.1/e7, local.1/e8`},
		"local": {fault.Invalid, `image "local" may be any of 10: say which: local.1/aa1, local.1/ab2, local.1/b3, local.1/b4, local.1/c5, ...`},
	} {
		_, err := c.Chain(t.Context(), said)
		if !errors.Is(err, want.kind) || err.Error() != want.text {
			t.Errorf("%q: %v (%v)", said, err, fault.KindOf(err))
		}
	}
}

func checked() *fake {
	return &fake{
		domains: []image.DomainInfo{
			{ID: "local.1", Open: true, Config: image.DomainConfig{Name: "local", Aliases: []string{"old"}}},
			{ID: "other", Open: true, Config: image.DomainConfig{Name: "other"}},
			{Config: image.DomainConfig{Name: "nas"}, Problem: "the server is away"},
		},
		findings: map[string][]image.Finding{
			"local.1": {
				{ID: "f2", Kind: image.FindingMend, Domain: "local.1", Object: "v2", Message: "cut off", Fix: "grow it"},
				{ID: "f1", Kind: image.FindingClean, Domain: "local.1", Object: "s1", Message: "an orphan", Fix: "delete it", Bytes: 7},
				{ID: "f3", Kind: image.FindingReport, Domain: "local.1", Object: "v3", Message: "unreadable"},
			},
			"other": {{ID: "f4", Kind: image.FindingClean, Domain: "other", Object: "s9", Fix: "delete it"}},
		},
	}
}

func ids(r FixResult) string {
	var out []string
	for _, f := range r.Results {
		out = append(out, f.ID+":"+f.Done+":"+f.Error)
	}
	return strings.Join(out, " ")
}

func TestCheckAndFix(t *testing.T) {
	f := checked()
	c, _ := start(t, f)
	ctx := t.Context()
	got, err := c.Check(ctx, "")
	if err != nil || len(got.Findings) != 4 || !reflect.DeepEqual(got.Unchecked, map[string]string{"nas": "it is not open: the server is away"}) {
		t.Errorf("check of all: %+v, %v", got, err)
	}
	for _, name := range []string{"local", "local.1", "old"} {
		got, err := c.Check(ctx, name)
		want := Finding{ID: "f1", Kind: "clean", Domain: "local.1", Object: "s1", Message: "an orphan", Fix: "delete it", Bytes: 7}
		if err != nil || len(got.Findings) != 3 || got.Findings[0] != want {
			t.Errorf("check of %s: %+v, %v", name, got, err)
		}
	}
	if _, err := c.Check(ctx, "none"); !errors.Is(err, fault.NotFound) || err.Error() != `domain "none" is not configured: there are local, other, nas` {
		t.Errorf("check of an unknown domain: %v", err)
	}

	for name, x := range map[string]struct {
		req   FixRequest
		want  string
		fixed []string
	}{
		"dry run":           {FixRequest{Domain: "local"}, "f1:: f2:: f3::only a person can help here", nil},
		"one":               {FixRequest{IDs: []string{"f2"}, Apply: true}, "f2:did grow it:", []string{"f2"}},
		"a kind":            {FixRequest{Kinds: []string{"clean"}, Apply: true}, "f1:did delete it: f4:did delete it:", []string{"f1", "f4"}},
		"what only I can":   {FixRequest{Domain: "local", IDs: []string{"f3"}, Apply: true}, "f3::only a person can help here", nil},
		"what went away":    {FixRequest{IDs: []string{"f9"}, Apply: true}, "f9::no such finding stands (any more)", nil},
		"of another domain": {FixRequest{Domain: "other", IDs: []string{"f1"}, Apply: true}, "f1::no such finding stands (any more)", nil},
	} {
		f.fixed = nil
		r, err := c.Fix(ctx, x.req)
		if err != nil || ids(r) != x.want || !slices.Equal(f.fixed, x.fixed) || r.Applied != x.req.Apply {
			t.Errorf("%s: %q, fixed %v, %v", name, ids(r), f.fixed, err)
		}
	}
	f.fixErr = fault.New(fault.Conflict, "it has changed")
	if r, err := c.Fix(ctx, FixRequest{IDs: []string{"f1"}, Apply: true}); err != nil || ids(r) != "f1::it has changed" {
		t.Errorf("a fix that fails: %q, %v", ids(r), err)
	}
	f.checkErr = fault.New(fault.Unavailable, "gone")
	if r, err := c.Check(ctx, "local"); err != nil || r.Unchecked["local.1"] != "gone" {
		t.Errorf("a check that fails: %+v, %v", r, err)
	}
}

func TestARequestWithMoreThanIsKnownIsRefused(t *testing.T) {
	f := checked()
	c, _ := start(t, f)
	_, err := ask[FixResult](t.Context(), c, http.MethodPost, "/v1/fix", nil, map[string]any{"apply": true, "olderThan": "1h"})
	if !errors.Is(err, fault.Invalid) || f.fixed != nil {
		t.Errorf("%v, fixed %v", err, f.fixed)
	}
	_, err = ask[FixResult](t.Context(), c, http.MethodGet, "/v9/x", nil, nil)
	if !errors.Is(err, fault.Unsupported) || err.Error() != "quarry v1 does not know GET /v9/x" {
		t.Errorf("%v", err)
	}
}

func TestEveryKindOfErrorSurvivesTheWay(t *testing.T) {
	for k := fault.Internal; k <= fault.Deadline; k++ {
		if got := kindNamed(k.String()); got != k {
			t.Errorf("%v became %v", k, got)
		}
	}
	if got := kindNamed("from the future"); got != fault.Internal {
		t.Errorf("an unknown kind became %v", got)
	}
}

func TestTheSocketIsItsOwnersOnly(t *testing.T) {
	_, e := start(t, &fake{})
	info, err := os.Stat(e.Path())
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := e.Listen(); !errors.Is(err, fault.InUse) {
		t.Errorf("a second server on one socket: %v", err)
	}
}

func TestASocketLeftBehindIsReplacedAndNothingElse(t *testing.T) {
	e, err := ParseEndpoint(filepath.Join(t.TempDir(), "a.sock"))
	if err != nil {
		t.Fatal(err)
	}
	left, err := net.Listen("unix", e.Path())
	if err != nil {
		t.Fatal(err)
	}
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	left.Close()
	l, err := e.Listen()
	if err != nil {
		t.Fatalf("over a dead socket: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(e.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays after closing: %v", err)
	}
	if err := os.WriteFile(e.Path(), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Listen(); !errors.Is(err, fault.Invalid) {
		t.Errorf("over a file: %v", err)
	}
	if data, err := os.ReadFile(e.Path()); err != nil || string(data) != "precious" {
		t.Errorf("the file is %q, %v", data, err)
	}
}

func TestEndpoints(t *testing.T) {
	long := "/" + strings.Repeat("x", 107)
	for s, want := range map[string]string{
		"unix:///run/a.sock": "unix:///run/a.sock", "/run/a.sock": "unix:///run/a.sock", "unix:///run//./a.sock": "unix:///run/a.sock",
	} {
		if e, err := ParseEndpoint(s); err != nil || e.String() != want {
			t.Errorf("%q: %v, %v", s, e, err)
		}
	}
	const form = `: must be unix:// and the absolute path of a socket, such as unix:///run/quarry/admin.sock`
	for s, want := range map[string]string{
		"":                     `endpoint ""` + form,
		"unix://run/a.sock":    `endpoint "unix://run/a.sock"` + form,
		"run/a.sock":           `endpoint "run/a.sock"` + form,
		"unix:///run/":         `endpoint "unix:///run/"` + form,
		"tcp://127.0.0.1:9000": `endpoint "tcp://127.0.0.1:9000": scheme "tcp" is not allowed: unix:///path`,
		long:                   `endpoint "` + long + `": the path has 108 bytes: a socket's may have 107`,
	} {
		if _, err := ParseEndpoint(s); !errors.Is(err, fault.Invalid) || err.Error() != want {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestNobodyThereIsUnavailable(t *testing.T) {
	e, err := ParseEndpoint(filepath.Join(t.TempDir(), "none.sock"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = NewClient(e).Domains(t.Context())
	want := "quarry does not answer on " + e.String() + ": dial unix " + e.Path() + ": connect: no such file or directory"
	if !errors.Is(err, fault.Unavailable) || err.Error() != want {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewClient(e).Domains(ctx); !errors.Is(err, fault.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

func TestServeLetsAnAnswerFinishAndNoLonger(t *testing.T) {
	for _, patient := range []bool{true, false} {
		f := &fake{block: make(chan struct{})}
		e, err := ParseEndpoint(filepath.Join(t.TempDir(), "a.sock"))
		if err != nil {
			t.Fatal(err)
		}
		l, err := e.Listen()
		if err != nil {
			t.Fatal(err)
		}
		arrived := make(chan struct{})
		inner := Handler(f, Version{}, nil)
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { close(arrived); inner.ServeHTTP(w, r) })
		grace := time.Minute
		if !patient {
			grace = 10 * time.Millisecond
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended, answered := make(chan error, 1), make(chan error, 1)
		go func() { ended <- Serve(ctx, l, h, grace) }()
		go func() { _, err := NewClient(e).Domains(context.Background()); answered <- err }()
		<-arrived
		cancel()
		if patient {
			close(f.block)
			if err := <-answered; err != nil {
				t.Errorf("the answer under way: %v", err)
			}
			if err := <-ended; err != nil {
				t.Errorf("Serve: %v", err)
			}
			continue
		}
		if err := <-ended; !errors.Is(err, fault.Deadline) {
			t.Errorf("Serve with a request that hangs: %v", err)
		}
		close(f.block)
		if err := <-answered; !errors.Is(err, fault.Unavailable) {
			t.Errorf("the request that hung: %v", err)
		}
	}
}

// TestASocketThatADeadServersChildHolds: a process that was killed while it started a
// program leaves its socket open in that, for a moment.
func TestASocketThatADeadServersChildHolds(t *testing.T) {
	const variable = "QUARRY_TEST_SERVE_AND_DIE"
	if path := os.Getenv(variable); path != "" {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		heir := exec.Command("sleep", "0.5")
		heir.ExtraFiles = []*os.File{f}
		if err := heir.Start(); err != nil {
			t.Fatal(err)
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	path := filepath.Join(t.TempDir(), "a.sock")
	server := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	server.Env = append(os.Environ(), variable+"="+path)
	if err := server.Run(); err == nil || server.ProcessState.Exited() {
		t.Fatalf("the server was not killed: %v", err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("its child does not hold the socket: %v", err)
	}
	conn.Close()
	e, err := ParseEndpoint(path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Listen()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
