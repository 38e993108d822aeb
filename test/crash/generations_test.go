package crash_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/quarry-csi/quarry/pkg/image"
)

// TestTenGenerations makes a chain of ten times snapshot and clone, each with
// content of its own, and deletes it in random orders.
func TestTenGenerations(t *testing.T) {
	rounds := 2
	if long() {
		rounds = 10
	}
	for _, st := range storages(t) {
		for _, layout := range []image.Layout{image.LayoutImage, image.LayoutDirectory} {
			for round := range rounds {
				t.Run(fmt.Sprintf("%s, %s, order %d", st.name, layout, round), func(t *testing.T) {
					t.Parallel()
					w := newWorld(t, st, layout)
					s := newStory(w)
					all := []image.Image{s.volume("g0", "a", 1)}
					for g := range 10 {
						parent := all[len(all)-1]
						snap := s.snapshot(fmt.Sprintf("s%d", g), parent)
						clone, err := w.create(fmt.Sprintf("g%d", g+1), "a", snap, 0)
						w.must(err)
						s.seeds[key(clone)] = s.seeds[key(snap)]
						s.ack(clone)
						s.check()
						seed := uint64(g + 2)
						w.write(clone, seed)
						s.seeds[key(clone)] = []uint64{seed}
						all = append(all, snap, clone)
					}
					w.restart()
					s.check()
					rnd := rand.New(rand.NewPCG(uint64(round), 7))
					rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
					for i, img := range all {
						s.deleting(img)
						s.gone[key(img)] = true
						if img.Mutable {
							w.must(w.DeleteVolume(w.ctx, img.Handle))
						} else {
							w.must(w.DeleteSnapshot(w.ctx, img.Handle))
						}
						if i%3 == 0 {
							w.must(w.collect())
							w.noLeaks(0)
						}
						if i%5 == 0 {
							w.restart()
						}
						s.check()
					}
					w.must(w.collect())
					w.noLeaks(0)
					w.end()
				})
			}
		}
	}
}
