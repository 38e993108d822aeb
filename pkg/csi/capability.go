package csi

import (
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
		if g := c.GetMount().GetVolumeMountGroup(); g != "" {
			return a, fault.New(fault.Invalid, "%s.mount.volume_mount_group %q: none is allowed, as VOLUME_MOUNT_GROUP is not declared", field, g)
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

// slabKind is the kind of slab that the layout and the capabilities ask for;
// "" when neither says anything.
// The error is fault.Invalid and names both sides.
func slabKind(l image.Layout, as []image.Access) (engine.Kind, error) {
	if l == "" && len(as) == 0 {
		return "", nil
	}
	kind := l.Kind()
	for _, a := range as {
		tree := !a.Block && a.Mode.MultiNode() && !a.Mode.ReadOnly()
		switch {
		case l == image.LayoutDirectory && a.Block:
			return "", fault.New(fault.Invalid, "layout %q and block access: a directory is no block device", l)
		case l == image.LayoutImage && tree:
			return "", fault.New(fault.Invalid, "layout %q and access mode %s: a filesystem on a block device cannot be written on several nodes", l, a.Mode)
		case tree:
			kind = engine.Tree
		}
	}
	return kind, nil
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
