package behaviour

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/process"
)

const (
	nodeID = "node-1"
)

// patience is how long one call may be repeated, as a sidecar repeats it.
var patience = func() time.Duration {
	if lab.Inside() { // whose processor may be emulated
		return 6 * time.Minute
	}
	return 90 * time.Second
}()

// binariesDir says to the tests where TestMain has built the programs.
const binariesDir = "QUARRY_BEHAVIOUR_BIN"

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test says why it is skipped
	}
	dir, err := os.MkdirTemp("", "quarry-behaviour-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = os.Setenv(binariesDir, dir)
	}
	if err == nil {
		err = process.Build(dir, "quarry", "kubectl-quarry")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// place is a domain of the rig.
type place struct {
	name string
	path string
	more string // further lines of YAML, indented by two
	// entry is the whole one of a domain that is no directory; then path is "".
	entry string
}

// on makes a file system with room for a domain.
func on(t *testing.T, name, fstype string, size int64) place {
	t.Helper()
	return place{name: name, path: hosttest.Filesystem(t, fstype, size)}
}

// rig is quarry standalone with its domains, and the way to it.
type rig struct {
	t      *testing.T
	dir    string
	places []place
	args   []string
	*process.Quarry
}

// newRig starts quarry. What the test leaves mounted is taken down at its end.
func newRig(t *testing.T, places ...place) *rig {
	t.Helper()
	r := idleRig(t, places...)
	r.start()
	return r
}

func idleRig(t *testing.T, places ...place) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("file systems are mounted: it needs root")
	}
	// Short, because the path of a socket may have 107 bytes only.
	dir, err := os.MkdirTemp("", "qb-")
	if err != nil {
		t.Fatal(err)
	}
	q, err := process.New(process.Config{Binary: filepath.Join(os.Getenv(binariesDir), "quarry"), Dir: dir, Node: nodeID, Installation: "behaviour"})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, places: places, Quarry: q}
	t.Cleanup(func() {
		r.kill()
		r.takeDown()
		if t.Failed() {
			t.Logf("the end of quarry's log:\n%s", r.LastLog(60))
		}
		if err := errors.Join(q.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) config() string {
	var entries []string
	for _, p := range r.places {
		if p.entry != "" {
			entries = append(entries, p.entry)
			continue
		}
		entries = append(entries, process.Domain(p.name, p.path, p.more))
	}
	return process.DomainsFile(entries...)
}

func (r *rig) start() {
	r.t.Helper()
	r.Domains, r.Args = r.config(), r.args
	if err := r.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// refused starts quarry with a domains file, expects that it ends with status
// 1, and returns the one line that it said.
func (r *rig) refused(config string, more ...string) string {
	r.t.Helper()
	r.Domains, r.Args = config, r.args
	cmd, err := r.Command(more...)
	if err != nil {
		r.t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // the status then shows it
	defer timer.Stop()
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		r.t.Fatalf("quarry ended with %v, not with status 1:\n%s", err, &out)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	return lines[len(lines)-1]
}

// kill ends quarry with SIGKILL, as if it had crashed.
func (r *rig) kill() {
	r.t.Helper()
	if err := r.Kill(); err != nil {
		r.t.Error(err)
	}
}

// stop ends quarry well.
func (r *rig) stop() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.Stop(ctx); err != nil {
		r.t.Fatal(err)
	}
}

// restart ends quarry well and starts it again.
func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	r.start()
}

// takeDown unmounts and detaches what a failed test left behind.
func (r *rig) takeDown() {
	points := r.mounts()
	for i := len(points) - 1; i >= 0; i-- {
		if err := unix.Unmount(points[i], unix.MNT_DETACH); err != nil {
			r.t.Errorf("unmount %s: %v", points[i], err)
		}
	}
	for dev := range r.loops() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			r.t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	}
}

// mounts below the rig's folder, in the order in which they were made.
func (r *rig) mounts() []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		r.t.Fatal(err)
	}
	var out []string
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], r.dir+"/") {
			out = append(out, f[4])
		}
	}
	return out
}

// loops are the loop devices over files of the rig's domains.
func (r *rig) loops() map[string]string {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		r.t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil { // detached meanwhile
			continue
		}
		for _, p := range r.places {
			if p.path != "" && strings.HasPrefix(string(text), p.path+"/") {
				out["/dev/"+strings.Split(f, "/")[3]] = strings.TrimSpace(string(text))
			}
		}
	}
	return out
}

// kubectl runs kubectl-quarry and returns what it printed and its exit status.
func (r *rig) kubectl(args ...string) (out string, status int) {
	r.t.Helper()
	cmd := exec.Command(filepath.Join(os.Getenv(binariesDir), "kubectl-quarry"),
		append(args, "--admin-endpoint", r.AdminEndpoint())...)
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return string(text), cmd.ProcessState.ExitCode()
}

// ask runs kubectl-quarry for a list in JSON.
func ask[T any](r *rig, args ...string) T {
	r.t.Helper()
	text, _ := r.kubectl(append(args, "-o", "json")...)
	var out T
	// What needs a person is said on stderr, after the document.
	if err := json.NewDecoder(strings.NewReader(text)).Decode(&out); err != nil {
		r.t.Fatalf("kubectl-quarry %s: %v\n%s", strings.Join(args, " "), err, text)
	}
	return out
}

// eventually asks until there is no error.
func (r *rig) eventually(what string, ask func() error) {
	r.t.Helper()
	end := time.After(patience)
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-end:
			r.t.Fatalf("waited for %s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// call makes a CSI call and repeats it as a sidecar does while the answer means
// "may still be running".
func call[Q, A any](r *rig, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		reply, err := method(ctx, request)
		if c := status.Code(err); c != codes.Aborted && c != codes.Unavailable && c != codes.DeadlineExceeded {
			return reply, err
		}
		select {
		case <-ctx.Done():
			return reply, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// must makes a call that has to succeed.
func must[Q, A any](r *rig, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) A {
	r.t.Helper()
	reply, err := call(r, method, request)
	if err != nil {
		r.t.Fatalf("%T: %v", request, err)
	}
	return reply
}

// refusal checks the code of an answer and that its text says all of these.
func refusal(t *testing.T, err error, code codes.Code, says ...string) {
	t.Helper()
	got := status.Convert(err)
	if got.Code() != code {
		t.Errorf("answered %s, want %s: %s", got.Code(), code, got.Message())
		return
	}
	for _, s := range says {
		if !strings.Contains(got.Message(), s) {
			t.Errorf("the answer %q does not say %q", got.Message(), s)
		}
	}
	if testing.Verbose() {
		t.Logf("%s: %s", got.Code(), got.Message())
	}
}
