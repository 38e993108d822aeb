package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// TestWorkThatWasGivenUpBeforeItBeganDoesNotBegin: who asks whether somebody writes the slab
// hears that nobody does, and goes on.
func TestWorkThatWasGivenUpBeforeItBeganDoesNotBegin(t *testing.T) {
	p := image.Place{Domain: "a", Slab: "s"}
	for what, giveUp := range map[string]func(g *gate, caller context.CancelFunc) (why string){
		"its caller is gone": func(_ *gate, caller context.CancelFunc) string { caller(); return "context canceled" },
		"a newer controller has come": func(g *gate, _ context.CancelFunc) string {
			if err := g.heard("a", 2); err != nil {
				t.Error(err)
			}
			return "newer controller"
		},
	} {
		t.Run(what, func(t *testing.T) {
			g := newGate(time.Hour)
			caller, gone := context.WithCancel(t.Context())
			defer gone()
			ctx, leave, err := g.enter(caller, map[string]int64{"a": 1})
			if err != nil {
				t.Fatal(err)
			}
			why := giveUp(g, gone)
			if err := g.settle(t.Context(), p); err != nil {
				t.Fatalf("nobody writes it: %v", err)
			}
			next, leaveNext, err := g.enter(t.Context(), map[string]int64{"a": 2})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := g.write(ctx, p); !errors.Is(err, fault.Canceled) || !strings.Contains(err.Error(), why) {
				t.Fatalf("it begins: %v", err)
			}
			// Nor does it once the next one writes, and has ended.
			release, err := g.write(next, p)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := g.write(ctx, p); !errors.Is(err, fault.Canceled) {
				t.Errorf("beside the next one: %v", err)
			}
			release()
			leaveNext()
			if _, err := g.write(ctx, p); !errors.Is(err, fault.Canceled) {
				t.Errorf("after the next one: %v", err)
			}
			leave()
			if len(g.targets)+len(g.running) > 0 {
				t.Errorf("left: %v, %v", g.targets, g.running)
			}
		})
	}
}
