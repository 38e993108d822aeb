package block

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/lab"
)

// flat is a raw slab with what a chain holds, in place of the chain's head.
func (r *rig) flat(name string, chain ...Slab) Slab {
	r.Helper()
	s := r.raw(name, chain[0].Size)
	s.Replaces = chain[0].ID
	dev := r.reader(name+"-reader", chain...)
	in, err := os.Open(dev.Path)
	r.must(err)
	defer in.Close()
	out, err := os.OpenFile(s.Path, os.O_RDWR, 0)
	r.must(err)
	defer out.Close()
	_, err = io.Copy(out, in)
	r.must(err)
	r.must(out.Sync())
	r.must(in.Close())
	r.detach(dev)
	return s
}

// unused checks that the kernel has let a slab go, and deletes it.
func (r *rig) unused(s Slab) {
	r.Helper()
	loops, err := host.NewLocal(host.Exec{}).Loops(bg, func(lp host.Loop) bool { return lp.Backing == s.Path })
	r.must(err)
	if len(loops) > 0 {
		r.Fatalf("slab %s is still attached as %s", s.ID, loops[0].Path)
	}
	r.must(os.Remove(s.Path))
}

// A volume that is written and a clone stand over a snapshot. Its chain is made one
// raw slab, and the slabs below it are deleted.
func TestARawSlabComesInPlaceOfALayerInUse(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	slabs, states := r.stack(3, size)
	dev := r.attach(spec(slabs...))
	own := r.layer("clone", size)
	clone := func(below ...Slab) Spec {
		return Spec{Owner: "d/clone", Use: Raw, Slabs: append([]Slab{own}, below...), Size: size}
	}
	other := r.attach(clone(slabs[1:]...))
	c := states[1].copy()
	r.write(other.Path, c, 77, every(region, 7, size)...)
	w := r.writer(dev.Path)
	flat := r.flat("flat", slabs[1:]...)
	w.further(t)

	r.change(slabs[0], flat)
	r.must(r.d.Switch(bg, []Spec{clone(flat)}))
	r.change(slabs[0], flat) // again
	w.further(t)
	for _, s := range slabs[1:] {
		r.unused(s)
	}
	r.verify("the clone", other.Path, size, c)
	flat.Replaces = "" // it is over
	r.d = devices()
	r.change(slabs[0], flat)
	if again := r.attach(clone(flat)); again.Path != other.Path {
		t.Errorf("the clone is at %s and was at %s", again.Path, other.Path)
	}
	snap := r.reader("snapshot", flat)
	r.verify("the snapshot", snap.Path, size, states[1])
	r.detach(snap)

	r.detach(other) // then the volume's layer can be merged
	over := r.layer("over", size)
	r.change(over, slabs[0], flat)
	w.further(t)
	r.merge(slabs[0], flat)
	r.change(over, flat)
	w.further(t)
	w.end()
	last, err := w.at()
	r.must(err)
	v := states[0]
	for u := range int64(region) {
		if back := (last + region - uint64(u)) % region; back < last {
			v[u] = last - back
		}
	}
	r.verify("the volume", dev.Path, size, v)
	r.detach(dev)
	r.verify("attached anew", r.attach(spec(over, flat)).Path, size, v)
}

// What has the name of the layer, and is not one that never changes, is left alone.
func TestARawSlabComesInPlaceOfNothingElse(t *testing.T) {
	r := newRig(t)
	const size = mib
	slabs, states := r.stack(2, size)
	dev := r.attach(spec(slabs...))
	flat := r.flat("flat", slabs[1:]...)
	_, err := r.d.Merge(bg, slabs[1:])
	r.must(err)
	before := r.tables()
	if err := r.d.Switch(bg, []Spec{spec(slabs[0], flat)}); fault.KindOf(err) != fault.InUse {
		t.Errorf("while its layer is merged: %v", err)
	}
	if now := r.tables(); now != before {
		t.Errorf("it was refused, and the tables were\n%sand are\n%s", before, now)
	}
	r.verify("the volume", dev.Path, size, states[0])
}

// An agent is killed before and after each call of such a switch.
func TestAnAgentKilledWhileARawSlabComesInPlaceOfALayer(t *testing.T) {
	lab.Need(t)
	for kill, more := 1, true; more; kill++ {
		t.Run(fmt.Sprint(kill), func(t *testing.T) {
			r := newRig(t)
			const size = mib
			slabs, states := r.stack(2, size)
			dev := r.attach(spec(slabs...))
			flat := r.flat("flat", slabs[1:]...)
			more = r.perish("switch", spec(slabs[0], flat), kill)
			r.d = devices()
			_, err := r.d.Recover(bg)
			r.must(err)
			if tables := r.tables(); strings.Contains(tables, "suspended=true") {
				t.Fatalf("killed at %d: left is\n%s", kill, tables)
			}
			r.verify("after the death", dev.Path, size, states[0])
			r.change(slabs[0], flat)
			for _, s := range slabs[1:] {
				r.unused(s)
			}
			r.verify("switched", dev.Path, size, states[0])
			r.detach(dev)
			r.verify("attached anew", r.attach(spec(slabs[0], flat)).Path, size, states[0])
		})
	}
}
