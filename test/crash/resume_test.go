package crash_test

import (
	"testing"

	"github.com/quarry-csi/quarry/pkg/image"
)

// TestABrokenOffCopyGoesOn kills a process at each checkpoint of a copy into
// another domain. The next one must go on there, not begin anew.
func TestABrokenOffCopyGoesOn(t *testing.T) {
	for _, st := range storages(t)[:1] { // where nothing can be shared: there is something to copy
		t.Run(st.name, func(t *testing.T) {
			resumed := 0
			for at := 1; ; at++ {
				w := newWorld(t, st, image.LayoutImage)
				s := newStory(w)
				snap := s.snapshot("s", s.volume("v", "a", 1))
				s.creates("new", "b", snap, 1)
				w.restart()
				w.mover.dieAt(at, func() { w.control.kill() })
				err := s.run(s)
				if err == nil {
					w.end()
					if at == 1 {
						t.Fatal("the copy made no checkpoint")
					}
					break
				}
				if final(err) {
					w.fatalf("a dead process answers with a final error: %v", err)
				}
				w.mover.dieAt(0, nil)
				w.restart()
				s.check()
				before, durable := w.mover.n(), w.mover.durable
				w.must(s.run(s))
				if got := w.mover.n() - before; got != 1 {
					w.fatalf("killed after checkpoint %d: %d copies went on, want 1", at, got)
				}
				if w.mover.from != durable {
					w.fatalf("killed after %d bytes were durable: went on at %d", durable, w.mover.from)
				}
				resumed++
				s.check()
				w.must(w.collect())
				w.noLeaks(0)
				w.empty()
				w.end()
			}
			t.Logf("went on after %d checkpoints", resumed)
		})
	}
}
