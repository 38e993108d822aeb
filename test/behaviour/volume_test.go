package behaviour

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

const mib = int64(1) << 20

// volume is a CSI volume, and where it is while it is staged.
type volume struct {
	r    *rig
	id   string
	name string
	cap  *csi.VolumeCapability

	staging, target string
}

func filesystem(fs string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

func rawBlock() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// creation is the request for an empty volume.
func creation(domain, name string, size int64, c *csi.VolumeCapability) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: map[string]string{"domain": domain},
	}
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

func (r *rig) create(req *csi.CreateVolumeRequest) *volume {
	r.t.Helper()
	v := must(r, r.CreateVolume, req).GetVolume()
	return &volume{r: r, id: v.GetVolumeId(), name: req.GetName(), cap: req.GetVolumeCapabilities()[0]}
}

// volume makes an empty one.
func (r *rig) volume(domain, name string, size int64, c *csi.VolumeCapability) *volume {
	r.t.Helper()
	return r.create(creation(domain, name, size, c))
}

// copyOf makes a volume from a snapshot or a volume.
func (r *rig) copyOf(source *csi.VolumeContentSource, domain, name string, size int64, c *csi.VolumeCapability) *volume {
	r.t.Helper()
	req := creation(domain, name, size, c)
	req.VolumeContentSource = source
	return r.create(req)
}

func (r *rig) snapshot(v *volume, name string) string {
	r.t.Helper()
	return must(r, r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id}).GetSnapshot().GetSnapshotId()
}

// image is the handle's second part.
func (v *volume) image() string { _, id, _ := strings.Cut(v.id, "/"); return id }

// stage attaches and stages, up to the first error.
func (v *volume) stage() error {
	r := v.r
	published, err := call(r, r.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.cap})
	if err != nil {
		return err
	}
	v.staging = filepath.Join(r.Kubelet(), "plugins", v.name, "globalmount")
	if err := os.MkdirAll(v.staging, 0o755); err != nil {
		return err
	}
	_, err = call(r, r.NodeStageVolume, &csi.NodeStageVolumeRequest{
		VolumeId: v.id, PublishContext: published.GetPublishContext(), StagingTargetPath: v.staging, VolumeCapability: v.cap})
	return err
}

// mount makes the volume visible at v.target, as a pod sees it.
func (v *volume) mount() *volume {
	r := v.r
	r.t.Helper()
	if err := v.stage(); err != nil {
		r.t.Fatalf("staging %s: %v", v.name, err)
	}
	v.target = filepath.Join(r.Kubelet(), "pods", v.name, "mount")
	if err := os.MkdirAll(filepath.Dir(v.target), 0o755); err != nil {
		r.t.Fatal(err)
	}
	must(r, r.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, TargetPath: v.target, VolumeCapability: v.cap})
	return v
}

// unmount is the reverse of mount, and of stage.
func (v *volume) unmount() {
	r := v.r
	r.t.Helper()
	if v.target != "" {
		must(r, r.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target})
		v.target = ""
	}
	if v.staging != "" {
		must(r, r.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging})
		v.staging = ""
	}
	must(r, r.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID})
}

func (v *volume) remove() {
	v.r.t.Helper()
	must(v.r, v.r.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.id})
}

func (r *rig) removeSnapshot(id string) {
	r.t.Helper()
	must(r, r.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: id})
}

// works proves that a volume can be staged, written, and read back.
func (v *volume) works() {
	r := v.r
	r.t.Helper()
	v.mount()
	want := []byte("proof " + v.id)
	path := filepath.Join(v.target, "proof")
	writeFile(r.t, path, want)
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		r.t.Errorf("volume %s does not work: read %q, %v", v.name, got, err)
	}
	v.unmount()
}

// writeFile writes a file that is durable on return.
func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fill writes n bytes that seed determines at the beginning of a file or
// device, durable on return, and returns their checksum.
func fill(t *testing.T, path string, seed uint64, n int64) string {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	sum := sha256.New()
	_, err = io.CopyN(io.MultiWriter(f, sum), rand.NewChaCha8(key), n)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// checksum of the first n bytes of a file or device.
func checksum(t *testing.T, path string, n int64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.CopyN(sum, f, n); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// content lists the files in folders of a domain, with their modes and sizes.
func content(t *testing.T, p place, folders ...string) []string {
	t.Helper()
	var out []string
	for _, folder := range folders {
		err := filepath.WalkDir(filepath.Join(p.path, folder), func(path string, e fs.DirEntry, err error) error {
			var info fs.FileInfo
			if err == nil {
				info, err = e.Info()
			}
			switch {
			case errors.Is(err, fs.ErrNotExist): // the collector was faster
				return nil
			case err == nil && !e.IsDir():
				out = append(out, fmt.Sprintf("%s %s %d", strings.TrimPrefix(path, p.path+"/"), info.Mode(), info.Size()))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func filesystemSize(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks) * st.Bsize
}

// writer appends counted entries to a journal, and makes numbered files, each
// durable before the next, until it is stopped.
type writer struct {
	synced atomic.Uint64 // entries and files that are durable, at least
	stop   chan struct{}
	ended  chan error
}

const journal = "journal"

func startWriter(t *testing.T, dir string) *writer {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, journal), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{stop: make(chan struct{}), ended: make(chan error, 1)}
	go func() {
		var err error
		for n := uint64(0); err == nil; n++ {
			select {
			case <-w.stop:
				w.ended <- f.Close()
				return
			default:
			}
			if _, err = f.Write(binary.BigEndian.AppendUint64(nil, n)); err == nil {
				err = f.Sync()
			}
			if err == nil {
				err = numbered(dir, n)
			}
			if err == nil {
				w.synced.Store(n + 1)
			}
		}
		w.ended <- errors.Join(err, f.Close())
	}()
	return w
}

// numbered makes file n and removes an old one, so that the directory changes
// all the time and the volume does not fill.
func numbered(dir string, n uint64) error {
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("f%08d", n)))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "content %d", n)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil || n < 64 {
		return err
	}
	return os.Remove(filepath.Join(dir, fmt.Sprintf("f%08d", n-64)))
}

// end stops the writer; why it had ended before is an error of the test.
func (w *writer) end(t *testing.T) {
	t.Helper()
	close(w.stop)
	if err := <-w.ended; err != nil {
		t.Errorf("the writer: %v", err)
	}
}

// goesOn waits until the writer has got further.
func (w *writer) goesOn(r *rig) {
	r.t.Helper()
	from := w.synced.Load()
	r.eventually("the writer to go on", func() error {
		if n := w.synced.Load(); n < from+2 {
			return fmt.Errorf("%d entries after %d", n, from)
		}
		return nil
	})
}

// verifyCut checks that dir holds entries 0, 1, 2 ... without a gap, at least
// those that were durable before the cut, and the last files of them.
func verifyCut(t *testing.T, dir string, atLeast uint64) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, journal))
	if err != nil {
		t.Fatal(err)
	}
	n := uint64(len(data) / 8)
	for i := range n {
		if got := binary.BigEndian.Uint64(data[8*i:]); got != i {
			t.Fatalf("entry %d of the journal is %d", i, got)
		}
	}
	if n < atLeast {
		t.Errorf("the journal has %d entries, %d were durable before the cut", n, atLeast)
	}
	if n < 2 {
		return
	}
	// The file of the last entry may not have been made at the cut.
	path := filepath.Join(dir, fmt.Sprintf("f%08d", n-2))
	if got, err := os.ReadFile(path); err != nil || string(got) != fmt.Sprintf("content %d", n-2) {
		t.Errorf("file %s, durable before entry %d, holds %q: %v", path, n-1, got, err)
	}
}
