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
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

const (
	nodeID = "node-1"
	// patience is how long one call may be repeated, as a sidecar repeats it.
	patience = 90 * time.Second
)

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
		build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "../../cmd/quarry", "../../cmd/kubectl-quarry")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		var out []byte
		if out, err = build.CombinedOutput(); err != nil {
			err = fmt.Errorf("building the programs: %w\n%s", err, out)
		}
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

	csi.ControllerClient
	csi.GroupControllerClient
	csi.NodeClient

	cmd    *exec.Cmd
	exited chan error
	conn   *grpc.ClientConn
	log    *bytes.Buffer
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
	r := &rig{t: t, dir: dir, places: places}
	t.Cleanup(func() {
		r.kill()
		r.takeDown()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		if t.Failed() && r.log != nil {
			t.Logf("the end of quarry's log:\n%s", r.log.Bytes()[max(0, r.log.Len()-6000):])
		}
	})
	if err := os.Mkdir(r.kubelet(), 0o755); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) kubelet() string { return filepath.Join(r.dir, "kubelet") }

func (r *rig) config() string {
	var text strings.Builder
	text.WriteString("domains:\n")
	for _, p := range r.places {
		fmt.Fprintf(&text, "- name: %s\n  engine: dir\n  params:\n    path: %s\n%s", p.name, p.path, p.more)
	}
	return text.String()
}

func (r *rig) command(config string, more ...string) *exec.Cmd {
	file := filepath.Join(r.dir, "domains.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		r.t.Fatal(err)
	}
	args := []string{"standalone", "--node-id", nodeID, "--domains", file, "--kubelet-dir", r.kubelet(), "--installation", "behaviour",
		"--endpoint", "unix://" + filepath.Join(r.dir, "csi.sock"), "--admin-endpoint", "unix://" + filepath.Join(r.dir, "admin.sock")}
	cmd := exec.Command(filepath.Join(os.Getenv(binariesDir), "quarry"), append(append(args, r.args...), more...)...)
	// Should this process be killed, the driver must not stay.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (r *rig) start() {
	r.t.Helper()
	r.cmd = r.command(r.config())
	if r.log == nil {
		r.log = &bytes.Buffer{}
	}
	r.cmd.Stdout, r.cmd.Stderr = r.log, r.log
	exited := make(chan error, 1)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	cmd := r.cmd
	go func() { exited <- cmd.Wait() }()
	r.exited = exited
	conn, err := grpc.NewClient("unix://"+filepath.Join(r.dir, "csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	r.conn = conn
	r.ControllerClient, r.GroupControllerClient, r.NodeClient = csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn), csi.NewNodeClient(conn)
	identity := csi.NewIdentityClient(conn)
	r.eventually("quarry to be ready", func() error {
		select {
		case err := <-exited:
			exited <- err
			r.t.Fatalf("quarry ended while starting: %v\n%s", err, r.log)
		default:
		}
		reply, err := identity.Probe(r.t.Context(), &csi.ProbeRequest{})
		if err == nil && reply.GetReady() != nil && !reply.GetReady().GetValue() {
			err = errors.New("not ready")
		}
		return err
	})
}

// refused starts quarry with a domains file, expects that it ends with status
// 1, and returns the one line that it said.
func (r *rig) refused(config string, more ...string) string {
	r.t.Helper()
	cmd := r.command(config, more...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // the status then shows it
	defer timer.Stop()
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		r.t.Fatalf("quarry ended with %v, not with status 1:\n%s", err, &out)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	return lines[len(lines)-1]
}

// kill ends quarry with SIGKILL, as if it had crashed.
func (r *rig) kill() { r.end(syscall.SIGKILL) }

func (r *rig) end(sig syscall.Signal) {
	r.t.Helper()
	if r.cmd == nil {
		return
	}
	if err := r.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		r.t.Error(err)
	}
	select {
	case err := <-r.exited:
		if sig == syscall.SIGTERM && err != nil {
			r.t.Errorf("quarry did not end well after SIGTERM: %v", err)
		}
	case <-time.After(patience):
		r.t.Fatalf("quarry did not end after %v", sig)
	}
	if r.conn != nil {
		if err := r.conn.Close(); err != nil {
			r.t.Error(err)
		}
	}
	r.cmd, r.conn = nil, nil
}

// restart ends quarry well and starts it again.
func (r *rig) restart() {
	r.t.Helper()
	r.end(syscall.SIGTERM)
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
			if strings.HasPrefix(string(text), p.path+"/") {
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
		append(args, "--admin-endpoint", "unix://"+filepath.Join(r.dir, "admin.sock"))...)
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
