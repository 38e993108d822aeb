package sanity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// driver is a running quarry standalone.
type driver struct {
	address string
	conn    *grpc.ClientConn
	cmd     *exec.Cmd
	exited  chan error
	log     *bytes.Buffer
}

func start(t *testing.T, binary, dir, domain string) *driver {
	t.Helper()
	config := filepath.Join(dir, "domains.yaml")
	text := fmt.Sprintf("domains:\n- name: local\n  engine: dir\n  scope: node\n  params:\n    path: %s\n", domain)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "csi.sock")
	d := &driver{address: "unix://" + socket, exited: make(chan error, 1), log: &bytes.Buffer{}}
	d.cmd = exec.Command(binary, "standalone", "-v=2", "--node-id", "node-1", "--domains", config,
		"--endpoint", d.address, "--admin-endpoint", "unix://"+filepath.Join(dir, "admin.sock"))
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	// Should this process be killed, the driver must not stay.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { d.exited <- d.cmd.Wait() }()
	t.Cleanup(func() { d.stop(t) })
	wait(t, "quarry to serve "+socket, 30*time.Second, func() error {
		select {
		case err := <-d.exited:
			d.exited <- err
			t.Fatalf("quarry ended at once: %v\n%s", err, d.log)
		default:
		}
		c, err := net.Dial("unix", socket)
		if err == nil {
			err = c.Close()
		}
		return err
	})
	conn, err := grpc.NewClient(d.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	d.conn = conn
	return d
}

// stop ends the driver as a supervisor does. Called again it does nothing.
func (d *driver) stop(t *testing.T) {
	t.Helper()
	if d.cmd == nil {
		return
	}
	if d.conn != nil {
		if err := d.conn.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	select {
	case err := <-d.exited:
		if err != nil {
			t.Errorf("quarry did not end well on SIGTERM: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("quarry did not end within 30 s of SIGTERM")
		if err := errors.Join(d.cmd.Process.Kill(), <-d.exited); err != nil {
			t.Log(err)
		}
	}
	d.cmd = nil
}

// openDomain asks for a volume, to learn the ID of the domain.
func (d *driver) openDomain(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c := csi.NewControllerClient(d.conn)
	r, err := c.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: "probe", VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20},
	})
	if err != nil {
		t.Fatalf("creating a first volume: %v\n%s", err, d.log)
	}
	if _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: r.Volume.VolumeId}); err != nil {
		t.Fatal(err)
	}
	domain, _, _ := strings.Cut(r.Volume.VolumeId, "/")
	return domain
}

// nothingIsLeft waits until the collector has returned all space, and looks
// for images that the suite or the driver forgot.
func (d *driver) nothingIsLeft(t *testing.T, domain string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c := csi.NewControllerClient(d.conn)
	if r, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{}); err != nil || len(r.Entries) > 0 {
		t.Errorf("volumes are left behind: %v, %v", r, err)
	}
	if r, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{}); err != nil || len(r.Entries) > 0 {
		t.Errorf("snapshots are left behind: %v, %v", r, err)
	}
	wait(t, "the collector", 2*time.Minute, func() error {
		for _, folder := range []string{"slabs", "tmp", "trash"} {
			entries, err := os.ReadDir(filepath.Join(domain, folder))
			if err != nil {
				return err
			}
			if len(entries) > 0 {
				return fmt.Errorf("%d entries are left behind in %s, such as %s", len(entries), folder, entries[0].Name())
			}
		}
		return nil
	})
}

// wait asks until there is no error.
func wait(t *testing.T, what string, limit time.Duration, ask func() error) {
	t.Helper()
	end := time.After(limit)
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-end:
			t.Errorf("waited %v for %s: %v", limit, what, err)
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func mounts(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// loops lists the files behind loop devices.
func loops(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) { // detached meanwhile
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, f+": "+strings.TrimSpace(string(text)))
	}
	return out
}

func with(m map[string]string, key, value string) map[string]string {
	out := map[string]string{key: value}
	for k, v := range m {
		out[k] = v
	}
	return out
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "quarry")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "github.com/quarry-csi/quarry/cmd/quarry").CombinedOutput(); err != nil {
		t.Fatalf("building quarry: %v\n%s", err, out)
	}
	return binary
}
