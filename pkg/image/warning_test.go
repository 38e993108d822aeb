package image_test

import (
	"context"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// pool is an engine whose storage says how it is.
type pool struct {
	engine.Engine
	usage *engine.Usage
}

func (p pool) DomainUsage(context.Context) (engine.Usage, error) { return *p.usage, nil }
func (p pool) SlabUsage(context.Context, string) (engine.Usage, error) {
	return engine.Usage{}, engine.ErrDeclined
}

func TestWhatStorageSaysOfItselfIsToldToEverybody(t *testing.T) {
	r := newRig(t, "a")
	usage := &engine.Usage{Total: 1 << 30, Available: 1 << 30}
	r.wrap = func(e engine.Engine) engine.Engine { return pool{e, usage} }
	r.start()
	v := r.volume("v", "a", 64<<20)
	tells := func(want string) {
		t.Helper()
		img, err := r.Get(r.ctx, v.Handle)
		r.must(err)
		known, asked := r.KnownDomains(), r.Domains(r.ctx)
		if img.Warning != want || known[0].Warning != want || asked[0].Warning != want || img.State != image.Optimized {
			t.Fatalf("the image says %q, the domain %q and %q, want %q", img.Warning, known[0].Warning, asked[0].Warning, want)
		}
	}
	tells("")
	*usage = engine.Usage{Total: 1 << 30, Used: 1 << 30, Warning: "the pool is full: lvextend"}
	_, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "w", Domains: []string{"a"}, Accesses: []image.Access{mount}, Size: 64 << 20})
	r.is(err, fault.Exhausted)
	if !strings.Contains(err.Error(), usage.Warning) {
		t.Errorf("%v does not say %q", err, usage.Warning)
	}
	tells(usage.Warning)
	if l, _, err := r.List(r.ctx, true, "", 10); err != nil || (len(l) != 1 || l[0].Warning == "") {
		t.Errorf("listed: %+v", l)
	}
	*usage = engine.Usage{Total: 1 << 30, Available: 1 << 30}
	r.volume("w", "a", 64<<20) // which measures
	tells("")
}
