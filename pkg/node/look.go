package node

import (
	"context"
	"slices"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// look is an examination of the slab of an image that was not staged when it
// began. It holds no image's lock: the storage may take its time, and staging
// must not wait for it. So the slab may be attached for good meanwhile, and is then not the
// look's to detach.
type look struct {
	shared  bool // with another image on this node, from the beginning: it stays attached
	taken   bool
	leaving chan struct{} // not nil while the slab is detached; closed afterwards
}

func slabKey(domain, slab string) string { return domain + "/" + slab }

// beginLook returns nil when the slab is being looked at already.
func (n *Node) beginLook(h image.Handle, slab string) *look {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := slabKey(h.Domain, slab)
	if n.looks[key] != nil {
		return nil
	}
	l := &look{}
	for other, slabs := range n.slabs {
		l.shared = l.shared || other != h && other.Domain == h.Domain &&
			slices.ContainsFunc(slabs, func(s image.SlabRef) bool { return s.ID == slab })
	}
	n.looks[key] = l
	return l
}

// endLook detaches the slab, unless somebody took it: then what was seen may be
// their work, and mine is false.
func (n *Node) endLook(l *look, h image.Handle, slab string, detach func() error) (mine bool, err error) {
	key := slabKey(h.Domain, slab)
	n.mu.Lock()
	if l.taken {
		delete(n.looks, key)
		n.mu.Unlock()
		return false, nil
	}
	l.leaving = make(chan struct{})
	n.mu.Unlock()
	if !l.shared {
		err = detach()
	}
	n.mu.Lock()
	delete(n.looks, key)
	n.mu.Unlock()
	close(l.leaving)
	return true, err
}

// take makes a slab the caller's, who is about to attach or to detach it. It
// waits only for a look that is detaching it just now. fault.Pending: that took
// too long.
func (n *Node) take(ctx context.Context, domain, slab string) error {
	patience := time.NewTimer(examineTimeout)
	defer patience.Stop()
	for {
		n.mu.Lock()
		l := n.looks[slabKey(domain, slab)]
		if l == nil || l.leaving == nil {
			if l != nil {
				l.taken = true
			}
			n.mu.Unlock()
			return nil
		}
		n.mu.Unlock()
		select {
		case <-l.leaving:
			continue
		case <-ctx.Done():
		case <-patience.C:
		}
		return fault.New(fault.Pending, "slab %s in domain %s is still being detached after it was examined: the storage takes its time", slab, domain)
	}
}
