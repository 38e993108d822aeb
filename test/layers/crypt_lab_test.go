package layers

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestEncryptedVolumes lets encrypted volumes live a whole life with the real program:
// snapshot in use, growth, clone, wrong secrets, a killed program, merge.
func TestEncryptedVolumes(t *testing.T) {
	r := newRig(t, spare(t))
	for _, fs := range []string{"ext4", "xfs"} { // this kernel mounts no clone of a btrfs beside it
		t.Run(fs, func(t *testing.T) {
			if err := r.encryptedLife(t, fs); err != nil {
				t.Fatal(err)
			}
		})
	}
	if err := r.leavesNothing(); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) encryptedLife(t *testing.T, fs string) error {
	const secret = "what nobody may find in the storage"
	right := map[string]string{"encryptionPassphrase": "right\n"}
	c := filesystem()
	c.GetMount().FsType = fs
	write := func(v *volume, name string) error {
		f, err := os.Create(filepath.Join(v.target, name))
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.Write(bytes.Repeat([]byte(secret+" "+name+"\n"), 20_000)); err != nil {
			return err
		}
		return f.Sync()
	}
	holds := func(v *volume, names ...string) error {
		for _, name := range names {
			got, err := os.ReadFile(filepath.Join(v.target, name))
			if err != nil {
				return err
			}
			if !bytes.Equal(got, bytes.Repeat([]byte(secret+" "+name+"\n"), 20_000)) {
				return fmt.Errorf("%s of %s has other content than was written", name, v.name)
			}
		}
		return nil
	}
	v, err := r.create(fs+"-source", gib/2, c, "", right)
	if err != nil {
		return err
	}
	if err := v.publish(); err != nil {
		return err
	}
	if err := write(v, "first"); err != nil {
		return err
	}
	snapshot, err := call(r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: fs + "-s", SourceVolumeId: v.id})
	if err != nil {
		return err
	}
	id := snapshot.GetSnapshot().GetSnapshotId()
	if err := write(v, "second"); err != nil {
		return err
	}

	larger := &csi.CapacityRange{RequiredBytes: gib}
	if _, err := call(r.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: larger, VolumeCapability: c}); err != nil {
		return err
	}
	if _, err := call(r.NodeExpandVolume, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, StagingTargetPath: v.staging, CapacityRange: larger, VolumeCapability: c}); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(v.target, &st); err != nil {
		return err
	}
	if n := int64(st.Blocks) * st.Bsize; n < gib*8/10 {
		return fmt.Errorf("grown to 1 GiB, the filesystem has %d bytes", n)
	}
	if err := write(v, "third"); err != nil {
		return err
	}

	clone, err := r.create(fs+"-clone", gib/2, c, id, right)
	if err != nil {
		return err
	}
	for want, secrets := range map[codes.Code]map[string]string{
		codes.PermissionDenied: {"encryptionPassphrase": "right"},
		codes.InvalidArgument:  nil,
	} {
		clone.secrets = secrets
		if err := clone.publish(); status.Code(err) != want {
			return fmt.Errorf("published with the secrets %v: %w, want %s", secrets, err, want)
		}
	}
	clone.secrets = right
	if err := clone.publish(); err != nil {
		return err
	}
	if err := holds(clone, "first"); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(clone.target, "second")); !os.IsNotExist(err) {
		return fmt.Errorf("the snapshot has what was written after it: %w", err)
	}

	if err := r.Kill(); err != nil {
		return err
	}
	if err := r.Start(t.Context()); err != nil {
		return err
	}
	if err := holds(v, "first", "second", "third"); err != nil {
		return err
	}
	if err := v.unpublish(); err != nil {
		return err
	}
	if err := v.publish(); err != nil {
		return err
	}
	if err := clone.remove(); err != nil {
		return err
	}
	if err := r.conceals([]byte(secret)); err != nil {
		return err
	}
	if err := r.removeSnapshot(id); err != nil {
		return err
	}
	if err := r.alone(v); err != nil {
		return err
	}
	if err := holds(v, "first", "second", "third"); err != nil {
		return err
	}
	if err := r.conceals([]byte(secret)); err != nil {
		return err
	}
	return v.remove()
}

// conceals looks for a text in everything that the storage has.
func (r *rig) conceals(text []byte) error {
	unix.Sync()
	b := make([]byte, mib)
	for _, slab := range r.files("slabs") {
		f, err := os.Open(filepath.Join(r.path, slab))
		if err != nil {
			return err
		}
		defer f.Close()
		for at := int64(0); ; {
			at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
			if err == unix.ENXIO {
				break
			}
			if err != nil {
				return err
			}
			n, err := f.ReadAt(b, at)
			if err != nil && err != io.EOF {
				return err
			}
			if i := bytes.Index(b[:n], text); i >= 0 {
				return fmt.Errorf("slab %s holds the plain text at byte %d", slab, at+int64(i))
			}
			at += max(1, int64(n-len(text)))
		}
	}
	return nil
}
