package node

import (
	"context"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Storage that takes its time over an examination must not hold up a staging,
// and the examination must not take away what was staged meanwhile.
func TestAnExaminationHoldsNobodyUp(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	hold := func(reached, goOn chan struct{}) {
		w.slabs.mu.Lock()
		defer w.slabs.mu.Unlock()
		w.slabs.reached, w.slabs.goOn = reached, goOn
	}
	type health struct {
		conditions []Condition
		err        error
	}
	for _, staged := range []bool{true, false} {
		reached, goOn := make(chan struct{}), make(chan struct{})
		hold(reached, goOn)
		examined := make(chan health, 1)
		go func() {
			c, err := w.node.Health(bg, h)
			examined <- health{c, err}
		}()
		<-reached
		hold(nil, nil)
		is, err := w.node.Staged(bg, h)
		if err == nil && staged {
			err = w.node.Stage(bg, w.request(h, host.Ext4))
		}
		close(goOn)
		got := <-examined
		if err != nil || is {
			t.Fatalf("while it was examined: staged=%t %v", is, err)
		}
		if got.err != nil || len(got.conditions) > 0 {
			t.Fatalf("nothing is wrong: %v %v", got.conditions, got.err)
		}
		if w.slabs.of("v") != staged {
			t.Fatalf("staged=%t, its slab attached=%t", staged, w.slabs.of("v"))
		}
		if staged {
			w.unstage(h)
		}
	}
}

func TestTakingWaitsForADetachThatIsUnderWay(t *testing.T) {
	w := newWorld(t)
	h := w.handle("v")
	l := w.node.beginLook(h, "s")
	if l == nil || w.node.beginLook(h, "s") != nil {
		t.Fatal("one look at a time")
	}
	detaching, goOn, taken := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := w.node.endLook(l, h, "s", func() error { close(detaching); <-goOn; return nil })
		if err != nil {
			t.Error(err)
		}
	}()
	<-detaching
	ended, cancel := context.WithCancel(bg)
	cancel()
	w.fails(w.node.take(ended, h.Domain, "s"), fault.Pending, h.Domain)
	go func() { taken <- w.node.take(bg, h.Domain, "s") }()
	close(goOn)
	w.ok(<-taken)
}
