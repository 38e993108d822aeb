package image

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// resumeGrace is how long a half-done copy of an earlier manager, or a snapshot
// past its first seal, waits for its request to be repeated before it is swept.
// Sidecars repeat within minutes.
const resumeGrace = time.Hour

// collectSoon wakes the collector.
func (d *domain) collectSoon() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

func (d *domain) collectLoop(ctx context.Context) {
	defer d.m.loops.Done()
	defer close(d.stopped)
	t := time.NewTicker(d.m.cfg.CollectEvery)
	defer t.Stop()
	for {
		if err := d.collect(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Collecting stopped, to be tried again", "domain", d.id)
		}
		d.watch(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-d.kick:
		}
	}
}

// Collect runs one round of the collector on every open domain.
func (m *Manager) Collect(ctx context.Context) error {
	var errs []error
	for _, d := range m.open() {
		errs = append(errs, fault.In(d.collect(ctx), "collect", d.id, ""))
	}
	return errors.Join(errs...)
}

// collect removes what is certainly dead. It works on the index; a fresh
// listing only ever tells it of things that the index proves to be nobody's.
// What fails is tried again in the next round.
func (d *domain) collect(ctx context.Context) error {
	if err := d.current(ctx); err != nil {
		return err
	}
	if err := d.readDescriptions(ctx); err != nil {
		return err
	}
	var errs []error
	errs = append(errs, d.collectPins(ctx))
	for _, img := range d.list() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		errs = append(errs, fault.In(d.collectImage(ctx, img), "collect", d.id, img.id))
	}
	errs = append(errs, d.collectEpochs(ctx))
	d.allocateLayers(ctx)
	errs = append(errs, d.trimLayers(ctx))
	d.mergeSome(ctx)
	d.flattenSome(ctx)
	if now := d.m.cfg.Now(); now.Sub(d.lastScan()) >= retention {
		errs = append(errs, d.collectStrays(ctx, now))
	}
	errs = append(errs, d.watchReserve(ctx))
	d.tellStates()
	return errors.Join(errs...)
}

// list is every entry of the index for which the collector may have work.
func (d *domain) list() []*image {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []*image
	for _, img := range d.images {
		if len(img.old) > 0 || !img.rec.Strong || img.pending != nil || img.dropped() || img.merging == nil && d.held(img) {
			out = append(out, img)
		}
	}
	// Groups before members, sources after what reads them: any order is right,
	// a fixed one is easier to follow.
	slices.SortFunc(out, func(a, b *image) int { return cmp.Compare(a.id, b.id) })
	return out
}

// collectImage does for one image whatever its time has come for.
func (d *domain) collectImage(ctx context.Context, img *image) error {
	select {
	case img.lock.ch <- struct{}{}:
		defer img.lock.release()
	default:
		return nil // somebody works on it
	}
	d.mu.Lock()
	inFlight, dead, pending := img.op != nil, d.finished(img), img.pending != nil
	leftOver := !dead && (img.rev == 0 || !d.visible(img) && !img.rec.Strong)
	goesOn := img.rec.Progress > 0 || img.layered() && img.rec.Op == opSnapshot && len(d.children[img.id]) > 0
	member := dead && !img.rec.dead() // of a group that was deleted, or never sealed
	waits := leftOver && goesOn && !img.found.IsZero() && d.m.cfg.Now().Sub(img.found) < resumeGrace
	d.mu.Unlock()
	switch {
	case inFlight, waits:
		return nil
	case pending:
		if err := d.resolve(ctx, img); err != nil {
			return err
		}
	}
	if leftOver {
		if rec, _ := img.snapshot(); !rec.Strong {
			err := d.sweep(ctx, img)
			if errors.Is(err, fault.Pending) { // check shows it until its time comes
				klog.FromContext(ctx).V(2).Info("Sweeping waits", "image", img.id, "why", err)
				return nil
			}
			return err
		}
	}
	if member {
		if settled, err := d.settleSource(ctx, img); err != nil || !settled {
			return err
		}
	}
	if err := d.endHold(ctx, img); err != nil {
		return err
	}
	if dead {
		if err := d.dispose(ctx, img); err != nil {
			return err
		}
	}
	return d.collectTags(ctx, img, dead)
}

// dispose deletes the slab of a dead image when nothing needs it any more.
func (d *domain) dispose(ctx context.Context, img *image) error {
	d.mu.Lock()
	dead := d.finished(img)
	busy := img.readers > 0 || len(img.attached) > 0 || d.pinned(img.id) || img.op != nil || len(d.children[img.id]) > 0 || d.replaces(img) != ""
	gone, slab, theirs := img.slabGone, img.slab, d.taken(img)
	d.mu.Unlock()
	if !dead || busy || gone {
		return nil
	}
	if slab != "" && !theirs {
		if err := d.deleteSlab(ctx, slab); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	img.slabGone = true
	d.setPromise(img)
	d.relink(img)
	return nil
}

// taken says whether a dead image's slab is another one's: it has become that
// one's by a merge, or never became img's by a snapshot. The caller holds d.mu.
func (d *domain) taken(img *image) bool {
	for _, o := range d.images {
		if o != img && o.slab == img.slab && !o.slabGone && (d.visible(o) || len(d.children[o.id]) > 0) {
			return true
		}
	}
	return false
}

// pinned says whether a copy into another domain may be reading the image.
// The caller holds d.mu.
func (d *domain) pinned(id string) bool {
	for name := range d.pins {
		if p, _, ok := parseRevTag(prefixPin, name); ok && p == id {
			return true
		}
	}
	return false
}

// deleteSlab and deleteTag act only while the domain is certainly ours.
func (d *domain) deleteSlab(ctx context.Context, id string) error {
	if err := d.current(ctx); err != nil {
		return err
	}
	return d.engine.DeleteSlab(ctx, id)
}

func (d *domain) deleteTag(ctx context.Context, name string) error {
	if err := d.current(ctx); err != nil {
		return err
	}
	return d.engine.DeleteTag(ctx, name)
}

// retention of superseded tags: none where a listing shows one moment.
func (d *domain) retention() time.Duration {
	if d.desc.AtomicListing {
		return 0
	}
	return retention
}

// collectTags deletes superseded revisions, lowest first, and in the end the
// tags of a dead image, after its slab. The caller holds img.lock.
func (d *domain) collectTags(ctx context.Context, img *image, dead bool) error {
	now, keep := d.m.cfg.Now(), d.retention()
	for {
		d.mu.Lock()
		due := len(img.old) > 0 && now.Sub(img.old[0].since) >= keep
		var rev revision
		if due {
			rev = img.old[0].rev
		}
		d.mu.Unlock()
		if !due {
			break
		}
		if err := d.deleteTag(ctx, imageTag(img.id, rev)); err != nil {
			return err
		}
		d.mu.Lock()
		img.old, img.lastOld = img.old[1:], now
		d.mu.Unlock()
	}
	d.mu.Lock()
	// A listing that saw only a superseded revision must have ended before the
	// last tag goes: else it would take a dead image for a living one.
	last := dead && img.slabGone && len(img.old) == 0 && now.Sub(img.lastOld) >= keep && !d.hasMembers(img)
	described, rev := img.described, img.rev
	d.mu.Unlock()
	if !last {
		return nil
	}
	if described {
		if err := d.deleteTag(ctx, prefixDescribe+img.id); err != nil {
			return err
		}
	}
	if err := d.deleteTag(ctx, imageTag(img.id, rev)); err != nil {
		return err
	}
	d.forget(img)
	return nil
}

// hasMembers says whether a group's record is still needed to tell its
// members dead. The caller holds d.mu.
func (d *domain) hasMembers(g *image) bool {
	if g.rec.Kind != kindGroup {
		return false
	}
	for _, img := range d.images {
		if img.rec.Group == g.id {
			return true
		}
	}
	return false
}

// collectPins removes the pins whose copies have ended, as their target shows.
func (d *domain) collectPins(ctx context.Context) error {
	d.mu.Lock()
	pins := make(map[string]pinRecord, len(d.pins))
	for name, p := range d.pins {
		pins[name] = p
	}
	d.mu.Unlock()
	var errs []error
	for name, p := range pins {
		h, err := ParseHandle(p.Target)
		if err != nil {
			continue // unreadable: check reports it
		}
		target, err := d.m.domain(h.Domain)
		if err != nil || !target.ended(h.Image) {
			continue
		}
		if err := d.deleteTag(ctx, name); err != nil {
			errs = append(errs, err)
			continue
		}
		d.mu.Lock()
		delete(d.pins, name)
		d.mu.Unlock()
	}
	return errors.Join(errs...)
}

// ended says whether the operation that was making an image is over.
func (d *domain) ended(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	img := d.images[id]
	return d.fenced == nil && (img == nil || img.op == nil && img.pending == nil && (img.rec.Strong || img.rec.dead()))
}

// collectEpochs removes the tags of earlier openings.
func (d *domain) collectEpochs(ctx context.Context) error {
	now, keep := d.m.cfg.Now(), d.retention()
	d.mu.Lock()
	var due []string
	for name, since := range d.oldTags {
		if now.Sub(since) >= keep {
			due = append(due, name)
		}
	}
	d.mu.Unlock()
	slices.Sort(due)
	for _, name := range due {
		if err := d.deleteTag(ctx, name); err != nil {
			return err
		}
		d.mu.Lock()
		delete(d.oldTags, name)
		d.mu.Unlock()
	}
	return nil
}

func (d *domain) lastScan() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.scanned
}

// stray is a slab or tag that the index proves to be nobody's.
type stray struct {
	slab bool
	name string
	why  string
	size int64
	// held: others have to be gone for a round before it may go.
	held bool
}

// collectStrays removes strays that were seen twice, a retention apart.
func (d *domain) collectStrays(ctx context.Context, now time.Time) error {
	found, slabs, err := d.findStrays(ctx)
	if err != nil {
		return err
	}
	seen := map[string]time.Time{}
	var due []stray
	d.mu.Lock()
	d.scanned = now
	for _, s := range found {
		since, again := d.strays[s.name]
		if !again {
			since = now
		}
		seen[s.name] = since
		if again && !s.held && now.Sub(since) >= d.retention() {
			due = append(due, s)
		}
	}
	d.strays = seen
	d.mu.Unlock()
	for _, s := range due {
		if err := d.removeStray(ctx, s); err != nil {
			return err
		}
	}
	return d.measure(ctx, slabs)
}

// complete says whether every image's chain is known: where a record is missing or unreadable,
// a slab that no image seems to need may be the one that it named. The caller
// holds d.mu.
func (d *domain) complete() bool {
	for _, img := range d.images {
		if below := img.below(); below != "" && d.images[below] == nil || img.badTag {
			return false
		}
	}
	return true
}

func (d *domain) removeStray(ctx context.Context, s stray) error {
	klog.FromContext(ctx).Info("Removing what nobody references", "domain", d.id, "object", s.name, "why", s.why)
	if s.slab {
		return d.deleteSlab(ctx, s.name)
	}
	return d.deleteTag(ctx, s.name)
}

// findStrays lists the slabs and tags afresh and names those that the index
// proves to be nobody's. It also returns the slabs.
func (d *domain) findStrays(ctx context.Context) ([]stray, []engine.Slab, error) {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	// Listed before the index is looked at: whatever is made meanwhile has its
	// intent in the index by then.
	slabs, err := d.engine.ListSlabs(ctx)
	if err != nil {
		return nil, nil, err
	}
	tags, err := d.engine.ListTags(ctx, "")
	if err != nil {
		return nil, nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	used := make(map[string]bool, len(d.images))
	for _, img := range d.images {
		used[img.slab] = true
		if !d.visible(img) { // it is being made, or taken away
			used[img.id] = true
		}
	}
	var out []stray
	whole := d.complete()
	for _, s := range slabs {
		if whole && !used[s.ID] && d.ours(s.ID) {
			out = append(out, stray{slab: true, name: s.ID, size: s.Size, why: "no image needs this slab"})
		}
	}
	last, several := lastAttachments(tags), map[string]bool{}
	for _, t := range tags {
		if key := attachmentKey(t.Name); key != "" && last[key] != t.Name {
			several[key] = true
		}
	}
	for _, t := range tags {
		key := attachmentKey(t.Name)
		if why := d.strayTag(t.Name); why != "" {
			// The last tells that the earlier ones ended: they go first.
			out = append(out, stray{name: t.Name, why: why, held: several[key] && last[key] == t.Name})
		}
	}
	return out, slabs, nil
}

// ours says whether an ID has the form of an incarnation of this or an
// earlier epoch: nothing else is ever deleted.
func (d *domain) ours(id string) bool {
	hash, rev, ok := strings.Cut(id, "-")
	n, err := strconv.ParseUint(rev, 16, 64)
	return ok && len(hash) == 20 && err == nil && revision(n).epoch() <= d.epoch
}

// strayTag says why a tag is nobody's, or "". The caller holds d.mu.
func (d *domain) strayTag(name string) string {
	if id, rev, ok := parseRevTag(prefixImage, name); ok {
		_, opening := d.known[name]
		if rev.epoch() < d.epoch && !opening && d.ours(id) {
			return "an older manager wrote it after this one had opened the domain: it is void"
		}
		return ""
	}
	if id, ok := strings.CutPrefix(name, prefixDescribe); ok {
		if d.images[id] == nil && d.ours(id) {
			return "it describes an image that does not exist"
		}
		return ""
	}
	if id, rev, ok := parseRevTag(prefixPin, name); ok {
		if _, known := d.pins[name]; !known && rev.epoch() <= d.epoch && d.ours(id) {
			return "it is a pin that was never confirmed"
		}
		return ""
	}
	if s, ok := strings.CutPrefix(name, prefixAttachment); ok {
		id, _, _ := strings.Cut(s, ".")
		img := d.images[id]
		if img == nil && d.ours(id) {
			return "it attaches an image that does not exist"
		}
		if img == nil || img.broken != nil {
			return ""
		}
		for _, a := range img.attached {
			if a.tag == name {
				return ""
			}
		}
		return "it is an attachment that has ended, was superseded or was never confirmed"
	}
	return ""
}
