package crash_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/quarry-csi/quarry/pkg/image"
)

// What the newer manager does while the older one is paused.
type takeover string

const (
	repeats takeover = "the newer repeats the request"
	deletes takeover = "the newer deletes everything"
	sleeps  takeover = "the newer does nothing"
	opening takeover = "the older resumes while the newer lists the images"
	later   takeover = "the older resumes while the newer lists the attachments"
)

// listing is the opening listing at which the older one is resumed: of which prefix.
func (what takeover) listing() string {
	return map[takeover]string{opening: "i.", later: "a."}[what]
}

// TestAnOlderManagerThatResumes pauses a manager before and after each engine
// call of each operation, lets a newer one take over, and resumes it. It must
// not act: the newer one and a third one must agree on what there is.
func TestAnOlderManagerThatResumes(t *testing.T) {
	total := 0
	var points atomic.Int64
	for _, st := range storages(t) {
		t.Run(st.name, func(t *testing.T) {
			for _, sc := range scenarios() {
				for _, after := range []bool{false, true} {
					for _, what := range []takeover{repeats, deletes, sleeps, opening, later} {
						first := 1 + total%step() // the quick form begins elsewhere each time
						total++
						t.Run(fmt.Sprintf("%s, after %t, %s", sc.name, after, what), func(t *testing.T) {
							t.Parallel()
							for at := first; overtake(t, st, sc, at, after, what); at += step() {
								points.Add(1)
							}
						})
					}
				}
			}
		})
	}
	t.Logf("%d operations and takeovers, %d points", total, points.Load())
}

// pause stops a process at one of its calls. What it was doing beside that call
// stops as well: calls under way end, others wait.
type pause struct {
	mu      sync.Mutex
	n, at   int
	after   bool
	where   string
	running int      // calls under way
	begun   []string // calls that began after the process was resumed
	resumed bool
	reached chan struct{} // closed when the process stands still
	resume  chan struct{}
}

func (p *pause) hook(verb, object string, after bool) {
	p.mu.Lock()
	if !after {
		p.n++
		if p.where == "" && p.n == p.at && !p.after {
			p.stop(verb + " " + object)
		}
		for p.where != "" && !p.resumed {
			p.mu.Unlock()
			<-p.resume
			p.mu.Lock()
		}
		p.running++
		if p.resumed {
			p.begun = append(p.begun, verb+" "+object)
		}
		p.mu.Unlock()
		return
	}
	p.running--
	if p.where == "" && p.n >= p.at && p.after {
		p.stop(verb + " " + object)
	} else if p.where != "" && p.running == 0 && !p.resumed {
		close(p.reached)
	}
	stands := p.where != "" && !p.resumed
	p.mu.Unlock()
	if stands {
		<-p.resume
	}
}

// stop notes where the process is paused. The caller holds p.mu.
func (p *pause) stop(where string) {
	if p.where = where; p.running == 0 {
		close(p.reached)
	}
}

func (p *pause) goOn() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.resumed {
		p.resumed = true
		close(p.resume)
	}
}

func (p *pause) wasResumed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resumed
}

// since is the calls that began after the process was resumed.
func (p *pause) since() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.begun)
}

func (s *story) in(w *world) *story {
	return &story{w: w, seeds: s.seeds, acked: maps.Clone(s.acked), gone: maps.Clone(s.gone), groups: maps.Clone(s.groups), run: s.run}
}

// overtake plays one point. It returns false when the operation makes fewer calls.
func overtake(t *testing.T, st storage, sc scenario, at int, after bool, what takeover) bool {
	w := newWorld(t, st, image.LayoutImage)
	w.story = fmt.Sprintf("%s, paused at call %d (after it: %t), %s", sc.name, at, after, what)
	s := newStory(w)
	sc.prepare(s)
	w.restart()
	p := &pause{at: at, after: after, reached: make(chan struct{}), resume: make(chan struct{})}
	defer p.goOn()
	w.control.mu.Lock()
	w.control.hook = p.hook
	w.control.mu.Unlock()
	older := *w
	s.w = &older
	seeds := maps.Clone(s.seeds)
	s.seeds = maps.Clone(seeds) // the older one's own
	ended := make(chan error, 1)
	go func() {
		err := errors.New("the older one's story failed the test")
		defer func() { ended <- err }() // also when a check in it ends this goroutine
		err = s.run(s)
	}()
	select {
	case <-p.reached:
	case err := <-ended:
		w.must(err)
		p.goOn() // a merge that nobody waits for may have come to the point
		w.end()
		return false
	}
	defer func() { p.goOn(); _ = older.Close() }()

	newer := *w
	newer.story += " (" + p.where + ")"
	before := s.in(&newer)
	before.seeds = seeds
	var err error
	if prefix := what.listing(); prefix != "" {
		newer.torn = true
		c := &control{}
		var once sync.Once
		c.hook = func(verb, object string, after bool) {
			if verb == "ListTags" && object == prefix && !after {
				once.Do(func() { p.goOn(); err = <-ended })
			}
		}
		np, lerr := newer.tryLaunch(c)
		newer.must(lerr)
		newer.process = np
		if !p.wasResumed() {
			newer.fatalf("the newer one opened without listing %q: the older one was never resumed meanwhile", prefix)
		}
	} else {
		newer.process = newer.launch()
	}
	defer newer.Close()
	before.check()
	switch what {
	case repeats:
		newer.must(before.run(before))
		newer.must(newer.collect())
		before.check()
	case deletes:
		var groups []image.Handle
		for _, img := range newer.list(newer.process) {
			if h, err := image.ParseHandle(img.Group); err == nil {
				groups = append(groups, h)
			}
		}
		newer.empty(groups...)
		before.acked = map[string]image.Handle{}
	}
	list := newer.list(newer.process)
	p.goOn()
	if what.listing() == "" {
		err = <-ended
	}
	if err != nil && final(err) && what != deletes {
		newer.fatalf("the older one, which cannot know, answers with a final error: %v", err)
	}
	deleted, begun := 0, p.since()
	for _, call := range begun {
		// Domain b may not be overtaken yet, and the tags of earlier epochs there may go.
		if strings.HasPrefix(call, "Delete") && !strings.HasPrefix(call, "DeleteTag e.") {
			deleted++
		}
	}
	mayEnd := 1 // the one that was under way
	if w.kernel != nil {
		mayEnd = 2 // a merge works beside the collector
	}
	if deleted > mayEnd {
		newer.fatalf("the older one went on to delete: %v", begun)
	}
	if err == nil && what != deletes { // it acknowledged: then the newer one must have seen it
		before.acked, before.gone = maps.Clone(s.acked), maps.Clone(s.gone)
	}
	before.check()
	same(&newer, "the newer one, after the older was resumed,", list, false)

	older.waitForMerges() // what it works on in the kernel nobody else can take down

	third := newer
	third.torn = false
	third.process = third.launch()
	defer third.Close()
	same(&third, "a third one", list, deleted > 0)
	last := before.in(&third)
	last.seeds = before.seeds
	last.check()
	if what != deletes {
		third.must(last.run(last))
		last.check()
	}
	third.must(third.collect())
	last.check()
	var groups []image.Handle
	for _, g := range last.groups {
		groups = append(groups, g)
	}
	if what == deletes {
		groups = nil
	}
	for _, img := range third.list(third.process) {
		if h, err := image.ParseHandle(img.Group); err == nil {
			groups = append(groups, h)
		}
	}
	third.empty(groups...)
	for _, d := range w.dirs {
		w.must(os.RemoveAll(d))
	}
	return true
}

// same checks that a process sees what another one saw. mayMerge: what the older one
// deleted since may have made a merge possible, and an image degraded by that.
func same(w *world, who string, want []image.Image, mayMerge bool) {
	w.t.Helper()
	have := w.list(w.process)
	describe := func(l []image.Image) (out []string) {
		for _, i := range l {
			if mayMerge && i.State == image.Degraded {
				i.State = image.Optimized
			}
			out = append(out, fmt.Sprintf("%s=%s %d %s", key(i), i.Handle, i.Size, i.State))
		}
		return out
	}
	if a, b := fmt.Sprint(describe(have)), fmt.Sprint(describe(want)); a != b {
		w.fatalf("%s sees\n\t%s\nthe newer one saw\n\t%s", who, a, b)
	}
	for i, img := range have {
		if fmt.Sprint(img.Attachments) != fmt.Sprint(want[i].Attachments) && !onlyStaged(img, want[i]) {
			w.fatalf("%s sees %s attached as %v, the newer one as %v", who, img.Handle, img.Attachments, want[i].Attachments)
		}
	}
}

// onlyStaged says whether two views of an image differ only in what an opening
// cannot know: whether a node has it staged.
func onlyStaged(a, b image.Image) bool {
	if len(a.Attachments) != len(b.Attachments) {
		return false
	}
	for i, x := range a.Attachments {
		y := b.Attachments[i]
		x.Staged, y.Staged = false, false
		if x != y {
			return false
		}
	}
	return true
}
