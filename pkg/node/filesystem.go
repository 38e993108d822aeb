package node

import (
	"context"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// defaultFilesystem is made where nobody asked for one.
const defaultFilesystem = host.Ext4

// stageFilesystem mounts an image's device at the staging path; the image's
// lock is held.
func (n *Node) stageFilesystem(ctx context.Context, r StageRequest, st image.Staging, dev block.Device, readOnly bool) error {
	fsType, err := chooseFilesystem(r.Access.Filesystem, st, readOnly)
	if err != nil {
		return err
	}
	readOnly = readOnly || slices.Contains(r.MountFlags, "ro")
	done, err := n.alreadyStaged(ctx, r, dev, readOnly)
	if err != nil {
		return err
	}
	if !done {
		if err := n.prepare(ctx, r.Handle, st, dev, fsType, readOnly); err != nil {
			return err
		}
		if err := n.mount(ctx, r, dev, fsType, readOnly); err != nil {
			return err
		}
	}
	if readOnly {
		return nil
	}
	// What cannot grow in use grew before it was mounted, or waits for the next
	// time it is: a repeated call must not fail for that.
	if n.host.GrowsOnline(fsType) {
		return n.fill(ctx, r.Handle, dev, fsType, r.StagingPath)
	}
	return nil
}

// chooseFilesystem is what was recorded, else what is asked for.
func chooseFilesystem(asked string, st image.Staging, readOnly bool) (string, error) {
	switch {
	case !st.Fresh && st.Filesystem == "":
		return "", fault.New(fault.Invalid, "the image has no filesystem that Quarry made (it was used as a raw block device), so it cannot be mounted")
	case !st.Fresh && asked != "" && asked != st.Filesystem:
		return "", fault.New(fault.Invalid, "filesystem %q was asked for, and the image carries %q", asked, st.Filesystem)
	case !st.Fresh:
		return st.Filesystem, nil
	case readOnly:
		return "", fault.New(fault.InUse, "the image has never been formatted, and read-only access cannot do it: use it for writing once")
	case asked == "":
		return defaultFilesystem, nil
	}
	return asked, host.CheckFilesystem(asked, st.Size-st.Crypt)
}

// alreadyStaged says whether the device is mounted at the staging path in the
// way that is asked for.
func (n *Node) alreadyStaged(ctx context.Context, r StageRequest, dev block.Device, readOnly bool) (bool, error) {
	s, err := n.find(ctx, r.Handle)
	if err != nil {
		return false, err
	}
	m := s.at(r.StagingPath)
	if m == nil {
		if others := append(s.elsewhere(r.StagingPath), points(s.parts)...); len(others) > 0 {
			return false, fault.New(fault.Exists, "the image is in use at %q, and not staged at %q: unpublish and unstage it there first", others, r.StagingPath)
		}
		return false, n.free(r.StagingPath)
	}
	if m.Source != dev.Path {
		return false, fault.New(fault.Exists, "staging path %q has %s mounted on it, and the image is %s", r.StagingPath, m.Source, dev.Path)
	}
	if slices.Contains(m.Options, "ro") != readOnly {
		return false, fault.New(fault.Exists, "the image is staged at %q with read-only=%t, and read-only=%t was asked for: unstage it first", r.StagingPath, !readOnly, readOnly)
	}
	return true, nil
}

// prepare makes the filesystem of a fresh image, and checks that of another.
func (n *Node) prepare(ctx context.Context, h image.Handle, st image.Staging, dev block.Device, fsType string, readOnly bool) error {
	if err := n.host.Unclaimed(ctx, dev.Path); err != nil {
		return err
	}
	found, err := n.host.Probe(ctx, dev.Path)
	if err != nil {
		return err
	}
	if st.Fresh {
		// The same type is the format of a predecessor that did not come to record it.
		if !found.Empty() && (found.Type != fsType || found.Partitions != "" || found.Ambivalent) {
			return fault.New(fault.Corrupt, "the image was never formatted, but its device shows %s: nothing was written; if that is of no value, clear it with \"wipefs -a\" on the slab, else restore the image's record", found)
		}
		if err := n.host.Format(ctx, dev.Path, fsType, st.Size-st.Crypt); err != nil {
			return n.short(ctx, h, err)
		}
		return n.cfg.Manager.Formatted(ctx, h, n.cfg.NodeID, fsType)
	}
	if found.Type != fsType {
		return fault.New(fault.Corrupt, "the image was formatted with %s, but its device shows %s: it is not formatted again; restore a snapshot", fsType, found)
	}
	if fsType == host.Btrfs {
		if err := n.host.SeparateBtrfs(ctx, dev.Path, found.UUID, readOnly); err != nil {
			return err
		}
	}
	if readOnly {
		return nil
	}
	note, err := n.host.Check(ctx, dev.Path, fsType)
	if note != "" {
		klog.FromContext(ctx).Info("Filesystem check", "image", h, "result", note)
	}
	if err != nil || n.host.GrowsOnline(fsType) {
		return err
	}
	room, err := n.room(ctx, h, dev, fsType)
	if err != nil || !room {
		return err
	}
	return n.host.GrowUnmounted(ctx, dev.Path)
}

// mount mounts the device at the staging path.
func (n *Node) mount(ctx context.Context, r StageRequest, dev block.Device, fsType string, readOnly bool) error {
	options := slices.Clone(r.MountFlags)
	if readOnly && !slices.Contains(options, "ro") {
		options = append(options, "ro")
	}
	switch fsType {
	case host.Ext4:
		if !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "errors=") }) {
			options = append(options, "errors=remount-ro") // rather than write on, on top of errors
		}
	case host.XFS:
		// The UUID may be that of a relative on this node; nothing else depends on it.
		options = append(options, "nouuid")
	case host.Btrfs:
		options = append(options, "subvolid=5") // whatever default a workload has set
	}
	if err := makeStaging(r.StagingPath); err != nil {
		return err
	}
	err := n.host.MountFilesystem(ctx, dev.Path, r.StagingPath, fsType, options)
	if err == nil || !dev.ReadOnly {
		return err
	}
	// A log that waits to be replayed cannot be, on a read-only device: then the
	// filesystem is shown as it was at its last checkpoint.
	without := map[string]string{host.Ext4: "noload", host.XFS: "norecovery", host.Btrfs: "rescue=nologreplay"}[fsType]
	if again := n.host.MountFilesystem(ctx, dev.Path, r.StagingPath, fsType, append(options, without)); again != nil {
		return err
	}
	klog.FromContext(ctx).Info("Mounted without replaying the log: the image was taken of a filesystem in use, and this shows its last checkpoint",
		"image", r.Handle, "filesystem", fsType, "option", without)
	return nil
}

// fill grows a mounted filesystem that is smaller than its device: the image
// was restored to a larger size, or grown while it was not staged.
func (n *Node) fill(ctx context.Context, h image.Handle, dev block.Device, fsType, point string) error {
	room, err := n.room(ctx, h, dev, fsType)
	if err != nil || !room {
		return err
	}
	return n.host.GrowFilesystem(ctx, fsType, dev.Path, point)
}

// room says whether a device is larger than its filesystem.
func (n *Node) room(ctx context.Context, h image.Handle, dev block.Device, fsType string) (bool, error) {
	sb, err := n.host.Superblock(ctx, dev.Path, fsType)
	if err != nil {
		return false, err
	}
	if dev.Size-sb.Size < max(sb.Block, 64<<10) { // mkfs rounds down to 64 KiB at most
		return false, nil
	}
	klog.FromContext(ctx).Info("Growing a filesystem to its device", "image", h, "filesystem", fsType, "from", sb.Size, "to", dev.Size)
	return true, nil
}

// formatNeeds is what a format writes at least, in bytes: the log of the smallest
// XFS has 64 MiB, and there is more than the log.
const formatNeeds = 96 << 20

// short makes an error of a failed format fault.Exhausted where the domain's
// storage, which is asked and not the program's text, has no room for one.
func (n *Node) short(ctx context.Context, h image.Handle, err error) error {
	e, eerr := n.cfg.Engines(h.Domain)
	if eerr != nil {
		return err
	}
	meter := engine.Discover(e.Engine).Meter
	if meter == nil {
		return err
	}
	u, merr := meter.DomainUsage(ctx)
	if merr != nil || u.Available >= formatNeeds {
		return err
	}
	return fault.New(fault.Exhausted, "%w (its storage has only %d bytes left: delete something, or give it more space)", err, u.Available)
}
