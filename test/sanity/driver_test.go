package sanity

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/test/process"
)

// patience with what takes less than a second on an idle machine.
const patience = 5 * time.Minute

// driver is quarry standalone.
type driver struct{ *process.Quarry }

// start runs quarry with one domain, whose entry in the domains file this is.
func start(t *testing.T, binary, dir, entry string) *driver {
	t.Helper()
	// The suite's paths are wherever it likes: no folder is the kubelet's.
	q, err := process.New(process.Config{Binary: binary, Dir: dir, Node: "node-1", Args: []string{"-v=2", "--kubelet-dir", ""},
		Domains: process.DomainsFile(entry)})
	if err != nil {
		t.Fatal(err)
	}
	d := &driver{q}
	t.Cleanup(func() {
		d.stop(t)
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := q.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

// stop ends the driver as a supervisor does. Called again it does nothing.
func (d *driver) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// directory is the entry of a domain of engine dir.
func directory(path string) string { return process.Domain("local", path, "  scope: node\n") }

// sharedDirectory is the entry of a domain of engine sharedfs, on a file system that is not shared.
func sharedDirectory(path string) string {
	return fmt.Sprintf("- name: local\n  engine: sharedfs\n  params: {path: %s, allowLocal: \"true\"}\n", path)
}

// openDomain asks for a volume until the domain is open, to learn its ID.
func (d *driver) openDomain(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var r *csi.CreateVolumeResponse
	wait(t, "the domain to open", patience, func() (err error) {
		r, err = d.CreateVolume(ctx, &csi.CreateVolumeRequest{
			Name: "probe", VolumeCapabilities: []*csi.VolumeCapability{{
				AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
				AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			}}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20},
		})
		return err
	})
	if t.Failed() {
		t.Fatalf("no first volume:\n%s", d.LastLog(40))
	}
	if _, err := d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: r.Volume.VolumeId}); err != nil {
		t.Fatal(err)
	}
	domain, _, _ := strings.Cut(r.Volume.VolumeId, "/")
	return domain
}

// noImages looks for images that the suite or the driver forgot.
func (d *driver) noImages(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if r, err := d.ListVolumes(ctx, &csi.ListVolumesRequest{}); err != nil || len(r.Entries) > 0 {
		t.Errorf("volumes are left behind: %v, %v", r, err)
	}
	if r, err := d.ListSnapshots(ctx, &csi.ListSnapshotsRequest{}); err != nil || len(r.Entries) > 0 {
		t.Errorf("snapshots are left behind: %v, %v", r, err)
	}
}

// nothingIsLeft waits until the collector has returned all space of a directory.
func (d *driver) nothingIsLeft(t *testing.T, domain string) {
	t.Helper()
	d.noImages(t)
	wait(t, "the collector", patience, func() error { return emptyDirectory(domain) })
}

// emptyDirectory says what a domain of engine dir holds beside its tags.
func emptyDirectory(domain string) error {
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
	dir := t.TempDir()
	if err := process.Build(dir, "quarry"); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "quarry")
}
