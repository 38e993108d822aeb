package crash_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// story is what happens in a world: what is there, and a request that is
// repeated until it succeeds.
type story struct {
	w      *world
	seeds  map[string][]uint64     // what may be visible, and its possible contents
	acked  map[string]image.Handle // what must be visible
	gone   map[string]bool         // what must not be visible any more
	groups map[string]image.Handle // acknowledged
	run    func(*story) error      // by any process: the story says by which
}

func newStory(w *world) *story {
	return &story{w: w, seeds: map[string][]uint64{}, acked: map[string]image.Handle{}, gone: map[string]bool{}, groups: map[string]image.Handle{}}
}

// key of an image in a story: its kind and name, or for a group's member its source.
func key(img image.Image) string {
	switch {
	case img.Mutable:
		return "volume " + img.Name
	case img.Group != "":
		return "member of " + img.Source
	}
	return "snapshot " + img.Name
}

// ack notes what was acknowledged, which must be the same each time.
func (s *story) ack(img image.Image) {
	k := key(img)
	if h, ok := s.acked[k]; ok && h != img.Handle {
		s.w.fatalf("%s was %s and is %s when asked for again", k, h, img.Handle)
	}
	s.acked[k] = img.Handle
}

// volume makes a volume with content, without faults.
func (s *story) volume(name, domain string, seed uint64) image.Image {
	s.w.t.Helper()
	v, err := s.w.create(name, domain, image.Image{}, 2*mib)
	s.w.must(err)
	s.w.write(v, seed)
	s.seeds[key(v)] = []uint64{seed}
	s.ack(v)
	return v
}

func (s *story) snapshot(name string, of image.Image) image.Image {
	s.w.t.Helper()
	img, err := s.w.snap(name, of)
	s.w.must(err)
	s.seeds[key(img)] = s.seeds[key(of)]
	s.ack(img)
	return img
}

// check compares what users see with what they may and must see.
func (s *story) check() {
	w := s.w
	w.t.Helper()
	w.waitForMerges() // what was listed must not change while it is read
	seen := map[string]image.Handle{}
	members := map[string]int{}
	for _, img := range w.list(w.process) {
		k := key(img)
		seeds, known := s.seeds[k]
		switch {
		case !known:
			w.fatalf("%s (%s) is visible, which nobody asked for", k, img.Handle)
		case s.gone[k]:
			w.fatalf("%s (%s) is visible after its deletion was acknowledged", k, img.Handle)
		case img.State != image.Optimized && (w.kernel == nil || img.State != image.Degraded) || !img.Ready:
			w.fatalf("%s (%s) is visible and %s: %s", k, img.Handle, img.State, img.Reason)
		}
		if first, twice := seen[k]; twice {
			w.fatalf("%s is visible twice, as %s and %s", k, first, img.Handle)
		}
		seen[k] = img.Handle
		var wrong error
		for _, seed := range seeds {
			if wrong = w.holds(img, seed); wrong == nil {
				break
			}
		}
		w.must(wrong)
		if img.Group != "" {
			members[img.Group]++
		}
		if got, err := w.Get(w.ctx, img.Handle); err != nil || got.Handle != img.Handle {
			w.fatalf("%s is listed and cannot be got: %v", k, err)
		}
	}
	for g, n := range members {
		if n != 2 {
			w.fatalf("group %s is visible with %d of 2 members", g, n)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.acked)) {
		if !s.gone[k] && seen[k] != s.acked[k] {
			w.fatalf("%s was acknowledged as %s, and is now %q", k, s.acked[k], seen[k])
		}
	}
}

// acknowledged removes from what must be there, before a deletion is asked for.
func (s *story) deleting(img image.Image) { delete(s.acked, key(img)) }

// scenario prepares a story. Every operation kind has one.
type scenario struct {
	name    string
	prepare func(s *story)
	// userWrites: the request includes a write into a volume.
	userWrites bool
}

func scenarios() []scenario {
	list := []scenario{
		{name: "create empty", prepare: func(s *story) {
			s.creates("new", "a", image.Image{}, 0)
		}},
		{name: "snapshot", prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			s.seeds["snapshot s"] = []uint64{1}
			s.run = func(s *story) error {
				img, err := s.w.snap("s", v)
				if err == nil {
					s.ack(img)
				}
				return err
			}
		}},
		{name: "group snapshot", prepare: func(s *story) {
			v, u := s.volume("v", "a", 1), s.volume("u", "a", 2)
			s.seeds["member of "+v.Handle.String()], s.seeds["member of "+u.Handle.String()] = []uint64{1}, []uint64{2}
			s.run = func(s *story) error {
				g, err := s.w.CreateGroup(s.w.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{v.Handle, u.Handle}})
				if err != nil {
					return err
				}
				if len(g.Snapshots) != 2 {
					return fmt.Errorf("group with %d members", len(g.Snapshots))
				}
				if h, ok := s.groups["g"]; ok && h != g.Handle {
					return fmt.Errorf("group was %s, is %s", h, g.Handle)
				}
				s.groups["g"] = g.Handle
				for _, img := range g.Snapshots {
					s.ack(img)
				}
				return nil
			}
		}},
		{name: "expand", prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			s.run = func(s *story) error {
				img, err := s.w.Expand(s.w.ctx, v.Handle, 3*mib, 0)
				if err == nil && img.Size != 3*mib {
					return fmt.Errorf("size %d after growing", img.Size)
				}
				return err
			}
		}},
		{name: "attach and detach", prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			s.run = func(s *story) error {
				if _, err := s.w.Attach(s.w.ctx, v.Handle, "n1", s.w.access()[0], false); err != nil {
					return err
				}
				return s.w.Detach(s.w.ctx, v.Handle, "n1")
			}
		}},
		{name: "delete volume", prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			s.snapshot("s", v)
			s.deletes(v, func(s *story) error { return s.w.DeleteVolume(s.w.ctx, v.Handle) })
		}},
		{name: "delete snapshot", prepare: func(s *story) {
			img := s.snapshot("s", s.volume("v", "a", 1))
			s.deletes(img, func(s *story) error { return s.w.DeleteSnapshot(s.w.ctx, img.Handle) })
		}},
		{name: "delete group", prepare: func(s *story) {
			v, u := s.volume("v", "a", 1), s.volume("u", "a", 2)
			g, err := s.w.CreateGroup(s.w.ctx, image.GroupRequest{Name: "g", Sources: []image.Handle{v.Handle, u.Handle}})
			s.w.must(err)
			s.seeds["member of "+v.Handle.String()], s.seeds["member of "+u.Handle.String()] = []uint64{1}, []uint64{2}
			s.deletes(image.Image{}, func(s *story) error {
				err := s.w.DeleteGroup(s.w.ctx, g.Handle)
				if err == nil {
					s.gone["member of "+v.Handle.String()], s.gone["member of "+u.Handle.String()] = true, true
				}
				return err
			})
		}},
		{name: "a name used again while clones of its first life exist", userWrites: true, prepare: func(s *story) {
			first := s.volume("v", "a", 1)
			snap := s.snapshot("s", first)
			clone, err := s.w.create("clone", "a", snap, 0)
			s.w.must(err)
			s.seeds[key(clone)] = []uint64{1}
			s.ack(clone)
			s.deleting(first)
			s.deleting(snap)
			s.seeds[key(first)], s.seeds[key(snap)] = []uint64{1, 0, 3}, []uint64{1, 3}
			s.run = func(s *story) error { return s.again(first, snap) }
		}},
	}
	for _, domain := range []string{"a", "b"} {
		list = append(list, scenario{name: "create from snapshot into " + domain, prepare: func(s *story) {
			v := s.volume("v", "a", 1)
			snap := s.snapshot("s", v)
			s.w.write(v, 2)
			s.seeds[key(v)] = []uint64{2}
			s.creates("new", domain, snap, 1)
		}}, scenario{name: "create from volume into " + domain, prepare: func(s *story) {
			s.creates("new", domain, s.volume("v", "a", 1), 1)
		}})
	}
	return list
}

func (s *story) creates(name, domain string, src image.Image, seed uint64) {
	s.seeds["volume "+name] = []uint64{seed}
	s.run = func(s *story) error {
		img, err := s.w.create(name, domain, src, 2*mib)
		if err == nil {
			s.ack(img)
		}
		return err
	}
}

// deletes makes a story of a deletion with all that the collector does then.
func (s *story) deletes(img image.Image, del func(*story) error) {
	if img.Slab != "" {
		s.deleting(img)
	}
	s.run = func(s *story) error {
		if err := del(s); err != nil {
			return err
		}
		if img.Slab != "" {
			s.gone[key(img)] = true
		}
		for range 4 {
			if err := s.w.Collect(s.w.ctx); err != nil {
				return err
			}
			s.w.clock.turn(11 * time.Minute)
		}
		return nil
	}
}

// again deletes a volume and its snapshot and uses their names for others.
func (s *story) again(first, snap image.Image) error {
	w := s.w
	if err := errors.Join(w.DeleteVolume(w.ctx, first.Handle), w.DeleteSnapshot(w.ctx, snap.Handle)); err != nil {
		return err
	}
	second, err := w.create("v", "a", image.Image{}, 2*mib)
	if err != nil {
		return err
	}
	if second.Handle == first.Handle || second.Slab == first.Slab {
		return fault.New(fault.Internal, "the second life %s is the first", second.Handle)
	}
	if err := w.put(second, 3); err != nil {
		return err // not a failure by itself: a newer manager may have deleted it meanwhile
	}
	s.seeds[key(second)] = []uint64{3}
	s.ack(second)
	img, err := w.snap("s", second)
	if err != nil {
		return err
	}
	s.seeds[key(img)] = []uint64{3}
	s.ack(img)
	return w.Collect(w.ctx)
}
