package node

import (
	"errors"
	"os"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// After a final error the kubelet forgets a volume whose staging it was not
// sure of: nobody would unstage it, and it could never be detached.
func TestNoErrorIsFinalWhileTheImageIsStaged(t *testing.T) {
	w := newWorld(t)
	file, tree := w.volume("v", testSize), w.handle("tree")
	w.ok(os.Mkdir(w.path("tree"), 0o755))
	w.set(tree, image.Staging{Handle: tree, Layout: image.LayoutDirectory, Size: testSize, Slabs: []image.SlabRef{{ID: "tree"}}})
	for _, h := range []image.Handle{file, tree} {
		w.stage(h, "")
		for name, change := range map[string]func(*StageRequest){
			"elsewhere": func(r *StageRequest) { r.StagingPath = w.path("elsewhere") },
			"read-only": func(r *StageRequest) { r.MountFlags = []string{"ro"} },
			"block":     func(r *StageRequest) { r.Access.Block, r.StagingPath = true, w.staging(h) },
		} {
			r := w.request(h, "")
			change(&r)
			err := w.node.Stage(bg, r)
			if !errors.Is(err, fault.Unavailable) || !errors.Is(err, fault.Exists) && !errors.Is(err, fault.Invalid) {
				t.Errorf("%s %s: %v is %v", h.Image, name, err, fault.KindOf(err))
			}
		}
		gone := fault.New(fault.NotFound, "no image")
		w.mu.Lock()
		w.down = gone
		w.mu.Unlock()
		w.fails(w.node.Stage(bg, w.request(h, "")), fault.Unavailable, "no image")
		w.unstage(h)
		w.fails(w.node.Stage(bg, w.request(h, "")), fault.NotFound, "no image") // nothing is left
		w.mu.Lock()
		w.down = nil
		w.mu.Unlock()
	}
}

func TestAFailedStagingDetachesWhatItAttached(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.ok(os.Truncate(w.path("v"), 5<<20))
	w.fails(w.node.Stage(bg, w.request(h, "")), fault.Corrupt, "5242880")
	if w.slabs.of("v") {
		t.Fatal("the error is final, and the slab is still attached")
	}
	w.slabs.fail(fault.New(fault.InUse, "still open"))
	w.fails(w.node.Stage(bg, w.request(h, "")), fault.Unavailable, "5242880")
	w.slabs.fail(nil)
	w.ok(os.Truncate(w.path("v"), 16<<20))
	w.stage(h, host.Ext4)
	if !w.slabs.of("v") {
		t.Fatal("it is staged without its slab")
	}
	w.unstage(h)
	if w.slabs.of("v") {
		t.Fatal("it is unstaged, and its slab is attached")
	}
}
