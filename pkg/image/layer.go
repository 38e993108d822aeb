package image

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"k8s.io/klog/v2"

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
	for _, mode := range src.modes() {
		if mode.MultiNode() && !mode.ReadOnly() {
			return fault.New(fault.Unsupported, "image %s is attached as %s, and a volume with several writers cannot have layers", src.id, mode)
		}
	}
	_, _, err := m.chainAgent(ctx, src)
	return err
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

// overlay makes the slab id an empty layer for an image of size bytes.
func (d *domain) overlay(ctx context.Context, op *operation, id string, size, chunk int64, params map[string]string) error {
	op.stepf("making a layer")
	spec := engine.SlabSpec{ID: id, Kind: engine.Block, Size: layer.StoreSize(size, chunk), Params: params}
	if err := d.engine.CreateSlab(ctx, spec); err != nil {
		return err
	}
	return d.m.cfg.Worker.FormatLayer(ctx, Place{d.id, id}, min(spec.Size, allocateAtOnce), chunk)
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
	chunk := layer.ChunkSize(rec.Size)
	more := max(0, layer.StoreSize(rec.Size, chunk)-rec.need())
	give, err := d.reserve(ctx, more)
	if err != nil {
		return err
	}
	defer give()
	if err := d.overlay(ctx, c.op, c.img.id, rec.Size, chunk, rec.Params); err != nil {
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

// prepared is a switch for which a node is ready.
type prepared struct {
	node  string
	agent ChainAgent
	id    string
}

// drop lets the node forget it, whatever else there is. p may be nil.
func (p *prepared) drop(ctx context.Context) error {
	if p == nil {
		return nil
	}
	err := p.agent.Release(context.WithoutCancel(ctx), p.id)
	if fault.KindOf(err) == fault.Conflict { // it was over
		return nil
	}
	return err
}

// prepare lets the one node that has src in use build a chain beside its present one. nil:
// there is no such node, or it could not; the switch is going to say why, if it cannot either.
func (m *Manager) prepare(ctx context.Context, src *image, chain []SlabRef) *prepared {
	nodes := src.stagedNodes()
	if len(nodes) != 1 {
		return nil
	}
	a, err := m.cfg.Agents.Agent(nodes[0])
	agent, ok := a.(ChainAgent)
	if err != nil || !ok {
		return nil
	}
	images, err := src.d.stagings(src, nodes[0])
	if err != nil {
		return nil
	}
	for i := range images {
		images[i].Slabs = chain
	}
	p := &prepared{node: nodes[0], agent: agent}
	if p.id, err = agent.Prepare(ctx, images); err != nil {
		klog.FromContext(ctx).V(2).Info("A node could not prepare for a layer", "image", src.id, "node", p.node, "err", err)
		return nil
	}
	return p
}

// stagings are what a node needs to build an image's present chain, under each of its names.
func (d *domain) stagings(img *image, node string) ([]Staging, error) {
	st, err := d.staging(img, node)
	if err != nil {
		return nil, err
	}
	var out []Staging
	for _, h := range d.handles(img) {
		st.Handle = h
		out = append(out, st)
	}
	return out, nil
}

// switchChains lets the nodes on which the images are in use build their
// present chains, all at one moment. The caller holds their locks. ready, if it is
// not nil, is a node that has begun with that; it is used or dropped.
func (m *Manager) switchChains(ctx context.Context, ready *prepared, images ...*image) error {
	byNode, agents, err := m.toSwitch(ctx, images)
	if err != nil {
		return errors.Join(err, ready.drop(ctx))
	}
	if ready != nil && (len(agents) > 1 || agents[ready.node] == nil) {
		if err := ready.drop(ctx); err != nil {
			return notSwitched(ready.node, err)
		}
		ready = nil
	}
	if len(agents) > 1 {
		m.holding.Lock() // two groups on the same nodes would wait for each other, each holding one
		defer m.holding.Unlock()
		return holdAll(ctx, agents, byNode)
	}
	for n, agent := range agents {
		id := ""
		if ready != nil {
			id = ready.id
		}
		if err := agent.Switch(ctx, byNode[n], id); err != nil {
			return notSwitched(n, err)
		}
	}
	return nil
}

func (m *Manager) toSwitch(ctx context.Context, images []*image) (map[string][]Staging, map[string]ChainAgent, error) {
	byNode, agents := map[string][]Staging{}, map[string]ChainAgent{}
	for _, img := range images {
		if err := img.d.current(ctx); err != nil {
			return nil, nil, err
		}
		for _, n := range img.stagedNodes() {
			all, err := img.d.stagings(img, n)
			if err != nil {
				return nil, nil, err
			}
			byNode[n] = append(byNode[n], all...)
		}
	}
	for n := range byNode {
		a, err := m.cfg.Agents.Agent(n)
		if err != nil {
			return nil, nil, err
		}
		agent, ok := a.(ChainAgent)
		if !ok {
			return nil, nil, fault.New(fault.Unsupported, "node %s cannot build chains of layers", n)
		}
		agents[n] = agent
	}
	return byNode, agents, nil
}

func notSwitched(node string, err error) error {
	if k := fault.KindOf(err); k == fault.Conflict || k == fault.Pending {
		return fault.New(fault.Pending, "node %s: %w", node, err)
	}
	return fault.New(fault.Unavailable, "node %s has not switched to the new chain yet: %w", node, err)
}

// holdAll lets several nodes switch at one moment: when all of them hold, nobody
// writes anywhere; and that was one moment if none had gone on before it was released.
func holdAll(ctx context.Context, agents map[string]ChainAgent, byNode map[string][]Staging) error {
	var mu sync.Mutex
	ready, errs := map[string]string{}, map[string]error{}
	each := func(do func(node string, agent ChainAgent) error) {
		var all sync.WaitGroup
		for n, agent := range agents {
			all.Go(func() {
				err := do(n, agent)
				mu.Lock()
				defer mu.Unlock()
				if err != nil && errs[n] == nil {
					errs[n] = notSwitched(n, err)
				}
			})
		}
		all.Wait()
	}
	each(func(n string, agent ChainAgent) error { // what takes its time, before anybody waits
		id, err := agent.Prepare(ctx, byNode[n])
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			ready[n] = id
		}
		return err
	})
	if len(errs) == 0 {
		each(func(n string, agent ChainAgent) error { return agent.Hold(ctx, byNode[n], ready[n]) })
	}
	ctx = context.WithoutCancel(ctx) // what is held is released whatever happens
	each(func(n string, agent ChainAgent) error {
		mu.Lock()
		id, have := ready[n]
		mu.Unlock()
		if !have {
			return nil
		}
		return agent.Release(ctx, id)
	})
	var all []error
	for _, n := range slices.Sorted(maps.Keys(errs)) {
		all = append(all, errs[n])
	}
	return errors.Join(all...)
}

// stagedNodes are the nodes that have the image in use, sorted.
func (img *image) stagedNodes() []string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	var out []string
	for n, a := range img.attached {
		if a.Staged {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
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
	chunk := layer.ChunkSize(spec.Size)
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
	dst.filling = link{parent: src.id, chunk: chunk} // from here on src's slab stays
	d.relink(dst)
	d.setPromise(dst)
	d.mu.Unlock()
	return how{reason: "layer"}, d.overlay(ctx, op, spec.ID, spec.Size, chunk, spec.Params)
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
