package crash_test

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/image"
)

// TestCloseLeavesNothingRunning closes managers in the middle of operations.
func TestCloseLeavesNothingRunning(t *testing.T) {
	st := storages(t)[0]
	for at := 1; at < 12; at++ {
		w := newWorld(t, st, image.LayoutImage)
		s := newStory(w)
		snap := s.snapshot("s", s.volume("v", "a", 1))
		s.creates("new", "b", snap, 1)
		w.control.arm(crashAfter, at)
		if err := s.run(s); err == nil {
			t.Fatalf("crash after call %d: no error", at)
		}
		w.end()
	}
	var stacks string
	for range 100 { // a goroutine ends a little after what it was waited for by
		buf := make([]byte, 1<<20)
		stacks = string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "quarry/pkg/image") && !strings.Contains(stacks, "quarry/pkg/mover") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still running after Close:\n%s", stacks)
}
