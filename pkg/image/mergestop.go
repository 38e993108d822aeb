package image

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// held says whether a merge holds the image on a node. The caller holds d.mu.
func (d *domain) held(img *image) bool {
	for _, a := range img.attached {
		if a.Mode == ModeMerging {
			return true
		}
	}
	return false
}

// endHold gives an image free that a manager that is gone had held for a merge
// which it had ended, or which is not due any more, and stops a merge that was
// dropped. The caller holds img's lock.
func (d *domain) endHold(ctx context.Context, img *image) error {
	d.mu.Lock()
	left := img.dropped() || d.held(img) && img.merging == nil && d.mergeable(img) != nil
	d.mu.Unlock()
	if !left {
		return nil
	}
	return d.m.stopMerge(ctx, img)
}

// dropped says whether a merge that nobody looks after could not be stopped.
// The caller holds d.mu.
func (img *image) dropped() bool { return img.merging != nil && img.merging.dropped }

// heldForMerge is the node on which a merge holds the image, or "".
func (img *image) heldForMerge() string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	for n, a := range img.attached {
		if a.Mode == ModeMerging {
			return n
		}
	}
	return ""
}

// mergesOn is the node on which a merge of img's layer may be running as far as is
// known, or "".
func (img *image) mergesOn() string {
	held := img.heldForMerge()
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	if img.merging != nil {
		return img.merging.node
	}
	return held
}

// stopMerge stops a merge of img's layer, if one may be running, and gives the
// image free. The caller holds img's lock.
func (m *Manager) stopMerge(ctx context.Context, img *image) error {
	d, held, node := img.d, img.heldForMerge(), img.mergesOn()
	if node == "" {
		return nil
	}
	if err := m.stopMergeOn(ctx, img, node); err != nil {
		return err
	}
	d.mu.Lock()
	img.merging = nil
	d.mu.Unlock()
	if held != "" {
		return m.detach(ctx, img, held)
	}
	return nil
}

func (m *Manager) stopMergeOn(ctx context.Context, img *image, node string) error {
	a, err := m.cfg.Agents.Agent(node)
	if err != nil && m.gone(ctx, node) {
		return nil
	}
	if err != nil {
		return fault.New(fault.Unavailable, "a merge of image %s may be running on node %s, which cannot be asked to stop it: %w", img.id, node, err)
	}
	agent, ok := a.(ChainAgent)
	if !ok {
		return nil // it cannot merge
	}
	st, err := img.d.staging(img, node)
	if err != nil {
		return err
	}
	if err := agent.StopMerge(ctx, st); err != nil {
		return fault.New(fault.Unavailable, "node %s has not stopped merging image %s: %w", node, img.id, err)
	}
	return nil
}

// stopMergesBelow stops the merges in img's chain, img's own included, that may be
// running on other nodes than this one, which is about to read the chain; also
// those that an earlier manager began. locked: the caller holds img's lock.
func (m *Manager) stopMergesBelow(ctx context.Context, img *image, node string, locked bool) error {
	d := img.d
	d.mu.Lock()
	line, err := d.line(img)
	d.mu.Unlock()
	if err != nil {
		return fault.New(fault.Corrupt, "image %s is broken: %w", img.id, err)
	}
	for _, i := range line[:len(line)-1] {
		if err := m.stopMergeBut(ctx, i, node, locked && i == img); err != nil {
			return err
		}
	}
	return nil
}

// stopMergeBut stops a merge of img's layer that may be running elsewhere than on a node.
func (m *Manager) stopMergeBut(ctx context.Context, img *image, node string, locked bool) error {
	d := img.d
	d.mu.Lock()
	below := d.images[img.below()]
	due := below != nil && d.finished(below)
	d.mu.Unlock()
	if !due {
		return nil
	}
	if !locked {
		release, err := img.hold(ctx, nil) // nobody is in the middle of a step
		if err != nil {
			return err
		}
		defer release()
	}
	if node != "" && img.mergesOn() == node {
		return nil
	}
	for _, n := range d.stagedOn(img) {
		if n == node {
			continue
		}
		if err := m.stopMergeOn(ctx, img, n); err != nil {
			return err
		}
	}
	return m.stopMerge(ctx, img)
}
