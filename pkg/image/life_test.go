package image_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/image"
)

const mib = 1 << 20

func TestAVolumeLivesThroughRestarts(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	again := r.volume("v", "a", 32*mib)
	if again.Handle != v.Handle {
		t.Fatalf("asked again: %v, first: %v", again.Handle, v.Handle)
	}
	r.restart()
	r.holds(r.volume("v", "a", 32*mib), 1)
	_, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{mount}, Size: 64 * mib})
	r.is(err, fault.Exists)
	r.must(r.DeleteVolume(r.ctx, v.Handle))
	r.must(r.DeleteVolume(r.ctx, v.Handle))
	_, err = r.Get(r.ctx, v.Handle)
	r.is(err, fault.NotFound)
	r.collect()
	r.empty("a")
}

func TestASnapshotKeepsItsBytes(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	s := r.snapshot("s", v)
	r.write(v, 2)
	again := r.snapshot("s", v)
	if again.Handle != s.Handle {
		t.Fatalf("asked again: %v, first: %v", again.Handle, s.Handle)
	}
	r.holds(again, 1)
	r.holds(v, 2)
	other := r.volume("w", "a", 32*mib)
	_, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: other.Handle})
	r.is(err, fault.Exists)
}

func TestRestoreAndCloneIntoEveryDomain(t *testing.T) {
	r := newRig(t, "a", "b").start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	s := r.snapshot("s", v)
	r.write(v, 2)
	for _, d := range []string{"a", "b"} {
		r.holds(r.from("restore-"+d, d, s, 64*mib), 1)
		r.holds(r.from("clone-"+d, d, v, 0), 2)
	}
	r.restart()
	for _, d := range []string{"a", "b"} {
		r.holds(r.from("restore-"+d, d, s, 64*mib), 1)
		r.holds(r.from("clone-"+d, d, v, 0), 2)
	}
}

func TestAllDeleteOrdersOfSourceSnapshotAndClone(t *testing.T) {
	orders := [][3]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
	for _, order := range orders {
		r := newRig(t, "a").start()
		v := r.volume("v", "a", 32*mib)
		r.write(v, 1)
		s := r.snapshot("s", v)
		c := r.from("c", "a", s, 0)
		list := []image.Image{v, s, c}
		for i, which := range order {
			img := list[which]
			if img.Mutable {
				r.must(r.DeleteVolume(r.ctx, img.Handle))
			} else {
				r.must(r.DeleteSnapshot(r.ctx, img.Handle))
			}
			r.collect()
			for _, left := range order[i+1:] {
				r.holds(list[left], 1)
			}
		}
		r.empty("a")
	}
}

func TestAGroupIsOneSeal(t *testing.T) {
	r := newRig(t, "a").start()
	v, w := r.volume("v", "a", 32*mib), r.volume("w", "a", 32*mib)
	r.write(v, 1)
	r.write(w, 2)
	g, err := r.CreateGroup(r.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{w.Handle, v.Handle}})
	r.must(err)
	r.restart()
	g, err = r.GetGroup(r.ctx, g.Handle)
	r.must(err)
	if len(g.Snapshots) != 2 {
		t.Fatalf("%d members, want 2", len(g.Snapshots))
	}
	r.is(r.DeleteSnapshot(r.ctx, g.Snapshots[0].Handle), fault.Invalid)
	for _, s := range g.Snapshots {
		seed := uint64(1)
		if s.Source == w.Handle.String() {
			seed = 2
		}
		r.holds(s, seed)
		r.holds(r.from("c-"+s.Handle.Image, "a", s, 0), seed)
	}
	r.must(r.DeleteGroup(r.ctx, g.Handle))
	r.must(r.DeleteGroup(r.ctx, g.Handle))
	list, _, err := r.List(r.ctx, false, "", 0)
	r.must(err)
	if len(list) != 0 {
		t.Fatalf("members are visible after their group was deleted: %v", list)
	}
	vols, _, err := r.List(r.ctx, true, "", 0)
	r.must(err)
	for _, v := range vols {
		r.must(r.DeleteVolume(r.ctx, v.Handle))
	}
	r.collect()
	r.empty("a")
}

func TestExpandGrowsAndNeverShrinks(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	v, err := r.Expand(r.ctx, v.Handle, 48*mib, 0)
	r.must(err)
	r.holds(v, 1)
	v, err = r.Expand(r.ctx, v.Handle, 40*mib, 0)
	r.must(err)
	if v.Size != 48*mib {
		t.Fatalf("size %d after a smaller one was asked for", v.Size)
	}
	_, err = r.Expand(r.ctx, v.Handle, 1<<62, 0)
	r.is(err, fault.OutOfRange)
	r.restart()
	v, err = r.Get(r.ctx, v.Handle)
	r.must(err)
	if v.Size != 48*mib {
		t.Fatalf("size %d after a restart", v.Size)
	}
}

func TestANameUsedAgainMeetsNothingOfItsFirstLife(t *testing.T) {
	r := newRig(t, "a").start()
	first := r.volume("v", "a", 32*mib)
	r.write(first, 1)
	s := r.snapshot("s", first)
	clone := r.from("c", "a", s, 0)
	r.must(r.DeleteVolume(r.ctx, first.Handle))
	second := r.volume("v", "a", 64*mib)
	if second.Handle == first.Handle || second.Slab == first.Slab {
		t.Fatalf("the second life is the first: %v", second)
	}
	r.write(second, 2)
	r.must(r.DeleteSnapshot(r.ctx, s.Handle))
	s2 := r.snapshot("s", second)
	r.collect()
	r.restart()
	r.collect()
	r.holds(second, 2)
	r.holds(s2, 2)
	r.holds(clone, 1)
}

func TestPagesGoOnWhereTheyEndedWhateverTheDomainsAreCalled(t *testing.T) {
	r := newRig(t, "a", "a-b", "a.b", "b").start()
	want := map[string]bool{}
	for _, d := range []string{"a", "a-b", "a.b", "b"} {
		for _, n := range []string{"1", "2", "3"} {
			want[r.volume(d+n, d, mib*16).Handle.String()] = true
		}
	}
	after, pages := "", 0
	for more := true; more; pages++ {
		list, m, err := r.List(r.ctx, true, after, 2)
		r.must(err)
		for _, v := range list {
			if !want[v.Handle.String()] {
				t.Fatalf("%s is listed twice", v.Handle)
			}
			delete(want, v.Handle.String())
			after = v.Handle.String()
		}
		more = m
	}
	if len(want) > 0 {
		t.Fatalf("not listed: %v", want)
	}
}

func TestADirectoryVolumeCountsOnceAgainstTheCapacity(t *testing.T) {
	r := newRig(t, "a")
	r.dirs["a"] = hosttest.Filesystem(t, "ext4", 512*mib)
	r.start()
	v, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Layout: image.LayoutDirectory,
		Accesses: []image.Access{mount}, Size: 200 * mib})
	r.must(err)
	r.must(os.WriteFile(filepath.Join(r.path(v), "f"), content(1, 150*mib), 0o600))
	before, _, _, err := r.Capacity(r.ctx, []string{"a"}, "")
	r.must(err)
	r.restart() // measures what is not Quarry's
	after, _, _, err := r.Capacity(r.ctx, []string{"a"}, "")
	r.must(err)
	if after < before-16*mib {
		t.Fatalf("%d MiB can be promised, %d before its files were measured", after/mib, before/mib)
	}
}

// TestAnEndedAttachmentIsForgottenInThreeLooks: seen, all but the last gone, the last gone.
func TestAnEndedAttachmentIsForgottenInThreeLooks(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", mib)
	for range 3 {
		if _, err := r.Attach(r.ctx, v.Handle, "n1", image.Access{Mode: image.SingleNodeWriter, Filesystem: "ext4"}, false); err != nil {
			t.Fatal(err)
		}
		r.must(r.Detach(r.ctx, v.Handle, "n1"))
	}
	tags := func() (names []string) {
		r.must(filepath.WalkDir(filepath.Join(r.dirs["a"], "tags", "a"), func(path string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				names = append(names, e.Name())
			}
			return err
		}))
		return names
	}
	all := tags()
	for look, want := range []int{3, 1, 0} {
		r.clock.turn(11 * time.Minute)
		r.must(r.Collect(r.ctx))
		left := tags()
		if len(left) != want {
			t.Fatalf("after look %d: %v, want %d of %v", look+1, left, want, all)
		}
		if want == 1 && left[0] != slices.Max(all) {
			t.Errorf("%v is left, want the last of %v", left, all)
		}
	}
}

// TestANodeThatIsAwayKeepsItsVolumesUnlessItIsOutOfService: it may write, until somebody
// promises that it is off.
func TestANodeThatIsAwayKeepsItsVolumesUnlessItIsOutOfService(t *testing.T) {
	r := newRig(t, "a")
	off, asked := "", error(nil)
	r.outOfService = func(_ context.Context, node string) (bool, error) { return node == off, asked }
	r.start()
	v := r.volume("v", "a", 32*mib)
	_, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	r.agents.state[v.Handle.String()] = image.IsFrozen // it is in use there

	off = "n1"
	r.is(r.Detach(r.ctx, v.Handle, "n1"), fault.Unavailable) // whatever is promised: the node itself says that it is in use
	off = ""
	r.agents.away = "n1"
	err = r.Detach(r.ctx, v.Handle, "n1")
	r.is(err, fault.Unavailable)
	if !strings.Contains(err.Error(), "out of service") {
		t.Errorf("what to do? %v", err)
	}
	_, err = r.Attach(r.ctx, v.Handle, "n2", mount, false)
	r.is(err, fault.InUse)
	off, asked = "n1", fault.New(fault.Unavailable, "nobody knows")
	r.is(r.Detach(r.ctx, v.Handle, "n1"), fault.Unavailable)
	asked = nil
	r.must(r.Detach(r.ctx, v.Handle, "n1"))
	_, err = r.Attach(r.ctx, v.Handle, "n2", mount, false)
	r.must(err)
}

// TestAStorageInPlaceOfAnotherIsNotWrittenFor: what stands where the domain was does not
// show that this manager opened it.
func TestAStorageInPlaceOfAnotherIsNotWrittenFor(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	tags := filepath.Join(r.dirs["a"], "tags", "e")
	r.must(os.Rename(tags, tags+".away"))
	r.must(os.Mkdir(tags, 0o755))
	_, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.is(err, fault.Unavailable)
	if !strings.Contains(err.Error(), "another one is in its place") {
		t.Errorf("what is wrong? %v", err)
	}
}

// TestANodeWithoutAnAttachmentChangesNothing: it can neither stage nor say that it formatted.
func TestANodeWithoutAnAttachmentChangesNothing(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	a, err := r.Attach(r.ctx, v.Handle, "n1", mount, true)
	r.must(err)
	_, err = r.Stage(r.ctx, v.Handle, "n2", a.Generation)
	r.is(err, fault.InUse)
	r.is(r.Formatted(r.ctx, v.Handle, "n2", "ext4"), fault.InUse)
	r.is(r.Formatted(r.ctx, v.Handle, "n1", "ext4"), fault.Permission) // read-only
	now, err := r.Get(r.ctx, v.Handle)
	r.must(err)
	if !now.Fresh {
		t.Error("it counts as formatted")
	}
}
