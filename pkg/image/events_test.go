package image_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// hearing keeps the events of a rig.
type hearing struct {
	mu     sync.Mutex
	events []image.Event
}

func (h *hearing) tell(e image.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, e)
}

// heard are the events since the last call, as "name reason: message".
func (h *hearing) heard() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, e := range h.events {
		warning := ""
		if e.Warning {
			warning = "! "
		}
		out = append(out, warning+e.Name+" "+e.Reason+": "+e.Message)
	}
	h.events = nil
	return out
}

// wants compares what was heard by beginnings.
func (h *hearing) wants(t *testing.T, want ...string) {
	t.Helper()
	got := h.heard()
	if len(got) != len(want) || !slices.EqualFunc(got, want, strings.HasPrefix) {
		t.Errorf("heard\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestUsersHearWhereTheirImagesAreAndWhy(t *testing.T) {
	h := &hearing{}
	r := newRig(t, "a", "b")
	r.tell, r.wrap = h.tell, engine.Minimal
	r.start()
	v, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{mount}, Size: 32 * mib, Described: image.Described{Namespace: "shop", Claim: "data"}})
	r.must(err)
	h.mu.Lock()
	if len(h.events) != 1 || h.events[0].Described.Claim != "data" || h.events[0].Described.Namespace != "shop" || h.events[0].Snapshot {
		t.Errorf("whom it is about: %+v", h.events)
	}
	h.mu.Unlock()
	where := r.dirs["a"]
	h.wants(t, "v QuarryCreated: in domain a ("+where)
	r.volume("v", "a", 32*mib)
	h.wants(t) // asked again: nothing happened
	s := r.snapshot("s", v)
	r.from("c", "a", s, 0)
	r.from("d", "b", s, 0)
	got := h.heard()
	for i, want := range []string{"default: copy, because the storage has no native snapshots", "default: copy, because the storage has no native clones", "default: copy from a, because its source is in domain a"} {
		if i >= len(got) || !strings.HasSuffix(got[i], want) {
			t.Errorf("heard %q, want ...%s", got, want)
		}
	}
	_, err = r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	h.wants(t)
	_, err = r.Attach(r.ctx, v.Handle, "n2", mount, false)
	r.is(err, fault.InUse)
	h.wants(t, "! v QuarryStillAttached: not attached to node n2: it is attached to node n1 as SINGLE_NODE_WRITER")
	r.agents.away = "n1"
	r.is(r.Detach(r.ctx, v.Handle, "n1"), fault.Unavailable)
	h.wants(t, "! v QuarryStillAttached: not detached from node n1: node n1 cannot confirm that the image is unstaged")
}

func TestUsersHearOfABrokenImageOnceAndOfItsMending(t *testing.T) {
	h := &hearing{}
	r := newRig(t, "a")
	r.tell = h.tell
	r.start()
	v := r.volume("v", "a", 32*mib)
	path := r.path(v)
	r.must(r.Collect(r.ctx))
	h.heard()
	r.must(os.Truncate(path, 16*mib))
	r.restart()
	r.must(r.Collect(r.ctx))
	h.wants(t, "! v QuarryBroken: its slab "+v.Slab+" has 16777216 bytes")
	r.must(r.Collect(r.ctx))
	h.wants(t)
	r.must(os.Truncate(path, 32*mib))
	findings, err := r.Check(r.ctx, "a")
	r.must(err)
	for _, f := range findings {
		_, err := r.Fix(r.ctx, f)
		r.must(err)
	}
	r.must(r.Collect(r.ctx))
	h.wants(t, "v QuarryOptimized: ")
}

// slowWorker says how far a copy is at moments of the rig's clock.
type slowWorker struct {
	image.Worker
	r *rig
}

func (w slowWorker) CopyBlock(ctx context.Context, src image.Content, dst image.Place, opts image.BlockCopy) error {
	for _, step := range []struct {
		after time.Duration
		done  int64
	}{{9 * time.Second, 10}, {time.Second, 20}, {29 * time.Second, 30}, {time.Second, 43}, {time.Minute, 100}} {
		w.r.clock.turn(step.after)
		opts.Progress(step.done, 100)
	}
	return w.Worker.CopyBlock(ctx, src, dst, opts)
}

func TestUsersHearOfALongCopyNowAndThen(t *testing.T) {
	h := &hearing{}
	r := newRig(t, "a", "b")
	r.tell = h.tell
	r.worker = func(w image.Worker) image.Worker { return slowWorker{w, r} }
	r.start()
	s := r.snapshot("s", r.volume("v", "a", 32*mib))
	h.heard()
	r.from("c", "b", s, 0)
	got := h.heard()
	var far []string
	for _, e := range got {
		if strings.HasPrefix(e, "c QuarryCopying: ") {
			far = append(far, e[strings.LastIndex(e, ", ")+2:])
		}
	}
	if !slices.Equal(far, []string{"20% of 100 B", "43% of 100 B"}) || len(got) != 3 {
		t.Errorf("heard %q", got)
	}
}

func TestUsageMeasuresWhatHasASlab(t *testing.T) {
	r := newRig(t, "a").start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	s := r.snapshot("s", v)
	r.must(r.DeleteVolume(r.ctx, v.Handle))
	found := map[string]image.Use{}
	for _, u := range r.Usage(r.ctx) {
		found[u.Name] = u
	}
	if u := found["v"]; u.State == image.Deleting && (!u.Measured || u.Allocated < 100_000 || u.Promised != 32*mib) {
		t.Errorf("%+v", u)
	}
	if u := found["s"]; !u.Measured || u.Allocated < 100_000 || u.Promised < 100_000 || u.Handle != s.Handle {
		t.Errorf("%+v", u)
	}
	r.collect()
	if all := r.Usage(r.ctx); len(all) != 1 || all[0].Name != "s" {
		t.Errorf("after the volume has gone: %+v", all)
	}
}
