package block

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

// TestALayerOnAShareLeavesTheMemoryOfTheNodeAlone: with chunks of one page. One with larger chunks is refused: with
// them the first device made the kernel say "Bad page state", and the node died some seconds later.
func TestALayerOnAShareLeavesTheMemoryOfTheNodeAlone(t *testing.T) {
	x := lab.StartNFS(t).Export(t, "ext4")
	dir, local := t.TempDir(), host.NewLocal(host.Exec{})
	options := []string{"vers=3", "proto=tcp", "mountproto=tcp", "addr=127.0.0.1", "hard", "nolock"}
	if err := local.MountFilesystem(bg, "127.0.0.1:"+x.Dir, dir, "nfs", options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := local.Unmount(bg, dir); err != nil {
			t.Error(err)
		}
	})
	r := newRig(t)
	r.dir = dir
	tainted := func() string {
		b, err := os.ReadFile("/proc/sys/kernel/tainted")
		r.must(err)
		return string(b)
	}
	before := tainted()

	const size, rounds = 8 * mib, 20
	base := r.raw("base", size)
	over := func(name string, chunk int64) Slab {
		s := r.raw(name, layer.StoreSize(size, chunk))
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		r.must(err)
		r.must(errors.Join(layer.Format(f, chunk), f.Close()))
		s.Size, s.Chunk = size, chunk
		return s
	}
	sp := spec(over("layer", layer.ShareChunk), base)
	for n := range int64(rounds) { // each time the kernel reads what is in the store
		dev := r.attach(sp)
		f, err := direct(dev.Path, os.O_RDWR)
		r.must(err)
		for i := range n {
			got := aligned(unit)
			_, err := f.ReadAt(got, i*96<<10)
			r.must(err)
			if !bytes.Equal(got, pattern(aligned(unit), i, uint64(i)+1)) {
				t.Errorf("round %d: what was written in round %d is something else", n, i)
			}
		}
		_, err = f.WriteAt(pattern(aligned(unit), n, uint64(n)+1), n*96<<10)
		r.must(errors.Join(err, f.Sync(), f.Close()))
		r.must(r.d.Detach(bg, dev))
	}
	if after := tainted(); after != before {
		t.Errorf("the kernel is tainted (%s, before %s): its log says by what", after, before)
	}

	if _, err := r.d.Attach(bg, spec(over("large", 32<<10), base)); !errors.Is(err, fault.Unsupported) {
		t.Errorf("a layer with chunks of 32 KiB: %v", err)
	}
}
