package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/test/lab"
)

// asQuarry makes the test binary be the program.
const asQuarry = "QUARRY_TEST_AS_PROGRAM"

// patience is how long a program may take for one step: far beyond what it takes.
var patience = func() time.Duration {
	if lab.Inside() { // whose processor may be emulated
		return 6 * time.Minute
	}
	return time.Minute
}()

func TestMain(m *testing.M) {
	if os.Getenv(asQuarry) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), asQuarry+"=1")
	return cmd
}

// place is a folder with a domains file, and sockets that do not exist yet.
type place struct{ dir, storage string }

func newPlace(t *testing.T, domains string) place {
	t.Helper()
	p := place{dir: t.TempDir()}
	p.storage = filepath.Join(p.dir, "storage")
	if err := os.Mkdir(p.storage, 0o755); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(domains, "{STORAGE}", p.storage)
	if err := os.WriteFile(filepath.Join(p.dir, "domains.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p place) args(more ...string) []string {
	return append([]string{
		"standalone", "--domains", p.dir + "/domains.yaml", "--endpoint", "unix://" + p.dir + "/csi.sock",
		"--admin-endpoint", "unix://" + p.dir + "/admin.sock", "--node-id", "n1", "--installation", "test",
	}, more...)
}

const oneDomain = "domains:\n- name: local\n  engine: dir\n  params: {path: \"{STORAGE}\"}\n"

func TestABadConfigurationIsOneLineAndStatusOne(t *testing.T) {
	const name = `is not allowed: 1 to 63 characters of [a-z0-9._-], beginning with a letter or digit`
	for what, c := range map[string]struct {
		domains string
		more    []string
		want    string // {DIR} stands for the place
	}{
		"unknown engine":      {"domains:\n- {name: a, engine: zfs}\n", nil, `{DIR}/domains.yaml:2: domain "a": domains[0].engine: engine "zfs" is unknown: known are "dir", "gluster", "lvm", "nfs3", "nfs4", "sharedfs", "smb"`},
		"no such directory":   {"domains:\n- {name: a, engine: dir, params: {path: /nonexistent/x}}\n", nil, `open in domain a: parameter "path": /nonexistent/x does not exist: create the directory or mount its file system`},
		"broken YAML":         {"domains: [\n", nil, `{DIR}/domains.yaml: yaml: line 1: did not find expected node content`},
		"no domains file":     {oneDomain, []string{"--domains", "/nonexistent"}, `domains file: stat /nonexistent: no such file or directory`},
		"bad endpoint":        {oneDomain, []string{"--endpoint", "tcp://:1"}, `--endpoint: endpoint "tcp://:1": scheme "tcp" is not allowed: unix:///path`},
		"one endpoint":        {oneDomain, []string{"--endpoint", "unix:///x.sock", "--admin-endpoint", "/x.sock"}, `--endpoint and --admin-endpoint are both unix:///x.sock: they must differ`},
		"bad node":            {oneDomain, []string{"--node-id", "Node 1"}, `--node-id "Node 1" ` + name},
		"bad installation":    {oneDomain, []string{"--installation", "a b"}, `--installation "a b" is not allowed: 1 to 128 ASCII characters without spaces`},
		"bad metrics":         {oneDomain, []string{"--metrics-endpoint", "9090"}, `--metrics-endpoint: "9090": must be ADDRESS:PORT, or :PORT for 127.0.0.1`},
		"relative kubelet":    {oneDomain, []string{"--kubelet-dir", "kubelet"}, `--kubelet-dir "kubelet" must be an absolute path`},
		"unknown flag":        {oneDomain, []string{"--bogus"}, `unknown flag: --bogus`},
		"an argument":         {oneDomain, []string{"bogus"}, `unknown command "bogus" for "quarry standalone"`},
		"socket is no socket": {oneDomain, []string{"--endpoint", "unix:///etc/passwd"}, `endpoint unix:///etc/passwd: there is a file that is not a socket: remove it or choose another path`},
	} {
		t.Run(what, func(t *testing.T) {
			p := newPlace(t, c.domains)
			var stdout, stderr bytes.Buffer
			cmd := program(t.Context(), p.args(c.more...)...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("ended with %v, want status 1", err)
			}
			want := "quarry: " + strings.ReplaceAll(c.want, "{DIR}", p.dir) + "\n"
			if stderr.String() != want || stdout.Len() > 0 {
				t.Errorf("\nstderr %s\nwant   %s\nstdout %q", stderr.String(), want, stdout.String())
			}
		})
	}
}

func TestTheVersionIsShown(t *testing.T) {
	if out, err := program(t.Context(), "version").Output(); err != nil || !strings.HasPrefix(string(out), "quarry dev (go") {
		t.Errorf("version: %s, %v", out, err)
	}
}

// running is a started program whose log is read.
type running struct {
	cmd   *exec.Cmd
	mu    sync.Mutex
	log   strings.Builder
	ended chan error
}

// begin starts the program and waits for the line that contains until.
func begin(t *testing.T, until string, args ...string) *running {
	t.Helper()
	return beginBy(t, func(*exec.Cmd) {}, until, args...)
}

// beginBy is begin with a change to how the program is started.
func beginBy(t *testing.T, change func(*exec.Cmd), until string, args ...string) *running {
	t.Helper()
	r := &running{cmd: program(context.Background(), args...), ended: make(chan error, 1)}
	change(r.cmd)
	pipe, err := r.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	seen := make(chan struct{})
	go func() {
		found := false
		for lines := bufio.NewScanner(pipe); lines.Scan(); {
			r.mu.Lock()
			fmt.Fprintln(&r.log, lines.Text())
			r.mu.Unlock()
			if !found && strings.Contains(lines.Text(), until) {
				found = true
				close(seen)
			}
		}
		r.ended <- r.cmd.Wait()
	}()
	t.Cleanup(func() { _ = r.cmd.Process.Kill() })
	select {
	case <-seen:
	case err := <-r.ended:
		t.Fatalf("ended with %v:\n%s", err, r.said())
	case <-time.After(patience):
		t.Fatalf("%q was not said:\n%s", until, r.said())
	}
	return r
}

func (r *running) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

func (r *running) stop(t *testing.T) {
	t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-r.ended:
		if err != nil {
			t.Errorf("ended with %v:\n%s", err, r.said())
		}
	case <-time.After(patience):
		t.Fatalf("it did not end:\n%s", r.said())
	}
}

// needRoot skips a test for those who are not root.
func needRoot(t *testing.T, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip(what + " needs root")
	}
}

func TestStandaloneLivesAndEndsWithStatusZero(t *testing.T) {
	needRoot(t, "quarry standalone")
	p := newPlace(t, oneDomain)
	r := begin(t, "Serving CSI", p.args("--metrics-endpoint", ":0")...)

	endpoint, err := admin.ParseEndpoint(p.dir + "/admin.sock")
	if err != nil {
		t.Fatal(err)
	}
	domains, err := admin.NewClient(endpoint).Domains(t.Context())
	if err != nil || len(domains) != 1 || !domains[0].Open || domains[0].Name != "local" || domains[0].Node != "n1" || domains[0].Owner != "test" {
		t.Errorf("domains %+v, %v", domains, err)
	}
	for _, socket := range []string{"csi.sock", "admin.sock"} {
		if info, err := os.Stat(filepath.Join(p.dir, socket)); err != nil || info.Mode().Perm()&0o007 != 0 {
			t.Errorf("%s: %v, %v", socket, info.Mode(), err)
		}
	}

	address := regexp.MustCompile(`127\.0\.0\.1:[0-9]+`).FindString(r.said())
	for path, want := range map[string]string{
		"/healthz": "ok\n", "/readyz": "ok\n", "/metrics": fmt.Sprintf("quarry_domain_open{domain=%q} 1\n", domains[0].ID),
	} {
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d, %v:\n%s", path, resp.StatusCode, err, body)
		}
	}

	// A second one that was started by mistake leaves the domain alone.
	for _, more := range [][]string{nil, {"--admin-endpoint", ""}} {
		var stderr bytes.Buffer
		second := program(t.Context(), p.args(more...)...)
		second.Stderr = &stderr
		if err := second.Run(); err == nil || strings.Count(stderr.String(), "\n") != 1 || !strings.Contains(stderr.String(), "another process serves it") {
			t.Errorf("second process: %v: %s", err, stderr.String())
		}
	}
	again, err := admin.NewClient(endpoint).Domains(t.Context())
	if err != nil || len(again) != 1 || !again[0].Open || again[0].Epoch != domains[0].Epoch {
		t.Errorf("after the second: %+v, %v", again, err)
	}

	r.stop(t)
	for _, socket := range []string{"csi.sock", "admin.sock"} {
		if _, err := os.Lstat(filepath.Join(p.dir, socket)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s stays: %v", socket, err)
		}
	}

	// Another installation is refused, this one continues.
	var stderr bytes.Buffer
	other := program(t.Context(), p.args("--installation", "other")...)
	other.Stderr = &stderr
	if err := other.Run(); err == nil || strings.Count(stderr.String(), "\n") != 1 || !strings.Contains(stderr.String(), `belongs to the Quarry installation "test", this one is "other"`) {
		t.Errorf("another installation: %v: %s", err, stderr.String())
	}
	begin(t, "Serving CSI", p.args()...).stop(t)
}

func TestMetricsAreLoopbackUnlessSaidOtherwise(t *testing.T) {
	for s, want := range map[string]string{"": "", ":9090": "127.0.0.1:9090", "0.0.0.0:1": "0.0.0.0:1", "[::1]:0": "[::1]:0"} {
		if got, err := loopbackByDefault(s); err != nil || got != want {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
	for _, s := range []string{"9090", ":http", ":70000", "a:b:c"} {
		if got, err := loopbackByDefault(s); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
}

func TestTheInstallationIsMadeOfTheMachineAndDoesNotShowIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "machine-id")
	const id = "3d1219c7c4c5404aaa1f6d2a48adfda4"
	if err := os.WriteFile(path, []byte(id+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, errA := machineInstallation(path)
	b, errB := machineInstallation(path)
	if errA != nil || errB != nil || a != b || !regexp.MustCompile(`^machine-[0-9a-f]{16}$`).MatchString(a) || strings.Contains(id, a[8:]) {
		t.Errorf("%q, %v, %q, %v", a, errA, b, errB)
	}
	if err := os.WriteFile(path, []byte("uninitialized\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, path + "x"} {
		if got, err := machineInstallation(p); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "--installation") {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// fakeManager notes what it is told.
type fakeManager struct {
	mu       sync.Mutex
	unopened []string
	added    chan string
}

func (m *fakeManager) AddDomain(_ context.Context, cfg image.DomainConfig, _ engine.Engine) (string, error) {
	m.added <- cfg.Name
	return cfg.Name, nil
}

func (m *fakeManager) Unopened(cfg image.DomainConfig, reason error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unopened = append(m.unopened, cfg.Name+": "+reason.Error())
}

func (*fakeManager) Reconfigure(image.DomainConfig) (string, error) {
	return "", fault.New(fault.Unavailable, "not open")
}

func (*fakeManager) CloseDomain(context.Context, image.DomainConfig, error) error { return nil }

func TestADomainThatIsAwayIsTriedAgainAndHoldsNothingUp(t *testing.T) {
	tries := 0
	registry := domain.Registry{
		"here": {Open: func(context.Context, map[string]string, map[string]string) (engine.Engine, error) { return nil, nil }},
		"away": {Open: func(context.Context, map[string]string, map[string]string) (engine.Engine, error) {
			if tries++; tries == 1 {
				return nil, fault.New(fault.Unavailable, "no route")
			}
			return nil, nil
		}},
		"wrong": {Open: func(context.Context, map[string]string, map[string]string) (engine.Engine, error) {
			return nil, fault.New(fault.Permission, "not yours")
		}},
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m := &fakeManager{added: make(chan string, 2)}
	o := &openers{manager: m, open: here(storages{registry: registry})}
	if err := o.start(ctx, []domain.Entry{{Name: "a", Engine: "away"}, {Name: "h", Engine: "here"}}, "n1"); err != nil {
		t.Fatal(err)
	}
	if first, second := <-m.added, <-m.added; first != "h" || second != "a" {
		t.Errorf("opened %s, then %s", first, second)
	}
	o.wait()
	said := strings.Join(m.unopened, "\n")
	if !strings.Contains(said, "a: open in domain a: no route") {
		t.Errorf("unopened: %s", said)
	}

	err := o.start(ctx, []domain.Entry{{Name: "w", Engine: "wrong"}}, "n1")
	if !errors.Is(err, fault.Permission) || err.Error() != "open in domain w: not yours" {
		t.Errorf("a mistake: %v", err)
	}
}

func TestOperationsAreCountedByTheWayTheyTook(t *testing.T) {
	m := newMetrics()
	m.observe("create volume", "local", "native", time.Second, nil)
	m.observe("create volume", "local", "default", time.Second, nil)
	m.observe("create volume", "local", "default", time.Second, fault.New(fault.Exhausted, "full"))
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, x := range f.GetMetric() {
			labels := ""
			for _, l := range x.GetLabel() {
				labels += l.GetName() + "=" + l.GetValue() + ";"
			}
			got[f.GetName()+"{"+labels+"}"] = x.GetCounter().GetValue()
		}
	}
	for name, want := range map[string]float64{
		"quarry_operations_total{domain=local;op=create volume;path=native;}":                     1,
		"quarry_operations_total{domain=local;op=create volume;path=default;}":                    2,
		"quarry_operation_failures_total{domain=local;kind=resource exhausted;op=create volume;}": 1,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
}
