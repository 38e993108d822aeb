package image

import (
	"context"
	"errors"
	"slices"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Attach lets a node use a volume. It is idempotent. fault.NotFound: no such
// volume or node. fault.InUse: attached elsewhere and not for several nodes.
// fault.Exists: attached to the node in another way.
func (m *Manager) Attach(ctx context.Context, h Handle, node string, a Access, readOnly bool) (Attachment, error) {
	img, err := m.volume(h)
	if err != nil {
		return Attachment{}, err
	}
	if _, err := m.cfg.Agents.Agent(node); err != nil {
		return Attachment{}, err
	}
	key := "attach/" + h.String() + "/" + node
	return do(ctx, m, key, "attach", h.String(), fingerprint(a, readOnly), func(ctx context.Context, op *operation) (Attachment, error) {
		return m.attach(ctx, op, img, node, a, readOnly)
	})
}

func (m *Manager) attach(ctx context.Context, op *operation, img *image, node string, a Access, readOnly bool) (Attachment, error) {
	d := img.d
	op.at(d.id, img.id)
	release, err := img.hold(ctx, op)
	if err != nil {
		return Attachment{}, err
	}
	defer release()
	if err := img.usable(); err != nil {
		return Attachment{}, err
	}
	if err := m.stopMerge(ctx, img); err != nil {
		return Attachment{}, err
	}
	rec, _ := img.snapshot()
	if err := img.checkAccess(rec, a); err != nil {
		return Attachment{}, err
	}
	if d.cfg.Scope == ScopeNode && d.cfg.Node != node {
		return Attachment{}, fault.New(fault.InUse, "domain %s belongs to node %s: node %s cannot reach it", d.id, d.cfg.Node, node)
	}
	want := Attachment{Node: node, Mode: a.Mode, Block: a.Block, ReadOnly: readOnly || a.Mode.ReadOnly()}
	have, err := img.admits(want)
	if errors.Is(err, fault.InUse) {
		img.tell(true, EventAttached, "not attached to node %s: %v", node, err)
	}
	if have != nil || err != nil {
		return value(have), err
	}
	return m.attachAs(ctx, img, want, a.Filesystem)
}

// attachAs creates the attachment's tag. The caller holds img's lock.
func (m *Manager) attachAs(ctx context.Context, img *image, want Attachment, filesystem string) (Attachment, error) {
	d, node := img.d, want.Node
	gen := d.next()
	want.Generation = int64(gen)
	body, err := marshal(attachRecord{Node: node, Mode: want.Mode, Block: want.Block, FS: filesystem, ReadOnly: want.ReadOnly, Nonce: nonce()})
	if err != nil {
		return Attachment{}, err
	}
	_, slab := img.snapshot()
	tag := engine.Tag{Name: attachmentTag(img.id, node, gen), Slab: slab, Record: body}
	err = d.createTag(ctx, tag)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		if uncertain(err) && want.Mode == ModeMerging { // stopMerge ends it
			want.Staged = true
			img.attached[node] = &attachment{Attachment: want, tag: tag.Name}
		} else if uncertain(err) {
			if img.unsure == nil {
				img.unsure = map[string][]string{}
			}
			img.unsure[node] = append(img.unsure[node], tag.Name)
		}
		return Attachment{}, err
	}
	img.attached[node] = &attachment{Attachment: want, tag: tag.Name}
	return want, nil
}

func value(a *Attachment) Attachment {
	if a == nil {
		return Attachment{}
	}
	return *a
}

// checkAccess refuses an access that the image's layout cannot serve.
func (img *image) checkAccess(rec record, a Access) error {
	if _, err := decideLayout(rec.layout(), []Access{a}, rec.layout()); err != nil {
		return err
	}
	if rec.Crypt > 0 {
		if err := checkEncrypted(a); err != nil {
			return err
		}
	}
	if rec.FS != "" && a.Filesystem != "" && a.Filesystem != rec.FS {
		return fault.New(fault.Invalid, "the volume carries %s, asked for was %s", rec.FS, a.Filesystem)
	}
	return img.d.checkReach([]Access{a}, rec.layout())
}

// CheckAccess says whether a volume can be used in all these ways. It returns
// fault.Invalid with the reason when not.
func (m *Manager) CheckAccess(_ context.Context, h Handle, accesses []Access) error {
	img, err := m.volume(h)
	if err != nil {
		return err
	}
	rec, _ := img.snapshot()
	for _, a := range accesses {
		if err := img.checkAccess(rec, a); err != nil {
			return err
		}
	}
	return nil
}

// admits says whether an attachment goes together with those that exist. It
// returns the one that is the same already.
func (img *image) admits(want Attachment) (*Attachment, error) {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	if a := img.attached[want.Node]; a != nil {
		if a.Mode != want.Mode || a.Block != want.Block || a.ReadOnly != want.ReadOnly {
			return nil, fault.New(fault.Exists, "it is attached to node %s as %s (read-only %t), asked for was %s (read-only %t)",
				want.Node, a.Mode, a.ReadOnly, want.Mode, want.ReadOnly)
		}
		same := a.Attachment
		return &same, nil
	}
	for n := range img.unsure {
		if n != want.Node && !want.Mode.MultiNode() {
			return nil, fault.New(fault.InUse, "whether it is attached to node %s is not known since an error: detach it there first", n)
		}
	}
	for _, a := range img.attached {
		switch {
		case img.rec.Chunk > 0 && (!a.ReadOnly || !want.ReadOnly):
			return nil, fault.New(fault.InUse, "it is attached to node %s, and its newest data is in a layer, which several nodes can only read: detach it there first, or attach it read-only everywhere", a.Node)
		case !a.Mode.MultiNode() || !want.Mode.MultiNode():
			return nil, fault.New(fault.InUse, "it is attached to node %s as %s: it cannot be attached to node %s as %s at the same time", a.Node, a.Mode, want.Node, want.Mode)
		case !a.ReadOnly && !want.ReadOnly && (a.Mode == MultiNodeSingleWriter || want.Mode == MultiNodeSingleWriter):
			return nil, fault.New(fault.InUse, "node %s is its single writer: attach it to node %s read-only", a.Node, want.Node)
		}
	}
	return nil, nil
}

// Detach ends an attachment; node "" means all of them. What is not attached,
// or does not exist, is success. fault.Unavailable: an agent has not confirmed
// that the image is unstaged.
func (m *Manager) Detach(ctx context.Context, h Handle, node string) error {
	img, err := m.find(h)
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = do(ctx, m, "detach/"+h.String()+"/"+node, "detach", h.String(), "", func(ctx context.Context, op *operation) (struct{}, error) {
		op.at(img.d.id, img.id)
		release, err := img.hold(ctx, op)
		if err != nil {
			return struct{}{}, err
		}
		defer release()
		if err := m.stopMerge(ctx, img); err != nil {
			return struct{}{}, err
		}
		for _, n := range img.maybeNodes() {
			if node == "" || node == n {
				if err := m.detach(ctx, img, n); err != nil {
					return struct{}{}, err
				}
			}
		}
		return struct{}{}, nil
	})
	return err
}

func (m *Manager) detach(ctx context.Context, img *image, node string) error {
	d := img.d
	if err := m.confirmUnstaged(ctx, img, node); err != nil {
		img.tell(true, EventAttached, "not detached from node %s: %v", node, err)
		return err
	}
	if err := d.endAttachment(ctx, img, node); err != nil {
		return err
	}
	d.mu.Lock()
	tags := slices.Clone(img.unsure[node])
	if a := img.attached[node]; a != nil {
		tags = append(tags, a.tag)
	}
	d.mu.Unlock()
	for _, tag := range tags { // the collector removes what stays, and the end after them
		if err := d.deleteTag(ctx, tag); err != nil {
			klog.FromContext(ctx).Info("An ended attachment is left to the collector", "image", img.id, "tag", tag, "err", err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(img.attached, node)
	delete(img.unsure, node)
	for _, tag := range tags {
		delete(img.badAttachments, tag)
	}
	if img.badAttachments != nil && len(img.badAttachments) == 0 {
		img.broken, img.badTag, img.badAttachments = nil, false, nil
	}
	return nil
}

// confirmUnstaged asks a node whether it has taken an image down.
func (m *Manager) confirmUnstaged(ctx context.Context, img *image, node string) error {
	agent, err := m.cfg.Agents.Agent(node)
	if err != nil && m.gone(ctx, node) {
		return nil
	}
	for _, h := range img.d.handles(img) {
		staged := false
		if err == nil { // one that answers is not off, whatever it answers
			staged, err = agent.Staged(ctx, h)
		}
		if staged {
			return fault.New(fault.Unavailable, "it is still staged on node %s", node)
		}
	}
	if err == nil {
		return nil
	}
	return fault.New(fault.Unavailable, "node %s cannot confirm that the image is unstaged, and may still write to it: %w; bring the node back, or take it out of service if it is off for good", node, err)
}

// gone says whether a node that cannot be reached is known to be off.
func (m *Manager) gone(ctx context.Context, node string) bool {
	if m.cfg.OutOfService == nil {
		return false
	}
	off, err := m.cfg.OutOfService(ctx, node)
	if err != nil {
		klog.FromContext(ctx).Error(err, "Whether a node is out of service is not known", "node", node)
		return false
	}
	if off {
		klog.FromContext(ctx).Info("A node is out of service: what it had in use is taken from it without its word", "node", node)
	}
	return off
}

// endAttachment seals that an image is not attached to a node any more. A
// manager that was overtaken meanwhile has thereby changed nothing, which the
// deletion of a tag could not promise.
func (d *domain) endAttachment(ctx context.Context, img *image, node string) error {
	body, err := marshal(attachRecord{Node: node, Ended: true, Nonce: nonce()})
	if err != nil {
		return err
	}
	return d.createTag(ctx, engine.Tag{Name: attachmentTag(img.id, node, d.next()), Record: body})
}

// maybeNodes are the nodes that the image is, or by an unknown outcome may be,
// attached to, sorted.
func (img *image) maybeNodes() []string {
	out := img.nodes()
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	for n := range img.unsure {
		out = append(out, n)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Stage tells a node what to build, and records that it does. generation is
// that of the attachment. fault.InUse: the attachment was withdrawn since.
// fault.Corrupt: the image is broken. fault.Pending: a copy keeps it still.
func (m *Manager) Stage(ctx context.Context, h Handle, node string, generation int64) (Staging, error) {
	img, err := m.volume(h)
	if err != nil {
		return Staging{}, err
	}
	d := img.d
	release, err := img.hold(ctx, nil)
	if err != nil {
		return Staging{}, err
	}
	defer release()
	if err := img.usable(); err != nil {
		return Staging{}, err
	}
	// A node that has no right to the volume stops nobody's merges.
	if d.attachedAs(img, node, generation) == nil {
		return Staging{}, notAttached(h, node, generation)
	}
	if err := m.stopMergesBelow(ctx, img, node, true); err != nil {
		return Staging{}, err
	}
	a := d.attachedAs(img, node, generation)
	if a == nil {
		return Staging{}, notAttached(h, node, generation)
	}
	rec, slab := img.snapshot()
	if a.Block && !a.ReadOnly && !rec.Used && rec.Crypt == 0 {
		// A raw block volume holds its user's bytes from now on: it must never
		// be taken for one that may be formatted. An encrypted one gets its header
		// first, and then the node says Formatted.
		rec.Used = true
		if err := d.commit(ctx, img, rec, slab); err != nil {
			return Staging{}, err
		}
	}
	st, err := d.staging(img, node)
	if err != nil {
		return Staging{}, err
	}
	st.Handle = h
	d.mu.Lock()
	defer d.mu.Unlock()
	a.told = m.tellings.Add(1)
	st.Told = a.told
	a.Staged, a.building = true, true
	return st, nil
}

// attachedAs is an image's attachment to a node, if it is of that generation.
func (d *domain) attachedAs(img *image, node string, generation int64) *attachment {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := img.attached[node]; a != nil && a.Generation == generation {
		return a
	}
	return nil
}

func notAttached(h Handle, node string, generation int64) error {
	return fault.New(fault.InUse, "volume %s is not attached to node %s with generation %d any more: attach it again", h, node, generation)
}

// Built tells that a node has built what Stage told it as told, or has given up.
// Until then the slabs of that chain stay. It need not arrive: a node that says
// nothing is asked.
func (m *Manager) Built(_ context.Context, h Handle, node string, told int64) error {
	return m.told(h, node, func(a *attachment) {
		if a.told == told {
			a.building = false
		}
	})
}

// told notes what a node says of an attachment; of one that is not known, nothing.
func (m *Manager) told(h Handle, node string, note func(*attachment)) error {
	img, err := m.find(h)
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	if a := img.attached[node]; a != nil {
		note(a)
	}
	return nil
}

// Formatted seals that a fresh image now carries a filesystem, or, with "" for it, the
// header of an encrypted raw block volume. The node calls it after formatting and
// flushing, before the first mount or use.
func (m *Manager) Formatted(ctx context.Context, h Handle, node, filesystem string) error {
	img, err := m.volume(h)
	if err != nil {
		return err
	}
	release, err := img.hold(ctx, nil)
	if err != nil {
		return err
	}
	defer release()
	d := img.d
	d.mu.Lock()
	a, rec, slab := img.attached[node], img.rec, img.slab
	d.mu.Unlock()
	switch {
	case a == nil:
		return fault.New(fault.InUse, "volume %s is not attached to node %s any more", h, node)
	case rec.Used && rec.FS == filesystem:
		return nil
	case a.ReadOnly:
		return fault.New(fault.Permission, "volume %s is attached to node %s read-only: nothing can have been written there", h, node)
	case rec.Used:
		return fault.New(fault.Conflict, "volume %s is recorded to carry %q, not %q", h, rec.FS, filesystem)
	}
	rec.Used, rec.FS = true, filesystem
	return d.commit(ctx, img, rec, slab)
}

// Outline is what a node that has an image in use asks about it.
type Outline struct {
	Size  int64     // bytes that users see
	Slabs []SlabRef // from head to base
	// Told is for Unstaged.
	Told int64
}

// Outline of an image, for a node. A broken chain is as long as it can be followed.
func (m *Manager) Outline(_ context.Context, h Handle, node string) (Outline, error) {
	img, err := m.find(h)
	if err != nil {
		return Outline{}, err
	}
	v := m.view(img)
	o := Outline{Size: v.Size, Slabs: v.Chain}
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	if a := img.attached[node]; a != nil {
		o.Told = a.told
	}
	return o, nil
}

// Unstaged tells that a node has taken everything of an image down. told is what
// Outline said before the node began with that: the message may be late, and the image
// be staged once more. fault.Conflict: it was.
func (m *Manager) Unstaged(_ context.Context, h Handle, node string, told int64) error {
	late := false
	err := m.told(h, node, func(a *attachment) {
		if late = a.told != told; !late {
			a.Staged, a.building = false, false
		}
	})
	if err == nil && late {
		return fault.New(fault.Conflict, "image %s was staged on node %s meanwhile: unstage it again", h, node)
	}
	return err
}
