package image

import (
	"context"
	"errors"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// The default snapshot of an image with a block slab, by device-mapper. The
// snapshot takes over the slab that its volume had, and the volume gets a new
// slab, a layer, that lies over it:
//
//	intent          snapshot weak                      the new slab is named after it
//	taking over     snapshot weak, with the old slab   protects it under a name of its own
//	first seal      volume = new slab over snapshot    metadata is ahead of the data path
//	switch          the node's device gets the layer   the cut
//	seal            snapshot strong
//
// An empty layer changes nothing: what reads the new chain and what reads the
// old one read the same until the switch, so every step may be repeated.

// layered says that a snapshot under way has taken over its source's slab, or
// is about to. The caller holds d.mu.
func (img *image) layered() bool {
	cut := img.rec.Op == opSnapshot || img.rec.Op == opHidden || img.rec.Op == opMember
	return !img.rec.Strong && cut && img.slab != img.id && img.slab != ""
}

// canLayer says whether a layer can be put over src's slab: fault.Unsupported
// with the reason if not. Any other error is one.
func (m *Manager) canLayer(ctx context.Context, src *image) error {
	rec, _ := src.snapshot()
	if rec.Kind != string(engine.Block) {
		return fault.New(fault.Unsupported, "a %s cannot have layers", rec.layout())
	}
	if src.d.desc.SharedAccess && rec.Size > layer.ShareLimit {
		return fault.New(fault.Unsupported, "image %s has %s, and on a share only images of up to %s can have layers", src.id, bytesText(rec.Size), bytesText(layer.ShareLimit))
	}
	for _, mode := range src.modes() {
		if mode.MultiNode() && !mode.ReadOnly() {
			return fault.New(fault.Unsupported, "image %s is attached as %s, and a volume with several writers cannot have layers", src.id, mode)
		}
	}
	_, _, err := m.chainAgent(ctx, src)
	return err
}

// chunk is that of a new layer for an image of size bytes.
func (d *domain) chunk(size int64) int64 {
	if d.desc.SharedAccess {
		return layer.ShareChunk
	}
	return layer.ChunkSize(size)
}

func (img *image) modes() []Mode {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	var out []Mode
	for _, a := range img.attached {
		out = append(out, a.Mode)
	}
	return out
}

// allocateAtOnce is how much of a layer's space is taken before it comes into
// use, in bytes. The rest of a larger one follows after the snapshot, in the
// background, by allocateStep: how long a snapshot takes does not depend on the
// volume's size. Between two steps it waits for snapshots that are being made.
const allocateAtOnce, allocateStep = 1 << 30, 4 << 30

// taken is how much of size bytes of a layer's space is taken for an image: none where its class wants that.
func (r *record) taken(size int64) int64 {
	if r.Thin {
		return 0
	}
	return size
}

// overlay makes the slab id an empty layer for an image of so many bytes and with that record.
func (d *domain) overlay(ctx context.Context, op *operation, id string, size, chunk int64, rec record) error {
	op.stepf("making a layer")
	spec := engine.SlabSpec{ID: id, Kind: engine.Block, Size: layer.StoreSize(size, chunk), Params: rec.Params}
	if err := d.engine.CreateSlab(ctx, spec); err != nil {
		return err
	}
	return d.m.cfg.Worker.FormatLayer(ctx, Place{d.id, id}, rec.taken(min(spec.Size, allocateAtOnce)), chunk)
}

// cutLayer makes the snapshot by a layer, up to and with the switch. The caller
// holds the source's lock.
func (c *cutting) cutLayer(ctx context.Context) error {
	var ready chan *prepared // whoever has the volume in use builds the new chain beside the seal
	err := c.layOver(ctx, func(chain []SlabRef) {
		ready = make(chan *prepared, 1)
		go func() { ready <- c.m.prepare(ctx, c.src, chain) }()
	})
	var p *prepared
	if ready != nil {
		p = <-ready
	}
	if err != nil {
		return errors.Join(err, p.drop(ctx))
	}
	c.op.stepf("switching %s to its new layer", c.src.id)
	return c.m.switchChains(ctx, p, c.src)
}

// layOver puts an empty layer over the source's slab, in the metadata. built, if it
// is not nil, is told the chain that the source is going to have, once its layer is there.
func (c *cutting) layOver(ctx context.Context, built func(chain []SlabRef)) error {
	d := c.src.d
	rec, slab := c.src.snapshot()
	chunk := d.chunk(rec.Size)
	more := max(0, layer.StoreSize(rec.Size, chunk)-rec.need())
	give, err := d.reserve(ctx, more)
	if err != nil {
		return err
	}
	defer give()
	if err := d.overlay(ctx, c.op, c.img.id, rec.Size, chunk, rec); err != nil {
		return err
	}
	if !c.layer { // else the intent says so already
		c.rec.Parent, c.rec.Chunk = rec.Parent, rec.Chunk
		if err := d.commit(ctx, c.img, c.rec, slab); err != nil {
			return err
		}
	}
	if built != nil {
		d.mu.Lock()
		below, err := d.chain(c.img)
		d.mu.Unlock()
		if err != nil {
			return err
		}
		built(append([]SlabRef{{ID: c.img.id, Size: rec.Size, Chunk: chunk}}, below...))
	}
	rec.Parent, rec.Chunk = c.img.id, chunk
	return d.commit(ctx, c.src, rec, c.img.id)
}

// sealCut makes the snapshot visible.
func (c *cutting) sealCut(ctx context.Context, h how, inexact bool) error {
	d := c.src.d
	c.op.took(h)
	c.op.stepf("sealing")
	d.mu.Lock()
	rec, slab := c.img.rec, c.img.slab
	d.mu.Unlock()
	rec.Strong, rec.Op, rec.Inexact, rec.How, rec.Created = true, "", inexact, h.String(), c.m.cfg.Now().UnixMilli()
	d.measureAlloc(ctx, &rec, slab)
	defer d.allocateSoon(c)
	return d.commit(ctx, c.img, rec, slab)
}

// finishCut goes on with a snapshot that an earlier call, or an earlier life,
// left after its first seal. done is false where there is none such: then it can
// only be swept. The caller holds img's lock.
func (m *Manager) finishCut(ctx context.Context, op *operation, img *image) (done bool, err error) {
	d := img.d
	d.mu.Lock()
	layered, rec := img.layered() && img.rec.Op == opSnapshot, img.rec
	d.mu.Unlock()
	if !layered {
		return false, nil
	}
	h, err := ParseHandle(rec.Source)
	if err != nil {
		return false, nil
	}
	src, err := m.find(m.canonical(h))
	if errors.Is(err, fault.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	// The caller holds the snapshot, and who holds the volume may wait for that.
	if !src.lock.tryAcquire() {
		return false, fault.New(fault.Pending, "snapshot %s is half made, and its volume %s is being worked on: ask again", img.id, src.id)
	}
	defer src.lock.release()
	if err := d.resolve(ctx, src); err != nil {
		return false, err
	}
	if below := src.parent(); below != img.id || src.usable() != nil {
		return false, nil
	}
	op.stepf("switching %s to its new layer", src.id)
	if err := m.switchChains(ctx, nil, src); err != nil {
		return false, err
	}
	c := cutting{m: m, op: op, src: src, img: img, rec: rec}
	return true, c.sealCut(ctx, how{reason: "layer"}, false)
}

func (img *image) parent() string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	return img.below()
}

// untake gives back, in the record that sweeps it, the slab that a layered
// snapshot under way had taken over, unless its volume already has a layer over
// it: then the snapshot stays below it, dead, until they are merged. It returns
// the slab that is left to img. An uncertain first seal is settled before.
func (d *domain) untake(ctx context.Context, img *image) (slab string, rec record, err error) {
	if slab, rec, done := d.unflatten(img); done {
		return slab, rec, nil
	}
	d.mu.Lock()
	layered := img.layered()
	rec, slab = img.rec, img.slab
	var src *image
	if h, err := ParseHandle(rec.Source); err == nil && layered {
		src = d.images[h.Image]
	}
	d.mu.Unlock()
	if !layered {
		return slab, rec, nil
	}
	if src != nil {
		if src.lock.tryAcquire() { // else whoever works on img holds it
			defer src.lock.release()
		}
		if err := d.resolve(ctx, src); err != nil {
			return "", rec, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.children[img.id]) > 0 {
		return slab, rec, nil
	}
	rec.Parent, rec.Chunk = "", 0
	return img.id, rec, nil
}

// cloneLayer makes dst's slab a layer over that of src, which never changes.
func (m *Manager) cloneLayer(ctx context.Context, op *operation, src, dst *image, spec engine.SlabSpec) (how, error) {
	d := dst.d
	chunk := d.chunk(spec.Size)
	give, err := d.reserve(ctx, layer.StoreSize(spec.Size, chunk)-spec.Size)
	if err != nil {
		return how{}, err
	}
	defer give()
	d.mu.Lock()
	if d.finished(src) && src.rec.Op != opHidden {
		d.mu.Unlock()
		return how{}, fault.New(fault.NotFound, "source %s was deleted", src.id)
	}
	rec := dst.rec
	dst.filling = link{parent: src.id, chunk: chunk} // from here on src's slab stays
	d.relink(dst)
	d.setPromise(dst)
	d.mu.Unlock()
	return how{reason: "layer"}, d.overlay(ctx, op, spec.ID, spec.Size, chunk, rec)
}

// content is what an image holds, for a Worker to read: its slab where that is
// all, else its chain, on a node that can make a device of it.
func (m *Manager) content(ctx context.Context, img *image) (Content, error) {
	d := img.d
	rec, slab := img.snapshot()
	c := Content{Place: Place{d.id, slab}, Size: rec.Size}
	if rec.Parent == "" && rec.Chunk == 0 {
		return c, nil
	}
	node, _, err := m.chainAgent(ctx, img)
	if err != nil {
		return c, fault.New(fault.Unavailable, "image %s is a chain of layers, and no node can read it now: %w", img.id, err)
	}
	// Whoever copies a volume holds its lock; a snapshot counts its readers.
	if err := m.stopMergesBelow(ctx, img, node, rec.Mutable); err != nil {
		return c, fault.In(err, "read the chain of", d.id, img.id)
	}
	st, err := d.staging(img, "")
	c.Node, c.Chain = node, &st
	return c, err
}

// layTogether puts a layer over each member of a group, and lets their nodes
// switch to all of them at one moment. engine.ErrDeclined: some member cannot
// have a layer; nothing was changed.
func (m *Manager) layTogether(ctx context.Context, op *operation, members []*cutting) (how, error) {
	var sources []*image
	layered := ""
	for _, c := range members {
		if rec, _ := c.src.snapshot(); rec.Chunk > 0 {
			layered = c.src.id
		}
		err := m.canLayer(ctx, c.src)
		if errors.Is(err, fault.Unsupported) && layered == "" {
			return how{}, engine.ErrDeclined
		}
		if err != nil {
			return how{}, err
		}
		sources = append(sources, c.src)
	}
	for i, c := range members {
		op.stepf("laying a layer over %s (%d of %d)", c.src.id, i+1, len(members))
		if err := c.layOver(ctx, nil); err != nil {
			return how{}, err
		}
	}
	op.stepf("switching %d volumes to their new layers", len(members))
	return how{reason: "layer"}, m.switchChains(ctx, nil, sources...)
}
