package image

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// retention is how long a superseded tag outlives its successor, and the last
// tag of a dead image its forerunners: a listing that races with the pair must
// see one of the two, and a listing lasts at most engine.ListingLimit.
const retention = 2 * engine.ListingLimit

// domain is an open domain: its engine and the index of everything in it.
type domain struct {
	m      *Manager
	id     string
	cfg    DomainConfig // as it was opened; see now
	engine engine.Engine
	// settings are cfg with what has changed since.
	settings atomic.Pointer[DomainConfig]
	// stop ends its collector, which closes stopped then.
	stop    context.CancelFunc
	stopped chan struct{}
	users   *engine.Users // of its slabs, in this process
	cuts    cuts
	caps    engine.Capabilities
	desc    engine.Description
	epoch   uint32

	mu       sync.Mutex // guards all that follows, and the guarded part of each image
	counter  uint32
	underWay underWay
	fenced   error // why nothing may be done any more; nil: all is well
	images   map[string]*image
	names    map[string]string              // name space + "/" + CSI name: image ID
	children map[string]map[*image]struct{} // parent's ID: images whose slabs lie over its slab
	pins     map[string]pinRecord
	oldTags  map[string]time.Time // tags of earlier openings (e., o.), and since when
	promised int64                // bytes
	foreign  int64                // bytes used by what is not Quarry's, as last measured
	warning  string               // of the storage, as last measured: engine.Usage.Warning
	watched  time.Time            // when that was
	scarce   bool                 // its storage is nearly full, as far as layers care
	known    map[string]struct{}  // i. tags of lower epochs that the opening listing held
	strays   map[string]time.Time // slabs and tags that nothing references, and since when
	scanned  time.Time            // when strays were last looked for
	// described says that the descriptions are in the index.
	described bool
	kick      chan struct{} // wakes the collector
	learned   time.Time     // when copyRate was
	copyRate  float64       // bytes per second of the last default copy; 0: none yet
}

// image is an entry of the index.
type image struct {
	id   string
	d    *domain
	lock *lock // held by whoever changes the image or needs it still

	// Guarded by d.mu.
	rec       record
	slab      string
	rev       revision
	old       []oldRevision // superseded, lowest first
	attached  map[string]*attachment
	unsure    map[string][]string // node: attachment tags whose creation has an unknown outcome
	described bool
	desc      Described
	broken    error
	badTag    bool // broken because of a tag, not of the slab
	// badAttachments are the attachments that cannot be read, where nothing
	// else made the image broken.
	badAttachments map[string]struct{}
	readers        int        // running copies of its slab
	op             *operation // that is making it
	promise        int64
	slabGone       bool
	filling        link      // where its slab is going to stand, while it is being filled
	linked         string    // the parent under which domain.children has it
	merging        *merge    // of its slab into its parent's
	mergeTried     time.Time // when that was last begun
	flatTried      time.Time // when it was last begun to be flattened
	flatErr        error     // what came of it
	full           string    // the slab, a layer, that has all its space
	trimmed        string    // the slab, a snapshot's layer, that has no more than it needs
	short          error     // why it has not
	scarce         string    // why what is written to its layer waits; see watchReserve
	toldScarce     bool      // its user knows
	whole          whole     // as it was last seen; see watchReserve
	toldState      State     // as its user was last told; see tellStates
	lastOld        time.Time // when its last superseded revision was deleted
	found          time.Time // when its leftovers were found at opening; zero: made by this process
	pending        *pendingTag
}

type oldRevision struct {
	rev   revision
	since time.Time
}

type attachment struct {
	Attachment
	tag string
	// told is the number of the last chain that the node was told, or 0. building: it may
	// not have built that one yet; see Built.
	told     int64
	building bool
}

// pendingTag is a tag whose creation has an unknown outcome: it may exist or
// may yet come into being. It is created again, identically, until the outcome is known.
type pendingTag struct {
	tag engine.Tag
	rec record
	rev revision
}

func (d *domain) handle(img *image) Handle { return Handle{Domain: d.id, Image: img.id} }

// ids are the domain's ID and its former ones, under which older handles know it.
func (d *domain) ids() []string { return d.idsOf(d.now().Aliases) }

func (d *domain) idsOf(aliases []string) []string {
	out := []string{d.id}
	for _, a := range aliases {
		out = append(out, a+strings.TrimPrefix(d.id, d.cfg.Name))
	}
	return out
}

// handles are all under which a node may have staged the image.
func (d *domain) handles(img *image) []Handle {
	var out []Handle
	for _, id := range d.ids() {
		out = append(out, Handle{Domain: id, Image: img.id})
	}
	return out
}

// next gives a revision that was never used.
func (d *domain) next() revision {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counter++
	return revision(uint64(d.epoch)<<32 | uint64(d.counter))
}

// current fails when another manager has opened the domain since: nothing may
// be done then, and what was just done has an unknown outcome.
func (d *domain) current(ctx context.Context) error {
	d.mu.Lock()
	fenced := d.fenced
	d.mu.Unlock()
	if fenced != nil {
		return fenced
	}
	tags, err := d.engine.ListTags(ctx, prefixEpoch)
	if err != nil {
		return err
	}
	own := false
	for _, t := range tags {
		e, ok := parseEpochTag(t.Name)
		own = own || ok && e == d.epoch
		if ok && e > d.epoch {
			return d.fence(fault.New(fault.Unavailable, "another Quarry has opened domain %s (epoch %d, this one has %d): the outcome is unknown, ask that one", d.id, e, d.epoch))
		}
	}
	if !own { // an empty directory where a mount is missing, say
		return fault.New(fault.Unavailable, "domain %s does not show that this process has opened it (tag of epoch %d): its storage was emptied, or another one is in its place: bring the right one back", d.id, d.epoch)
	}
	return nil
}

func (d *domain) fence(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fenced == nil {
		d.fenced = err
	}
	return d.fenced
}

// commit makes rec the record of img: it creates the next revision and, when
// it is certain that this manager still owns the domain, enters it into the
// index. The caller holds img.lock or is the only one who knows img.
func (d *domain) commit(ctx context.Context, img *image, rec record, slab string) error {
	if err := d.resolve(ctx, img); err != nil {
		return err
	}
	rec.Nonce = nonce()
	rev := d.next()
	tag, err := rec.encode(imageTag(img.id, rev), slab)
	if err != nil {
		return err
	}
	return d.create(ctx, img, &pendingTag{tag: tag, rec: rec, rev: rev})
}

// resolve finds out what became of a tag whose creation had an unknown outcome.
func (d *domain) resolve(ctx context.Context, img *image) error {
	d.mu.Lock()
	p := img.pending
	d.mu.Unlock()
	if p == nil {
		return nil
	}
	return d.create(ctx, img, p)
}

func (d *domain) create(ctx context.Context, img *image, p *pendingTag) error {
	if err := d.createTag(ctx, p.tag); err != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		if img.pending == p {
			img.pending = nil
		}
		if img.pending == nil && p.rev > img.rev && d.underWay.has(p.rev) { // else it certainly was not created
			img.pending = p
		}
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if img.pending == p {
		img.pending = nil
	}
	if p.rev <= img.rev { // somebody else found it out at the same time
		return nil
	}
	d.apply(img, p.rec, p.tag.Slab, p.rev)
	return nil
}

// createTag creates a tag and makes sure that this manager still owns the domain.
func (d *domain) createTag(ctx context.Context, t engine.Tag) (err error) {
	rev, ok := revisionOf(t.Name)
	d.mu.Lock()
	err = d.fenced
	d.mu.Unlock()
	if err == nil && ok {
		err = d.begin(ctx, t.Name, rev)
	}
	if err != nil {
		return err
	}
	defer func() {
		if ok && (err == nil || !uncertain(err) || !strings.HasPrefix(t.Name, prefixImage)) { // only records are created again
			d.mu.Lock()
			defer d.mu.Unlock()
			d.underWay.end(rev)
		}
	}()
	if err := d.engine.CreateTag(ctx, t); err != nil {
		if errors.Is(err, fault.Exists) {
			return fault.New(fault.Corrupt, "tag %s, a name that only this manager uses, is taken by something else: %w", t.Name, err)
		}
		return err
	}
	err = d.current(ctx)
	if err != nil && !uncertain(err) { // the tag is there, whatever the listing said
		return fault.New(fault.Unavailable, "tag %s was created, and whether that counts is unknown: %w", t.Name, err)
	}
	return err
}

// uncertain says whether a failed CreateTag may have happened all the same.
func uncertain(err error) bool {
	switch fault.KindOf(err) {
	case fault.Invalid, fault.Exhausted, fault.Permission, fault.Corrupt:
		return false
	}
	return true
}

// apply enters a record into the index. The caller holds d.mu.
func (d *domain) apply(img *image, rec record, slab string, rev revision) {
	if img.rev != 0 {
		img.old = append(img.old, oldRevision{rev: img.rev, since: d.m.cfg.Now()})
	}
	img.rec, img.slab, img.rev = rec, slab, rev
	if rec.Strong {
		img.op, img.filling = nil, link{}
	}
	d.relink(img)
	d.setName(img)
	d.setPromise(img)
}

// setName makes a name lead to its undeleted incarnation. There can be two after
// an intent with an unknown outcome: what is strong, then what is younger, has the
// name, and the other one is swept. The caller holds d.mu.
func (d *domain) setName(img *image) {
	if img.rec.Name == "" {
		return
	}
	key := img.rec.space() + "/" + img.rec.Name
	holder := d.images[d.names[key]]
	switch {
	case img.rec.dead():
		if holder == img {
			delete(d.names, key)
		}
	case holder == nil, holder == img:
		d.names[key] = img.id
	case img.rec.Strong != holder.rec.Strong:
		if img.rec.Strong {
			d.names[key] = img.id
		}
	case born(img.id) > born(holder.id):
		d.names[key] = img.id
	}
}

// setPromise accounts for the bytes that an image may come to need. The
// caller holds d.mu.
func (d *domain) setPromise(img *image) {
	n := img.rec.need()
	if img.filling.chunk > 0 {
		n = layer.StoreSize(img.rec.Size, img.filling.chunk)
	}
	if !img.rec.Mutable && img.rec.Alloc > 0 {
		n = img.rec.Alloc
	}
	if img.slabGone || img.slab == "" {
		n = 0
	}
	d.promised += n - img.promise
	img.promise = n
}

// add makes an entry for an image that is about to be made.
func (d *domain) add(id string, op *operation) *image {
	img := &image{id: id, d: d, lock: newLock(), op: op, attached: map[string]*attachment{}}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.images[id] = img
	return img
}

// forget drops an entry none of whose tags exists.
func (d *domain) forget(img *image) {
	d.mu.Lock()
	defer d.mu.Unlock()
	img.slabGone = true
	d.setPromise(img)
	delete(d.images, img.id)
	d.relink(img)
	if key := img.rec.space() + "/" + img.rec.Name; d.names[key] == img.id {
		delete(d.names, key)
	}
}

// snapshot returns a consistent copy of an image's record and slab.
func (img *image) snapshot() (record, string) {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	return img.rec, img.slab
}

// visible says whether users see the image. The caller holds d.mu.
func (d *domain) visible(img *image) bool {
	if img.rec.Strong {
		return img.rec.Kind != kindGroup
	}
	if img.rec.Op == opMember {
		g := d.images[img.rec.Group]
		return g != nil && g.rec.Strong
	}
	return false
}

// finished says whether nothing may ever revive the image. The caller holds d.mu.
func (d *domain) finished(img *image) bool {
	if img.rec.dead() {
		return true
	}
	if !img.rec.Strong && img.rec.Op == opMember && img.op == nil {
		g := d.images[img.rec.Group]
		return g == nil || g.rec.dead()
	}
	return false
}

func (img *image) isFinished() bool {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	return img.d.finished(img)
}

// get finds a visible image. fault.NotFound, or fault.Unavailable when fenced.
func (d *domain) get(id string) (*image, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fenced != nil {
		return nil, d.fenced
	}
	img := d.images[id]
	if img == nil || !d.visible(img) {
		return nil, fault.New(fault.NotFound, "there is no image %s in domain %s", id, d.id)
	}
	return img, nil
}

// hold takes the image's lock for op and settles what is uncertain about it.
// The error of a lock that is held for long is fault.Pending.
func (img *image) hold(ctx context.Context, op *operation) (release func(), err error) {
	if err := img.lock.acquire(ctx, op); err != nil {
		return nil, err
	}
	if err := img.d.resolve(ctx, img); err != nil {
		img.lock.release()
		return nil, err
	}
	return img.lock.release, nil
}

// usable fails when the image is broken or no longer visible.
func (img *image) usable() error {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	if !img.d.visible(img) {
		return fault.New(fault.NotFound, "image %s was deleted", img.id)
	}
	if img.broken != nil {
		return fault.New(fault.Corrupt, "image %s is broken: %w; restore what is missing, or delete it: see kubectl quarry check", img.id, img.broken)
	}
	return nil
}

// read counts a running copy of the image's slab, which keeps the slab from
// being deleted until the returned function is called.
func (img *image) read() (done func()) {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	img.readers++
	return img.unread
}

func (img *image) unread() {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	img.readers--
}
