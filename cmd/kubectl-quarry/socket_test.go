package main

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	engineserve "github.com/quarry-csi/quarry/pkg/engine/serve"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// behind serves an engine as another process would, and returns the socket.
func behind(t *testing.T, kind string, open func(ctx context.Context, params, secrets map[string]string) (engine.Engine, error)) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "q-")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- engineserve.New(engineserve.Config{Engine: kind, Release: "1", Open: open}).Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return l.Addr().String()
}

// check runs an engine check and reads its report.
func check(t *testing.T, args ...string) (report, int) {
	t.Helper()
	var out, errOut bytes.Buffer
	code := run(t.Context(), append([]string{"engine", "check", "-o", "json"}, args...), &out, &errOut)
	var r report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("status %d, %v, stderr %s", code, err, errOut.String())
	}
	return r, code
}

// broken are the rules of a report that are not kept.
func (r report) broken() string {
	var out []string
	for _, x := range r.Rules {
		if x.Result != "PASS" {
			out = append(out, x.Mode+"/"+x.Rule+": "+strings.Join(x.Said, "; "))
		}
	}
	return strings.Join(out, "\n")
}

// TestEngineCheckOverASocket: an engine that takes any pool, which it makes, and wants a secret.
func TestEngineCheckOverASocket(t *testing.T) {
	reg, pools := engines.Registry(host.Exec{}), t.TempDir()
	var mu sync.Mutex
	made := map[string]bool{}
	socket := behind(t, "pools", func(ctx context.Context, params, secrets map[string]string) (engine.Engine, error) {
		for name := range params {
			if name != "pool" {
				return nil, fault.New(fault.Invalid, "parameter %q is unknown: only pool is known", name)
			}
		}
		if !maps.Equal(secrets, map[string]string{"key": "hunter2"}) {
			return nil, fault.New(fault.Permission, "the secret is wrong")
		}
		dir := filepath.Join(pools, params["pool"])
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		mu.Lock()
		made[dir] = true
		mu.Unlock()
		return reg.Open(ctx, domain.Entry{Engine: "dir", Params: map[string]string{"path": dir}})
	})
	keys := filepath.Join(t.TempDir(), "keys.yaml")
	if err := os.WriteFile(keys, []byte("key: hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, code := check(t, "pools", "--socket", socket, "--param", "pool=try-{}", "--secrets-file", keys)
	modes := map[string]int{}
	for _, x := range r.Rules {
		modes[x.Mode]++
	}
	if code != 0 || r.broken() != "" || r.Engine != "pools 1" || modes["native"] < 30 || modes["minimal"] != modes["native"] || modes["protocol"] < 8 || len(modes) != 3 {
		t.Errorf("status %d, engine %q, rules %v, broken:\n%s", code, r.Engine, modes, r.broken())
	}
	if len(made) < 60 {
		t.Errorf("%d domains were made, want one for each test", len(made))
	}
	for dir := range made {
		for _, kind := range []string{"slabs", "tags"} {
			if err := filepath.WalkDir(filepath.Join(dir, kind), func(path string, d os.DirEntry, err error) error {
				if err == nil && !d.IsDir() {
					t.Errorf("%s is left behind", path)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		}
	}
}

// careless is an engine that breaks some rules.
type careless struct{ engine.Engine }

// CreateTag overwrites.
func (c careless) CreateTag(ctx context.Context, t engine.Tag) error {
	err := c.Engine.CreateTag(ctx, t)
	if fault.KindOf(err) == fault.Exists {
		if err := c.DeleteTag(ctx, t.Name); err != nil {
			return err
		}
		return c.CreateTag(ctx, t)
	}
	return err
}

// DetachSlab does not look at what it is asked.
func (c careless) DetachSlab(context.Context, string) error { return nil }

func TestEngineCheckOverASocketFindsWhatIsBroken(t *testing.T) {
	reg, dir := engines.Registry(host.Exec{}), t.TempDir()
	socket := behind(t, "careless", func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
		e, err := reg.Open(ctx, domain.Entry{Engine: "dir", Params: map[string]string{"path": params["folder"]}})
		return careless{e}, err
	})
	r, code := check(t, "--socket", socket, "--directory", "folder", "--param", "folder="+dir)
	if code != exitNeedsPerson {
		t.Errorf("status %d", code)
	}
	for _, want := range []string{
		"native/TagIsExclusive: ", "minimal/TagIsExclusive: ", "native/TagAfterALostReply: ", "protocol/OpeningIsRefusedWithAReason: ",
		`DetachSlab of "../a": <nil> (`,
	} {
		if !strings.Contains(r.broken(), want) {
			t.Errorf("the report does not have %q:\n%s", want, r.broken())
		}
	}
	if strings.Contains(r.broken(), "native/SlabSizes") {
		t.Errorf("what is kept is said to be broken:\n%s", r.broken())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestEngineCheckRefusesWhatIsNoEngine(t *testing.T) {
	socket := behind(t, "other", func(context.Context, map[string]string, map[string]string) (engine.Engine, error) {
		return nil, fault.New(fault.Invalid, "never")
	})
	for args, want := range map[string]string{
		"--socket " + socket:   "error: socket " + socket + ": never",
		"--socket /etc/passwd": "error: socket /etc/passwd is not a socket: the path",
	} {
		var out, errOut bytes.Buffer
		code := run(t.Context(), append([]string{"engine", "check", "--param", "pool={}"}, strings.Fields(args)...), &out, &errOut)
		if code != 1 || !strings.HasPrefix(errOut.String(), want) || out.Len() > 0 {
			t.Errorf("%s: status %d, stderr %s", args, code, errOut.String())
		}
	}
}

// TestEngineCheckEmptiesNobodysDomain: an engine that does not heed the new names opens one that is in use.
func TestEngineCheckEmptiesNobodysDomain(t *testing.T) {
	reg, dir := engines.Registry(host.Exec{}), t.TempDir()
	open := func(ctx context.Context, _, _ map[string]string) (engine.Engine, error) {
		return reg.Open(ctx, domain.Entry{Name: "d", Engine: "dir", Params: map[string]string{"path": dir}})
	}
	e, err := open(t.Context(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: "precious", Kind: engine.Block, Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	code := run(t.Context(), []string{"engine", "check", "--socket", behind(t, "forgetful", open), "--param", "pool=try-{}"}, &out, &errOut)
	if code != 1 || !strings.Contains(errOut.String(), "1 slabs and 0 tags: nothing is tried there") {
		t.Errorf("status %d: %s%s", code, out.String(), errOut.String())
	}
	if slabs, err := e.ListSlabs(t.Context()); err != nil || len(slabs) != 1 {
		t.Errorf("somebody's slabs: %v %v", slabs, err)
	}
}
