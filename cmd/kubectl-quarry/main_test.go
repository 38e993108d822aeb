package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// TestMain lets the engine check start this binary as its child.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "engine" && os.Args[2] == "run-suite" {
		main()
	}
	flag.Parse()
	os.Exit(m.Run())
}

type fake struct{ fixed []string }

func (*fake) Domains(context.Context) []image.DomainInfo {
	return []image.DomainInfo{{
		ID: "local.0000002a", Open: true, Epoch: 7, Owner: "machine-1", Promised: 3 << 29, Capacity: 80 << 30, Volumes: 2, Snapshots: 1,
		Config:       image.DomainConfig{Name: "local", Engine: "dir", Scope: "node", Node: "n1", Overcommit: 1, CapacityLimit: 100 << 30},
		Description:  engine.Description{Location: "/srv (ext4)"},
		Capabilities: []engine.Capability{engine.CapClone, engine.CapMeter}, Usage: &engine.Usage{Total: 100 << 30, Used: 20 << 30},
	}, {
		ID: "nas", Config: image.DomainConfig{Name: "nas", Engine: "dir", Scope: "shared"}, Problem: "the server is away",
	}}
}

func ago(d time.Duration) time.Time { return start().Add(-d) }
func start() time.Time              { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

func (*fake) All(context.Context) []image.Image {
	h := func(s string) image.Handle { return image.Handle{Domain: "local.0000002a", Image: s} }
	return []image.Image{{
		Handle: h("v1"), Name: "pvc-1", Layout: image.LayoutImage, Mutable: true, Size: 1 << 30, Slab: "v1", State: image.Optimized,
		How: "default: new", Created: ago(49 * time.Hour), Source: "local.0000002a/v0", Filesystem: "ext4",
		Attachments: []image.Attachment{{Node: "n1"}}, Described: image.Described{Namespace: "shop", Claim: "data", Class: "fast"},
	}, {
		Handle: h("s2"), Name: "snap-1", Layout: image.LayoutImage, Size: 1 << 30, Slab: "s2", State: image.Optimized, Inexact: true,
		How: "native: reflink", Created: ago(5 * time.Minute), Source: "local.0000002a/v1", Ready: true,
	}, {
		Handle: h("v3"), Name: "evil\x1b[2J\nname", Layout: image.LayoutDirectory, Mutable: true, Size: 3 << 29, State: image.Degraded,
		Created: ago(59 * time.Second), Source: "local.0000002a/s2", Reason: "being copied",
	}}
}

func (*fake) Topology(domain string) (string, error) {
	if domain == "nas" {
		return "", nil
	}
	return "n1", nil
}

func (*fake) Import(_ context.Context, r image.ImportRequest) (image.Image, error) {
	if r.Source == "gone.img" {
		return image.Image{}, fault.New(fault.NotFound, "there is no /srv/import/gone.img")
	}
	h := image.Handle{Domain: r.Domain, Image: "v9"}
	if r.DryRun {
		h.Image = ""
	}
	return image.Image{Handle: h, Name: r.Name, Layout: image.LayoutImage, Mutable: true, Size: 3 << 29, Filesystem: map[bool]string{false: "ext4"}[r.Block]}, nil
}

func (f *fake) Usage(ctx context.Context) []image.Use {
	var out []image.Use
	for _, i := range f.All(ctx) {
		i.Promised = i.Size
		out = append(out, image.Use{Image: i, Allocated: i.Size / 2, Measured: i.Layout == image.LayoutImage})
	}
	return out
}

func (*fake) Operations() []image.Operation {
	return []image.Operation{{
		ID: "op1", Op: "create volume", Domain: "local.0000002a", Image: "v3", Name: "pvc-3", Done: 43, Total: 100,
		Step: "copying 43% of 20 GiB from nas to local", Started: ago(90 * time.Second), Path: "default", Reason: "another domain",
	}}
}

func (*fake) Check(_ context.Context, domain string) ([]image.Finding, error) {
	return []image.Finding{
		{ID: "f1", Kind: image.FindingClean, Domain: domain, Object: "s9", Message: "an orphan", Fix: "delete the slab", Bytes: 1 << 20},
		{ID: "f2", Kind: image.FindingReport, Domain: domain, Object: "v4", Message: "its record cannot be read"},
	}, nil
}

func (f *fake) Fix(_ context.Context, x image.Finding) (string, error) {
	f.fixed = append(f.fixed, x.ID)
	return "deleted slab " + x.Object, nil
}

// serve starts the fake and returns its endpoint.
func serve(t *testing.T, m admin.Manager) string {
	t.Helper()
	e, err := admin.ParseEndpoint(filepath.Join(t.TempDir(), "a.sock"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- admin.Serve(ctx, l, admin.Handler(m, admin.Version{Version: "v1", Driver: "csi.quarry.dev"}, nil), time.Minute)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return e.String()
}

// do runs the program as of start().
func do(args ...string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	root := newRoot(&cli{out: &out, err: &errOut, now: start})
	root.SetArgs(args)
	err = root.ExecuteContext(context.Background())
	return out.String(), errOut.String(), err
}

func TestTablesAreAsKubectlWouldDrawThem(t *testing.T) {
	endpoint := serve(t, &fake{})
	for args, want := range map[string]struct{ out, err string }{
		"domains": {`
NAME    ID               ENGINE   STATUS        VOLUMES   SNAPSHOTS   PROMISED   AVAILABLE   USED         CAPABILITIES
local   local.0000002a   dir      Open          2         1           1.5Gi      80Gi        20Gi/100Gi   clone,meter
nas     nas              dir      Unavailable   <none>    <none>      <none>     <none>      <none>       <none>
`, "Domain \"nas\" is unavailable: the server is away\n"},
		"images": {`
HANDLE              NAME            KIND       LAYOUT      SIZE    STATE               HOW               SOURCE              CLAIM       AGE
local.0000002a/s2   snap-1          snapshot   image       1Gi     optimized,inexact   native: reflink   local.0000002a/v1   <none>      5m
local.0000002a/v1   pvc-1           volume     image       1Gi     optimized           default: new      local.0000002a/v0   shop/data   2d1h
local.0000002a/v3   evil [2J name   volume     directory   1.5Gi   degraded            <none>            local.0000002a/s2   <none>      59s
`, ""},
		"images --kind snapshot -o wide": {`
HANDLE              NAME     KIND       LAYOUT   SIZE   STATE               HOW               SOURCE              CLAIM    AGE   FILESYSTEM   NODES    CLASS    SLAB   REASON
local.0000002a/s2   snap-1   snapshot   image    1Gi    optimized,inexact   native: reflink   local.0000002a/v1   <none>   5m    <none>       <none>   <none>   s2     <none>
`, ""},
		"images --domain nas": {"\n", "No images found.\n"},
		"operations": {`
OPERATION       DOMAIN           IMAGE   NAME    PROGRESS   PATH      STEP                                      AGE
create volume   local.0000002a   v3      pvc-3   43%        default   copying 43% of 20 GiB from nas to local   90s
`, ""},
		"usage": {`
NAMESPACE   VOLUMES   SNAPSHOTS   SIZE    PROMISED   ALLOCATED
<none>      1         1           2.5Gi   2.5Gi      1.2Gi+
shop        1         0           1Gi     1Gi        512Mi
`, ""},
		"usage -o wide": {`
NAMESPACE   DOMAIN           VOLUMES   SNAPSHOTS   SIZE    PROMISED   ALLOCATED
<none>      local.0000002a   1         1           2.5Gi   2.5Gi      1.2Gi+
shop        local.0000002a   1         0           1Gi     1Gi        512Mi
`, ""},
		"chain snap-1": {`
LINEAGE                       NAME            KIND       SIZE    STATE               HOW               AGE
local.0000002a/v0 (deleted)
└─ local.0000002a/v1          pvc-1           volume     1Gi     optimized           default: new      2d1h
   └─ local.0000002a/s2 *     snap-1          snapshot   1Gi     optimized,inexact   native: reflink   5m
      └─ local.0000002a/v3    evil [2J name   volume     1.5Gi   degraded            <none>            59s

SLABS
s2   (head and base)
`, ""},
		"fix local": {`
finding f1 (clean local.0000002a/s9) would be fixed: delete the slab (an orphan)
finding f2 (report local.0000002a/v4) not fixed: only a person can help here (its record cannot be read)
`, "Dry run: nothing was changed. Add --yes to do it.\n"},
	} {
		t.Run(args, func(t *testing.T) {
			out, errOut, err := do(append(strings.Fields(args), "--admin-endpoint", endpoint)...)
			if err != nil {
				t.Fatal(err)
			}
			if want := strings.TrimPrefix(want.out, "\n"); !sameLines(out, want) {
				t.Errorf("stdout:\n%s\nwant:\n%s", out, want)
			}
			if errOut != want.err {
				t.Errorf("stderr %q, want %q", errOut, want.err)
			}
		})
	}
}

// sameLines compares without the blanks at the ends of lines.
func sameLines(a, b string) bool {
	trim := func(s string) string {
		lines := strings.Split(s, "\n")
		for n := range lines {
			lines[n] = strings.TrimRight(lines[n], " ")
		}
		return strings.Join(lines, "\n")
	}
	return trim(a) == trim(b)
}

func TestJSONAndYAMLHoldTheSame(t *testing.T) {
	endpoint := serve(t, &fake{})
	out, _, err := do("images", "-o", "json", "--admin-endpoint", endpoint)
	if err != nil {
		t.Fatal(err)
	}
	var images []admin.Image
	if err := json.Unmarshal([]byte(out), &images); err != nil || len(images) != 3 || images[2].Name != "evil\x1b[2J\nname" {
		t.Errorf("%v: %s", err, out)
	}
	out, _, err = do("operations", "-o", "yaml", "--admin-endpoint", endpoint)
	want := `- domain: local.0000002a
  done: 43
  id: op1
  image: v3
  name: pvc-3
  op: create volume
  path: default
  reason: another domain
  started: "2026-01-02T03:02:35Z"
  step: copying 43% of 20 GiB from nas to local
  total: 100
`
	if err != nil || out != want {
		t.Errorf("%v:\n%s\nwant\n%s", err, out, want)
	}
}

func TestExitStatus(t *testing.T) {
	f := &fake{}
	endpoint := serve(t, f)
	for args, want := range map[string]struct {
		code int
		err  string // the last line on stderr
	}{
		"domains":                     {0, `Domain "nas" is unavailable: the server is away`},
		"check":                       {2, "1 of 2 findings need a person: kubectl quarry fix shows what can be done."},
		"fix local --kind clean":      {0, "Dry run: nothing was changed. Add --yes to do it."},
		"fix local --yes --id f1":     {0, ""},
		"fix local --yes":             {2, "1 of 2 findings were not fixed."},
		"fix --yes --id f1":           {2, "Not everything could be checked."},
		"fix --kind cleen":            {1, `error: --kind "cleen" is not allowed: clean, optimize, merge, mend or report`},
		"check none":                  {1, `error: domain "none" is not configured: there are local, nas`},
		"images -o xml":               {1, `error: --output "xml" is not allowed: table, wide, json or yaml`},
		"images --kind both":          {1, `error: --kind "both" is not allowed: volume or snapshot`},
		"chain":                       {1, `error: accepts 1 arg(s), received 0`},
		"imagse":                      {1, ""},
		"engine check zfs":            {1, `error: engine "zfs" is unknown: known are "dir", "gluster", "lvm", "nfs3", "nfs4", "sharedfs", "smb"`},
		"engine check dir --param p":  {1, `error: --param "p": must be NAME=VALUE, once for each name`},
		"engine check dir --param p=": {1, `error: parameter "p" is unknown to engine "dir": only "path" is known`},
		"engine check dir":            {1, `error: --param path="": the absolute path of an existing directory is needed`},
		"engine check":                {1, `error: what is to be checked? An engine (dir, sharedfs), or --socket`},
		"engine check lvm":            {1, `error: engine "lvm" does not keep a domain in a directory: dir, sharedfs can be checked here, and any behind a --socket`},
		"engine check dir --param path=/tmp --secrets-file x": {1, `error: --secrets-file "x": it goes with --socket only`},
		"engine check --socket /none --param a=b":             {1, `error: the suite needs many new, empty domains, and no parameter makes one: give --param path=/a/directory (--directory says which parameter is one), or write {} into a parameter's value`},
		"engine check --socket /none --secrets-file /none":    {1, `error: --secrets-file: open /none: no such file or directory`},
		"engine check --socket /none --param path=tmp":        {1, `error: --param path="tmp": the absolute path of an existing directory is needed`},
		"engine check --socket /none --param a={}":            {1, "error: socket /none: nothing is there: start the engine's process, or correct the path"},
	} {
		t.Run(args, func(t *testing.T) {
			var out, errOut bytes.Buffer
			code := run(context.Background(), append(strings.Fields(args), "--admin-endpoint", endpoint), &out, &errOut)
			lines := strings.Split(strings.TrimSpace(errOut.String()), "\n")
			if code != want.code || want.err != "" && lines[len(lines)-1] != want.err {
				t.Errorf("status %d, want %d; stderr %q", code, want.code, errOut.String())
			}
		})
	}
	for _, id := range f.fixed {
		if id != "f1" {
			t.Errorf("%s was fixed, which only a person can", id)
		}
	}
}

func TestNobodyThereSaysWhatToDo(t *testing.T) {
	endpoint := "unix://" + filepath.Join(t.TempDir(), "none.sock")
	_, _, err := do("domains", "--admin-endpoint", endpoint)
	if err == nil || !strings.HasPrefix(err.Error(), "quarry does not answer on "+endpoint) ||
		!strings.HasSuffix(err.Error(), ": run this as root where quarry runs, name its socket with --admin-endpoint or QUARRY_ADMIN_ENDPOINT, or a cluster with --context") {
		t.Errorf("%v", err)
	}
	t.Setenv(endpointVariable, endpoint)
	if _, _, err := do("domains"); err == nil || !strings.Contains(err.Error(), endpoint) {
		t.Errorf("with the variable: %v", err)
	}
}

func TestSizesAndAges(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 1023: "1023", 1024: "1Ki", 1 << 30: "1Gi", 3 << 29: "1.5Gi", 1<<30 - 1: "1Gi", 1<<63 - 1: "8Ei", -2048: "-2Ki",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Minute: "<invalid>", -time.Millisecond: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m",
		150 * time.Second: "2m30s", 11 * time.Minute: "11m", 179 * time.Minute: "179m", 3 * time.Hour: "3h",
		3*time.Hour + time.Minute: "3h1m", 47 * time.Hour: "47h", 48 * time.Hour: "2d", 49 * time.Hour: "2d1h",
		30 * 24 * time.Hour: "30d", 800 * 24 * time.Hour: "2y70d", 9 * 365 * 24 * time.Hour: "9y",
	} {
		if got := age(start(), ago(d)); got != want {
			t.Errorf("age(%s) = %s, want %s", d, got, want)
		}
	}
	if got := age(start(), time.Time{}); got != "<unknown>" {
		t.Errorf("no time: %s", got)
	}
}

func TestTheSuitesReportIsReadAsGoPrintsIt(t *testing.T) {
	// go1.26.8, -test.v, shortened.
	const out = `=== RUN   rules
=== RUN   rules/native
=== RUN   rules/native/Description
=== RUN   rules/native/TagIsExclusive
=== RUN   rules/native/TagIsExclusive/block
    tags.go:64: two won
=== RUN   rules/native/Quota
    quota.go:9: not here
--- FAIL: rules (0.10s)
    --- FAIL: rules/native (0.10s)
        --- PASS: rules/native/Description (0.00s)
        --- FAIL: rules/native/TagIsExclusive (0.10s)
            --- FAIL: rules/native/TagIsExclusive/block (0.10s)
        --- SKIP: rules/native/Quota (0.00s)
    --- PASS: rules/protocol (0.10s)
        --- PASS: rules/protocol/HealthIsAnswered (0.00s)
FAIL
`
	r := report{Engine: "dir", Location: "/x", Rules: parseReport(out)}
	var b bytes.Buffer
	if err := r.write(&b); err != nil {
		t.Fatal(err)
	}
	want := `Engine dir on /x
Native capabilities: <none>

RESULT   MODE       RULE                 TOOK
PASS     native     description          0.00s
FAIL     native     tag is exclusive     0.10s
SKIP     native     quota                0.00s
PASS     protocol   health is answered   0.00s

FAIL: tag is exclusive (native)
  tags.go:64: two won

SKIP: quota (native)
  quota.go:9: not here

2 of 4 rules kept.
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// One run proves both: the rules are kept, and what is expected and is not
// there is noticed.
func TestEngineCheckOfARealDirectory(t *testing.T) {
	dir := t.TempDir()
	var out, errOut bytes.Buffer
	code := run(t.Context(), []string{"engine", "check", "dir", "--param", "path=" + dir, "--expect", "fence", "-o", "json"}, &out, &errOut)
	var r report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("status %d, %v, stderr %s", code, err, errOut.String())
	}
	if code != exitNeedsPerson || len(r.Rules) < 40 || r.Engine != "dir" || !strings.HasPrefix(r.Location, dir) {
		t.Errorf("status %d, %+v, stderr %s", code, r, errOut.String())
	}
	for _, x := range r.Rules {
		unexpected := x.Mode == "native" && x.Rule == "CapabilitiesAsGiven"
		if (x.Result == "FAIL") != unexpected {
			t.Errorf("%+v", x)
		}
		if unexpected && !strings.Contains(strings.Join(x.Said, " "), "expected were [fence]") {
			t.Errorf("the report does not say why: %+v", x)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
