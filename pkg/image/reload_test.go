package image_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

func shared(name string) image.DomainConfig {
	return image.DomainConfig{Name: name, Engine: "dir", Scope: image.ScopeShared}
}

func TestSettingsChangeWhileADomainIsOpen(t *testing.T) {
	r := newRig(t, "a", "b").start()
	v := r.volume("v", "a", 32*mib)
	_, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	cfg := shared("a")
	cfg.Aliases, cfg.CapacityLimit, cfg.NativeOnly, cfg.Overcommit = []string{"old"}, 40*mib, true, 2
	id, err := r.Reconfigure(cfg)
	if err != nil || id != "a" {
		t.Fatal(id, err)
	}
	if _, err := r.Get(r.ctx, image.Handle{Domain: "old", Image: v.Handle.Image}); err != nil {
		t.Errorf("by its new alias: %v", err)
	}
	if ids, _, err := r.IDs("a"); err != nil || !slices.Equal(ids, []string{"a", "old"}) {
		t.Errorf("its IDs are %v, %v", ids, err)
	}
	_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "w", Domains: []string{"a"}, Accesses: []image.Access{mount}, Size: 64 * mib})
	r.is(err, fault.Exhausted)
	for _, d := range r.Domains(r.ctx) {
		if d.ID == "a" && (d.Config.CapacityLimit != 40*mib || !d.Config.NativeOnly || d.Config.Overcommit != 2 || d.Epoch != 1) {
			t.Errorf("%+v", d)
		}
	}
	if got := r.AttachedIn("a"); !slices.Equal(got, []string{"n1"}) {
		t.Errorf("attached in a: %v", got)
	}
	if got := r.AttachedIn("b"); len(got) > 0 {
		t.Errorf("attached in b: %v", got)
	}
	// An alias that is gone stays for what is in use under it.
	cfg.Aliases = nil
	_, err = r.Reconfigure(cfg)
	r.must(err)
	if _, err := r.Get(r.ctx, image.Handle{Domain: "old", Image: v.Handle.Image}); err != nil {
		t.Errorf("by its former alias: %v", err)
	}
	cfg.Aliases = []string{"b"}
	_, err = r.Reconfigure(cfg)
	r.is(err, fault.Invalid)
	_, err = r.Reconfigure(shared("c"))
	r.is(err, fault.Unavailable)
}

func TestADomainThatIsClosedKeepsItsImages(t *testing.T) {
	r := newRig(t, "a", "b").start()
	v := r.volume("v", "a", 32*mib)
	r.write(v, 1)
	_, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	r.must(r.CloseDomain(r.ctx, shared("a"), fault.New(fault.Unavailable, "it is being opened again")))
	r.must(r.CloseDomain(r.ctx, shared("a"), fault.New(fault.Unavailable, "it is being opened again")))
	_, err = r.Get(r.ctx, v.Handle)
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "it is being opened again") {
		t.Errorf("an image of a closed domain: %v", err)
	}
	_, _, err = r.List(r.ctx, true, "", 0)
	r.is(err, fault.Unavailable)
	r.volume("w", "b", 32*mib) // others go on

	e, err := dir.Open(r.ctx, map[string]string{"path": r.dirs["a"]}, host.Exec{})
	r.must(err)
	_, err = r.AddDomain(r.ctx, shared("a"), e)
	r.must(err)
	again, err := r.Get(r.ctx, v.Handle)
	r.must(err)
	if len(again.Attachments) != 1 || again.Attachments[0].Node != "n1" {
		t.Errorf("attached: %+v", again.Attachments)
	}
	r.holds(again, 1)

	r.must(r.CloseDomain(r.ctx, shared("a"), nil))
	r.Forget("a")
	_, err = r.Get(r.ctx, v.Handle)
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "is not configured") {
		t.Errorf("an image of a domain that is not configured any more: %v", err)
	}
	if list, _, err := r.List(r.ctx, true, "", 0); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}
