package image

import (
	"context"
	"errors"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// DeleteVolume deletes a volume. What depends on it keeps what it needs. A
// volume that does not exist is success. fault.InUse: it is attached.
func (m *Manager) DeleteVolume(ctx context.Context, h Handle) error {
	return m.delete(ctx, h, true)
}

// DeleteSnapshot deletes a snapshot. A snapshot that does not exist is
// success. fault.Invalid: it belongs to a group.
func (m *Manager) DeleteSnapshot(ctx context.Context, h Handle) error {
	return m.delete(ctx, h, false)
}

func (m *Manager) delete(ctx context.Context, h Handle, mutable bool) error {
	img, err := m.find(h)
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	rec, _ := img.snapshot()
	if rec.Mutable != mutable && !img.unreadable() {
		return nil // as a volume (a snapshot) it does not exist
	}
	if rec.Group != "" {
		return fault.New(fault.Invalid, "snapshot %s belongs to group snapshot %s: delete that", h, Handle{h.Domain, rec.Group})
	}
	_, err = do(ctx, m, "delete/"+h.String(), "delete "+kindWord(mutable), h.String(), "", func(ctx context.Context, op *operation) (struct{}, error) {
		return struct{}{}, m.deleteImage(ctx, op, img)
	})
	return err
}

// unreadable says that no record of the image can be read: nobody knows what it is.
func (img *image) unreadable() bool {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	return img.broken != nil && img.rec.Created == 0
}

// deleteImage seals that an image is deleted. The collector does the rest.
func (m *Manager) deleteImage(ctx context.Context, op *operation, img *image) error {
	d := img.d
	op.at(d.id, img.id)
	release, err := img.hold(ctx, op)
	if err != nil {
		return err
	}
	defer release()
	rec, slab := img.snapshot()
	if rec.dead() {
		return nil
	}
	if err := m.stopMerge(ctx, img); err != nil {
		return err
	}
	if nodes := img.maybeNodes(); len(nodes) > 0 {
		return fault.New(fault.InUse, "it is attached to %s: detach it first", strings.Join(nodes, ", "))
	}
	if tag := img.badAttachment(); tag != "" {
		return fault.New(fault.InUse, "its attachment %s cannot be read back, so nobody knows who uses it: restore that tag, or remove it when no node does", tag)
	}
	rec.Strong, rec.Op = false, opDelete
	if err := d.commit(ctx, img, rec, slab); err != nil {
		return err
	}
	d.collectSoon()
	return nil
}

// badAttachment names an attachment whose node is not known, or "".
func (img *image) badAttachment() string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	for tag := range img.badAttachments {
		return tag
	}
	return ""
}

// nodes that an image is attached to, sorted.
func (img *image) nodes() []string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	var out []string
	for n := range img.attached {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// sweep seals that nobody will ever finish the operation that was making img,
// and takes its slab away. The caller holds img.lock or is the only one who
// works on img.
func (d *domain) sweep(ctx context.Context, img *image) error {
	if err := d.resolve(ctx, img); err != nil {
		return err
	}
	if img.rev == 0 { // the intent itself never came into being
		d.forget(img)
		return nil
	}
	if err := d.settleFlat(ctx, img); err != nil {
		return err
	}
	slab, rec, err := d.untake(ctx, img)
	if err != nil {
		return err
	}
	if !rec.dead() {
		rec.Strong, rec.Op, rec.Progress = false, opSwept, 0
		if err := d.commit(ctx, img, rec, slab); err != nil {
			return err
		}
	}
	d.mu.Lock()
	img.op = nil
	d.mu.Unlock()
	return d.dispose(ctx, img)
}

// sweepLater sweeps and leaves what fails to the collector.
func (d *domain) sweepLater(ctx context.Context, img *image) {
	if err := d.sweep(ctx, img); err != nil {
		klog.FromContext(ctx).Info("Sweeping is left to the collector", "image", img.id, "err", err)
	}
	d.mu.Lock()
	img.op = nil
	d.mu.Unlock()
}

// abandon ends a failed operation. It returns nil when the seal turns out to
// have happened after all. Otherwise it sweeps and returns the cause with a kind
// that is true: fault.Unavailable when something remains.
func (d *domain) abandon(ctx context.Context, img *image, cause error) error {
	err := d.resolve(ctx, img)
	if err == nil {
		if rec, _ := img.snapshot(); rec.Strong {
			return nil
		}
		err = d.sweep(ctx, img)
	}
	d.mu.Lock()
	img.op = nil
	d.mu.Unlock()
	if err != nil {
		return fault.New(fault.Unavailable, "%w (cleaning up is left to the collector: %w)", cause, err)
	}
	return cause
}
