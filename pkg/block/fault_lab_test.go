package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

// frail makes a layer whose slab is a block device that can be broken from a
// chunk of the store on, and mended.
func (r *rig) frail(name string, size int64) (_ Slab, broken func(from int64), mended func()) {
	s, room, disk, put := r.replaceable(name, size)
	return s, func(from int64) {
			at := from * s.Chunk / 512
			put(fmt.Sprintf("0 %d linear %s 0\n%d %d error\n", at, disk, at, room/512-at))
		}, func() {
			put(fmt.Sprintf("0 %d linear %s 0\n", room/512, disk))
		}
}

// full makes a layer whose slab is a block device that can be made to refuse writes.
func (r *rig) full(name string, size int64) (_ Slab, refuse func(bool)) {
	s, room, disk, put := r.replaceable(name, size)
	refuse = func(refuses bool) {
		table := "linear %[2]s 0\n"
		if refuses {
			table = "flakey %[2]s 0 0 3600 1 error_writes\n"
		}
		put(fmt.Sprintf("0 %[1]d "+table, room/512, disk))
	}
	r.Cleanup(func() { refuse(false) })
	return s, refuse
}

// replaceable makes a layer whose slab is a device with a table that a test may put.
func (r *rig) replaceable(name string, size int64) (_ Slab, room int64, disk string, put func(table string)) {
	r.Helper()
	chunk := layer.ChunkSize(size)
	room = layer.StoreSize(size, chunk)
	disk = lab.Loop(r.T, room)
	s := Slab{ID: "d/" + name, Path: "/dev/mapper/" + name, Size: size, Chunk: chunk}
	setup := func(stdin string, args ...string) {
		r.Helper()
		cmd := exec.Command("dmsetup", args...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			r.Fatalf("dmsetup %v: %v\n%s", args, err, out)
		}
	}
	fine := fmt.Sprintf("0 %d linear %s 0\n", room/512, disk)
	setup(fine, "create", name)
	r.Cleanup(func() {
		all, err := r.d.All(bg)
		for _, dev := range all {
			err = errors.Join(err, r.d.Detach(bg, dev))
		}
		if err := errors.Join(err, r.d.Collect(bg, "d")); err != nil {
			r.Error(err)
		}
		setup("", "remove", "--retry", name)
	})
	f, err := os.OpenFile(s.Path, os.O_RDWR, 0)
	r.must(err)
	r.must(layer.Format(f, chunk))
	r.must(f.Close())
	return s, room, disk, func(table string) {
		setup(table, "load", name)
		setup("", "suspend", "--nolockfs", "--noflush", name)
		setup("", "resume", name)
	}
}

func TestAStoreThatFailsKeepsWhatWasAcknowledged(t *testing.T) {
	r := newRig(t)
	const size = 16 * mib
	base := r.raw("base", size)
	over, broken, mended := r.frail("frail", size)
	dev := r.attach(spec(base))
	c := content{}
	r.write(dev.Path, c, 1, every(0, 2*per, size)...)
	before := c.copy()
	r.change(over, base)
	r.write(dev.Path, c, 2, every(0, 5*per, size)...)
	broken(130)
	f, err := direct(dev.Path, os.O_RDWR)
	r.must(err)
	for u := int64(per); ; u += 5 * per {
		if _, err = f.WriteAt(pattern(aligned(unit), u, 3), u*unit); err != nil {
			break
		}
		if c[u] = 3; u > size/unit {
			t.Fatal("no write fails")
		}
	}
	f.Close()

	if _, err := r.d.Attach(bg, spec(over, base)); !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "kubectl quarry fix") {
		t.Errorf("attached again: %v", err)
	}
	// The kernel would show the base instead of the image from now on.
	if _, err := r.d.Merge(bg, []Slab{over, base}); !errors.Is(err, fault.Corrupt) {
		t.Errorf("an invalid layer is merged: %v", err)
	}
	if tables := r.tables(); strings.Contains(tables, "snapshot-merge") || strings.Contains(tables, "suspended=true") {
		t.Errorf("left is\n%s", tables)
	}
	found, err := r.d.Find(bg, owner)
	r.must(err)
	r.must(r.d.Detach(bg, found[0]))
	mended()
	if _, err := r.d.Attach(bg, spec(over, base)); !errors.Is(err, fault.Corrupt) {
		t.Errorf("attached before the repair: %v", err)
	}
	snap := r.reader("base", base)
	r.verify("the snapshot below", snap.Path, size, before)
	r.detach(snap)

	store, err := direct(over.Path, os.O_RDWR)
	r.must(err)
	_, err = layer.Repair(store, layer.StoreSize(size, over.Chunk))
	r.must(errors.Join(err, store.Close()))
	dev = r.attach(spec(over, base))
	r.verify("repaired", dev.Path, size, c)
	r.merge(over, base)
	r.change(base)
	r.verify("merged", dev.Path, size, c)
}

func TestAMergeThatFailsLosesNothing(t *testing.T) {
	r := newRig(t)
	const size = 16 * mib
	base := r.raw("base", size)
	over, broken, mended := r.frail("frail", size)
	dev := r.attach(spec(over, base))
	c := content{}
	r.write(dev.Path, c, 2, every(0, 2*per, size)...)
	broken(100) // merging goes from the end
	var err error
	waitFor(t, func() bool {
		var m Merge
		m, err = r.d.Merge(bg, []Slab{over, base})
		if m.Done {
			t.Fatal("merged from a broken store")
		}
		return err != nil
	})
	if !errors.Is(err, fault.Corrupt) {
		t.Errorf("merge: %v", err)
	}
	if err := r.d.StopMerge(bg, over.ID); !errors.Is(err, fault.Corrupt) {
		t.Errorf("a merge that failed is stopped: %v", err)
	}
	mended()
	r.verify("mended", dev.Path, size, c)
	r.write(dev.Path, c, 3, every(0, 10*per, size)...)
	r.detach(dev)
	dev = r.attach(spec(over, base))
	r.verify("attached again", dev.Path, size, c)
	r.merge(over, base)
	r.verify("merged", dev.Path, size, c)
}

func TestWhatADeadAgentLeftIsTakenOver(t *testing.T) {
	r := newRig(t)
	const size = mib
	slabs, states := r.stack(1, size)
	h := r.d.Host
	top, err := h.MappedByUUID(bg, topUUID(Raw, owner))
	r.must(err)
	over, err := h.MappedByUUID(bg, slabUUID(slabs[0].ID))
	r.must(err)
	for name, suspended := range map[string][]host.Mapped{"the top": {*top}, "the layer": {*over}, "both": {*top, *over}} {
		for _, m := range suspended {
			r.must(h.SuspendMapped(bg, m, false))
		}
		if name == "both" {
			resumed, err := devices().Recover(bg)
			r.must(err)
			if len(resumed) != 2 {
				t.Errorf("resumed %v", resumed)
			}
		}
		dev := r.attach(spec(slabs...))
		r.verify("after "+name+" was suspended", dev.Path, size, states[0])
	}
	// A table that was loaded and never put in force.
	r.must(h.LoadMapped(bg, *top, false, []host.Target{{Length: size, Type: "zero"}}))
	r.change(slabs...)
	if tables := r.tables(); strings.Contains(tables, "inactive=true") {
		t.Errorf("left is\n%s", tables)
	}
	dev := r.attach(spec(slabs...))
	r.verify("with a table that was not put in force", dev.Path, size, states[0])
	r.detach(dev)

	// Devices without tables, and without a top.
	for _, uuid := range []string{topUUID(Raw, owner), slabUUID(slabs[0].ID)} {
		run(t, "dmsetup", "create", nameOf(uuid), "--uuid", uuid, "--notable")
	}
	dev = r.attach(spec(slabs...))
	r.verify("over devices without tables", dev.Path, size, states[0])
	top, err = h.MappedByUUID(bg, topUUID(Raw, owner))
	r.must(err)
	r.must(h.RemoveMapped(bg, *top))
	resumed, err := devices().Recover(bg)
	if left := r.left(); err != nil || len(resumed) > 0 || left != "" {
		t.Errorf("recovered %v, %v; left is %q", resumed, err, left)
	}
}

// recorder notes what changes tables, suspends and flushes.
type recorder struct {
	kernel
	log []string
}

func (k *recorder) SuspendAll(ctx context.Context, m []host.Mapped, limit time.Duration) (*host.Suspension, error) {
	k.log = append(k.log, "suspend")
	return k.kernel.SuspendAll(ctx, m, limit)
}

func (k *recorder) LoadMapped(ctx context.Context, m host.Mapped, readOnly bool, table []host.Target) error {
	k.log = append(k.log, "load")
	return k.kernel.LoadMapped(ctx, m, readOnly, table)
}

func (k *recorder) FlushDevice(ctx context.Context, path string) error {
	k.log = append(k.log, "flush "+path)
	return k.kernel.FlushDevice(ctx, path)
}

// A flush of a layer goes to its store only: what the old head has in its cache
// when a layer comes over it would never be flushed again.
func TestTheOldHeadIsFlushedWhileNothingIsWritten(t *testing.T) {
	r := newRig(t)
	const size = mib
	base, first, second := r.raw("base", size), r.layer("first", size), r.layer("second", size)
	dev := r.attach(spec(base))
	for _, slabs := range [][]Slab{{first, base}, {second, first, base}} {
		w, err := r.d.look(bg)
		r.must(err)
		head := w.path(read(*w.uuid(topUUID(Raw, owner))).under)
		k := &recorder{kernel: r.d.Host}
		r.d.kernel = k
		r.change(slabs...)
		r.d.kernel = nil
		suspend, load := slices.Index(k.log, "suspend"), slices.Index(k.log, "load")
		if suspend < 0 || load < suspend || !slices.Contains(k.log[suspend:load], "flush "+head) {
			t.Errorf("the old head is %s: %v", head, k.log)
		}
	}
	r.verify("the image", dev.Path, size, nil)
}

// Why Grow loads a layer's table over another origin only while the layer is
// suspended: what is written between the load and the resume is lost. Over the same
// origin the kernel hands its exceptions on.
func TestWhatIsWrittenAfterAStoreWasReadIsLost(t *testing.T) {
	r := newRig(t)
	const size = mib
	base, over := r.raw("base", size), r.layer("over", size)
	dev := r.attach(spec(over, base))
	c := content{}
	r.write(dev.Path, c, 1, 0)
	w, err := r.d.look(bg)
	r.must(err)
	m := *w.uuid(slabUUID(over.ID))
	in := read(m)

	r.must(r.d.Host.LoadMapped(bg, m, false, layered("snapshot", in.under, in.store, in.chunk, size)))
	r.write(dev.Path, c, 2, per)
	r.must(r.d.Host.ResumeMapped(bg, m))
	r.verify("over the same origin", dev.Path, size, c)

	pad, err := r.d.pad(bg, w, m.UUID, in.under, size, 2*size)
	r.must(err)
	r.must(r.d.Host.LoadMapped(bg, m, false, layered("snapshot", pad, in.store, in.chunk, size)))
	lost := c.copy()
	r.write(dev.Path, c, 3, 2*per)
	r.must(r.d.Host.ResumeMapped(bg, m))
	r.verify("over another origin", dev.Path, size, lost)
}

// A table that the kernel takes and then refuses, when it has suspended the device
// for it, leaves nothing suspended.
func TestADeviceWhoseTableIsRefusedGoesOn(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	base := r.raw("base", size)
	dev := r.attach(spec(base))
	c := content{}
	r.write(dev.Path, c, 1, every(0, 3, size)...)
	w, err := r.d.look(bg)
	r.must(err)
	m, under := *dev.mapped, read(*dev.mapped).under
	if _, err := r.d.change(bg, w, m, false, linear(under, 2*size)); err == nil {
		t.Fatal("the kernel takes a table that goes over the end of what is below")
	}
	r.verify("after the refusal", dev.Path, size, c)
	now, err := r.d.host().MappedByUUID(bg, m.UUID)
	r.must(err)
	if now == nil || now.Suspended || now.Inactive {
		t.Errorf("it was left as %+v", now)
	}
}

// A layer's device that is left because somebody looks at it is not used again: what
// the kernel remembers of the store may be out of date.
func TestADeviceThatIsLeftIsNotUsedAgain(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	slabs, states := r.stack(1, size)
	dev := r.attach(spec(slabs...))
	w, err := r.d.look(bg)
	r.must(err)
	left := w.uuid(slabUUID(slabs[0].ID))
	f, err := os.Open(left.Path)
	r.must(err)
	defer f.Close()
	r.detach(dev)
	if !strings.Contains(r.left(), hash(slabs[0].ID, 20)) {
		t.Fatal("the device that is open was removed: the test tries nothing")
	}
	if _, err := r.d.Attach(bg, spec(slabs...)); !errors.Is(err, fault.InUse) {
		t.Errorf("attached over what was left: %v", err)
	}
	r.must(f.Close())
	dev = r.attach(spec(slabs...))
	r.verify("made anew", dev.Path, size, states[0])
}

// A power cut in the middle of a write to an area of metadata leaves exceptions behind
// a gap. The kernel would keep them, and a merge into the layer close the gap.
func TestEveryLayerIsSettledBeforeTheKernelReadsIt(t *testing.T) {
	for name, attach := range map[string]func(*rig, []Slab) Device{
		"in use": func(r *rig, slabs []Slab) Device { return r.attach(spec(slabs...)) },
		"read":   func(r *rig, slabs []Slab) Device { return r.reader("copy", slabs...) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			const size = 2 * mib
			slabs, states := r.stack(2, size)
			r.detach(r.attach(spec(slabs...)))
			var offsets []int64
			for _, s := range slabs[:2] {
				f, err := os.OpenFile(s.Path, os.O_RDWR, 0)
				r.must(err)
				at := s.Chunk + (r.stored(s)+3)*16
				_, err = f.WriteAt([]byte{1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0}, at)
				r.must(errors.Join(err, f.Sync(), f.Close()))
				offsets = append(offsets, at)
			}
			dev := attach(r, slabs)
			r.verify("the image", dev.Path, size, states[0])
			for i, at := range offsets {
				f, err := direct(slabs[i].Path, os.O_RDONLY)
				r.must(err)
				b := aligned(unit)
				_, err = f.ReadAt(b, at/unit*unit)
				r.must(errors.Join(err, f.Close()))
				if !bytes.Equal(b[at%unit:][:16], make([]byte, 16)) {
					t.Errorf("layer %d holds an exception behind a gap", i)
				}
			}
		})
	}
}
