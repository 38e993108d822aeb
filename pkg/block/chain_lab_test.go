package block

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// stack makes an image with so many layers, each of which was written, and
// returns its slabs from head to base and what is in each.
func (r *rig) stack(depth int, size int64) ([]Slab, []content) {
	r.Helper()
	slabs := []Slab{r.raw("base", size)}
	dev := r.attach(spec(slabs...))
	now := content{}
	r.write(dev.Path, now, 1, every(0, 3, size)...)
	states := []content{now.copy()}
	for i := 1; i <= depth; i++ {
		slabs = append([]Slab{r.layer(fmt.Sprint("layer", i), size)}, slabs...)
		r.change(slabs...)
		r.write(dev.Path, now, uint64(i+1), every(int64(i), 5, size)...)
		states = append([]content{now.copy()}, states...)
	}
	return slabs, states
}

func TestAChainReadsTheSameUnderEveryDeviceAndAgain(t *testing.T) {
	for _, depth := range []int{0, 1, 4} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			r := newRig(t)
			const size = 2 * mib
			slabs, states := r.stack(depth, size)
			dev := r.attach(spec(slabs...)) // is there already
			r.verify("the image", dev.Path, size, states[0])
			for i := 1; i < len(slabs); i++ {
				snap := r.reader(fmt.Sprint("snapshot", i), slabs[i:]...)
				r.verify(fmt.Sprint("snapshot ", i), snap.Path, size, states[i])
				if !snap.ReadOnly {
					t.Error("a private reader can write")
				}
			}

			r.d = devices() // a restarted agent
			all, err := r.d.All(bg)
			r.must(err)
			if len(all) != len(slabs) {
				t.Errorf("%d devices are found, %d were made", len(all), len(slabs))
			}
			found, err := r.d.Find(bg, owner)
			r.must(err)
			if len(found) != 1 || found[0].Path != dev.Path || !found[0].Owns(owner) || found[0].Owns("d/w") || found[0].Backing != slabs[0].Path {
				t.Fatalf("found %+v, want %s over %s", found, dev.Path, slabs[0].Path)
			}
			for _, dev := range all {
				r.detach(dev)
			}
			if left := r.left(); left != "" {
				t.Errorf("after detaching there is %s", left)
			}

			dev = r.attach(spec(slabs...))
			r.verify("the image, attached again", dev.Path, size, states[0])
		})
	}
}

func TestASnapshotIsTheImageAtItsCut(t *testing.T) {
	r := newRig(t)
	const size = 4 * mib
	slabs := []Slab{r.raw("base", size)}
	dev := r.attach(spec(slabs...))
	w := r.writer(dev.Path)
	var cuts [][2]uint64
	var chains [][]Slab
	for i := range 4 {
		w.further(t)
		from, _ := w.at()
		chains = append(chains, slabs)
		slabs = append([]Slab{r.layer(fmt.Sprint("l", i), size)}, slabs...)
		r.change(slabs...)
		to, _ := w.at()
		cuts = append(cuts, [2]uint64{from, to + 1})
	}
	w.further(t)
	for i, chain := range chains { // while the writer goes on
		snap := r.reader(fmt.Sprint("snapshot", i), chain...)
		if n := r.prefix("snapshot", snap.Path); n < cuts[i][0] || n > cuts[i][1] {
			t.Errorf("snapshot %d has write %d: before it %d was durable, after it at most %d begun", i, n, cuts[i][0], cuts[i][1])
		}
	}
	w.end()
	last, err := w.at()
	r.must(err)
	if n := r.prefix("image", dev.Path); n != last {
		t.Errorf("the image has write %d, the last was %d", n, last)
	}
}

func TestAMountedFilesystemIsCutConsistently(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t)
			const size = 320 * mib
			base, over := r.raw("base", size), r.layer("over", size)
			s := Spec{Owner: owner, Use: Filesystem, Slabs: []Slab{base}, Size: size}
			dev := r.attach(s)
			run(t, "mkfs."+kind, "-q", dev.Path)
			at := mount(t, dev.Path)
			stop, done := make(chan struct{}), make(chan error, 1)
			go func() { // a counter, durable at each step
				f, err := os.Create(at + "/counter")
				for n := 0; err == nil; n++ {
					select {
					case <-stop:
						done <- f.Close()
						return
					default:
					}
					if _, err = fmt.Fprintf(f, "%08d\n", n); err == nil {
						err = f.Sync()
					}
				}
				done <- err
			}()
			waitFor(t, func() bool { b, _ := os.ReadFile(at + "/counter"); return len(b) > 45 })
			r.must(os.WriteFile(at+"/before", []byte("yes"), 0o600)) // not synced
			before, err := os.ReadFile(at + "/counter")
			r.must(err)
			s.Slabs = []Slab{over, base}
			r.must(r.d.Switch(bg, []Spec{s}))
			r.must(os.WriteFile(at+"/after", []byte("no"), 0o600))
			waitFor(t, func() bool { b, _ := os.ReadFile(at + "/counter"); return len(b) > len(before)+18 })

			snap := r.reader("snapshot", base)
			options := "ro"
			if kind == "xfs" {
				options += ",norecovery,nouuid"
			} else {
				options += ",noload" // a frozen filesystem has an empty journal
			}
			shot := mount(t, snap.Path, "-o", options)
			text, err := os.ReadFile(shot + "/counter")
			r.must(err)
			if !strings.HasPrefix(string(text), string(before)) {
				t.Errorf("the snapshot's counter ends at %d, and %d was durable before", len(text), len(before))
			}
			for i, line := range strings.Fields(string(text)) {
				if line != fmt.Sprintf("%08d", i) {
					t.Fatalf("line %d is %q", i, line)
				}
			}
			if b, err := os.ReadFile(shot + "/before"); string(b) != "yes" {
				t.Errorf("what was written before the cut is %q, %v", b, err)
			}
			if _, err := os.ReadFile(shot + "/after"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what was written after the cut: %v", err)
			}
			close(stop)
			r.must(<-done)
			umount(t, shot)
			umount(t, at)
			if kind == "ext4" {
				run(t, "e2fsck", "-fn", dev.Path)
			} else {
				run(t, "xfs_repair", "-n", dev.Path)
			}
		})
	}
}

func TestTwoClonesOverOneBase(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	slabs, states := r.stack(1, size)
	r.change(append([]Slab{r.layer("rest", size)}, slabs...)...)
	clones := []Device{}
	for i := range 2 {
		s := spec(append([]Slab{r.layer(fmt.Sprint("clone", i), size)}, slabs...)...)
		s.Owner = fmt.Sprint("d/clone", i)
		clones = append(clones, r.attach(s))
	}
	a, b := states[0].copy(), states[0].copy()
	r.write(clones[0].Path, a, 100, every(0, 2, size)...)
	r.write(clones[1].Path, b, 200, every(1, 2, size)...)
	r.verify("clone 0", clones[0].Path, size, a)
	r.verify("clone 1", clones[1].Path, size, b)
	snap := r.reader("snapshot", slabs...)
	r.verify("their source", snap.Path, size, states[0])
	if n := strings.Count(r.left(), "quarry-s-"); n != 2*4+1 { // device and loop of four layers, and the base's loop
		t.Errorf("%d devices of slabs for five slabs: %s", n, r.left())
	}
	r.detach(snap)
	r.detach(clones[0]) // what the others use stays
	r.verify("clone 1", clones[1].Path, size, b)
}

func TestAGroupIsCutAtOneMoment(t *testing.T) {
	r := newRig(t)
	const size = mib
	a, b := r.raw("a", size), r.raw("b", size)
	sa, sb := spec(a), spec(b)
	sa.Owner, sb.Owner = "d/a", "d/b"
	r.cutTogether(r.d, &sa, &sb, func() {
		r.must(r.d.Switch(bg, []Spec{sa, sb}))
		r.must(r.d.Switch(bg, []Spec{sa, sb})) // repeated
	})

	// An attempt that was cut short.
	sa.Slabs = append([]Slab{r.layer("half", size)}, sa.Slabs...)
	r.must(r.d.Switch(bg, []Spec{sa}))
	sb.Slabs = append([]Slab{r.layer("other", size)}, sb.Slabs...)
	if err := r.d.Switch(bg, []Spec{sa, sb}); !errors.Is(err, fault.Conflict) {
		t.Errorf("a group of which one was cut before: %v", err)
	}
	r.must(r.d.Switch(bg, []Spec{sb}))
}

// TestAGroupOnSeveralNodesIsCutAtOneMoment: two agents, which know nothing of each other.
func TestAGroupOnSeveralNodesIsCutAtOneMoment(t *testing.T) {
	r := newRig(t)
	const size = mib
	a, b := r.raw("a", size), r.raw("b", size)
	b.ID = "e/b"
	sa, sb := spec(a), spec(b)
	sa.Owner, sb.Owner = "d/a", "e/b"
	second := devices()
	r.cutTogether(second, &sa, &sb, func() {
		ha, err := r.d.Hold(bg, []Spec{sa})
		r.must(err)
		hb, err := second.Hold(bg, []Spec{sb})
		r.must(errors.Join(err, ha.Release()))
		r.must(hb.Release())
		r.must(hb.Release()) // repeated
	})

	// Of one that was resumed by another hand the moment does not count.
	sa.Slabs = append([]Slab{r.layer("late", size)}, sa.Slabs...)
	h, err := r.d.Hold(bg, []Spec{sa})
	r.must(err)
	if _, err := second.Recover(bg); err != nil { // what an agent does that starts
		t.Fatal(err)
	}
	if err := h.Release(); !errors.Is(err, fault.Conflict) {
		t.Errorf("released after it had gone on: %v", err)
	}
}

// cutTogether attaches one volume here and one on another node or here, and cuts both
// again and again while every number is written to the first, then to the second.
func (r *rig) cutTogether(other *Devices, sa, sb *Spec, cut func()) {
	r.Helper()
	size := sa.Size
	da := r.attach(*sa)
	db, err := other.Attach(bg, *sb)
	r.must(err)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		fa, err := direct(da.Path, os.O_RDWR)
		if err != nil {
			done <- err
			return
		}
		defer fa.Close()
		fb, err := direct(db.Path, os.O_RDWR)
		for n := uint64(1); err == nil; n++ {
			select {
			case <-stop:
				done <- fb.Close()
				return
			default:
			}
			if _, err = fa.WriteAt(pattern(aligned(unit), 0, n), 0); err == nil {
				_, err = fb.WriteAt(pattern(aligned(unit), 0, n), 0)
			}
		}
		done <- err
	}()
	number := func(path string) uint64 {
		f, err := direct(path, os.O_RDONLY)
		r.must(err)
		defer f.Close()
		buf := aligned(unit)
		_, err = f.ReadAt(buf, 0)
		r.must(err)
		return uint64(buf[8]) | uint64(buf[9])<<8 | uint64(buf[10])<<16
	}
	layer := func(name string, below *Spec) Slab {
		s := r.layer(name, size)
		domain, _, _ := strings.Cut(below.Slabs[0].ID, "/")
		s.ID = domain + "/" + name
		return s
	}
	for i := range 5 {
		from := number(db.Path)
		waitFor(r.T, func() bool { return number(db.Path) > from+2 })
		oldA, oldB := sa.Slabs, sb.Slabs
		sa.Slabs = append([]Slab{layer(fmt.Sprint("a", i), sa)}, oldA...)
		sb.Slabs = append([]Slab{layer(fmt.Sprint("b", i), sb)}, oldB...)
		cut()
		na := number(r.reader(fmt.Sprint("a", i), oldA...).Path)
		nb := number(r.reader(fmt.Sprint("b", i), oldB...).Path)
		if na != nb && na != nb+1 {
			r.Errorf("cut %d: a has %d and b %d: never was it so", i, na, nb)
		}
	}
	close(stop)
	r.must(<-done)
}

func TestSwitchAsksForNothingElse(t *testing.T) {
	r := newRig(t)
	const size = mib
	slabs, states := r.stack(1, size)
	dev, err := r.d.Find(bg, owner)
	r.must(err)
	before := r.tables()
	r.change(slabs...)
	if now := r.tables(); now != before {
		t.Errorf("what was so already was changed from\n%sto\n%s", before, now)
	}
	gone := spec(slabs...)
	gone.Owner = "d/elsewhere"
	r.must(r.d.Switch(bg, []Spec{gone}))

	for name, c := range map[string]struct {
		slabs []Slab
		kind  fault.Kind
	}{
		"without its layer": {slabs[1:], fault.Conflict},
		"other slabs":       {[]Slab{r.raw("other", size)}, fault.Conflict},
		"a cycle":           {[]Slab{slabs[0], slabs[0], slabs[1]}, fault.Corrupt},
		"no base":           {slabs[:1], fault.Corrupt},
		"a missing slab":    {append([]Slab{{ID: "d/x", Path: "/nowhere", Size: size, Chunk: unit}}, slabs...), fault.NotFound},
		"no header":         {append([]Slab{func() Slab { s := r.raw("zeros", 8*size); s.Size, s.Chunk = size, unit; return s }()}, slabs...), fault.Corrupt},
		"another chunk size": {append([]Slab{func() Slab {
			s := r.layer("chunk", size)
			r.enlarge(&s, 2*size)
			s.Size, s.Chunk = size, 8192
			return s
		}()}, slabs...), fault.Corrupt},
		"a short store": {append([]Slab{func() Slab { s := r.layer("short", size); r.must(os.Truncate(s.Path, size)); return s }()}, slabs...), fault.Corrupt},
	} {
		err := r.d.Switch(bg, []Spec{spec(c.slabs...)})
		if fault.KindOf(err) != c.kind || err == nil {
			t.Errorf("%s: %v, want %s", name, err, c.kind)
		}
		if now := r.tables(); now != before {
			t.Fatalf("%s: tables changed from\n%sto\n%s", name, before, now)
		}
	}

	full := r.layer("full", size) // somebody wrote to it
	s := spec(append([]Slab{full}, slabs...)...)
	s.Owner = "d/clone"
	clone := r.attach(s)
	r.write(clone.Path, content{}, 9, 1)
	if err := r.d.Switch(bg, []Spec{spec(s.Slabs...)}); !errors.Is(err, fault.Conflict) {
		t.Errorf("a layer with content over what is in use: %v", err)
	}
	r.verify("the image", dev[0].Path, size, states[0])
}

func TestADeviceUnderOurNameIsNotTouched(t *testing.T) {
	r := newRig(t)
	const size = mib
	base, over := r.raw("base", size), r.layer("over", size)
	uuid := slabUUID(over.ID)
	dmsetup := func(args ...string) { run(t, "dmsetup", args...) }
	dmsetup("create", nameOf(uuid), "--uuid", uuid, "--table", "0 2048 zero")
	_, err := r.d.Attach(bg, spec(over, base))
	if !errors.Is(err, fault.InUse) {
		t.Errorf("a device with our UUID and another table: %v", err)
	}
	dmsetup("remove", "--retry", nameOf(uuid))
	dmsetup("create", nameOf(uuid), "--table", "0 2048 zero")
	_, err = r.d.Attach(bg, spec(over, base))
	if !errors.Is(err, fault.InUse) || !strings.Contains(err.Error(), "dmsetup remove") {
		t.Errorf("a device with our name: %v", err)
	}
	dmsetup("remove", "--retry", nameOf(uuid))
	r.attach(spec(over, base))
}

func TestReadOnlyIsHonoured(t *testing.T) {
	r := newRig(t)
	const size = mib
	slabs, states := r.stack(1, size)
	dev, err := r.d.Find(bg, owner)
	r.must(err)
	s := spec(slabs...)
	s.ReadOnly = true
	f, err := os.Open(dev[0].Path)
	r.must(err)
	if _, err := r.d.Attach(bg, s); !errors.Is(err, fault.InUse) {
		t.Errorf("made read-only while it is open: %v", err)
	}
	f.Close()
	ro := r.attach(s)
	if f, err := direct(ro.Path, os.O_RDWR); err == nil {
		if _, err = f.WriteAt(aligned(unit), 0); err == nil {
			t.Error("a read-only device was written")
		}
		f.Close()
	}
	r.verify("read-only", ro.Path, size, states[0])
}

func TestAnImageOnABlockDevice(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	file := r.raw("volume", 3*mib) // larger than recorded, as volumes of extents are
	lp, err := r.d.Host.AttachLoop(bg, host.LoopSpec{File: file.Path, Size: 3 * mib, Mark: "somebody"})
	r.must(err)
	t.Cleanup(func() {
		all, err := r.d.Find(bg, owner)
		for _, dev := range all {
			err = errors.Join(err, r.d.Detach(bg, dev))
		}
		r.must(errors.Join(err, r.d.Collect(bg, "d"), r.d.Host.DetachLoop(bg, lp)))
	})
	link := filepath.Join(r.dir, "link")
	r.must(os.Symlink(lp.Path, link))
	base := Slab{ID: "d/volume", Path: link, Size: size}
	dev := r.attach(spec(base))
	c := content{}
	r.write(dev.Path, c, 1, every(0, 2, size)...)
	over := r.layer("over", size)
	r.change(over, base)
	r.write(dev.Path, c, 2, every(0, 3, size)...)
	r.verify("the image", dev.Path, size, c)
	r.detach(dev)
	if left := r.left(); left != "" {
		t.Errorf("left is %s", left)
	}
	if _, err := os.Stat(lp.Path); err != nil {
		t.Error(err)
	}
	dev = r.attach(spec(over, base))
	r.verify("again", dev.Path, size, c)
	big := base
	big.Size = 4 * mib
	if _, err := r.d.Attach(bg, Spec{Owner: "d/big", Use: Raw, Slabs: []Slab{big}, Size: big.Size}); !errors.Is(err, fault.Corrupt) {
		t.Errorf("a volume that is too small: %v", err)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func mount(t *testing.T, device string, args ...string) string {
	t.Helper()
	at := t.TempDir()
	run(t, "mount", append(args, device, at)...)
	t.Cleanup(func() { _ = exec.Command("umount", at).Run() })
	return at
}

func umount(t *testing.T, at string) {
	t.Helper()
	run(t, "umount", at)
}
