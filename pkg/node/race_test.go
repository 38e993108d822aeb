package node

import (
	"context"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// answered stops a staging after the manager's answer, before anything is in the kernel.
type answered struct {
	*manager
	reached, goOn chan struct{}
}

func (a *answered) Stage(ctx context.Context, h image.Handle, node string, generation int64) (image.Staging, error) {
	st, err := a.manager.Stage(ctx, h, node, generation)
	close(a.reached)
	<-a.goOn
	return st, err
}

// A detaching meanwhile would otherwise be confirmed, and the slab deleted or
// used elsewhere while this node goes on to mount it.
func TestAnImageThatIsJustBeingStagedIsNotSaidToBeUnstaged(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", testSize)
	a := &answered{manager: w.manager, reached: make(chan struct{}), goOn: make(chan struct{})}
	w.node.cfg.Manager = a
	staged := make(chan error, 1)
	go func() { staged <- w.node.Stage(bg, w.request(h, "")) }()
	<-a.reached
	is, err := w.node.Staged(bg, h)
	close(a.goOn)
	w.ok(<-staged)
	if err == nil {
		t.Fatalf("staged=%t while it was being staged", is)
	}
	w.fails(err, fault.Pending, "running")
	is, err = w.node.Staged(bg, h)
	w.ok(err)
	if !is {
		t.Fatal("it is staged")
	}
}
