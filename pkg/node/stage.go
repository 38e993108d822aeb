package node

import (
	"context"
	"errors"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// cleanupTimeout bounds the taking down of what a failed staging had made.
const cleanupTimeout = time.Minute

// StageRequest asks to make an image usable on this node.
type StageRequest struct {
	Handle image.Handle
	// StagingPath is the directory to mount on; for raw block it stays empty.
	StagingPath string
	Access      image.Access
	// MountFlags are options of mount(8) that the class asks for.
	MountFlags []string
	// Generation is that of the attachment.
	Generation int64
	// Passphrase opens an encrypted image; others ignore it.
	Passphrase Passphrase
}

// Stage makes an image usable: it attaches the slab, builds the device, makes
// the filesystem if the image is fresh, checks, mounts and grows it. What is
// staged already in the same way is success. Once begun it goes on to its end
// when ctx ends; whoever asks again meanwhile gets fault.Pending.
//
// fault.Invalid: the request does not fit the image. fault.Permission: the
// passphrase is wrong. fault.Exists: something
// else is staged at the path. fault.Corrupt: the slab is damaged. fault.Exhausted: what
// is written to it would have to wait for space. While
// anything of the image is on the node, staged before or left by this call,
// such an error is fault.Unavailable instead: it has to be unstaged.
func (n *Node) Stage(ctx context.Context, r StageRequest) error {
	return fault.In(n.stage(ctx, r), "stage", r.Handle.Domain, r.Handle.Image)
}

func (n *Node) stage(ctx context.Context, r StageRequest) error {
	staging, err := n.realPath(ctx, "staging path", r.StagingPath)
	if err != nil {
		return err
	}
	r.StagingPath = staging
	if fi, err := n.host.Stat(ctx, staging); err == nil && !fi.Mode.IsDir() {
		return fault.New(fault.Invalid, "staging path %q is %s: a directory or nothing is needed there", staging, fi.Mode)
	}
	if err := checkFlags(r.MountFlags, r.Access.Block); err != nil {
		return err
	}
	unlock, err := n.lock(ctx, r.Handle)
	if err != nil {
		return err
	}
	defer unlock()
	err = n.build(ctx, r)
	if err == nil || !final(err) {
		return err
	}
	if there, ferr := n.there(context.WithoutCancel(ctx), r.Handle); there || ferr != nil {
		return remains(err)
	}
	return err
}

// build does the work of stage; the image's lock is held.
func (n *Node) build(ctx context.Context, r StageRequest) error {
	st, err := n.cfg.Manager.Stage(ctx, r.Handle, n.cfg.NodeID, r.Generation)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // a format or a check that is cut short would begin again for ever
	defer n.built(ctx, r.Handle, st.Told)
	if err := fits(r, st); err != nil {
		return err
	}
	readOnly := st.ReadOnly || r.Access.Mode.ReadOnly()
	n.mu.Lock()
	n.slabs[r.Handle] = st.Slabs
	n.mu.Unlock()
	if err := n.assemble(ctx, r, st, readOnly); err != nil {
		return n.giveUp(ctx, r.Handle, err)
	}
	return nil
}

// built tells the Image Manager that nothing is built any more of what it told. Where it does
// not hear that, it asks.
func (n *Node) built(ctx context.Context, h image.Handle, told int64) {
	if err := n.cfg.Manager.Built(ctx, h, n.cfg.NodeID, told); err != nil {
		klog.FromContext(ctx).V(2).Info("The Image Manager was not told that a staging has ended; it will ask", "image", h, "err", err)
	}
}

// assemble attaches the slabs and puts together what is used of them.
func (n *Node) assemble(ctx context.Context, r StageRequest, st image.Staging, readOnly bool) error {
	if err := n.endReads(ctx, st); err != nil {
		return err
	}
	opts := engine.AttachOptions{ReadOnly: readOnly}
	var bind host.MountAttr
	if st.Layout == image.LayoutDirectory {
		bind, opts.MountOptions = treeFlags(r.MountFlags, readOnly)
	}
	slabs, release, err := n.attachSlabs(ctx, st, opts)
	if err != nil {
		return err
	}
	defer release()
	if st.Layout == image.LayoutDirectory {
		return n.stageTree(ctx, r, slabs[0].Path, bind)
	}
	if !readOnly {
		if err := n.roomFor(ctx, slabs); err != nil {
			return err
		}
	}
	use := block.Filesystem
	if r.Access.Block {
		use = block.Raw
	}
	dev, err := n.devices.Attach(ctx, block.Spec{Owner: r.Handle.String(), Use: use, Slabs: slabs, Size: st.Size, ReadOnly: readOnly, Crypt: cryptOf(r, st)})
	if err != nil {
		return damaged(refused(err, st))
	}
	if dev.Note != "" {
		klog.FromContext(ctx).Info("No direct I/O", "image", r.Handle, "reason", dev.Note)
	}
	if use == block.Raw {
		return n.sealHeader(ctx, r, st)
	}
	return n.stageFilesystem(ctx, r, st, dev, readOnly)
}

// giveUp takes down what a failed staging made and nobody uses: its device and
// what the engine attached. What is mounted, or handed out as a raw block
// device, may be an earlier staging's work and stays. If anything is left, the
// error says so by its kind.
func (n *Node) giveUp(ctx context.Context, h image.Handle, err error) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	s, ferr := n.find(ctx, h)
	if ferr != nil || s.anchor != nil || s.raw() || len(s.mounts)+len(s.parts) > 0 {
		return remains(err)
	}
	for _, d := range s.devices {
		if derr := n.devices.Detach(ctx, d); derr != nil {
			klog.FromContext(ctx).Error(derr, "Detaching the device of a failed staging; unstaging will try again", "image", h, "device", d.Path)
			return remains(err)
		}
	}
	if derr := n.detachSlabs(ctx, h, nil); derr != nil && !errors.Is(derr, fault.NotFound) {
		klog.FromContext(ctx).Error(derr, "Detaching the slabs of a failed staging; unstaging will try again", "image", h)
		return remains(err)
	}
	return err
}

// there says whether anything of an image is on this node.
func (n *Node) there(ctx context.Context, h image.Handle) (bool, error) {
	s, err := n.find(ctx, h)
	return s.anchor != nil || len(s.devices) > 0, err
}

// remains gives the error of a staging that leaves something behind a kind
// after which the kubelet unstages: after any other it forgets the volume,
// which could then never be detached.
func remains(err error) error {
	if err == nil || !final(err) {
		return err
	}
	return fault.New(fault.Unavailable, "it is staged in part: %w", err)
}

// final says whether the kubelet takes an error for the end of a staging: its
// isFinalError goes by the codes that these kinds become.
func final(err error) bool {
	switch fault.KindOf(err) {
	case fault.Unavailable, fault.Pending, fault.Conflict, fault.Exhausted, fault.Canceled, fault.Deadline:
		return false
	}
	return true
}

// damaged adds to an error about a slab what to do. The image exists: a
// missing slab must not look as if it did not.
func damaged(err error) error {
	if errors.Is(err, fault.NotFound) || errors.Is(err, fault.Corrupt) {
		return fault.New(fault.Corrupt, "%w; restore it, or delete its image: see kubectl quarry check", err)
	}
	return err
}

// fits compares what is asked with what the image is.
func fits(r StageRequest, st image.Staging) error {
	switch {
	case len(st.Slabs) == 0:
		return fault.New(fault.Internal, "the image has no slab")
	case st.Layout == image.LayoutDirectory && r.Access.Block:
		return fault.New(fault.Invalid, "access \"block\" was asked for, and the image has the layout %q: only %q can be a raw block device", st.Layout, image.LayoutImage)
	case st.Crypt > 0 && r.Passphrase == "":
		return fault.New(fault.Invalid, "the image is encrypted, and the secrets of this call have no %q: name a secret with that key in the storage class (csi.storage.k8s.io/node-stage-secret-name and -namespace)", PassphraseKey)
	case st.Block != r.Access.Block:
		return fault.New(fault.Exists, "access block=%t was asked for, and the image is attached with block=%t", r.Access.Block, st.Block)
	}
	return nil
}

// treeFlags are the mount flags of a directory: those that a bind has for itself, and those that
// the storage has to take, or refuses.
func treeFlags(flags []string, readOnly bool) (bind host.MountAttr, storage []string) {
	for _, f := range flags {
		if a, ok := host.ParseMountAttr(f); ok {
			bind |= a
		} else {
			storage = append(storage, f)
		}
	}
	if readOnly {
		bind |= host.ReadOnly
	}
	return bind, storage
}

// stageTree binds a directory slab over an anchor that names the image.
func (n *Node) stageTree(ctx context.Context, r StageRequest, dir string, attr host.MountAttr) error {
	mounts, err := n.host.Mounts()
	if err != nil {
		return err
	}
	anchor := anchorOf(mounts, r.Handle)
	if anchor != nil && anchor.Point != r.StagingPath {
		return fault.New(fault.Exists, "the image is staged at %q, and %q was asked for: unstage it there first", anchor.Point, r.StagingPath)
	}
	if anchor == nil {
		if err := n.free(r.StagingPath); err != nil {
			return err
		}
		if err := makeStaging(r.StagingPath); err != nil {
			return err
		}
		if err := n.host.MountFilesystem(ctx, anchorPrefix+r.Handle.String(), r.StagingPath, "tmpfs", []string{"ro", "size=4k", "nr_inodes=2", "mode=700"}); err != nil {
			return err
		}
	} else if top := covering(mounts, *anchor); top != nil {
		if asked := attr&host.ReadOnly != 0; top.ReadOnly() != asked && !slices.Contains(top.Super, "ro") {
			return fault.New(fault.Exists, "the image is staged at %q with read-only=%t, and read-only=%t was asked for: unstage it first", r.StagingPath, top.ReadOnly(), asked)
		}
		return nil
	}
	return n.host.Bind(ctx, dir, r.StagingPath, attr)
}

// free refuses a staging path on which something else is mounted.
func (n *Node) free(path string) error {
	at, err := n.host.MountsAt(path)
	if err != nil || len(at) == 0 {
		return err
	}
	m := at[len(at)-1]
	return fault.New(fault.Exists, "staging path %q has %s (%s) mounted on it already", path, m.Source, m.Type)
}
