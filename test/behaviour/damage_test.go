package behaviour

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/quarry-csi/quarry/pkg/admin"
)

// usesOf are the ways to use a volume's content, each once.
func usesOf(r *rig, v *volume, domain string) map[string]func() error {
	return map[string]func() error{
		"publish or stage": v.stage,
		"snapshot": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "of-" + v.name, SourceVolumeId: v.id})
			return err
		},
		"clone": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.CreateVolume(ctx, cloneRequest(v, domain, "clone-of-"+v.name, 32*mib))
			return err
		},
		"expand": func() error {
			ctx, cancel := once()
			defer cancel()
			_, err := r.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 48 * mib}})
			return err
		},
	}
}

// restoresOf a snapshot, into its domain and into another.
func restoresOf(r *rig, snapshot string) map[string]func() error {
	out := map[string]func() error{}
	for _, p := range r.places {
		out["restore into "+p.name] = func() error {
			ctx, cancel := once()
			defer cancel()
			req := creation(p.name, "restored-in-"+p.name, 32*mib, filesystem("ext4"))
			req.VolumeContentSource = fromSnapshot(snapshot)
			_, err := r.CreateVolume(ctx, req)
			return err
		}
	}
	return out
}

// Slabs that somebody truncated, replaced or removed, at run time and before
// a start.
func TestASlabDamagedBehindOurBackIsRefusedAndNothingElse(t *testing.T) {
	damages := map[string]func(t *testing.T, path string){
		"truncated": func(t *testing.T, path string) {
			if err := os.Truncate(path, 8*mib); err != nil {
				t.Fatal(err)
			}
		},
		"replaced by a directory": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
				t.Fatal(err)
			}
		},
		"replaced by a link": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)); err != nil {
				t.Fatal(err)
			}
		},
		"replaced by a fifo": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
		},
		"removed": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
	}
	one, two := on(t, "one", "ext4", 1<<30), on(t, "two", "xfs", 512*mib)
	r := newRig(t, one, two)
	v, w := r.volume("one", "v", 32*mib, filesystem("ext4")), r.volume("two", "w", 32*mib, filesystem("ext4"))
	type pair struct {
		name     string
		damaged  *volume
		snapshot string
	}
	var pairs []pair
	for name := range damages {
		damaged := r.volume("one", "damaged "+name, 32*mib, filesystem("ext4"))
		damaged.name = strings.ReplaceAll(damaged.name, " ", "-")
		damaged.works()
		pairs = append(pairs, pair{name, damaged, r.snapshot(damaged, "snapshot "+name)})
	}
	for _, p := range pairs {
		_, id, _ := strings.Cut(p.snapshot, "/")
		damages[p.name](t, slabFile(one, p.damaged.image()))
		damages[p.name](t, slabFile(one, id))
	}
	for _, when := range []string{"at run time", "after a restart"} {
		for _, p := range pairs {
			_, id, _ := strings.Cut(p.snapshot, "/")
			for image, uses := range map[string]map[string]func() error{p.damaged.image(): usesOf(r, p.damaged, "one"), id: restoresOf(r, p.snapshot)} {
				for what, try := range uses {
					t.Run(p.name+"/"+what+"/"+when, func(t *testing.T) {
						before := content(t, one, "slabs")
						refusal(t, try(), codes.DataLoss, image, "kubectl quarry check")
						r.eventually("what was begun to be gone", func() error { return same(before, content(t, one, "slabs")) })
					})
				}
			}
			// The attachment that came before the damage was noticed goes.
			must(r, r.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: p.damaged.id, StagingTargetPath: filepath.Join(r.Kubelet(), "plugins", p.damaged.name, "globalmount")})
			must(r, r.ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: p.damaged.id, NodeId: nodeID})
		}
		if len(r.loops())+len(r.mounts()) > 0 {
			t.Errorf("%s: left are %v, %v", when, r.loops(), r.mounts())
		}
		found := map[string]string{}
		for _, f := range ask[admin.Checked](r, "check").Findings {
			found[f.Object] += f.Message
		}
		for _, p := range pairs {
			if m := found[p.damaged.image()]; !strings.Contains(m, "delete the volume") && !strings.Contains(m, "delete it") {
				t.Errorf("%s: check says of the volume that is %s: %q", when, p.name, m)
			}
		}
		v.works()
		w.works()
		if when == "at run time" {
			r.restart()
		}
	}
	// Damaged ones can be deleted; what is not Quarry's to remove says so.
	for _, p := range pairs {
		p.damaged.remove()
		r.removeSnapshot(p.snapshot)
	}
	if data, err := os.ReadFile("/etc/passwd"); err != nil || len(data) == 0 {
		t.Errorf("the file behind the link: %d bytes, %v", len(data), err)
	}
	v.works()
}

// halve cuts a tag in half.
func halve(t *testing.T, tag string) {
	t.Helper()
	info, err := os.Stat(tag)
	if err == nil {
		err = os.Truncate(tag, info.Size()/2)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// tagsOf are the tags whose names begin so.
func tagsOf(t *testing.T, p place, prefix string) []string {
	t.Helper()
	tags, err := filepath.Glob(filepath.Join(p.path, "tags", prefix[:1], prefix+"*"))
	if err != nil || len(tags) == 0 {
		t.Fatalf("no tags %s*: %v", prefix, err)
	}
	return tags
}

func TestATagCutInHalfBreaksOneImageOnly(t *testing.T) {
	one, two := on(t, "one", "ext4", 1<<30), on(t, "two", "xfs", 512*mib)
	r := newRig(t, one, two)
	v, w := r.volume("one", "v", 32*mib, filesystem("ext4")), r.volume("two", "w", 32*mib, filesystem("ext4"))
	broken := r.volume("one", "broken", 32*mib, filesystem("ext4"))
	broken.works()
	source := r.volume("one", "source", 32*mib, filesystem("ext4"))
	source.works()
	snap := r.snapshot(source, "snap")
	_, snapImage, _ := strings.Cut(snap, "/")
	req := creation("one", "described", 32*mib, filesystem("ext4"))
	req.Parameters["csi.storage.k8s.io/pvc/name"], req.Parameters["csi.storage.k8s.io/pvc/namespace"] = "claim", "space"
	described := r.create(req)
	attached := r.volume("one", "attached", 32*mib, filesystem("ext4"))
	if err := attached.stage(); err != nil {
		t.Fatal(err)
	}
	r.stop()

	for _, prefix := range []string{"i." + broken.image(), "i." + snapImage, "d." + described.image(), "a." + attached.image()} {
		tags := tagsOf(t, one, prefix)
		halve(t, tags[len(tags)-1])
	}
	before := content(t, one, "slabs")
	r.start()
	for what, try := range usesOf(r, broken, "one") {
		t.Run("record of a volume/"+what, func(t *testing.T) { refusal(t, try(), codes.DataLoss, broken.image(), "kubectl quarry check") })
	}
	for what, try := range restoresOf(r, snap) {
		t.Run("record of a snapshot/"+what, func(t *testing.T) { refusal(t, try(), codes.DataLoss, snapImage, "kubectl quarry check") })
	}
	t.Run("the name of a broken image", func(t *testing.T) {
		ctx, cancel := once()
		defer cancel()
		_, err := r.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snap", SourceVolumeId: source.id})
		refusal(t, err, codes.DataLoss, snapImage, "kubectl quarry check")
		_, err = r.CreateVolume(ctx, creation("one", "broken", 32*mib, filesystem("ext4")))
		refusal(t, err, codes.DataLoss, broken.image(), "kubectl quarry check")
	})
	t.Run("attachment", func(t *testing.T) {
		refusal(t, usesOf(r, attached, "one")["snapshot"](), codes.DataLoss, "a."+attached.image(), "kubectl quarry check")
		ctx, cancel := once()
		defer cancel()
		// Somebody may be using it.
		_, err := r.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: attached.id})
		refusal(t, err, codes.FailedPrecondition, "attached to "+nodeID, "detach it first")
	})
	described.works()
	if err := same(before, content(t, one, "slabs")); err != nil {
		t.Errorf("slabs changed: %v", err)
	}
	text, status := r.kubectl("check")
	if status != 2 {
		t.Errorf("kubectl-quarry check ended with status %d, not 2", status)
	}
	for _, id := range []string{broken.image(), snapImage, attached.image()} {
		if !strings.Contains(text, id) {
			t.Errorf("kubectl-quarry check does not name %s:\n%s", id, text)
		}
	}
	attached.unmount() // it is known now who used it
	attached.works()
	v.works()
	w.works()
	source.works()
	broken.remove()
	r.removeSnapshot(snap)
	r.eventually("the space to be back", func() error {
		for _, id := range []string{broken.image(), snapImage} {
			if _, err := os.Lstat(slabFile(one, id)); !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("slab %s: %v", id, err)
			}
		}
		return nil
	})
	r.snapshot(source, "snap") // the name is free again
}
