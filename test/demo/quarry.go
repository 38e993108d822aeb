package main

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
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/admin"
)

const (
	diskSize = 8 << 30
	nodeName = "demo"
	// readiness is how long quarry may take from its start to a ready Probe.
	readiness = 30 * time.Second
	// patience is how long one CSI call may be repeated, as a sidecar would.
	patience = 2 * time.Minute
)

// place is one domain of the demo.
type place struct {
	domain     string // its name
	disk       string // what its disk is formatted with
	filesystem string // what is put inside its volumes
	path       string // where its disk is mounted
}

// quarry is the running binary and the connections to it.
type quarry struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	cmd      *exec.Cmd
	exited   chan struct{} // closed when the process has ended
	exitErr  error         // valid then
	conn     *grpc.ClientConn
	cli      string // kubectl-quarry
	admin    string // its endpoint
	log      string
	kubelet  string // the kubelet's folder, as far as quarry knows
	node     string
	identity string
	startup  time.Duration
}

// startQuarry writes the domains file, starts the binary and waits until Probe
// says that it is ready.
func startQuarry(ctx context.Context, bin, dir string, places []*place) (_ *quarry, err error) {
	var domains strings.Builder
	domains.WriteString("domains:\n")
	for _, p := range places {
		fmt.Fprintf(&domains, "- name: %s\n  engine: dir\n  params:\n    path: %s\n", p.domain, p.path)
	}
	file := filepath.Join(dir, "domains.yaml")
	if err := os.WriteFile(file, []byte(domains.String()), 0o600); err != nil {
		return nil, err
	}
	q := &quarry{
		cli:     filepath.Join(bin, "kubectl-quarry"),
		admin:   "unix://" + filepath.Join(dir, "admin.sock"),
		log:     filepath.Join(dir, "quarry.log"),
		kubelet: filepath.Join(dir, "kubelet"),
		exited:  make(chan struct{}),
	}
	if err := os.Mkdir(q.kubelet, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(q.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	endpoint := "unix://" + filepath.Join(dir, "csi.sock")
	q.cmd = exec.Command(filepath.Join(bin, "quarry"), "standalone",
		"--domains", file, "--endpoint", endpoint, "--admin-endpoint", q.admin,
		"--node-id", nodeName, "--kubelet-dir", q.kubelet, "--installation", "demo")
	q.cmd.Stdout, q.cmd.Stderr = log, log
	// A group of its own: Ctrl-C reaches the demo alone, which takes volumes down first.
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	begin := time.Now()
	if err := q.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		q.exitErr = q.cmd.Wait()
		close(q.exited)
	}()
	defer func() {
		if err != nil {
			stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleaning)
			defer cancel()
			err = errors.Join(fmt.Errorf("%w\n%s", err, q.lastLog(30)), q.stop(stopping))
		}
	}()
	q.conn, err = grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	q.IdentityClient, q.ControllerClient, q.NodeClient =
		csi.NewIdentityClient(q.conn), csi.NewControllerClient(q.conn), csi.NewNodeClient(q.conn)
	if err := q.ready(ctx); err != nil {
		return nil, err
	}
	q.startup = time.Since(begin)
	info, err := q.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return nil, err
	}
	q.identity = info.GetName() + " " + info.GetVendorVersion()
	node, err := q.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil {
		return nil, err
	}
	q.node = node.GetNodeId()
	return q, nil
}

func (q *quarry) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readiness)
	defer cancel()
	for {
		reply, err := q.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && (reply.GetReady() == nil || reply.GetReady().GetValue()) {
			return nil
		}
		select {
		case <-q.exited:
			return fmt.Errorf("quarry ended while starting: %w", orEnded(q.exitErr))
		case <-ctx.Done():
			return fmt.Errorf("quarry is not ready after %s: %w", readiness, errors.Join(ctx.Err(), err))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func orEnded(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// stop ends the process: politely, then not.
func (q *quarry) stop(ctx context.Context) error {
	var closed error
	if q.conn != nil {
		closed = q.conn.Close()
	}
	select {
	case <-q.exited:
		return fmt.Errorf("quarry had ended by itself: %w", orEnded(q.exitErr))
	default:
	}
	if err := q.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-q.exited:
	case <-time.After(cleaning / 2):
		killed := q.cmd.Process.Kill()
		select {
		case <-q.exited:
		case <-ctx.Done():
		}
		return errors.Join(fmt.Errorf("quarry did not end %s after SIGTERM and was killed", cleaning/2), killed)
	}
	if q.exitErr != nil {
		return fmt.Errorf("quarry ended badly after SIGTERM: %w", q.exitErr)
	}
	return closed
}

func (q *quarry) lastLog(lines int) string {
	data, err := os.ReadFile(q.log)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// call makes a CSI call, and repeats it as a sidecar does while the answer means
// "may still be running".
func call[Q, A any](ctx context.Context, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		reply, err := method(ctx, request)
		switch status.Code(err) {
		case codes.Aborted, codes.Unavailable, codes.DeadlineExceeded:
		default:
			return reply, err
		}
		if wait > time.Second {
			fmt.Fprintf(os.Stderr, "      waiting: %s\n", status.Convert(err).Message())
		}
		select {
		case <-ctx.Done():
			return reply, err
		case <-time.After(wait):
		}
	}
}

// ask runs kubectl-quarry and returns what it printed.
func (q *quarry) ask(ctx context.Context, args ...string) (string, error) {
	return run(ctx, q.cli, append(args, "--admin-endpoint", q.admin)...)
}

// show runs kubectl-quarry and puts what it says on the screen. It fails when
// there is something that needs a person.
func (q *quarry) show(ctx context.Context, s *screen, args ...string) error {
	cmd := exec.CommandContext(ctx, q.cli, append(args, "--admin-endpoint", q.admin)...)
	text, err := cmd.CombinedOutput()
	s.table("kubectl quarry "+strings.Join(args, " "), string(text))
	if err != nil {
		return fmt.Errorf("kubectl-quarry %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// list asks kubectl-quarry for JSON.
func list[T any](ctx context.Context, q *quarry, what string) ([]T, error) {
	text, err := q.ask(ctx, what, "-o", "json")
	if err != nil {
		return nil, err
	}
	var out []T
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		return nil, fmt.Errorf("kubectl-quarry %s -o json: %w", what, err)
	}
	return out, nil
}

// images are all of them, hidden and dying ones too.
func (q *quarry) images(ctx context.Context) ([]admin.Image, error) {
	return list[admin.Image](ctx, q, "images")
}

// reasons prints what each domain does natively and what by default, and why.
func (q *quarry) reasons(ctx context.Context, s *screen) error {
	domains, err := list[admin.Domain](ctx, q, "domains")
	if err != nil {
		return err
	}
	for _, d := range domains {
		for _, note := range d.Notes {
			s.note("%s: %s", d.Name, note)
		}
	}
	return nil
}
