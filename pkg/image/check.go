package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Check looks for what is wrong in a domain ("": in all). It takes no locks
// and changes nothing.
func (m *Manager) Check(ctx context.Context, id string) ([]Finding, error) {
	list := m.open()
	if id != "" {
		d, err := m.domain(id)
		if err != nil {
			return nil, err
		}
		list = []*domain{d}
	}
	var out []Finding
	for _, d := range list {
		f, err := d.check(ctx)
		if err != nil {
			return nil, fault.In(err, "check", d.id, "")
		}
		out = append(out, f...)
	}
	return out, nil
}

func (d *domain) check(ctx context.Context) ([]Finding, error) {
	if err := d.current(ctx); err != nil {
		return nil, err
	}
	strays, slabs, err := d.findStrays(ctx)
	if err != nil {
		return nil, err
	}
	bySlab := make(map[string]engine.Slab, len(slabs))
	for _, s := range slabs {
		bySlab[s.ID] = s
	}
	var out []Finding
	add := func(kind FindingKind, object string, bytes int64, fix, format string, args ...any) {
		out = append(out, Finding{ID: findingID(d.id, string(kind), object), Kind: kind, Domain: d.id, Object: object,
			Message: fmt.Sprintf(format, args...), Fix: fix, Bytes: bytes})
	}
	for _, s := range slabs {
		if !d.ours(s.ID) {
			add(FindingReport, s.ID, 0, "", "this slab has a name that Quarry never gives: it is left alone; remove it if you know it")
		}
	}
	for _, s := range strays {
		if s.held {
			continue
		}
		add(FindingClean, s.name, s.size, "delete it", "%s", s.why)
	}
	d.mu.Lock()
	for _, img := range d.images {
		s, have := bySlab[img.slab]
		d.checkImage(img, s, have, add)
	}
	for name, p := range d.pins {
		if _, err := ParseHandle(p.Target); err != nil {
			add(FindingReport, name, 0, "", "this pin cannot be read back: it keeps its image's slab for ever; delete the tag when no copy of the image is running")
		}
	}
	layers := d.layers()
	d.mu.Unlock()
	for _, l := range layers {
		switch err := d.checkLayer(ctx, l); {
		case errors.Is(err, fault.Corrupt):
			add(FindingMend, l.id, 0, "check the layer, and make it usable again if nothing in it contradicts itself", "the layer in slab %s: %v", l.slab, err)
		case err != nil:
			add(FindingReport, l.id, 0, "", "the layer in slab %s cannot be read: %v; mend the storage, then unstage what uses the layer and stage it again", l.slab, err)
		}
	}
	slices.SortFunc(out, func(a, b Finding) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// layers are the images whose slabs are layers that somebody needs, with their
// slabs. The caller holds d.mu.
func (d *domain) layers() (out []layerOf) {
	for _, img := range d.images {
		if img.rec.Chunk > 0 && !img.slabGone && (d.visible(img) || len(d.children[img.id]) > 0) {
			out = append(out, layerOf{img.id, img.slab})
		}
	}
	return out
}

type layerOf struct{ id, slab string }

// checkLayer looks whether the kernel has given a layer up. What cannot be
// attached is no finding: the image's state tells.
func (d *domain) checkLayer(ctx context.Context, l layerOf) error {
	looked, err := d.m.cfg.Worker.CheckLayer(ctx, Place{d.id, l.slab})
	if !looked {
		return nil
	}
	return err
}

// mendLayer makes a layer that the kernel gave up usable again. The caller holds
// its image's lock.
func (d *domain) mendLayer(ctx context.Context, img *image) (string, error) {
	if nodes := d.stagedOn(img); len(nodes) > 0 {
		return "", fault.New(fault.InUse, "the layer in slab %s is in use on %s: stop what uses image %s, detach it, and try again", img.slab, strings.Join(nodes, ", "), img.id)
	}
	rec, slab := img.snapshot()
	n, err := d.m.cfg.Worker.RepairLayer(ctx, Place{d.id, slab}, rec.need())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("the layer in slab %s is usable again: %d chunks of %s checked; check the filesystem on it, too", slab, n, bytesText(rec.Chunk)), nil
}

func findingID(parts ...string) string { return strings.Join(parts, ":") }

// checkImage looks at one image. The caller holds d.mu.
func (d *domain) checkImage(img *image, s engine.Slab, have bool, add func(kind FindingKind, object string, bytes int64, fix, format string, args ...any)) {
	dead := d.finished(img)
	switch {
	case img.rec.Kind == kindGroup && img.rec.Strong:
		if n := d.members(img); n != img.rec.Members {
			add(FindingReport, img.id, 0, "", "group snapshot %q has %d members, %d are there", img.rec.Name, img.rec.Members, n)
		}
	case dead && !img.slabGone && img.slab != "" && img.op == nil:
		add(FindingClean, img.id, s.Size, "delete its slab", "it is deleted: %s", d.whyDeleting(img))
	case !dead && !d.visible(img) && img.op == nil:
		add(FindingClean, img.id, s.Size, "sweep it", "%s %q was left half done by an earlier run", img.rec.Op, img.rec.Name)
	case !d.visible(img):
	case img.broken != nil && img.rev != 0 && compareSlab(img, s, have) == nil && !img.badTag:
		add(FindingMend, img.id, 0, "take it into use again", "it was broken (%v), and its slab is now as recorded", img.broken)
	case img.broken != nil:
		add(FindingReport, img.id, 0, "", "%s %q is broken: %v; restore what is missing, or delete it", kindWord(img.rec.Mutable), img.rec.Name, img.broken)
	case img.scarce != "":
		add(FindingReport, img.id, 0, "", "%s %q: %s", kindWord(img.rec.Mutable), img.rec.Name, img.scarce)
	case d.toFlatten(img) != nil:
		add(FindingOptimize, img.id, 0, "flatten image "+d.toFlatten(img).id, "%s", d.whyDegraded(img))
	case have && d.mergeable(img) == nil:
		add(FindingMerge, img.id, s.Size, "merge it into the slab below", "%s", d.whyDegraded(img))
	default:
		if err := compareSlab(img, s, have); err != nil {
			add(FindingReport, img.id, 0, "", "%s %q: %v; restore the slab, or delete the %s", kindWord(img.rec.Mutable), img.rec.Name, err, kindWord(img.rec.Mutable))
		}
	}
}

func (d *domain) members(g *image) int {
	n := 0
	for _, img := range d.images {
		if img.rec.Group == g.id {
			n++
		}
	}
	return n
}

// Fix verifies a finding again and acts on it. It returns what it did.
// fault.NotFound: the finding does not stand any more. fault.Unsupported: only
// a person can help.
func (m *Manager) Fix(ctx context.Context, f Finding) (string, error) {
	d, err := m.domain(f.Domain)
	if err != nil {
		return "", err
	}
	now, err := d.check(ctx)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(now, func(g Finding) bool { return g.ID == f.ID })
	if i < 0 {
		return "", errGone(f.ID)
	}
	f = now[i]
	if f.Fix == "" {
		return "", fault.New(fault.Unsupported, "%s: only a person can help: %s", f.Object, f.Message)
	}
	d.mu.Lock()
	img := d.images[f.Object]
	d.mu.Unlock()
	if img == nil {
		return d.fixStray(ctx, f)
	}
	if err := img.lock.acquire(ctx, nil); err != nil {
		return "", err
	}
	defer img.lock.release()
	return d.fixImage(ctx, img, f)
}

func (d *domain) fixStray(ctx context.Context, f Finding) (string, error) {
	strays, _, err := d.findStrays(ctx)
	if err != nil {
		return "", err
	}
	for _, s := range strays {
		if s.name == f.Object && !s.held {
			return "deleted " + s.name, d.removeStray(ctx, s)
		}
	}
	return "", errGone(f.ID)
}

// fixImage acts on an image whose lock the caller holds.
func (d *domain) fixImage(ctx context.Context, img *image, f Finding) (string, error) {
	d.mu.Lock()
	dead, inFlight, visible := d.finished(img), img.op != nil, d.visible(img)
	d.mu.Unlock()
	switch {
	case f.Kind == FindingMerge && visible:
		d.mu.Lock()
		img.mergeTried = time.Time{}
		d.mu.Unlock()
		d.mergeSome(ctx)
		return "began to merge " + img.id, nil
	case f.Kind == FindingOptimize && visible:
		d.mu.Lock()
		t := d.toFlatten(img)
		if t != nil {
			t.flatTried = time.Time{}
		}
		d.mu.Unlock()
		if t == nil {
			break
		}
		d.flattenSome(ctx)
		return "began to flatten " + t.id, nil
	case f.Kind == FindingClean && dead:
		return "deleted the slab of " + img.id, d.dispose(ctx, img)
	case f.Kind == FindingClean && !visible && !inFlight:
		return "swept " + img.id, d.sweep(ctx, img)
	case f.Kind == FindingMend && img.rec.Chunk > 0 && d.checkLayer(ctx, layerOf{img.id, img.slab}) != nil:
		return d.mendLayer(ctx, img)
	case f.Kind == FindingMend && visible:
		d.mu.Lock()
		img.broken = nil
		d.mu.Unlock()
		return img.id + " is in use again", nil
	}
	return "", errGone(f.ID)
}
