package image

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// open claims an epoch, indexes the domain and finds its ID.
func (d *domain) open(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	if err := d.checkNode(ctx); err != nil {
		return err
	}
	var tags []engine.Tag
	for {
		if err := d.claim(ctx); err != nil {
			return err
		}
		var err error
		if tags, err = d.listOpening(ctx); err != nil {
			return fault.In(err, "index the tags", d.cfg.Name, "")
		}
		highest := highestEpoch(tags)
		if highest == d.epoch {
			break
		}
		// Another manager opened meanwhile, or the epoch tags were lost: claim a
		// higher one, which makes the listing too old.
		d.epoch = highest
	}
	if err := d.identify(ctx, tags); err != nil {
		return err
	}
	counting, err := d.settle(ctx, tags)
	if err != nil {
		return err
	}
	if err := d.bind(ctx, tags); err != nil {
		return err
	}
	d.index(counting)
	return d.inspect(ctx)
}

// listOpening lists everything that the index needs. Descriptions, which are
// for people only and half of all tags, are read later.
func (d *domain) listOpening(ctx context.Context) ([]engine.Tag, error) {
	var tags []engine.Tag
	for _, prefix := range []string{prefixDomain, prefixOpening, prefixImage, prefixAttachment, prefixPin, prefixEpoch} {
		list, err := d.engine.ListTags(ctx, prefix)
		if err != nil {
			return nil, err
		}
		tags = append(tags, list...)
	}
	return tags, nil
}

// readDescriptions enters the descriptions into the index, once.
func (d *domain) readDescriptions(ctx context.Context) error {
	d.mu.Lock()
	done := d.described
	d.mu.Unlock()
	if done {
		return nil
	}
	tags, err := d.engine.ListTags(ctx, prefixDescribe)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range tags {
		if img := d.images[strings.TrimPrefix(t.Name, prefixDescribe)]; img != nil {
			img.described = true
			_ = json.Unmarshal(t.Record, &img.desc) // for people only: may be missing
		}
	}
	d.described = true
	return nil
}

// claim creates an epoch tag higher than every other.
func (d *domain) claim(ctx context.Context) error {
	for {
		tags, err := d.engine.ListTags(ctx, prefixEpoch)
		if err != nil {
			return fault.In(err, "read the epochs", d.cfg.Name, "")
		}
		if err := d.checkOwner(tags); err != nil {
			return err
		}
		d.epoch = max(d.epoch, highestEpoch(tags)) + 1
		body, err := marshal(epochRecord{Owner: d.m.cfg.Installation, Time: d.m.cfg.Now().UnixMilli(), Nonce: nonce()})
		if err != nil {
			return err
		}
		err = d.engine.CreateTag(ctx, engine.Tag{Name: epochTag(d.epoch), Record: body})
		if err == nil {
			return nil
		}
		if !errors.Is(err, fault.Exists) {
			return fault.In(err, "claim an epoch", d.cfg.Name, "")
		}
	}
}

// checkOwner refuses a domain that belongs to another installation.
func (d *domain) checkOwner(tags []engine.Tag) error {
	var last *engine.Tag
	for i, t := range tags {
		if _, ok := parseEpochTag(t.Name); ok && (last == nil || t.Name > last.Name) {
			last = &tags[i]
		}
	}
	if last == nil || d.cfg.TakeOver {
		return nil
	}
	var r epochRecord
	if err := json.Unmarshal(last.Record, &r); err != nil || r.Owner == "" {
		return fault.New(fault.Corrupt, "domain %s: tag %s, which names the installation that owns the domain, cannot be read; if it is yours, set takeOver: true on the domain once", d.cfg.Name, last.Name)
	}
	if r.Owner != d.m.cfg.Installation {
		return fault.New(fault.Permission, "domain %s belongs to the Quarry installation %q, this one is %q; if that one is gone for good, set takeOver: true on the domain once", d.cfg.Name, r.Owner, d.m.cfg.Installation)
	}
	return nil
}

// highestEpoch seen in any tag.
func highestEpoch(tags []engine.Tag) uint32 {
	var top uint32
	for _, t := range tags {
		if e, ok := parseEpochTag(t.Name); ok {
			top = max(top, e)
			continue
		}
		if i := strings.LastIndexByte(t.Name, '.'); i >= 0 {
			if r, ok := parseRevision(t.Name[i+1:]); ok {
				top = max(top, r.epoch())
			}
		}
	}
	return top
}

// identify finds the domain's ID, which for a node-scope domain is stored in
// the domain itself.
func (d *domain) identify(ctx context.Context, tags []engine.Tag) error {
	d.id = d.cfg.Name
	if d.cfg.Scope != ScopeNode {
		return nil
	}
	i := slices.IndexFunc(tags, func(t engine.Tag) bool { return t.Name == nameDomainID })
	if i >= 0 {
		if len(tags[i].Record) != 8 {
			return fault.New(fault.Corrupt, "domain %s: its ID (tag %s) cannot be read; restore that tag", d.cfg.Name, nameDomainID)
		}
		d.id += "." + string(tags[i].Record)
		return nil
	}
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	id := hex.EncodeToString(b[:])
	// Not raced: the epoch is ours. If it is not any more, current says so.
	if err := d.createTag(ctx, engine.Tag{Name: nameDomainID, Record: []byte(id)}); err != nil {
		return fault.In(err, "store the domain's ID", d.cfg.Name, "")
	}
	d.id += "." + id
	return nil
}

// index enters the opening listing.
func (d *domain) index(tags []engine.Tag) {
	now := d.m.cfg.Now()
	byImage := map[string][]found{}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range tags {
		if id, rev, ok := parseRevTag(prefixImage, t.Name); ok {
			byImage[id] = append(byImage[id], found{rev, t})
			d.known[t.Name] = struct{}{}
		} else if e, ok := parseEpochTag(t.Name); ok && e < d.epoch {
			d.oldTags[t.Name] = now
		}
	}
	for id, revs := range byImage {
		d.enter(id, revs, now)
	}
	last := lastAttachments(tags)
	for _, t := range tags {
		if key := attachmentKey(t.Name); key == "" || last[key] == t.Name {
			d.enterSide(t) // of an image's attachments to a node, the last counts
		}
	}
}

// attachmentKey is what the attachments of an image to a node have in common,
// "" for other tags.
func attachmentKey(name string) string {
	if i := strings.LastIndexByte(name, '.'); strings.HasPrefix(name, prefixAttachment) && i > len(prefixAttachment) {
		return name[:i]
	}
	return ""
}

// lastAttachments finds the youngest attachment tag by key.
func lastAttachments(tags []engine.Tag) map[string]string {
	last := map[string]string{}
	for _, t := range tags { // generations have a fixed width
		if key := attachmentKey(t.Name); key != "" && t.Name > last[key] {
			last[key] = t.Name
		}
	}
	return last
}

type found struct {
	rev revision
	tag engine.Tag
}

// enter makes an image's entry from its revisions. The highest counts; a lower
// one is never used in its place, but tells the name of a broken image.
func (d *domain) enter(id string, revs []found, now time.Time) {
	slices.SortFunc(revs, func(a, b found) int { return cmp.Compare(a.rev, b.rev) })
	img := &image{id: id, d: d, lock: newLock(), attached: map[string]*attachment{}, found: now}
	d.images[id] = img
	top := revs[len(revs)-1]
	for _, r := range revs[:len(revs)-1] {
		img.old = append(img.old, oldRevision{rev: r.rev, since: now})
	}
	if len(revs) == 1 {
		img.lastOld = now
	}
	rec, err := decode(top.tag)
	if err == nil {
		d.apply(img, rec, top.tag.Slab, top.rev)
		return
	}
	img.broken, img.badTag, img.rev, img.slab = err, true, top.rev, id
	img.rec = record{Kind: string(engine.Block), Strong: true, Mutable: true}
	for _, r := range slices.Backward(revs[:len(revs)-1]) {
		if rec, lower := decode(r.tag); lower == nil && !rec.dead() {
			img.rec, img.slab = rec, r.tag.Slab
			img.rec.Strong = true
			d.setName(img)
			break
		}
	}
	d.relink(img)
}

// enterSide indexes a tag that belongs to an image: attachment or pin.
func (d *domain) enterSide(t engine.Tag) {
	if s, ok := strings.CutPrefix(t.Name, prefixAttachment); ok {
		id, _, _ := strings.Cut(s, ".")
		gen, ok := parseRevision(t.Name[strings.LastIndexByte(t.Name, '.')+1:])
		img := d.images[id]
		if !ok || img == nil {
			return
		}
		var r attachRecord
		err := json.Unmarshal(t.Record, &r)
		if img.rec.dead() && (err != nil || r.Mode != ModeMerging) {
			return // what is deleted was not attached, but it may be merged: a stray
		}
		if err != nil || r.Node == "" {
			// Somebody may be using the image, and it is not known who.
			if img.broken == nil {
				img.broken, img.badTag = fault.New(fault.Corrupt, "attachment %s cannot be read back", t.Name), true
				img.badAttachments = map[string]struct{}{}
			}
			if img.badAttachments != nil {
				img.badAttachments[t.Name] = struct{}{}
			}
			// Its name says who it is, unless that is a hash. Once it is confirmed
			// that the image is unstaged there, the attachment goes and all is well.
			if node, ok := nodeOfAttachment(t.Name); ok {
				img.attached[node] = &attachment{tag: t.Name, building: true, Attachment: Attachment{Node: node, Generation: int64(gen), Staged: true}}
			}
			return
		}
		if r.Ended {
			return
		}
		img.attached[r.Node] = &attachment{tag: t.Name, building: true, Attachment: Attachment{Node: r.Node, Mode: r.Mode, Block: r.Block,
			ReadOnly: r.ReadOnly, Generation: int64(gen), Staged: true}} // until the agent says otherwise
		return
	}
	if _, _, ok := parseRevTag(prefixPin, t.Name); ok {
		var r pinRecord
		_ = json.Unmarshal(t.Record, &r) // an unreadable pin pins until a person removes it
		d.pins[t.Name] = r
	}
}

// inspect compares the index with the slabs, and measures what is not Quarry's.
func (d *domain) inspect(ctx context.Context) error {
	slabs, err := d.engine.ListSlabs(ctx)
	if err != nil {
		return fault.In(err, "list the slabs", d.cfg.Name, "")
	}
	bySlab := make(map[string]engine.Slab, len(slabs))
	for _, s := range slabs {
		bySlab[s.ID] = s
	}
	d.mu.Lock()
	for _, img := range d.images {
		s, have := bySlab[img.slab]
		switch {
		case img.rec.Kind == kindGroup:
		case !d.visible(img):
			if img.slabGone = !have; img.slabGone {
				d.setPromise(img)
				d.relink(img)
			}
		case img.broken != nil:
		default:
			img.broken = compareSlab(img, s, have)
		}
	}
	for _, img := range d.images {
		if d.visible(img) && img.broken == nil && img.rec.Kind != kindGroup {
			img.broken = d.compareChain(img, bySlab)
		}
	}
	d.mu.Unlock()
	return d.measure(ctx, slabs)
}

// compareSlab says what is wrong with an image's slab, or nil.
func compareSlab(img *image, s engine.Slab, have bool) error {
	switch {
	case !have:
		return fault.New(fault.Corrupt, "its slab %s is missing", img.slab)
	case string(s.Kind) != img.rec.Kind:
		return fault.New(fault.Corrupt, "its slab %s is of kind %s, recorded is %s", img.slab, s.Kind, img.rec.Kind)
	case s.Kind == engine.Block && s.Size < img.rec.need():
		return fault.New(fault.Corrupt, "its slab %s has %d bytes, recorded are %d: it was truncated", img.slab, s.Size, img.rec.need())
	}
	return nil
}

// measure finds out how much of the storage is used by what is not Quarry's.
func (d *domain) measure(ctx context.Context, slabs []engine.Slab) error {
	if d.caps.Meter == nil {
		return nil
	}
	u, err := d.usage(ctx)
	if err != nil {
		return fault.In(err, "measure the usage", d.cfg.Name, "")
	}
	foreign := u.Used
	for _, s := range slabs {
		su, err := d.caps.Meter.SlabUsage(ctx, s.ID)
		switch {
		case err == nil:
			foreign -= su.Used
		case errors.Is(err, engine.ErrDeclined): // a tree without a quota: its promise stands for it
			foreign -= s.Size
		case errors.Is(err, fault.NotFound):
		default:
			klog.FromContext(ctx).V(2).Info("Slab cannot be measured", "domain", d.id, "slab", s.ID, "err", err)
		}
	}
	d.mu.Lock()
	d.foreign = max(0, foreign)
	d.mu.Unlock()
	return nil
}
