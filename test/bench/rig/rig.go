// Package rig holds what the benchmarks share: file systems to measure on, the
// real Quarry process with its CSI socket, and medians.
package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/host"
)

// Node and Installation are what the measured process is told about itself.
const (
	Node         = "bench"
	Installation = "bench"
)

// Run runs a program of the host and returns what it printed.
func Run(ctx context.Context, name string, args ...string) (string, error) {
	res, err := (host.Exec{}).Run(ctx, host.Command{Name: name, Args: args, Timeout: time.Hour})
	return string(res.Stdout), err
}

// Filesystem makes an ext4 or xfs of size bytes in a sparse file below dir and
// mounts it. Nothing is left to be done in the background by the kernel.
func Filesystem(ctx context.Context, dir, fstype string, size int64) (mnt string, unmount func() error, err error) {
	backing, mnt := filepath.Join(dir, fstype+".disk"), filepath.Join(dir, fstype)
	if err := errors.Join(os.WriteFile(backing, nil, 0o600), os.Truncate(backing, size), os.Mkdir(mnt, 0o755)); err != nil {
		return "", nil, err
	}
	mkfs := []string{"-q", backing}
	if fstype == "ext4" {
		mkfs = []string{"-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", backing}
	}
	if _, err := Run(ctx, "mkfs."+fstype, mkfs...); err != nil {
		return "", nil, err
	}
	if _, err := Run(ctx, "mount", "-o", "loop", backing, mnt); err != nil {
		return "", nil, err
	}
	return mnt, func() error {
		if err := unix.Unmount(mnt, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", mnt, err)
		}
		return nil
	}, nil
}

// Quarry is the running binary.
type Quarry struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient

	Kubelet string
	cmd     *exec.Cmd
	exited  chan error
	conn    *grpc.ClientConn
	log     string
}

// Start starts bin/quarry with a folder dir of its own and domains by name, and
// waits until Probe says that it is ready.
func Start(ctx context.Context, bin, dir string, domains map[string]string) (_ *Quarry, err error) {
	var text strings.Builder
	text.WriteString("domains:\n")
	for name, path := range domains {
		fmt.Fprintf(&text, "- name: %s\n  engine: dir\n  params:\n    path: %s\n", name, path)
	}
	q := &Quarry{Kubelet: filepath.Join(dir, "kubelet"), log: filepath.Join(dir, "quarry.log"), exited: make(chan error, 1)}
	file, socket := filepath.Join(dir, "domains.yaml"), filepath.Join(dir, "csi.sock")
	if err := errors.Join(os.MkdirAll(q.Kubelet, 0o755), os.WriteFile(file, []byte(text.String()), 0o600)); err != nil {
		return nil, err
	}
	log, err := os.Create(q.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	q.cmd = exec.Command(filepath.Join(bin, "quarry"), "standalone", "--domains", file, "--endpoint", "unix://"+socket,
		"--admin-endpoint", "", "--node-id", Node, "--kubelet-dir", q.Kubelet, "--installation", Installation)
	q.cmd.Stdout, q.cmd.Stderr = log, log
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the benchmark, which stops it
	if err := q.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { q.exited <- q.cmd.Wait() }()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w\n%s", err, q.lastLog()), q.cmd.Process.Kill())
		}
	}()
	if err := q.ready(ctx, socket); err != nil {
		return nil, err
	}
	q.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	q.IdentityClient, q.ControllerClient, q.NodeClient = csi.NewIdentityClient(q.conn), csi.NewControllerClient(q.conn), csi.NewNodeClient(q.conn)
	for {
		reply, err := q.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && (reply.GetReady() == nil || reply.GetReady().GetValue()) {
			return q, nil
		}
		if err := q.pause(ctx); err != nil {
			return nil, err
		}
	}
}

// ready waits for the socket by dialing it: gRPC would wait longer between two
// attempts than what is to be measured.
func (q *Quarry) ready(ctx context.Context, socket string) error {
	for {
		c, err := net.Dial("unix", socket)
		if err == nil {
			return c.Close()
		}
		if err := q.pause(ctx); err != nil {
			return err
		}
	}
}

func (q *Quarry) pause(ctx context.Context) error {
	select {
	case err := <-q.exited:
		return fmt.Errorf("quarry ended while starting: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(2 * time.Millisecond):
		return nil
	}
}

// Memory returns the most that the process had in memory so far, in bytes.
func (q *Quarry) Memory() (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", q.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc says nothing of VmHWM")
}

// CPU returns the processor time that the process has used. On a machine that
// others use too it says more than the time on the clock.
func (q *Quarry) CPU() (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", q.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// Behind "pid (comm)": fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	var user, system int64
	if len(fields) > 12 {
		_, err = fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	}
	return time.Duration(user+system) * 10 * time.Millisecond, err
}

// Stop ends the process as the kubelet would.
func (q *Quarry) Stop() error {
	if err := errors.Join(q.conn.Close(), q.cmd.Process.Signal(syscall.SIGTERM)); err != nil {
		return err
	}
	select {
	case err := <-q.exited:
		if err != nil {
			return fmt.Errorf("quarry ended badly: %w\n%s", err, q.lastLog())
		}
		return nil
	case <-time.After(time.Minute):
		return errors.Join(errors.New("quarry does not end on SIGTERM"), q.cmd.Process.Kill())
	}
}

func (q *Quarry) lastLog() string {
	data, err := os.ReadFile(q.log)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-20):], []byte("\n")))
}

// Call makes a CSI call and repeats it while the answer means "may still be running".
func Call[Q, A any](ctx context.Context, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) (A, error) {
	for {
		reply, err := method(ctx, request)
		switch status.Code(err) {
		case codes.Aborted, codes.Unavailable:
		default:
			return reply, err
		}
		select {
		case <-ctx.Done():
			return reply, err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Block is the capability of a raw block volume on one node.
func Block() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// Filled makes a file of n bytes that are not zero, durable.
func Filled(path string, n int64) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	buf := bytes.Repeat([]byte("quarry's benchmark "), 1<<16)
	for n > 0 && err == nil {
		var k int
		k, err = f.Write(buf[:min(int64(len(buf)), n)])
		n -= int64(k)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// Quantile of d; q is 0.5 for the median.
func Quantile[T time.Duration | float64 | int64](d []T, q float64) T {
	sorted := slices.Sorted(slices.Values(d))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// Out is where tables go, so that each benchmark prints alike.
func Out() io.Writer { return os.Stdout }
