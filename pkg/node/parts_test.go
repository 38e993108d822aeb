package node

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// A container's subPath is a bind mount of its own, which outlives the target
// that it was made from: a pod would go on to write what was said to be detached.
func TestAMountedSubPathKeepsTheImageStaged(t *testing.T) {
	w := newWorld(t)
	tree, beside := w.handle("tree"), w.handle("tree2") // one name begins with the other
	for _, h := range []image.Handle{tree, beside} {
		w.ok(os.Mkdir(w.path(h.Image), 0o755))
		w.set(h, image.Staging{Handle: h, Layout: image.LayoutDirectory, Size: testSize, Slabs: []image.SlabRef{{ID: h.Image}}})
	}
	file := w.volume("v", testSize)
	for _, h := range []image.Handle{tree, beside, file} {
		w.stage(h, host.Ext4)
		w.ok(w.node.Publish(bg, w.publication(h, "target")))
		part := w.path("subpath")
		w.ok(os.Mkdir(w.path("target/sub"), 0o755))
		w.ok(os.Mkdir(part, 0o755))
		w.ok(unix.Mount(w.path("target/sub"), part, "", unix.MS_BIND, ""))
		w.ok(w.node.Unpublish(bg, h, w.path("target")))
		if h == beside {
			w.unstage(tree) // the other one's part does not count
		}
		w.fails(w.node.Unstage(bg, h, w.staging(h)), fault.InUse, part)
		w.write(filepath.Join(w.staging(h), "f"), "still staged")
		w.ok(unix.Unmount(part, 0))
		w.ok(os.Remove(part))
		if h != tree {
			w.unstage(h)
		}
	}
}
