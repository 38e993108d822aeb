// Package process runs the real quarry binary for tests and for the demo: its
// domains file, sockets, log and kubelet's folder in one directory, clients that
// outlive it, and how it starts and ends.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// readiness is how long a start may take: far beyond what it takes, so that only
// what hangs runs into it.
const readiness = 90 * time.Second

// Config says how quarry is run.
type Config struct {
	// Binary is the path of quarry.
	Binary string
	// Dir is a directory of its own. Its path must be short: that of a socket may
	// have 107 bytes only.
	Dir string
	// Domains is the text of the domains file: see Domain. It may be changed
	// between two starts, as may Args.
	Domains string
	Node    string
	// Installation may be "": its default.
	Installation string
	// Args are further arguments; of a flag that is given twice the last counts.
	Args []string
}

// Quarry is quarry standalone, running or not.
type Quarry struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.GroupControllerClient
	csi.SnapshotMetadataClient
	csi.NodeClient
	Config

	conn   *grpc.ClientConn
	cmd    *exec.Cmd // nil: it does not run
	exited chan struct{}
	err    error // of the process, when exited is closed
}

// BinVariable names a folder with programs that are built already.
const BinVariable = "QUARRY_BIN"

// Build builds programs of cmd/ into dir. Where BinVariable is set, it links to
// those there instead: the guest of the kernel lab is too slow to compile.
func Build(dir string, programs ...string) error {
	if ready := os.Getenv(BinVariable); ready != "" {
		for _, p := range programs {
			from := filepath.Join(ready, p)
			if _, err := os.Stat(from); err != nil {
				return fmt.Errorf("%s is %q: %w", BinVariable, ready, err)
			}
			if err := os.Symlink(from, filepath.Join(dir, p)); err != nil {
				return err
			}
		}
		return nil
	}
	args := []string{"build", "-buildvcs=false", "-o", dir + "/"}
	for _, p := range programs {
		args = append(args, "github.com/quarry-csi/quarry/cmd/"+p)
	}
	build := exec.Command("go", args...)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building %v: %w\n%s", programs, err, out)
	}
	return nil
}

// DomainsFile is the text of a domains file with these entries.
func DomainsFile(entries ...string) string {
	text := "domains:\n"
	for _, e := range entries {
		text += e
	}
	return text
}

// Domain is the entry of a directory in a domains file. more are further lines,
// indented by two.
func Domain(name, path, more string) string {
	return fmt.Sprintf("- name: %s\n  engine: dir\n  params:\n    path: %s\n%s", name, path, more)
}

// New prepares the directory and the clients. Nothing runs yet.
func New(c Config) (*Quarry, error) {
	q := &Quarry{Config: c}
	if err := os.MkdirAll(q.Kubelet(), 0o755); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(q.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))
	if err != nil {
		return nil, err
	}
	q.conn = conn
	q.IdentityClient, q.ControllerClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn)
	q.GroupControllerClient, q.NodeClient = csi.NewGroupControllerClient(conn), csi.NewNodeClient(conn)
	q.SnapshotMetadataClient = csi.NewSnapshotMetadataClient(conn)
	return q, nil
}

// Endpoint of CSI.
func (q *Quarry) Endpoint() string { return "unix://" + filepath.Join(q.Dir, "csi.sock") }

// AdminEndpoint is the operator's.
func (q *Quarry) AdminEndpoint() string { return "unix://" + filepath.Join(q.Dir, "admin.sock") }

// Kubelet is the kubelet's folder, as far as quarry knows.
func (q *Quarry) Kubelet() string { return filepath.Join(q.Dir, "kubelet") }

func (q *Quarry) logFile() string { return filepath.Join(q.Dir, "quarry.log") }

// Command writes the domains file and gives the command that would run quarry.
// It has a process group of its own, so that Ctrl-C reaches the caller alone,
// and is killed should the caller be killed.
func (q *Quarry) Command(more ...string) (*exec.Cmd, error) {
	file := filepath.Join(q.Dir, "domains.yaml")
	if err := os.WriteFile(file, []byte(q.Domains), 0o600); err != nil {
		return nil, err
	}
	args := []string{"standalone", "--domains", file, "--endpoint", q.Endpoint(), "--admin-endpoint", q.AdminEndpoint(),
		"--node-id", q.Node, "--kubelet-dir", q.Kubelet()}
	if q.Installation != "" {
		args = append(args, "--installation", q.Installation)
	}
	cmd := exec.Command(q.Binary, append(append(args, q.Args...), more...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return cmd, nil
}

// Start starts quarry and waits until Probe says that it is ready. One that does
// not become ready is ended, and the error has the end of its log.
func (q *Quarry) Start(ctx context.Context) error {
	if q.cmd != nil {
		return errors.New("quarry runs already")
	}
	cmd, err := q.Command()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(q.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	q.cmd, q.exited = cmd, make(chan struct{})
	go func(exited chan struct{}) {
		q.err = cmd.Wait()
		close(exited)
	}(q.exited)
	if err := q.ready(ctx); err != nil {
		err = fmt.Errorf("%w\n%s", err, q.LastLog(30))
		select {
		case <-q.exited: // which the error says
			q.cmd = nil
			return err
		default:
			return errors.Join(err, q.Kill())
		}
	}
	return nil
}

func (q *Quarry) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readiness)
	defer cancel()
	for {
		reply, err := q.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && (reply.GetReady() == nil || reply.GetReady().GetValue()) {
			return nil
		}
		select {
		case <-q.exited:
			return fmt.Errorf("quarry ended while it started: %w", orZero(q.err))
		case <-ctx.Done():
			return fmt.Errorf("quarry does not become ready: %w", errors.Join(ctx.Err(), err))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func orZero(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// Running says whether it was started and not ended since.
func (q *Quarry) Running() bool { return q.cmd != nil }

// Stop ends quarry as a supervisor does, and waits for it until ctx ends; then
// it is killed. The error says so, or that it did not end well. What does not
// run is stopped already.
func (q *Quarry) Stop(ctx context.Context) error {
	if err := q.signal(syscall.SIGTERM); err != nil || q.cmd == nil {
		return err
	}
	select {
	case <-q.exited:
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("quarry did not end on SIGTERM and was killed: %w", ctx.Err()), q.Kill())
	}
	q.cmd = nil
	if q.err != nil {
		return fmt.Errorf("quarry ended badly on SIGTERM: %w", q.err)
	}
	return nil
}

// Kill ends quarry with SIGKILL, as if it had crashed. What does not run is
// dead already.
func (q *Quarry) Kill() error {
	if err := q.signal(syscall.SIGKILL); err != nil || q.cmd == nil {
		return err
	}
	<-q.exited
	q.cmd = nil
	return nil
}

// signal fails when quarry has ended by itself.
func (q *Quarry) signal(sig syscall.Signal) error {
	if q.cmd == nil {
		return nil
	}
	select {
	case <-q.exited:
		q.cmd = nil
		return fmt.Errorf("quarry had ended by itself: %w", orZero(q.err))
	default:
	}
	if err := q.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Close closes the clients' connection.
func (q *Quarry) Close() error { return q.conn.Close() }

// LastLog gives the last lines of what all runs have said.
func (q *Quarry) LastLog(lines int) string {
	data, err := os.ReadFile(q.logFile())
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
