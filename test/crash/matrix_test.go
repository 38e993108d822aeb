package crash_test

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// TestEveryOperationAtEveryEngineCall lets every operation meet with every
// mishap at every engine call that it makes. How many there are is found out.
func TestEveryOperationAtEveryEngineCall(t *testing.T) {
	total := 0
	var points atomic.Int64
	for _, st := range storages(t) {
		t.Run(st.name, func(t *testing.T) {
			for _, layout := range []image.Layout{image.LayoutImage, image.LayoutDirectory} {
				for _, sc := range scenarios() {
					for _, m := range mishaps {
						total++
						t.Run(fmt.Sprintf("%s, %s, %s", layout, sc.name, m), func(t *testing.T) {
							t.Parallel()
							points.Add(int64(matrix(t, st, layout, sc, m)))
						})
					}
				}
			}
		})
	}
	t.Logf("%d operations and mishaps, %d points", total, points.Load())
}

// mishaps are all that may befall an operation at an engine call.
var mishaps = []mode{crashBefore, crashAfter, lostReply, outage, refused, misread}

// step between the points that the quick form tries: prime, so that every kind
// of call is met in some scenario.
func step() int {
	if long() {
		return 1
	}
	return 7
}

// matrix tries one operation with one mishap, and returns how many points it tried.
func matrix(t *testing.T, st storage, layout image.Layout, sc scenario, m mode) (n int) {
	for at := 1; ; at += step() {
		if hit := tried(t, st, layout, sc, m, at); hit == "" {
			if n == 0 && m != misread && m != refused {
				t.Error("the operation makes no engine call")
			}
			return n
		}
		n++
	}
}

// tried tries one operation with one mishap at a call, in a world of its own. It returns
// what was hit; "": the operation makes fewer calls.
func tried(t *testing.T, st storage, layout image.Layout, sc scenario, m mode, at int) (hit string) {
	w := newWorld(t, st, layout)
	w.story = fmt.Sprintf("%s: %s", sc.name, point(m, at))
	s := newStory(w)
	sc.prepare(s)
	w.restart() // begin from what is on the disk
	hit = mishap(s, m, at)
	w.end()
	return hit
}

// mishap plays a story with a mishap at a call. It returns what was hit; "": the
// operation makes fewer calls.
func mishap(s *story, m mode, at int) string {
	w := s.w
	w.control.arm(m, at)
	err := s.run(s)
	hit := w.control.hit()
	w.control.arm(none, 0)
	if hit == "" {
		w.must(err)
		return ""
	}
	w.story += " (" + hit + ")"
	switch m {
	case crashBefore, crashAfter:
		if err != nil && final(err) {
			w.fatalf("a dead process answers with a final error: %v", err)
		}
		w.restart()
		s.check()
	case lostReply, outage, misread:
		if err != nil && final(err) && m != misread {
			w.fatalf("a lost reply became a final error: %v", err)
		}
		s.check()
	case refused:
		if err != nil && !errors.Is(err, fault.Exhausted) {
			w.fatalf("storage that is full became another kind of error: %v", err)
		}
		s.check()
		if err != nil {
			w.must(w.collect()) // nothing may remain
			w.noLeaks(s.sealed())
			s.check()
		}
	}
	for try := 1; ; try++ {
		if err = s.run(s); err == nil {
			break
		}
		if try == 5 || m == crashBefore || m == crashAfter {
			w.fatalf("the request fails when it is repeated: %v", err)
		}
	}
	w.must(s.run(s)) // and is idempotent
	s.check()
	w.must(w.collect())
	w.noLeaks(len(s.groups))
	s.check()
	w.must(s.run(s))
	w.restart()
	s.check()
	w.must(s.run(s))
	w.must(w.collect())
	w.noLeaks(len(s.groups))
	var groups []image.Handle
	for _, g := range s.groups {
		groups = append(groups, g)
	}
	w.empty(groups...)
	return hit
}

// sealed groups: those of an operation whose reply was refused may be there.
func (s *story) sealed() int {
	groups := map[string]bool{}
	for _, img := range s.w.list(s.w.process) {
		if img.Group != "" {
			groups[img.Group] = true
		}
	}
	return len(groups)
}
