package engine_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// volumes attaches as lvm does: the path is there while the slab is active, and
// a slab that somebody has open stays active.
type volumes struct {
	engine.Engine
	mu     sync.Mutex
	active bool
	open   int
	wait   chan struct{} // detaching waits for it
}

func (v *volumes) AttachSlab(_ context.Context, id string, _ engine.AttachOptions) (engine.Attachment, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if id != "s" {
		return engine.Attachment{}, fault.New(fault.NotFound, "slab %q does not exist", id)
	}
	v.active = true
	return engine.Attachment{Path: "/dev/" + id}, nil
}

func (v *volumes) DetachSlab(context.Context, string) error {
	if v.wait != nil {
		<-v.wait
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.active = v.active && v.open > 0
	return nil
}

func (v *volumes) opens(t *testing.T) {
	t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.active {
		t.Fatal("what was attached is gone before it was opened")
	}
	v.open++
}

func (v *volumes) is(t *testing.T, active bool) {
	t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.active != active {
		t.Fatalf("active: %v, want %v", v.active, active)
	}
}

func no(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestNobodyDetachesWhatAnotherIsAboutToOpen(t *testing.T) {
	v := &volumes{}
	u := engine.NewUsers(v)
	_, node, err := u.Attach(t.Context(), "s", engine.AttachOptions{})
	no(t, err)
	_, reader, err := u.Attach(t.Context(), "s", engine.AttachOptions{})
	no(t, err)
	no(t, reader(t.Context(), true)) // a reader has finished
	no(t, u.Detach(t.Context(), "s"))
	v.opens(t)
	no(t, node(t.Context(), false))
	v.is(t, true) // it is open
	no(t, u.Detach(t.Context(), "s"))
	v.is(t, true)
	v.open--
	no(t, u.Detach(t.Context(), "s"))
	v.is(t, false)
}

func TestTheLastOneDetaches(t *testing.T) {
	v := &volumes{}
	u := engine.NewUsers(v)
	_, first, err := u.Attach(t.Context(), "s", engine.AttachOptions{})
	no(t, err)
	_, second, err := u.Attach(t.Context(), "s", engine.AttachOptions{})
	no(t, err)
	no(t, first(t.Context(), true))
	no(t, first(t.Context(), true)) // again: no effect
	v.is(t, true)
	no(t, second(t.Context(), false)) // it opened nothing, and another wanted it gone
	v.is(t, false)

	_, keep, err := u.Attach(t.Context(), "s", engine.AttachOptions{})
	no(t, err)
	no(t, keep(t.Context(), false))
	v.is(t, true) // attached for good
	if _, _, err := u.Attach(t.Context(), "nothing", engine.AttachOptions{}); !errors.Is(err, fault.NotFound) {
		t.Errorf("a slab that is not there: %v", err)
	}
}

func TestAttachingWaitsForADetachThatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &volumes{active: true, wait: make(chan struct{})}
		u := engine.NewUsers(v)
		go func() { _ = u.Detach(t.Context(), "s") }()
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		gaveUp := make(chan error, 1)
		go func() {
			_, _, err := u.Attach(ctx, "s", engine.AttachOptions{})
			gaveUp <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-gaveUp; !errors.Is(err, fault.Canceled) {
			t.Errorf("a caller who gave up: %v", err)
		}
		go func() { close(v.wait) }()
		_, release, err := u.Attach(t.Context(), "s", engine.AttachOptions{})
		no(t, err)
		v.is(t, true)
		no(t, release(t.Context(), true))
		v.is(t, false)
	})
}
