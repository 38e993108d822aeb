package block

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// stored counts what a layer's slab holds.
func (r *rig) stored(s Slab) int64 {
	r.Helper()
	f, err := direct(s.Path, os.O_RDONLY)
	r.must(err)
	defer f.Close()
	n := int64(0)
	r.must(layer.Exceptions(f, layer.StoreSize(s.Size, s.Chunk), func(int64, int64) error { n++; return nil }))
	return n
}

func TestAHeadIsMergedWhileItIsWritten(t *testing.T) {
	r := newRig(t)
	const size = 4 * mib
	base := r.raw("base", size)
	dev := r.attach(spec(base))
	c := content{}
	r.write(dev.Path, c, 1, every(region, 2, size)...)
	over := r.layer("over", size)
	r.change(over, base)
	r.write(dev.Path, c, 2, every(region, 3, size)...)
	w := r.writer(dev.Path)
	w.further(t)
	r.merge(over, base)
	w.further(t)
	if n := r.stored(over); n != 0 {
		t.Errorf("the merged layer still holds %d chunks", n)
	}
	r.change(over, base) // as long as the manager did not seal it
	w.further(t)
	r.change(base)
	w.further(t)
	if left := r.left(); strings.Contains(left, hash(over.ID, 20)) {
		t.Errorf("the empty layer is still there: %s", left)
	}
	w.end()
	last, err := w.at()
	r.must(err)
	for u := range int64(region) {
		c[u] = last - (last+region-uint64(u))%region
	}
	r.verify("the image", dev.Path, size, c)
	r.detach(dev)
	dev = r.attach(spec(base))
	r.verify("the base alone", dev.Path, size, c)
}

func TestAMiddleLayerIsMergedUnderALiveHead(t *testing.T) {
	for name, at := range map[string]int{"into the base": 2, "into a layer": 1} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			const size = 2 * mib
			slabs, states := r.stack(3, size)
			dev := r.attach(spec(slabs...))
			w := r.writer(dev.Path)
			r.merge(slabs[at:]...)
			w.further(t)
			w.end()
			last, err := w.at()
			r.must(err)
			c := states[0]
			for u := range int64(region) {
				if back := (last + region - uint64(u)) % region; back < last {
					c[u] = last - back
				}
			}
			r.verify("the image", dev.Path, size, c)
			rest := append(append([]Slab{}, slabs[:at]...), slabs[at+1:]...)
			r.change(rest...) // a chain seen through what was merged
			r.merge(rest[at-1:]...)
			r.verify("merged further", dev.Path, size, c)
			rest = append(append([]Slab{}, rest[:at-1]...), rest[at:]...)
			if at > 1 {
				r.change(rest...)
			} else {
				r.change(rest...)
				r.verify("another head", dev.Path, size, c)
			}
			r.detach(dev)
			r.detach(r.attach(spec(rest...)))
			dev = r.attach(spec(rest...))
			r.verify("attached anew", dev.Path, size, c)
			for len(rest) > 1 {
				r.merge(rest...)
				rest = rest[1:]
				r.change(rest...)
				r.verify(fmt.Sprint("with slabs ", len(rest)), dev.Path, size, c)
			}
		})
	}
}

func TestAMergeIsStoppedAndGoesOn(t *testing.T) {
	r := newRig(t)
	const size = 16 * mib
	slabs, states := r.stack(1, size)
	dev := r.attach(spec(slabs...))
	c := states[0]
	for round := range uint64(4) { // with new writes in between
		m, err := r.d.Merge(bg, slabs)
		r.must(err)
		if m.Done {
			t.Fatal("merged too soon for this test")
		}
		r.must(r.d.StopMerge(bg, slabs[0].ID))
		r.must(r.d.StopMerge(bg, slabs[0].ID))
		if strings.Contains(r.tables(), "snapshot-merge") {
			t.Fatalf("it goes on:\n%s", r.tables())
		}
		r.verify("stopped", dev.Path, size, c)
		r.write(dev.Path, c, 10+round, every(int64(round), 61, size)...)
		r.verify("written", dev.Path, size, c)
	}
	left := r.stored(slabs[0])
	r.detach(dev) // and read from disk again
	dev = r.attach(spec(slabs...))
	r.verify("attached again", dev.Path, size, c)
	if n := r.stored(slabs[0]); n != left || n == 0 {
		t.Errorf("the layer has %d chunks, %d before", n, left)
	}
	_, err := r.d.Merge(bg, slabs)
	r.must(err)
	r.d = devices() // a new agent
	r.merge(slabs...)
	r.merge(slabs...)
	r.must(r.d.StopMerge(bg, slabs[0].ID))
	r.verify("merged", dev.Path, size, c)
}

func TestAMergeInterruptedByAReboot(t *testing.T) {
	r := newRig(t)
	const size = 16 * mib
	slabs, states := r.stack(1, size)
	dev := r.attach(spec(slabs...))
	_, err := r.d.Merge(bg, slabs)
	r.must(err)
	r.detach(dev)
	dev = r.attach(spec(slabs...))
	r.verify("after", dev.Path, size, states[0])
	r.merge(slabs...)
	r.change(slabs[1:]...)
	r.verify("merged", dev.Path, size, states[0])
}

func TestAParentThatIsReadIsNotMergedInto(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	slabs, states := r.stack(1, size)
	snap := r.reader("snapshot", slabs[1:]...)
	if _, err := r.d.Merge(bg, slabs); !errors.Is(err, fault.InUse) || !strings.Contains(err.Error(), snap.Path) {
		t.Errorf("merged into what %s reads: %v", snap.Path, err)
	}
	r.verify("snapshot", snap.Path, size, states[1])
	r.detach(snap)
	other := spec(r.layer("clone", size), slabs[1])
	other.Owner = "d/clone"
	clone := r.attach(other)
	if _, err := r.d.Merge(bg, slabs); !errors.Is(err, fault.InUse) {
		t.Errorf("merged into what a clone stands on: %v", err)
	}
	r.detach(clone)
	above := spec(append([]Slab{r.layer("above", size)}, slabs...)...) // reads through the merged one
	above.Owner = "d/above"
	reader := r.attach(above)
	r.merge(slabs...)
	r.verify("above", reader.Path, size, states[0])
	if _, err := r.d.Merge(bg, []Slab{above.Slabs[0], slabs[1]}); !errors.Is(err, fault.InUse) {
		t.Errorf("merged into what the image still uses: %v", err)
	}
}

func TestMergeRefuses(t *testing.T) {
	r := newRig(t)
	const size = mib
	slabs, _ := r.stack(2, size)
	r.must(r.d.StopMerge(bg, "d/unknown"))
	if _, err := r.d.Merge(bg, []Slab{r.layer("x", size), slabs[2]}); !errors.Is(err, fault.NotFound) {
		t.Errorf("a layer without a device: %v", err)
	}
	if _, err := r.d.Merge(bg, []Slab{slabs[0], slabs[2]}); !errors.Is(err, fault.InUse) {
		t.Errorf("a slab that is not the parent: %v", err)
	}
}

func TestGrowthWhileInUse(t *testing.T) {
	for _, depth := range []int{0, 1, 2} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			r := newRig(t)
			const size, larger, largest = 2 * mib, 5*mib + 512, 9 * mib
			slabs, states := r.stack(depth, size)
			c := states[0]
			dev := r.attach(spec(slabs...))
			w := r.writer(dev.Path)
			defer w.end()
			for _, to := range []int64{larger, largest} {
				if _, err := r.d.Grow(bg, dev, to); !errors.Is(err, fault.Corrupt) {
					t.Errorf("grown over a slab that was not: %v", err)
				}
				r.enlarge(&slabs[0], to)
				grown, err := r.d.Grow(bg, dev, to)
				r.must(err)
				again, err := r.d.Grow(bg, dev, to)
				r.must(err)
				if grown.Size != to || again.Size != to || grown.Path != dev.Path {
					t.Errorf("grown to %d as %s, want %d as %s", grown.Size, grown.Path, to, dev.Path)
				}
				w.further(t)
			}
			w.end()
			last, err := w.at()
			r.must(err)
			for u := range int64(region) {
				if back := (last + region - uint64(u)) % region; back < last {
					c[u] = last - back
				}
			}
			r.verify("grown", dev.Path, largest, c)
			r.write(dev.Path, c, 7, every(300, 7, largest)...)
			r.verify("written", dev.Path, largest, c)

			// A layer over what was grown, and one over that.
			r.change(append([]Slab{r.layer("new", largest)}, slabs...)...)
			r.verify("with a layer", dev.Path, largest, c)
			all, err := r.d.Find(bg, owner)
			r.must(err)
			r.detach(all[0])
			dev = r.attach(spec(slabs...))
			r.verify("attached again", dev.Path, largest, c)

			for len(slabs) > 1 { // all of it into the base
				if _, err := r.d.Merge(bg, slabs); slabs[1].Size < largest && !errors.Is(err, fault.Invalid) {
					t.Errorf("merged into a smaller parent: %v", err)
				}
				r.enlarge(&slabs[1], largest)
				r.merge(slabs...)
				r.verify("merged", dev.Path, largest, c)
				slabs = slabs[1:]
				r.change(slabs...)
				r.verify("moved", dev.Path, largest, c)
			}
			r.detach(dev)
			dev = r.attach(spec(slabs...))
			r.verify("the base alone", dev.Path, largest, c)
		})
	}
}

// A layer that grew stands on a pad, and that on the device of a layer, which was
// merged since and stayed as small as it was.
func TestAGrownLayerIsMergedOverOneThatWasMerged(t *testing.T) {
	r := newRig(t)
	const size, larger = 2 * mib, 6 * mib
	slabs, states := r.stack(2, size)
	c := states[0]
	dev := r.attach(spec(slabs...))
	r.enlarge(&slabs[0], larger)
	_, err := r.d.Grow(bg, dev, larger)
	r.must(err)
	r.write(dev.Path, c, 7, every(300, 7, larger)...)
	r.merge(slabs[1:]...)
	slabs = []Slab{slabs[0], slabs[2]}
	r.change(slabs...)
	r.verify("with the middle merged", dev.Path, larger, c)
	r.enlarge(&slabs[1], larger)
	r.merge(slabs...)
	r.verify("merged", dev.Path, larger, c)
	r.change(slabs[1])
	r.verify("the base alone", dev.Path, larger, c)
}
