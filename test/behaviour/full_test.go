package behaviour

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// fillUp lets a file that is not Quarry's take all space but leave bytes.
func fillUp(t *testing.T, p place, leave int64) (free func()) {
	t.Helper()
	path := filepath.Join(p.path, "foreign")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	var at int64
	for step := 64 * mib; step >= 4096; {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		if room := int64(st.Bavail)*st.Bsize - leave; room < step {
			step /= 2
			continue
		}
		switch err := unix.Fallocate(int(f.Fd()), 0, at, step); {
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		case err != nil:
			t.Fatal(err)
		default:
			at += step
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFullDiskIsSaidClearlyCleanedUpAndForgottenOnceThereIsSpace(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			p := on(t, "small", fs, 640*mib)
			// Twice as much may be promised as there is: so the disk itself is
			// what says no, in the middle of the work.
			p.more = "  overcommit: 100\n"
			r := newRig(t, p)
			v := r.volume("small", "v", 96*mib, filesystem("ext4")).mount()
			sum := fill(t, filepath.Join(v.target, "data"), 7, 48*mib)
			v.unmount()
			snap := r.snapshot(v, "s")
			doomed := []*volume{r.volume("small", "d0", 16*mib, filesystem("ext4")), r.volume("small", "d1", 16*mib, filesystem("ext4"))}
			fresh := r.volume("small", "fresh", 320*mib, filesystem("xfs"))
			doomedSnap := r.snapshot(doomed[0], "ds")

			// Room for tags, and for the beginning of a copy.
			free := fillUp(t, p, 24*mib)
			before := content(t, p, "slabs")
			copies := map[string]func() error{
				"snapshot": func() error {
					_, err := call(r, r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: "s2", SourceVolumeId: v.id})
					return err
				},
				"clone": func() error { _, err := call(r, r.CreateVolume, cloneRequest(v, "small", "c", 128*mib)); return err },
				"restore": func() error {
					req := creation("small", "r", 96*mib, filesystem("ext4"))
					req.VolumeContentSource = fromSnapshot(snap)
					_, err := call(r, r.CreateVolume, req)
					return err
				},
			}
			if fs == "ext4" { // on XFS they share their extents with the source
				for what, try := range copies {
					t.Run(what+" with a little space", func(t *testing.T) {
						refusal(t, try(), codes.ResourceExhausted, "small")
						r.eventually("what was begun to be gone", func() error { return same(before, content(t, p, "slabs", "tmp", "trash")) })
					})
				}
			}
			free()

			free = fillUp(t, p, 0)
			before = content(t, p, "slabs")
			everything := map[string]func() error{
				"create": func() error {
					_, err := call(r, r.CreateVolume, creation("small", "n", 32*mib, filesystem("ext4")))
					return err
				},
				"expand": func() error {
					_, err := call(r, r.ControllerExpandVolume, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 128 * mib}})
					return err
				},
				"attach": func() error {
					_, err := call(r, r.ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: nodeID, VolumeCapability: v.cap})
					return err
				},
			}
			for what, try := range copies {
				everything[what] = try
			}
			t.Run("format with none", func(t *testing.T) {
				err := fresh.stage()
				refusal(t, err, codes.ResourceExhausted, "small")
				if len(r.loops())+len(r.mounts()) > 0 {
					t.Errorf("a refused stage left %v, %v", r.loops(), r.mounts())
				}
			})
			for what, try := range everything {
				t.Run(what+" with none", func(t *testing.T) {
					err := try()
					if err == nil && what == "attach" { // it may fit into a block that is there
						return
					}
					refusal(t, err, codes.ResourceExhausted, "small")
					if msg := err.Error(); !strings.Contains(msg, "space") && !strings.Contains(msg, "left to promise") {
						t.Errorf("the answer %q does not say that space is what lacks", msg)
					}
				})
			}
			r.eventually("what was begun to be gone", func() error { return same(before, content(t, p, "slabs", "tmp", "trash")) })
			must(r, r.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: nodeID})

			// Deleting needs no space, and gives it back.
			doomed[0].remove()
			doomed[1].remove()
			r.removeSnapshot(doomedSnap)
			r.eventually("the deleted slabs to be gone", func() error {
				for _, d := range doomed {
					if _, err := os.Lstat(slabFile(p, d.image())); !errors.Is(err, os.ErrNotExist) {
						return errors.Join(err, errors.New("a slab is there still"))
					}
				}
				return nil
			})
			free()
			for what, try := range everything {
				r.eventually(what+" with space again", try) // XFS gives the space of a deleted file back later
			}
			fresh.works()
			v.mount()
			if got := checksum(t, filepath.Join(v.target, "data"), 48*mib); got != sum {
				t.Error("the volume that was there all the time has changed")
			}
			v.unmount()
		})
	}
}
