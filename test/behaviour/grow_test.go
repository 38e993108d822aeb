package behaviour

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

// expand grows the image and then, as the kubelet does, the volume in use.
func (v *volume) expand(size int64) error {
	r := v.r
	r.t.Helper()
	grown := must(r, r.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: v.cap})
	if grown.GetCapacityBytes() < size {
		r.t.Errorf("%s was grown to %d, not %d", v.name, grown.GetCapacityBytes(), size)
	}
	if v.target == "" {
		return nil
	}
	ctx, cancel := once()
	defer cancel()
	_, err := r.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, StagingTargetPath: v.staging,
		CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapability: v.cap})
	return err
}

func TestVolumesGrowInUseAndAtRest(t *testing.T) {
	p := on(t, "grow", "ext4", 4<<30)
	r := newRig(t, p)
	const small, large = 320 * mib, 640 * mib
	// less is what a filesystem keeps for itself, at most.
	const less = 128 * mib
	for _, fs := range []string{"xfs", "btrfs"} {
		t.Run(fs+" in use", func(t *testing.T) {
			v := r.volume(p.name, fs, small, filesystem(fs)).mount()
			sum := fill(t, filepath.Join(v.target, "data"), 1, 8*mib)
			if err := v.expand(large); err != nil {
				t.Fatal(err)
			}
			if got := filesystemSize(t, v.target); got < large-less {
				t.Errorf("the filesystem has %d bytes, want about %d", got, large)
			}
			if checksum(t, filepath.Join(v.target, "data"), 8*mib) != sum {
				t.Error("the data changed")
			}
			v.unmount()
			v.remove()
		})
	}
	// Linux lets only CAP_SYS_RESOURCE grow a mounted ext4. Whether this machine
	// has it is found out by trying: either it grows at once, or the answer says
	// why not and it grows when it is staged next.
	t.Run("ext4 in use", func(t *testing.T) {
		v := r.volume(p.name, "ext4", small, filesystem("ext4")).mount()
		sum := fill(t, filepath.Join(v.target, "data"), 1, 8*mib)
		err := v.expand(large)
		may := mayResize(t)
		switch {
		case may && err != nil:
			t.Errorf("the process may grow a mounted ext4, and it does not: %v", err)
		case !may:
			refusal(t, err, codes.FailedPrecondition, v.image(), "CAP_SYS_RESOURCE")
			if got := filesystemSize(t, v.target); got > small {
				t.Errorf("it was refused, and the filesystem has %d bytes", got)
			}
			writeFile(t, filepath.Join(v.target, "still"), []byte("writable"))
			v.unmount()
			v.mount()
		}
		if got := filesystemSize(t, v.target); got < large-less {
			t.Errorf("the filesystem has %d bytes, want about %d", got, large)
		}
		if checksum(t, filepath.Join(v.target, "data"), 8*mib) != sum {
			t.Error("the data changed")
		}
		v.unmount()
		v.remove()
	})
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs+" at rest", func(t *testing.T) {
			v := r.volume(p.name, "rest-"+fs, small, filesystem(fs)).mount()
			v.unmount()
			if err := v.expand(large); err != nil {
				t.Fatal(err)
			}
			v.mount()
			if got := filesystemSize(t, v.target); got < large-less {
				t.Errorf("the filesystem has %d bytes, want about %d", got, large)
			}
			v.unmount()
			v.remove()
		})
	}
	t.Run("raw block in use", func(t *testing.T) {
		v := r.volume(p.name, "raw", small, rawBlock()).mount()
		sum := fill(t, v.target, 1, 8*mib)
		if err := v.expand(large); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("blockdev", "--getsize64", v.target).CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "671088640" {
			t.Errorf("the device has %s bytes: %v", out, err)
		}
		if checksum(t, v.target, 8*mib) != sum {
			t.Error("the data changed")
		}
		// What is new reads as zero.
		f, err := os.Open(v.target)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		tail := make([]byte, mib)
		if _, err := f.ReadAt(tail, large-mib); err != nil || !bytes.Equal(tail, make([]byte, mib)) {
			t.Errorf("the end of the grown device does not read as zero: %v", err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		v.unmount()
		v.remove()
	})
	t.Run("node before controller", func(t *testing.T) {
		v := r.volume(p.name, "early", small, filesystem("xfs")).mount()
		ctx, cancel := once()
		defer cancel()
		_, err := r.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, CapacityRange: &csi.CapacityRange{RequiredBytes: large}})
		refusal(t, err, codes.OutOfRange, "335544320", "671088640", "controller first")
		_, err = r.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: filepath.Join(r.Kubelet(), "elsewhere")})
		refusal(t, err, codes.NotFound, "elsewhere")
		v.unmount()
		v.remove()
	})
}

// mayResize asks the kernel's own tool whether this process may grow a mounted
// ext4: the capability of the process, not of the driver under test.
func mayResize(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	const sysResource = 24 // capabilities(7)
	for _, line := range strings.Split(string(text), "\n") {
		if hex, ok := strings.CutPrefix(line, "CapEff:\t"); ok {
			digit := hex[len(hex)-1-sysResource/4]
			return strings.IndexByte("0123456789abcdef", digit)&(1<<(sysResource%4)) != 0
		}
	}
	t.Fatal("/proc/self/status has no CapEff")
	return false
}

func TestClonesAreMountedBesideTheirSource(t *testing.T) {
	ext4, xfs := on(t, "on-ext4", "ext4", 3<<30), on(t, "on-xfs", "xfs", 3<<30)
	r := newRig(t, ext4, xfs)
	for _, p := range r.places {
		for _, fs := range []string{"ext4", "xfs", "btrfs"} {
			t.Run(p.name+"/"+fs, func(t *testing.T) {
				const size = 320 * mib
				v := r.volume(p.name, p.name+fs, size, filesystem(fs)).mount()
				sum := fill(t, filepath.Join(v.target, "data"), 1, 8*mib)
				clone := r.create(cloneRequest(v, p.name, p.name+fs+"-clone", size)).mount()
				restored := r.copyOf(fromSnapshot(r.snapshot(v, p.name+fs+"-s")), p.name, p.name+fs+"-r", 2*size, filesystem(fs)).mount()
				for _, c := range []*volume{clone, restored} {
					if checksum(t, filepath.Join(c.target, "data"), 8*mib) != sum {
						t.Errorf("%s does not hold what its source did", c.name)
					}
					writeFile(t, filepath.Join(c.target, "own"), []byte(c.name))
				}
				if _, err := os.Stat(filepath.Join(v.target, "own")); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("what was written to a clone is in its source: %v", err)
				}
				if got := filesystemSize(t, restored.target); got < 2*size-192*mib {
					t.Errorf("the larger restore has a filesystem of %d bytes", got)
				}
				for _, c := range []*volume{v, clone, restored} {
					c.unmount()
				}
				// Beside each other again, in the other order.
				clone.mount()
				v.mount()
				if got, err := os.ReadFile(filepath.Join(clone.target, "own")); err != nil || string(got) != clone.name {
					t.Errorf("the clone holds %q, %v", got, err)
				}
				clone.unmount()
				v.unmount()
				for _, c := range []*volume{v, clone, restored} {
					c.remove()
				}
			})
		}
	}
}
