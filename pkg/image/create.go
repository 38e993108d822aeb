package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// CreateVolume makes a volume, empty or from a snapshot or another volume of
// any domain. It is idempotent by name. fault.Exists: the name is taken by a
// volume with other properties. fault.OutOfRange: the size cannot be.
// fault.Exhausted: no room; nothing remains. fault.Pending: still at work.
func (m *Manager) CreateVolume(ctx context.Context, r CreateRequest) (Image, error) {
	if err := checkName("volume", r.Name); err != nil {
		return Image{}, err
	}
	asked := fingerprint(r.Domains, r.Layout, r.Accesses, r.Size, r.Limit, r.Source, r.Params, r.Encrypted, r.ThinLayers)
	return do(ctx, m, spaceVolume+"/"+r.Name, "create volume", r.Name, asked, func(ctx context.Context, op *operation) (Image, error) {
		return m.createVolume(ctx, op, r)
	})
}

func (m *Manager) createVolume(ctx context.Context, op *operation, r CreateRequest) (Image, error) {
	c := creation{m: m, op: op, r: r}
	op.about(m, Subject{Name: r.Name, Described: r.Described})
	if img := m.byName(spaceVolume, r.Name); img != nil {
		done, err := c.existing(ctx, img)
		if done || err != nil {
			return m.view(img), err
		}
	}
	// The name may be taken where nobody can look: on another node, too.
	among := r.Domains
	if len(among) != 1 {
		among = nil
	}
	if err := m.allOpen(among...); err != nil {
		return Image{}, err
	}
	for {
		if err := c.plan(ctx); err != nil {
			return Image{}, err
		}
		img, err := c.run(ctx)
		if errors.Is(err, errChanged) && fault.KindOf(err) == fault.Conflict && ctx.Err() == nil {
			continue // a source changes so only so often; of another kind: the intent remains
		}
		return img, err
	}
}

// creation is a CreateVolume under way.
type creation struct {
	m  *Manager
	op *operation
	r  CreateRequest

	d      *domain
	layout Layout
	fs     string
	size   int64
	src    *image
	srcRec record
}

// existing deals with an image that has the name already: done says that it
// is what was asked for. What an earlier life left half made is resumed or swept.
func (c *creation) existing(ctx context.Context, img *image) (done bool, err error) {
	d := img.d
	c.op.at(d.id, img.id)
	d.mu.Lock()
	fenced, rec, broken := d.fenced, img.rec, img.broken
	d.mu.Unlock()
	switch {
	case fenced != nil:
		return false, fenced
	case rec.Strong && broken != nil:
		return false, fault.New(fault.Corrupt, "volume %s with this name exists and is broken: %w; see kubectl quarry check", d.handle(img), broken)
	case rec.Strong:
		return true, c.compare(d, rec)
	}
	release, err := img.hold(ctx, c.op)
	if err != nil {
		return false, err
	}
	defer release()
	if rec, _ = img.snapshot(); rec.Strong { // an uncertain seal that turned out to have happened
		return true, c.compare(d, rec)
	}
	if rec.dead() {
		return false, nil
	}
	if rec.Progress > 0 && c.compare(d, rec) == nil {
		switch err := c.resume(ctx, img, rec); {
		case err == nil:
			return true, nil
		case !errors.Is(err, fault.InUse): // in use: an older manager still writes the slab
			return false, err
		}
	}
	return false, d.sweep(ctx, img)
}

// compare says how an existing volume differs from the request, as fault.Exists.
func (c *creation) compare(d *domain, rec record) error {
	r := c.r
	differs := func(what string, is, asked any) error {
		return fault.New(fault.Exists, "a volume %q with %s %v exists, asked for was %v", r.Name, what, is, asked)
	}
	source := Layout("")
	if rec.Source != "" {
		source = rec.layout()
	}
	layout, err := decideLayout(r.Layout, r.Accesses, source)
	switch {
	case err != nil:
		return err
	case layout != rec.layout():
		return differs("layout", rec.layout(), layout)
	case rec.payload() < r.Size || r.Limit > 0 && rec.payload() > r.Limit:
		return differs("size", sizeRange(rec.payload(), 0), sizeRange(r.Size, r.Limit))
	case (rec.Crypt > 0) != r.Encrypted:
		return differs("encryption", encryption(rec.Crypt > 0), encryption(r.Encrypted))
	case rec.Thin != r.ThinLayers:
		return differs("thinLayers", rec.Thin, r.ThinLayers)
	case !c.m.same(rec.Source, r.Source):
		return differs("source", orNone(rec.Source), orNone(r.Source))
	case !maps.Equal(rec.Params, r.Params):
		return differs("parameters", rec.Params, r.Params)
	case !r.RestoreToSource && len(r.Domains) > 0 && !slices.ContainsFunc(r.Domains, d.named):
		return differs("domain", d.id, strings.Join(r.Domains, ", "))
	}
	return nil
}

func sizeRange(size, limit int64) string {
	s := fmt.Sprintf("%s (%d bytes)", bytesText(size), size)
	if limit > 0 {
		s += fmt.Sprintf(" to %s (%d bytes)", bytesText(limit), limit)
	}
	return s
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// plan decides everything that can be decided before anything is changed.
func (c *creation) plan(ctx context.Context) (err error) {
	var srcLayout Layout
	var srcSize int64
	if c.r.Source != "" {
		if c.src, err = c.source(); err != nil {
			return err
		}
		c.srcRec, _ = c.src.snapshot()
		srcLayout, srcSize = c.srcRec.layout(), c.srcRec.payload()
	}
	if c.layout, err = decideLayout(c.r.Layout, c.r.Accesses, srcLayout); err != nil {
		return err
	}
	if err := c.checkEncryption(ctx); err != nil {
		return err
	}
	if c.r.ThinLayers && c.layout != LayoutImage {
		return fault.New(fault.Invalid, "parameter thinLayers=\"true\" and layout %q: only a volume of layout %q has layers", c.layout, LayoutImage)
	}
	c.fs = filesystemOf(c.r.Accesses, c.layout)
	if c.fs != "" && c.srcRec.FS != "" && c.fs != c.srcRec.FS {
		return fault.New(fault.Invalid, "the source carries %s and the volume asked for %s: they must be the same", c.srcRec.FS, c.fs)
	}
	return c.place(ctx, srcSize)
}

// source finds the source and checks that it is what the caller takes it for.
func (c *creation) source() (*image, error) {
	h, err := ParseHandle(c.r.Source)
	if err != nil {
		return nil, fault.New(fault.NotFound, "source: %w", err)
	}
	src, err := c.m.find(h)
	if err != nil {
		return nil, err
	}
	if rec, _ := src.snapshot(); rec.Mutable != c.r.SourceMutable {
		return nil, fault.New(fault.NotFound, "source %s is not a %s", h, kindWord(c.r.SourceMutable))
	}
	return src, src.usable()
}

func kindWord(mutable bool) string {
	if mutable {
		return "volume"
	}
	return "snapshot"
}

// run makes the volume: intent, slab, seal.
func (c *creation) run(ctx context.Context) (Image, error) {
	release, err := c.d.reserve(ctx, c.size)
	if err != nil {
		return Image{}, err
	}
	defer release()
	rec := record{Name: c.r.Name, Kind: string(c.layout.Kind()), Mutable: true, Op: opCreate, Size: c.size, Crypt: c.r.header(), Thin: c.r.ThinLayers,
		Source: c.r.Source, SrcVol: c.r.Source != "" && c.r.SourceMutable, Created: c.m.cfg.Now().UnixMilli(), Params: c.r.Params}
	if c.r.Tuning != (Tuning{}) {
		rec.Tuning = &c.r.Tuning
	}
	img, err := c.d.intend(ctx, c.op, rec, "")
	if err != nil {
		return Image{}, err
	}
	release() // the intent's promise counts from here on
	if err := c.fill(ctx, img, rec, 0); err != nil {
		if err := c.d.abandon(ctx, img, err); err != nil {
			return Image{}, err
		}
	}
	return c.m.view(img), nil
}

// resume goes on with a copy that an earlier manager had begun. fault.InUse:
// that one may still be writing.
func (c *creation) resume(ctx context.Context, img *image, rec record) error {
	c.d, c.layout, c.size = img.d, rec.layout(), rec.Size
	src, err := c.source()
	if err != nil {
		return fault.New(fault.InUse, "the source is gone: %w", err) // sweep, then say so
	}
	c.src = src
	c.srcRec, _ = src.snapshot()
	if c.srcRec.Mutable || c.layout != LayoutImage {
		return fault.New(fault.InUse, "only a copy of a snapshot can be resumed")
	}
	img.d.mu.Lock()
	gone := img.slabGone
	img.op = c.op
	img.d.mu.Unlock()
	if gone {
		err = fault.New(fault.InUse, "its slab is gone: it begins anew")
	} else {
		err = c.fill(ctx, img, rec, rec.Progress)
	}
	if err != nil && !uncertain(err) && !errors.Is(err, fault.InUse) {
		return c.d.abandon(ctx, img, err) // a final error: nothing may remain
	}
	img.d.mu.Lock()
	img.op = nil
	img.d.mu.Unlock()
	return err
}

// fill makes the slab's content and seals the volume.
func (c *creation) fill(ctx context.Context, img *image, rec record, from int64) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.d.describe(gctx, img, c.r.Described) })
	var h how
	g.Go(func() (err error) {
		h, err = c.content(gctx, img, from)
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	rec.Strong, rec.Op, rec.Progress, rec.How = true, "", 0, h.String()
	c.d.mu.Lock()
	rec.Parent, rec.Chunk = img.filling.parent, img.filling.chunk
	c.d.mu.Unlock()
	if c.src != nil {
		rec.Used, rec.FS, rec.Cloned = c.srcRec.Used, c.srcRec.FS, c.srcRec.FS != ""
	}
	c.op.took(h)
	c.op.stepf("sealing")
	if err := c.d.commit(ctx, img, rec, img.id); err != nil {
		return err
	}
	c.m.tellCreated(img)
	return nil
}

func (c *creation) content(ctx context.Context, img *image, from int64) (how, error) {
	spec := engine.SlabSpec{ID: img.id, Kind: c.layout.Kind(), Size: c.size, Params: c.r.Params}
	switch {
	case c.src == nil:
		c.op.stepf("creating slab")
		if err := c.d.engine.CreateSlab(ctx, spec); err != nil {
			return how{}, err
		}
		return how{native: true, reason: "new slab"}, c.d.zero(ctx, c.op, img.id, spec.Kind, 0, spec.Size)
	case c.srcRec.Mutable:
		return c.m.cloneVolume(ctx, c.op, c.src, c.srcRec, img, spec)
	}
	return c.m.cloneSnapshot(ctx, c.op, c.src, img, spec, from)
}

// intend writes the intent of a new image, which is thereby in the index. slab
// is the one that it takes over; "" for a new one, which has the image's ID.
func (d *domain) intend(ctx context.Context, op *operation, rec record, slab string) (*image, error) {
	rev := d.next()
	img := d.add(incarnation(rec.space(), rec.Name, rev), op)
	op.at(d.id, img.id)
	op.stepf("writing the intent")
	if slab == "" && rec.Kind != kindGroup {
		slab = img.id
	}
	rec.Nonce = nonce()
	tag, err := rec.encode(imageTag(img.id, rev), slab)
	if err == nil {
		err = d.create(ctx, img, &pendingTag{tag: tag, rec: rec, rev: rev})
	}
	if err != nil {
		d.mu.Lock()
		unknown := img.pending != nil
		img.op = nil
		img.rec = rec
		if unknown {
			d.setName(img) // whoever asks again finds it, and sweeps it first
		}
		d.mu.Unlock()
		if !unknown {
			d.forget(img)
		}
		return nil, err
	}
	return img, nil
}

// describe writes the tag that describes an image for people.
func (d *domain) describe(ctx context.Context, img *image, desc Described) error {
	body, err := marshal(desc)
	if err != nil {
		return err
	}
	if len(body) > engine.MaxRecord { // the least useful goes first
		desc.Class, desc.Modes, desc.Volume = "", nil, ""
		if body, err = marshal(desc); err != nil || len(body) > engine.MaxRecord {
			return err
		}
	}
	d.mu.Lock()
	have := img.described
	d.mu.Unlock()
	if have || desc.empty() {
		return nil
	}
	if err := d.engine.CreateTag(ctx, engine.Tag{Name: prefixDescribe + img.id, Slab: img.id, Record: body}); err != nil && !errors.Is(err, fault.Exists) {
		return err
	}
	d.mu.Lock()
	img.described, img.desc = true, desc
	d.mu.Unlock()
	return nil
}

func (d Described) empty() bool {
	return d.Namespace == "" && d.Claim == "" && d.Volume == "" && d.Class == "" && d.Filesystem == "" && len(d.Modes) == 0
}
