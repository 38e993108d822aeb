package kill_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/admin"
)

const (
	nodeName = "killed"
	// attempt is the deadline of one call, as sidecars set it.
	attempt = 15 * time.Second
	// patience is how long one call is repeated, and a start is waited for: far
	// beyond what anything takes, so that only what hangs runs into it.
	patience = 4 * time.Minute
)

// quarry is the process under test and the connections to it, which outlive it.
type quarry struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.GroupControllerClient
	csi.NodeClient
	admin *admin.Client

	binary  string
	args    []string
	log     string
	kubelet string
	conn    *grpc.ClientConn

	cmd    *exec.Cmd
	exited chan struct{}
	err    error // of the process, when exited is closed
}

func newQuarry(binary, dir string, domains map[string]string) (*quarry, error) {
	var text strings.Builder
	text.WriteString("domains:\n")
	for name, path := range domains {
		fmt.Fprintf(&text, "- name: %s\n  engine: dir\n  params:\n    path: %s\n", name, path)
	}
	file := filepath.Join(dir, "domains.yaml")
	if err := os.WriteFile(file, []byte(text.String()), 0o600); err != nil {
		return nil, err
	}
	q := &quarry{binary: binary, log: filepath.Join(dir, "quarry.log"), kubelet: filepath.Join(dir, "kubelet")}
	if err := os.Mkdir(q.kubelet, 0o755); err != nil {
		return nil, err
	}
	endpoint, adminEndpoint := "unix://"+filepath.Join(dir, "csi.sock"), "unix://"+filepath.Join(dir, "admin.sock")
	q.args = []string{"standalone", "--domains", file, "--endpoint", endpoint, "--admin-endpoint", adminEndpoint,
		"--node-id", nodeName, "--kubelet-dir", q.kubelet, "--installation", "kill-test"}
	at, err := admin.ParseEndpoint(adminEndpoint)
	if err != nil {
		return nil, err
	}
	q.admin = admin.NewClient(at)
	q.conn, err = grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second,
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))
	if err != nil {
		return nil, err
	}
	q.IdentityClient, q.ControllerClient = csi.NewIdentityClient(q.conn), csi.NewControllerClient(q.conn)
	q.GroupControllerClient, q.NodeClient = csi.NewGroupControllerClient(q.conn), csi.NewNodeClient(q.conn)
	return q, nil
}

// start starts the process and does not wait until it is ready.
func (q *quarry) start() error {
	log, err := os.OpenFile(q.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	q.cmd = exec.Command(q.binary, q.args...)
	q.cmd.Stdout, q.cmd.Stderr = log, log
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	exited := make(chan struct{})
	q.exited = exited
	if err := q.cmd.Start(); err != nil {
		return err
	}
	go func(cmd *exec.Cmd) {
		q.err = cmd.Wait()
		close(exited)
	}(q.cmd)
	return nil
}

// ready waits until Probe says so.
func (q *quarry) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		reply, err := q.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && (reply.GetReady() == nil || reply.GetReady().GetValue()) {
			return nil
		}
		select {
		case <-q.exited:
			return fmt.Errorf("quarry ended by itself while it started: %v", q.err)
		case <-ctx.Done():
			return fmt.Errorf("quarry is not ready: %w", errors.Join(ctx.Err(), err))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// kill ends the process as the kernel's out-of-memory killer does, and with
// family its children too, as the end of a container does.
func (q *quarry) kill(family bool) error {
	select {
	case <-q.exited:
		return fmt.Errorf("quarry ended by itself: %v", q.err)
	default:
	}
	var children []int
	if family {
		children = descendants(q.cmd.Process.Pid)
	}
	if err := q.cmd.Process.Kill(); err != nil {
		return err
	}
	for _, pid := range children {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			return err
		}
	}
	<-q.exited
	return nil
}

// descendants of a process, which the kernel tells by parent.
func descendants(of int) (found []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	parents := map[int]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		data, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // ended meanwhile
		}
		// "pid (comm) state ppid": comm may hold anything.
		fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		if len(fields) > 1 {
			parents[pid], _ = strconv.Atoi(fields[1])
		}
	}
	for pid := range parents {
		for up, hops := pid, 0; up > 1 && hops < 16; up, hops = parents[up], hops+1 {
			if parents[up] == of {
				found = append(found, pid)
				break
			}
		}
	}
	return found
}

// stop ends the process politely.
func (q *quarry) stop() error {
	if err := q.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-q.exited:
	case <-time.After(patience):
		return errors.Join(errors.New("quarry does not end on SIGTERM"), q.cmd.Process.Kill())
	}
	if q.err != nil {
		return fmt.Errorf("quarry ended badly on SIGTERM: %w", q.err)
	}
	return nil
}

func (q *quarry) lastLog(lines int) string {
	data, err := os.ReadFile(q.log)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// mayRun says whether an error means that the operation may still be running:
// sidecars then ask again, and take any other code as the end.
func mayRun(err error) bool {
	switch status.Code(err) {
	case codes.Aborted, codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return true
	}
	return false
}

// call makes a CSI call and repeats it, as a sidecar does, until it is known how
// it ended.
func call[Q, A any](ctx context.Context, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		one, done := context.WithTimeout(ctx, attempt)
		reply, err := method(one, request)
		done()
		if err == nil || !mayRun(err) {
			return reply, err
		}
		select {
		case <-ctx.Done():
			return reply, fmt.Errorf("still, after %s: %w", patience, err)
		case <-time.After(wait):
		}
	}
}
