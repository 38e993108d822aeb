package image

import (
	"testing"
	"time"
)

func TestANewTagWaitsForTheOneThatIsTooFarBehind(t *testing.T) {
	d := &domain{underWay: newUnderWay()}
	slow := revision(1)
	if err := d.begin(t.Context(), "slow", slow); err != nil {
		t.Fatal(err)
	}
	for c := revision(2); c <= window; c++ { // all that fit beside it
		if err := d.begin(t.Context(), "quick", c); err != nil {
			t.Fatal(err)
		}
		d.underWay.end(c)
	}
	begun := make(chan error)
	go func() { begun <- d.begin(t.Context(), "next", window+1) }()
	select {
	case err := <-begun:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(20 * time.Millisecond): // a chance to go wrong
	}
	d.mu.Lock()
	d.underWay.end(slow)
	d.mu.Unlock()
	if err := <-begun; err != nil {
		t.Fatal(err)
	}
}
