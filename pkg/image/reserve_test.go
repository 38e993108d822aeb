package image_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// takingWorker writes down how much space is taken, of slabs that are made layers and of others.
type takingWorker struct {
	image.Worker
	mu              sync.Mutex
	formatted, more []int64
}

func (w *takingWorker) FormatLayer(ctx context.Context, p image.Place, size, chunk int64) error {
	w.mu.Lock()
	w.formatted = append(w.formatted, size)
	w.mu.Unlock()
	return w.Worker.FormatLayer(ctx, p, size, chunk)
}

func (w *takingWorker) Allocate(ctx context.Context, p image.Place, size int64) error {
	w.mu.Lock()
	w.more = append(w.more, size)
	w.mu.Unlock()
	return w.Worker.Allocate(ctx, p, size)
}

func (w *takingWorker) took() (formatted, more []int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.formatted), slices.Clone(w.more)
}

func TestTheSpaceOfThinLayersIsNotTaken(t *testing.T) {
	r := newRig(t, "a")
	nodes := &chainNodes{merging: map[string]string{}}
	r.mapAgents, r.wrap = nodes, engine.Minimal
	w := &takingWorker{}
	r.worker = func(in image.Worker) image.Worker { w.Worker = in; return w }
	r.start()
	req := image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{mount}, Size: mib, ThinLayers: true}
	v, err := r.CreateVolume(r.ctx, req)
	r.must(err)
	if !v.ThinLayers {
		t.Error("the volume does not say so")
	}
	for _, other := range []bool{true, false} {
		req.ThinLayers = other
		_, err := r.CreateVolume(r.ctx, req)
		if other {
			r.must(err)
		} else if r.is(err, fault.Exists); !strings.Contains(err.Error(), "thinLayers") {
			t.Error(err)
		}
	}
	_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "d", Domains: []string{"a"}, Accesses: []image.Access{mount}, Layout: image.LayoutDirectory, ThinLayers: true})
	if r.is(err, fault.Invalid); !strings.Contains(err.Error(), "thinLayers") {
		t.Error(err)
	}

	plain := r.volume("plain", "a", mib)
	r.stageOn(v, "n1")
	r.stageOn(plain, "n2")
	s1, s2 := r.snapshot("s1", v), r.snapshot("s2", v)
	if formatted, _ := w.took(); !slices.Equal(formatted, []int64{0, 0}) {
		t.Errorf("of thin layers %v bytes were taken", formatted)
	}
	whole := layer.StoreSize(plain.Size, layer.ChunkSize(plain.Size)) // raised to what a filesystem needs
	r.snapshot("of plain", plain)
	clone := image.CreateRequest{Name: "clone", Domains: []string{"a"}, Accesses: []image.Access{mount}, Source: s2.Handle.String()}
	_, err = r.CreateVolume(r.ctx, clone)
	r.must(err)
	clone.Name, clone.ThinLayers = "thin clone", true
	_, err = r.CreateVolume(r.ctx, clone)
	r.must(err)
	if formatted, more := w.took(); !slices.Equal(formatted, []int64{0, 0, whole, whole, 0}) || len(more) > 0 {
		t.Errorf("%v and %v bytes were taken", formatted, more)
	}
	// What is below a thin layer gets no space for a merge either.
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	r.must(r.Collect(r.ctx))
	for end := time.Now().Add(time.Minute); nodes.on() == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no merge begins")
		}
	}
	if _, more := w.took(); !slices.Equal(more, []int64{0}) {
		t.Errorf("for a merge %v bytes were taken", more)
	}
	r.restart()
	for of, want := range map[image.Handle]bool{v.Handle: true, plain.Handle: false} {
		if img, err := r.Get(r.ctx, of); err != nil || img.ThinLayers != want {
			t.Errorf("opened again: %+v, %v", img, err)
		}
	}
}

// nearlyFull is an engine without snapshots of its own, whose storage says how full it is, and of
// each slab how much space it has.
type nearlyFull struct {
	engine.Engine
	free, used *int64
}

const fullTotal = 100 << 30 // of which 1 GiB is kept

func (e nearlyFull) DomainUsage(context.Context) (engine.Usage, error) {
	return engine.Usage{Total: fullTotal, Used: fullTotal - *e.free, Available: *e.free}, nil
}

func (e nearlyFull) SlabUsage(context.Context, string) (engine.Usage, error) {
	return engine.Usage{Total: 1 << 30, Used: *e.used}, nil
}

func TestUsersHearThatWritesWaitForSpaceAndThatTheyGoOn(t *testing.T) {
	h := &hearing{}
	r := newRig(t, "a")
	r.tell, r.mapAgents = h.tell, &chainNodes{merging: map[string]string{}}
	free, used := int64(50<<30), int64(0)
	r.wrap = func(in engine.Engine) engine.Engine { return nearlyFull{engine.Minimal(in), &free, &used} }
	r.start()
	v, raw := r.volume("v", "a", 8*mib), r.volume("raw", "a", 8*mib)
	r.stageOn(v, "n1")
	r.stageOn(raw, "n2")
	r.snapshot("s", v)
	h.heard()
	state := func(want image.State, findings int) {
		t.Helper()
		r.must(r.Collect(r.ctx))
		img, err := r.Get(r.ctx, v.Handle)
		r.must(err)
		found, err := r.Check(r.ctx, "a")
		r.must(err)
		if img.State != want || want == image.Degraded && !strings.Contains(img.Reason, "domain a") {
			t.Errorf("with %d bytes free it is %s: %s", free, img.State, img.Reason)
		}
		if len(found) != findings || findings == 1 && (found[0].Kind != image.FindingReport || found[0].Object != v.Handle.Image) {
			t.Errorf("with %d bytes free: %+v", free, found)
		}
		if img, err := r.Get(r.ctx, raw.Handle); err != nil || img.State != image.Optimized {
			t.Errorf("a volume without layers: %+v, %v", img, err)
		}
	}
	state(image.Optimized, 0)
	h.wants(t)
	free = 1<<30 - 1
	state(image.Degraded, 1)
	h.wants(t, "! v QuarryWritesPaused: its layer has not all its space, and domain a has 1023.9 MiB free")
	free = 1<<30 + 1
	state(image.Degraded, 1) // there is not yet so much that they go on
	h.wants(t)
	free = 3 << 29
	state(image.Optimized, 0)
	h.wants(t, "v QuarryWritesGoOn: ")
	free = 1<<30 + 1
	state(image.Optimized, 0)
	free = 0
	state(image.Degraded, 1)
	h.wants(t, "! v QuarryWritesPaused: ")
	used = 1 << 30 // its layer has all its space
	state(image.Optimized, 0)
	h.wants(t, "v QuarryWritesGoOn: ")
}
