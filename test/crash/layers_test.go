package crash_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// layered is a storage without any capability, on nodes that build chains.
func layered(t *testing.T) storage {
	return storage{name: "layers", root: shm(t), minimal: true, layers: true}
}

// stage attaches a volume and lets the first node use it.
func (w *world) stage(v image.Image) error { return w.stageOn(v, "n1") }

func (w *world) stageOn(v image.Image, node string) error {
	a, err := w.Attach(w.ctx, v.Handle, node, w.access()[0], false)
	if err != nil {
		return err
	}
	st, err := w.Stage(w.ctx, v.Handle, node, a.Generation)
	if err != nil {
		return err
	}
	w.kernel.stage(st, node)
	return nil
}

// layerScenarios are about volumes in use.
func layerScenarios() []scenario {
	staged := func(s *story, name string, seed uint64) image.Image {
		v := s.volume(name, "a", 0)
		s.w.must(s.w.stage(v))
		s.write(v, seed)
		return v
	}
	return []scenario{
		{name: "snapshot of a volume in use", prepare: func(s *story) {
			v := staged(s, "v", 1)
			s.seeds["snapshot s"] = []uint64{1}
			s.run = func(s *story) error {
				img, err := s.w.snap("s", v)
				if err == nil {
					s.ack(img)
				}
				return err
			}
		}},
		{name: "second snapshot of a volume in use", prepare: func(s *story) {
			v := staged(s, "v", 1)
			s.snapshot("s1", v)
			s.write(v, 2)
			s.seeds["snapshot s"] = []uint64{2}
			s.run = func(s *story) error {
				img, err := s.w.snap("s", v)
				if err == nil {
					s.ack(img)
				}
				return err
			}
		}},
		{name: "group snapshot of volumes in use", prepare: func(s *story) {
			s.snapshotsGroup(staged(s, "v", 1), staged(s, "u", 2))
		}},
		{name: "group snapshot of volumes in use on two nodes", prepare: func(s *story) {
			v, u := staged(s, "v", 1), s.volume("u", "a", 0)
			s.w.must(s.w.stageOn(u, "n2"))
			s.write(u, 2)
			s.snapshotsGroup(v, u)
		}},
		{name: "clone of a volume in use", prepare: func(s *story) {
			s.creates("new", "a", staged(s, "v", 1), 1)
		}},
		{name: "copy of a volume in use", prepare: func(s *story) {
			s.creates("new", "b", staged(s, "v", 1), 1)
		}},
		{name: "copy of a snapshot that is a layer", prepare: func(s *story) {
			v := staged(s, "v", 1)
			s.snapshot("s1", v)
			s.write(v, 2)
			snap := s.snapshot("s2", v)
			s.write(v, 3)
			s.creates("new", "b", snap, 2)
		}},
		{name: "grow a volume in use that has layers", prepare: func(s *story) {
			v := staged(s, "v", 1)
			s.snapshot("s1", v)
			s.write(v, 2)
			s.run = func(s *story) error {
				_, err := s.w.Expand(s.w.ctx, v.Handle, 3*mib, 0)
				return err
			}
		}},
		{name: "delete the only snapshot of a volume in use", prepare: func(s *story) {
			v := staged(s, "v", 1)
			img := s.snapshot("s1", v)
			s.write(v, 2)
			s.deletes(img, func(s *story) error { return s.w.DeleteSnapshot(s.w.ctx, img.Handle) })
		}},
		{name: "delete the oldest snapshot of a volume in use", prepare: func(s *story) {
			v := staged(s, "v", 1)
			img := s.snapshot("s1", v)
			s.write(v, 2)
			s.snapshot("s2", v)
			s.write(v, 3)
			s.deletes(img, func(s *story) error { return s.w.DeleteSnapshot(s.w.ctx, img.Handle) })
		}},
		{name: "delete a snapshot between others", prepare: func(s *story) {
			v := staged(s, "v", 1)
			s.snapshot("s1", v)
			s.write(v, 2)
			img := s.snapshot("s2", v)
			s.write(v, 3)
			s.snapshot("s3", v)
			s.write(v, 4)
			s.deletes(img, func(s *story) error { return s.w.DeleteSnapshot(s.w.ctx, img.Handle) })
		}},
		{name: "delete the snapshot of a volume that grew since", prepare: func(s *story) {
			v := staged(s, "v", 1)
			img := s.snapshot("s1", v)
			s.write(v, 2)
			_, err := s.w.Expand(s.w.ctx, v.Handle, 3*mib, 0)
			s.w.must(err)
			s.deletes(img, func(s *story) error { return s.w.DeleteSnapshot(s.w.ctx, img.Handle) })
		}},
		{name: "delete the snapshot of a detached volume", prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			img := s.snapshot("s1", v)
			s.write(v, 2)
			s.deletes(img, func(s *story) error { return s.w.DeleteSnapshot(s.w.ctx, img.Handle) })
		}},
		{name: "delete a snapshot and snapshot again", prepare: func(s *story) {
			v := staged(s, "v", 1)
			img := s.snapshot("s1", v)
			s.write(v, 2)
			s.deleting(img)
			s.seeds["snapshot s"] = []uint64{2}
			s.run = func(s *story) error {
				if err := s.w.DeleteSnapshot(s.w.ctx, img.Handle); err != nil {
					return err
				}
				s.gone[key(img)] = true
				if err := s.w.Collect(s.w.ctx); err != nil {
					return err
				}
				snap, err := s.w.snap("s", v)
				if err == nil {
					s.ack(snap)
				}
				return err
			}
		}},
		{name: "flatten the chain of a volume in use", prepare: func(s *story) {
			v := staged(s, "v", 1)
			for i := range uint64(3) {
				s.snapshot(fmt.Sprintf("s%d", i+1), v)
				s.write(v, i+2)
			}
			s.flattens(v)
		}},
		{name: "flatten below a volume and a clone in use", prepare: func(s *story) {
			v := staged(s, "v", 1)
			for i := range uint64(3) {
				img := s.snapshot(fmt.Sprintf("s%d", i+1), v)
				s.write(v, i+2)
				if i == 2 {
					c, err := s.w.create("clone", "a", img, 2*mib)
					s.w.must(err)
					s.ack(c)
					s.w.must(s.w.stage(c))
					s.write(c, 9)
				}
			}
			s.flattens(v)
		}},
		{name: "delete a volume whose clone lives", prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			clone, err := s.w.create("clone", "a", v, 0)
			s.w.must(err)
			s.seeds[key(clone)] = []uint64{1}
			s.ack(clone)
			s.deletes(v, func(s *story) error { return s.w.DeleteVolume(s.w.ctx, v.Handle) })
		}},
	}
}

// snapshotsGroup makes a story of a group snapshot of volumes with the contents 1, 2, and so on.
func (s *story) snapshotsGroup(volumes ...image.Image) {
	var sources []image.Handle
	for n, v := range volumes {
		sources = append(sources, v.Handle)
		s.seeds["member of "+v.Handle.String()] = []uint64{uint64(n) + 1}
	}
	s.run = func(s *story) error {
		g, err := s.w.CreateGroup(s.w.ctx, image.GroupRequest{Name: "g", Sources: sources})
		if err != nil {
			return err
		}
		s.groups["g"] = g.Handle
		for _, img := range g.Snapshots {
			s.ack(img)
		}
		return nil
	}
}

// flattens makes a story of the flattening of a volume's chain to one layer.
func (s *story) flattens(v image.Image) {
	err := s.w.Modify(s.w.ctx, v.Handle, image.Tuning{ChainLimit: 2}, nil)
	s.w.must(err)
	s.run = func(s *story) error {
		for range 2 {
			if err := s.w.Collect(s.w.ctx); err != nil {
				return err
			}
			s.w.waitForMerges()
			s.w.clock.turn(11 * time.Minute)
		}
		return nil
	}
}

// write changes a volume in a story without faults.
func (s *story) write(v image.Image, seed uint64) {
	s.w.t.Helper()
	s.w.write(v, seed)
	s.seeds[key(v)] = []uint64{seed}
}

// TestLayersAtEveryCall lets every operation on chains of layers meet with every
// mishap at every call that it makes, of an engine or of the node's agent. The
// kernel's state is kept, as when a process dies, or lost, as at a power cut.
func TestLayersAtEveryCall(t *testing.T) {
	st := layered(t)
	for _, lost := range []bool{false, true} {
		for _, sc := range append(layerScenarios(), scenarios()...) {
			for _, m := range []mode{none, crashBefore, crashAfter, lostReply, outage, refused, misread} {
				if lost && m != crashBefore && m != crashAfter {
					continue
				}
				t.Run(fmt.Sprintf("%s, %s, kernel state lost %t", sc.name, m, lost), func(t *testing.T) {
					t.Parallel()
					for at := 1; ; at += step() {
						w := newWorld(t, st, image.LayoutImage)
						w.kernel.steps, w.reboots = 2, lost
						w.story = fmt.Sprintf("%s: %s (kernel state lost: %t)", sc.name, point(m, at), lost)
						s := newStory(w)
						sc.prepare(s)
						w.restart()
						hit := mishap(s, m, at)
						w.end()
						if hit == "" {
							return
						}
					}
				})
			}
		}
	}
}

// chained makes a volume over two snapshots, and closes its manager.
func chained(t *testing.T) (w *world, v, s1, s2 image.Image) {
	w = newWorld(t, layered(t), image.LayoutImage)
	w.story = t.Name()
	s := newStory(w)
	v = s.volume("v", "a", 1)
	s1 = s.snapshot("s1", v)
	s.write(v, 2)
	s2 = s.snapshot("s2", v)
	s.write(v, 3)
	s.check()
	v, err := w.Get(w.ctx, v.Handle)
	w.must(err)
	w.must(w.Close())
	return w, v, s1, s2
}

// broken checks that images are broken with a reason that names what is wrong,
// that they can neither be used nor copied, and that check reports them.
func (w *world) broken(what string, images ...image.Image) {
	w.t.Helper()
	findings, err := w.Check(w.ctx, "a")
	w.must(err)
	for _, img := range images {
		now, err := w.Get(w.ctx, img.Handle)
		w.must(err)
		if now.State != image.Broken || !strings.Contains(now.Reason, what) {
			w.fatalf("%s is %s (%s), and %s is gone", img.Handle, now.State, now.Reason, what)
		}
		if !slices.ContainsFunc(findings, func(f image.Finding) bool { return f.Object == img.Handle.Image }) {
			w.fatalf("check says nothing of %s: %v", img.Handle, findings)
		}
		if img.Mutable {
			_, err = w.Attach(w.ctx, img.Handle, "n1", w.access()[0], false)
		} else {
			_, err = w.create("from "+img.Name, "a", img, 0)
		}
		if !errors.Is(err, fault.Corrupt) {
			w.fatalf("%s is broken, and using it: %v", img.Handle, err)
		}
	}
}

func TestAChainThatMissesASlab(t *testing.T) {
	w, v, s1, s2 := chained(t)
	base := filepath.Join(w.dirs["a"], "slabs", v.Chain[2].ID)
	w.must(os.Rename(base, base+".away"))
	w.start()
	w.broken(v.Chain[2].ID, v, s1, s2)
	w.must(w.collect())
	w.must(w.Close())
	w.must(os.Rename(base+".away", base))
	w.start()
	w.must(w.holds(v, 3))
	w.end()
}

func TestAChainThatMissesARecord(t *testing.T) {
	w, v, s1, _ := chained(t)
	tags, err := filepath.Glob(filepath.Join(w.dirs["a"], "tags", "i", "i."+s1.Handle.Image+".*"))
	w.must(err)
	if len(tags) == 0 {
		w.fatalf("%s has no record", s1.Handle)
	}
	for _, tag := range tags {
		w.must(os.Rename(tag, filepath.Join(w.dirs["a"], filepath.Base(tag))))
	}
	w.start()
	w.broken(s1.Handle.Image, v)
	w.must(w.collect())
	w.must(w.Close())
	for _, tag := range tags {
		w.must(os.Rename(filepath.Join(w.dirs["a"], filepath.Base(tag)), tag))
	}
	w.start()
	w.must(w.holds(v, 3))
	w.end()
}

func TestALayerThatTheKernelGaveUp(t *testing.T) {
	w, v, _, _ := chained(t)
	f, err := os.OpenFile(filepath.Join(w.dirs["a"], "slabs", v.Chain[0].ID), os.O_RDWR, 0)
	w.must(err)
	_, err = f.WriteAt(make([]byte, 4), 4) // the field "valid"
	w.must(errors.Join(err, f.Close()))
	w.start()
	find := func() *image.Finding {
		findings, err := w.Check(w.ctx, "a")
		w.must(err)
		for _, f := range findings {
			if f.Kind == image.FindingMend && f.Object == v.Handle.Image {
				return &f
			}
		}
		return nil
	}
	finding := find()
	if finding == nil {
		w.fatalf("check does not see that the layer was given up")
	}
	a, err := w.Attach(w.ctx, v.Handle, "n1", w.access()[0], false)
	w.must(err)
	_, err = w.Stage(w.ctx, v.Handle, "n1", a.Generation)
	w.must(err)
	if _, err := w.Fix(w.ctx, *finding); !errors.Is(err, fault.InUse) {
		w.fatalf("mending a layer in use: %v", err)
	}
	w.unstaged(v.Handle)
	w.must(w.Detach(w.ctx, v.Handle, "n1"))
	if _, err := w.Fix(w.ctx, *finding); err != nil {
		w.fatalf("mending: %v", err)
	}
	if find() != nil {
		w.fatalf("it is still found after it was mended")
	}
	w.must(w.holds(v, 3))
	w.end()
}

// TestAnOlderManagerThatResumesOverLayers is TestAnOlderManagerThatResumes on
// chains in use: the older one is paused before and after its calls to the node's
// agent, too.
func TestAnOlderManagerThatResumesOverLayers(t *testing.T) {
	st := layered(t)
	n := 0
	for _, sc := range layerScenarios() {
		for _, after := range []bool{false, true} {
			for _, what := range []takeover{repeats, sleeps, opening} {
				first := 1 + n%step() // the quick form begins elsewhere each time
				n++
				t.Run(fmt.Sprintf("%s, after %t, %s", sc.name, after, what), func(t *testing.T) {
					t.Parallel()
					for at := first; overtake(t, st, sc, at, after, what); at += step() {
					}
				})
			}
		}
	}
}

// TestAMergeLeavesAnAttachmentAlone: between two stagings a volume is attached and
// not in use, and its node stages it with the generation that it was told.
func TestAMergeLeavesAnAttachmentAlone(t *testing.T) {
	w := newWorld(t, layered(t), image.LayoutImage)
	w.story = t.Name()
	s := newStory(w)
	v := s.volume("v", "a", 0)
	w.must(w.stage(v))
	s.write(v, 1)
	s1 := s.snapshot("s1", v)
	s.write(v, 2)
	a, err := w.Attach(w.ctx, v.Handle, "n1", w.access()[0], false)
	w.must(err)
	w.kernel.unstage(v.Handle)
	w.unstaged(v.Handle)
	w.must(w.DeleteSnapshot(w.ctx, s1.Handle))
	w.must(w.collect())
	st, err := w.Stage(w.ctx, v.Handle, "n1", a.Generation)
	if err != nil {
		w.fatalf("staging it again with the attachment that it has: %v", err)
	}
	w.kernel.stage(st, "n1")
	w.must(w.collect())
	now, err := w.Get(w.ctx, v.Handle)
	w.must(err)
	if len(now.Chain) != 1 {
		w.fatalf("in use again, its chain is %v", now.Chain)
	}
	w.must(w.holds(now, 2))
	w.end()
}

// TestMergesMoveNothingTwice: of a chain whose images were all deleted, the lowest layer goes
// into the raw slab first.
func TestMergesMoveNothingTwice(t *testing.T) {
	w := newWorld(t, layered(t), image.LayoutImage)
	w.story = t.Name()
	s := newStory(w)
	v := s.volume("v", "a", 1)
	var snapshots []image.Image
	for n := range 5 {
		snapshots = append(snapshots, s.snapshot(fmt.Sprint("s", n), v))
		s.write(v, uint64(n)+2)
	}
	for _, img := range snapshots {
		w.must(w.DeleteSnapshot(w.ctx, img.Handle))
	}
	w.must(w.collect())
	if want := []int{2, 2, 2, 2, 2}; !slices.Equal(w.kernel.merges, want) {
		w.fatalf("the chains that were merged had %v slabs, want %v", w.kernel.merges, want)
	}
	now, err := w.Get(w.ctx, v.Handle)
	w.must(err)
	w.must(w.holds(now, 6))
	w.end()
}

func TestASnapshotsLayerGivesItsSpaceBack(t *testing.T) {
	w, v, s1, s2 := chained(t)
	used := func(slab string) int64 {
		st, err := os.Stat(filepath.Join(w.dirs["a"], "slabs", slab))
		w.must(err)
		return st.Sys().(*syscall.Stat_t).Blocks * 512
	}
	head, below := v.Chain[0].ID, v.Chain[1].ID
	if used(below) < 2*mib {
		w.fatalf("the layer of %s was made with %d bytes of space", s2.Handle, used(below))
	}
	w.start()
	w.must(w.collect())
	if n := used(below); n >= 2*mib || n < 3*pieceSize {
		w.fatalf("the layer of %s holds %d bytes of content and takes %d", s2.Handle, 3*pieceSize, n)
	}
	if n := used(head); n < 2*mib {
		w.fatalf("the layer of the volume, which is written, has only %d bytes of space", n)
	}
	for img, seed := range map[*image.Image]uint64{&v: 3, &s2: 2, &s1: 1} {
		now, err := w.Get(w.ctx, img.Handle)
		w.must(err)
		w.must(w.holds(now, seed))
	}
	// It gets all of it again before something is merged into it.
	w.must(w.DeleteSnapshot(w.ctx, s2.Handle))
	w.must(w.collect())
	now, err := w.Get(w.ctx, v.Handle)
	w.must(err)
	if len(now.Chain) != 2 || now.Chain[0].ID != below || used(below) < 2*mib {
		w.fatalf("after the merge the chain is %v, and its head takes %d bytes", now.Chain, used(below))
	}
	w.must(w.holds(now, 3))
	w.end()
}

// TestAChainOfSnapshotsThatAllLiveIsFlattened: with a limit of two layers, eight
// snapshots of a volume in use, none of them deleted.
func TestAChainOfSnapshotsThatAllLiveIsFlattened(t *testing.T) {
	w := newWorld(t, layered(t), image.LayoutImage)
	w.story = t.Name()
	s := newStory(w)
	v := s.volume("v", "a", 0)
	w.must(w.stage(v))
	err := w.Modify(w.ctx, v.Handle, image.Tuning{ChainLimit: 2}, nil)
	w.must(err)
	for i := range uint64(8) {
		s.write(v, i+1)
		s.snapshot(fmt.Sprintf("s%d", i+1), v)
	}
	s.write(v, 9)
	findings, err := w.Check(w.ctx, "a")
	w.must(err)
	if !slices.ContainsFunc(findings, func(f image.Finding) bool {
		return f.Kind == image.FindingOptimize && f.Object == v.Handle.Image
	}) {
		w.fatalf("check does not say that a chain of 8 layers with chainLimit 2 should be flattened: %v", findings)
	}
	for range 8 {
		w.must(w.collect())
	}
	for _, img := range w.list(w.process) {
		if img.State != image.Optimized || len(img.Chain) > 3 {
			w.fatalf("%s is %s (%s), its chain %v", img.Name, img.State, img.Reason, img.Chain)
		}
	}
	s.check()
	w.noLeaks(0)
	w.restart()
	s.check()
	w.end()
}

// TestAMergeKeepsToItsRate: a look at a merge finds one chunk more of it merged, and
// there may be one in a second.
func TestAMergeKeepsToItsRate(t *testing.T) {
	w := newWorld(t, layered(t), image.LayoutImage)
	w.story = t.Name()
	w.kernel.steps, w.rate = 1, kernelChunk
	w.restart()
	s := newStory(w)
	v := s.volume("v", "a", 0)
	w.must(w.stage(v))
	s.write(v, 1)
	s1 := s.snapshot("s1", v)
	s.write(v, 2) // 12 chunks
	w.must(w.DeleteSnapshot(w.ctx, s1.Handle))
	w.must(w.Collect(w.ctx))
	looks := func() int {
		w.kernel.mu.Lock()
		defer w.kernel.mu.Unlock()
		return w.kernel.looks
	}
	// At the first look nobody knows how much there was, at the second the second that has not passed is used up.
	for n := 2; slices.ContainsFunc(w.Operations(), isMerge); n++ {
		for slices.ContainsFunc(w.Operations(), isMerge) && looks() < n {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(5 * time.Millisecond) // several rounds of a merge that does not rest
		if now := looks(); now > n {
			w.fatalf("%d looks in %d seconds", now, n-2)
		}
		w.clock.turn(time.Second)
	}
	if looks() < 8 {
		w.fatalf("12 chunks were merged in %d looks", looks())
	}
	w.must(w.collect())
	now, err := w.Get(w.ctx, v.Handle)
	w.must(err)
	if len(now.Chain) != 1 {
		w.fatalf("the chain is still %v", now.Chain)
	}
	w.must(w.holds(now, 2))
	w.end()
}
