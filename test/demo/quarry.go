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
)

const (
	diskSize = 8 << 30
	nodeName = "demo"
	// readiness is how long quarry may take from its start to a ready Probe.
	readiness = 30 * time.Second
	// patience is how long one CSI call may be repeated, as a sidecar would.
	patience = 3 * time.Minute
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
		"--node-id", nodeName, "--kubelet-dir", q.kubelet)
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

// show runs kubectl-quarry and puts its table on the screen.
func (q *quarry) show(ctx context.Context, s *screen, args ...string) error {
	text, err := q.ask(ctx, args...)
	if err != nil {
		return err
	}
	s.table("kubectl quarry "+strings.Join(args, " "), text)
	return nil
}

// listed is what the demo reads of an element of kubectl-quarry's list of images.
type listed struct {
	Handle handle
	State  string
	How    string
}

// handle is "<domain>/<image>".
type handle string

// UnmarshalJSON takes the text or its two parts.
func (h *handle) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '"' {
		return json.Unmarshal(data, (*string)(h))
	}
	var parts struct{ Domain, Image string }
	err := json.Unmarshal(data, &parts)
	*h = handle(parts.Domain + "/" + parts.Image)
	return err
}

// images are all of them, hidden and dying ones too.
func (q *quarry) images(ctx context.Context) ([]listed, error) {
	text, err := q.ask(ctx, "images", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list []listed
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, fmt.Errorf("kubectl-quarry images -o json: %w", err)
	}
	return list, nil
}
