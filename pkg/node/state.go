package node

import (
	"context"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// anchorPrefix begins the source of the tmpfs below a directory's bind mount.
const anchorPrefix = "quarry:"

// state is what the kernel knows of an image on this node.
type state struct {
	devices []block.Device // views first
	// mounts of the image's filesystem or directory that show all of it; for raw
	// block those of its device nodes.
	mounts []host.Mount
	// parts are mounts that show a directory or file inside of the image, such as
	// those of a container's subPath. They need no mount of the whole image to live on.
	parts  []host.Mount
	anchor *host.Mount // of a directory
}

// find looks an image up in the kernel.
func (n *Node) find(ctx context.Context, h image.Handle) (state, error) {
	mounts, err := n.host.Mounts()
	if err != nil {
		return state{}, err
	}
	var s state
	if s.anchor = anchorOf(mounts, h); s.anchor != nil {
		tree := covering(mounts, *s.anchor)
		for _, m := range mounts {
			switch {
			case tree == nil:
			case m.SameTree(*tree):
				s.mounts = append(s.mounts, m)
			case m.PartOf(*tree):
				s.parts = append(s.parts, m)
			}
		}
		return s, nil
	}
	if s.devices, err = n.devices.Find(ctx, h.String()); err != nil {
		return state{}, err
	}
	for _, d := range s.devices {
		for _, m := range mounts {
			if shows(m, d) {
				s.mounts = append(s.mounts, m)
			} else if d.Use == block.Filesystem && m.Source == d.Path {
				s.parts = append(s.parts, m)
			}
		}
	}
	return s, nil
}

// raw says whether the image is staged as a raw block device. One that is locked
// was never handed out.
func (s state) raw() bool {
	d := s.device(block.Raw)
	return d != nil && !d.Locked
}

func (s state) device(u block.Use) *block.Device {
	for i := range s.devices {
		if s.devices[i].Use == u {
			return &s.devices[i]
		}
	}
	return nil
}

// at returns the image's mount at path, or nil.
func (s state) at(path string) *host.Mount {
	for i := len(s.mounts) - 1; i >= 0; i-- {
		if s.mounts[i].Point == path {
			return &s.mounts[i]
		}
	}
	return nil
}

// elsewhere lists the mount points of the image other than one.
func (s state) elsewhere(path string) []string {
	var out []string
	for _, m := range s.mounts {
		if m.Point != path {
			out = append(out, m.Point)
		}
	}
	return out
}

// points are the mount points of mounts.
func points(mounts []host.Mount) []string {
	out := make([]string, 0, len(mounts))
	for _, m := range mounts {
		out = append(out, m.Point)
	}
	return out
}

// shows says whether a mount is of a device's filesystem, whole, or of its node.
func shows(m host.Mount, d block.Device) bool {
	if d.Use == block.Filesystem {
		return m.Source == d.Path && m.Root == "/"
	}
	return strings.HasSuffix(m.Root, "/"+filepath.Base(d.Path)) && isDeviceNode(m, d.Path)
}

// isDeviceNode says whether the mount's filesystem is the one that holds the
// device's node: a name alone would also fit a directory of some other one.
func isDeviceNode(m host.Mount, device string) bool {
	var st unix.Stat_t
	if unix.Stat(device, &st) != nil {
		return false
	}
	return unix.Major(st.Dev) == m.Major && unix.Minor(st.Dev) == m.Minor
}

func anchorOf(mounts []host.Mount, h image.Handle) *host.Mount {
	for i := range mounts {
		if mounts[i].Type == "tmpfs" && mounts[i].Source == anchorPrefix+h.String() {
			return &mounts[i]
		}
	}
	return nil
}

// covering is the mount that lies directly on an anchor, or nil.
func covering(mounts []host.Mount, anchor host.Mount) *host.Mount {
	for i := range mounts {
		if mounts[i].Point == anchor.Point && mounts[i].Parent == anchor.ID {
			return &mounts[i]
		}
	}
	return nil
}
