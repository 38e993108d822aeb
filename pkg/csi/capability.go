package csi

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// accesses translates a list of volume capabilities, which must not be empty.
func accesses(caps []*csi.VolumeCapability) ([]image.Access, error) {
	if len(caps) == 0 {
		return nil, fault.New(fault.Invalid, "volume_capabilities is empty: at least one is needed")
	}
	out := make([]image.Access, len(caps))
	for i, c := range caps {
		var err error
		if out[i], err = access(fmt.Sprintf("volume_capabilities[%d]", i), c); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// access translates one volume capability.
func access(field string, c *csi.VolumeCapability) (image.Access, error) {
	var a image.Access
	switch {
	case c == nil:
		return a, fault.New(fault.Invalid, "%s is missing", field)
	case c.GetBlock() != nil:
		a.Block = true
	case c.GetMount() != nil:
		a.Filesystem = c.GetMount().GetFsType()
		if a.Filesystem != "" && !slices.Contains(image.Filesystems(), a.Filesystem) {
			return a, fault.New(fault.Invalid, "%s.mount.fs_type %q is unknown: known are %s, and none for the default", field, a.Filesystem, strings.Join(image.Filesystems(), ", "))
		}
		if n := len(strings.Join(c.GetMount().GetMountFlags(), ",")); n > maxMap {
			return a, fault.New(fault.Invalid, "%s.mount.mount_flags has %d bytes: at most %d are allowed", field, n, maxMap)
		}
	default:
		return a, fault.New(fault.Invalid, "%s.access_type is missing: it must be block or mount", field)
	}
	mode := c.GetAccessMode().GetMode()
	name, known := csi.VolumeCapability_AccessMode_Mode_name[int32(mode)]
	if !known || mode == csi.VolumeCapability_AccessMode_UNKNOWN {
		return a, fault.New(fault.Invalid, "%s.access_mode %d is unknown", field, mode)
	}
	a.Mode = image.Mode(name) // image names its modes as CSI does
	return a, nil
}

// compatible says why an image with a layout cannot be used with an access.
// The error is fault.Invalid and names both sides.
func compatible(l image.Layout, a image.Access) error {
	writers := a.Mode.MultiNode() && !a.Mode.ReadOnly()
	switch {
	case l == image.LayoutDirectory && a.Block:
		return fault.New(fault.Invalid, "layout %q and block access: a directory is no block device; layout %q is", l, image.LayoutImage)
	case l == image.LayoutDirectory && a.Filesystem != "":
		return fault.New(fault.Invalid, "layout %q and filesystem %q: a directory has the filesystem of its domain; ask for none, or for layout %q", l, a.Filesystem, image.LayoutImage)
	case l == image.LayoutImage && !a.Block && writers:
		return fault.New(fault.Invalid, "layout %q and access mode %s: a filesystem on a block device cannot be written on several nodes; layout %q can", l, a.Mode, image.LayoutDirectory)
	}
	return nil
}

// placeable adds to compatible what depends on the image's domain.
func (s *Server) placeable(ctx context.Context, img image.Image, a image.Access) error {
	if err := compatible(img.Layout, a); err != nil {
		return err
	}
	if a.Filesystem != "" && img.Filesystem != "" && a.Filesystem != img.Filesystem {
		return fault.New(fault.Invalid, "filesystem %q: the volume carries %q", a.Filesystem, img.Filesystem)
	}
	if !a.Mode.MultiNode() {
		return nil
	}
	for _, d := range s.cfg.Manager.Domains(ctx) {
		if d.ID != img.Handle.Domain {
			continue
		}
		if d.Config.Scope == image.ScopeNode {
			return fault.New(fault.Invalid, "access mode %s and domain %q: it can be reached from node %q only", a.Mode, d.ID, d.Config.Node)
		}
		if a.Block && !a.Mode.ReadOnly() && !d.Description.MultiWriterBlock {
			return fault.New(fault.Invalid, "block access with mode %s and domain %q: its block devices cannot be written on several nodes", a.Mode, d.ID)
		}
	}
	return nil
}

// slabKind is the kind of slab that the capabilities and the layout ask for.
func slabKind(l image.Layout, as []image.Access) engine.Kind {
	if l != "" {
		return l.Kind()
	}
	for _, a := range as {
		if !a.Block && a.Mode.MultiNode() && !a.Mode.ReadOnly() {
			return engine.Tree
		}
	}
	return engine.Block
}

// nodes translates a topology requirement into node names: the preferred
// first, then the other requisite ones.
func nodes(r *csi.TopologyRequirement) ([]string, error) {
	var out []string
	for _, list := range []struct {
		field string
		t     []*csi.Topology
	}{{"preferred", r.GetPreferred()}, {"requisite", r.GetRequisite()}} {
		for i, t := range list.t {
			n, err := nodeOf(fmt.Sprintf("accessibility_requirements.%s[%d]", list.field, i), t)
			if err != nil {
				return nil, err
			}
			if !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out, nil
}

// nodeOf reads the one segment that Quarry knows.
func nodeOf(field string, t *csi.Topology) (string, error) {
	for k := range t.GetSegments() {
		if k != TopologyKey {
			return "", fault.New(fault.Invalid, "%s: key %q is unknown: the only one is %q", field, k, TopologyKey)
		}
	}
	n := t.GetSegments()[TopologyKey]
	if n == "" {
		return "", fault.New(fault.Invalid, "%s: key %q is missing", field, TopologyKey)
	}
	return n, nil
}

// topology says from where an image of a domain can be reached; nil: from everywhere.
func (s *Server) topology(domain string) ([]*csi.Topology, error) {
	n, err := s.cfg.Manager.Topology(domain)
	if err != nil || n == "" {
		return nil, err
	}
	return []*csi.Topology{{Segments: map[string]string{TopologyKey: n}}}, nil
}
