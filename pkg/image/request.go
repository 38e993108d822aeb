package image

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// Smallest sizes in bytes. XFS: mkfs.xfs 6 refuses less than 300 MiB. btrfs:
// mkfs.btrfs needs about 109 MiB with its default profiles. ext4: less leaves
// no room for a journal.
var minSizes = map[string]int64{"": 1 << 20, "ext4": 16 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}

// Filesystems that images can carry, the default first.
func Filesystems() []string { return []string{"ext4", "xfs", "btrfs"} }

// DefaultFilesystem of an image that is mounted, when nobody says another.
const DefaultFilesystem = "ext4"

func checkName(what, name string) error {
	if name == "" || len(name) > 128 || !utf8.ValidString(name) {
		return fault.New(fault.Invalid, "%s name %q has %d bytes: 1 to 128 bytes of UTF-8 are allowed", what, name, len(name))
	}
	return nil
}

func checkAccess(a Access) error {
	switch a.Mode {
	case SingleNodeWriter, SingleNodeReaderOnly, SingleNodeSingleWriter, SingleNodeMultiWriter,
		MultiNodeReaderOnly, MultiNodeSingleWriter, MultiNodeMultiWriter:
	default:
		return fault.New(fault.Invalid, "access mode %q is unknown", a.Mode)
	}
	if a.Block && a.Filesystem != "" {
		return fault.New(fault.Invalid, "filesystem %q was asked for a raw block volume: leave it empty", a.Filesystem)
	}
	if a.Filesystem != "" && !slices.Contains(Filesystems(), a.Filesystem) {
		return fault.New(fault.Invalid, "filesystem %q is unknown: one of %s", a.Filesystem, strings.Join(Filesystems(), ", "))
	}
	return nil
}

// treeAccess says whether an access needs a directory: writers on several nodes.
func treeAccess(a Access) bool { return !a.Block && a.Mode.MultiNode() && !a.Mode.ReadOnly() }

// decideLayout finds the layout from what the class says and from all
// accesses together. source is the layout of the source, or "".
func decideLayout(class Layout, accesses []Access, source Layout) (Layout, error) {
	if class != "" && class != LayoutImage && class != LayoutDirectory {
		return "", fault.New(fault.Invalid, "parameter layout %q is unknown: %q or %q", class, LayoutImage, LayoutDirectory)
	}
	var block, tree bool
	for _, a := range accesses {
		if err := checkAccess(a); err != nil {
			return "", err
		}
		block = block || a.Block
		tree = tree || treeAccess(a)
	}
	if block && tree {
		return "", fault.New(fault.Invalid, "raw block and a filesystem written from several nodes were asked for in one volume: a volume is either an image or a directory")
	}
	layout := class
	if layout == "" {
		switch {
		case tree:
			layout = LayoutDirectory
		case block || source == "":
			layout = LayoutImage
		default:
			layout = source
		}
	}
	switch {
	case layout == LayoutDirectory && block:
		return "", fault.New(fault.Invalid, "layout %q cannot serve a raw block volume: use layout %q", LayoutDirectory, LayoutImage)
	case layout == LayoutImage && tree:
		return "", fault.New(fault.Invalid, "layout %q cannot be written from several nodes: use layout %q", LayoutImage, LayoutDirectory)
	case source != "" && source != layout:
		return "", fault.New(fault.Invalid, "the source has layout %q and the volume asked for layout %q: they must be the same", source, layout)
	}
	if layout == LayoutDirectory {
		for _, a := range accesses {
			if a.Filesystem != "" {
				return "", fault.New(fault.Invalid, "filesystem %q was asked for a volume of layout %q, which has none of its own: leave it empty", a.Filesystem, layout)
			}
		}
	}
	return layout, nil
}

// checkReach refuses accesses that a domain cannot serve.
func (d *domain) checkReach(accesses []Access, layout Layout) error {
	if !slices.Contains(d.desc.Kinds, layout.Kind()) {
		return fault.New(fault.Invalid, "domain %s (engine %s) has no volumes of layout %q", d.id, d.cfg.Engine, layout)
	}
	for _, a := range accesses {
		if a.Mode.MultiNode() && d.cfg.Scope == ScopeNode {
			return fault.New(fault.Invalid, "access mode %s needs a shared domain, domain %s belongs to node %s", a.Mode, d.id, d.cfg.Node)
		}
		if a.Block && a.Mode.MultiNode() && !a.Mode.ReadOnly() && !d.desc.MultiWriterBlock {
			return fault.New(fault.Invalid, "access mode %s for raw block: domain %s cannot be written from several nodes", a.Mode, d.id)
		}
	}
	return nil
}

// checkParams refuses parameters that the engine did not declare, or not like that.
func (d *domain) checkParams(params map[string]string, layout Layout) error {
	for _, k := range slices.Sorted(maps.Keys(params)) {
		help, ok := d.desc.Params[k]
		if !ok {
			known := append([]string{"chainLimit", "domain", "domains", "encrypted", "layout", "quiesceLimit", "requireNative", "restorePlacement", "thinLayers"},
				slices.Collect(maps.Keys(d.desc.Params))...)
			slices.Sort(known)
			return fault.New(fault.Invalid, "parameter %q is unknown in domain %s (engine %s): known are %s", k, d.id, d.cfg.Engine, strings.Join(known, ", "))
		}
		if slices.Contains(d.desc.TreeParams, k) && layout.Kind() != engine.Tree {
			return fault.New(fault.Invalid, "parameter %q and layout %q: only a volume of layout %q has one", k, layout, LayoutDirectory)
		}
		of, ok := d.desc.ParamValues[k]
		if !ok {
			continue
		}
		pattern, err := regexp.Compile(`^(?:` + of + `)$`)
		if err != nil {
			return fault.New(fault.Unavailable, "domain %s: engine %s says of parameter %q what is no regular expression: %w", d.id, d.cfg.Engine, k, err)
		}
		if !pattern.MatchString(params[k]) {
			return fault.New(fault.Invalid, "parameter %q: value %q is not allowed: %s", k, params[k], help)
		}
	}
	return nil
}

// native capabilities by name, for requireNative.
func (d *domain) checkNative(want []engine.Capability) error {
	have := d.caps.List()
	for _, c := range want {
		if !slices.Contains(have, c) {
			return fault.New(fault.Invalid, "requireNative %q: domain %s (%s) has no native %s, it has %v", c, d.id, d.desc.Location, c, have)
		}
	}
	return nil
}

// unit is what sizes of a layout are multiples of, given about which size.
type unit func(size int64) int64

// unit of the domain. chunk is that of the layer which is written, or 0.
func (d *domain) unit(layout Layout, chunk int64) unit {
	if layout == LayoutDirectory {
		return func(int64) int64 { return d.desc.Granularity }
	}
	return func(size int64) int64 {
		u := layer.Unit(size, d.desc.Granularity)
		for chunk > 0 && u%chunk != 0 {
			u *= 2
		}
		return u
	}
}

// sizeFor finds the size of a new volume. source is the source's size or 0.
func sizeFor(asked, limit, source int64, of unit, fs string, maxSlab int64) (int64, error) {
	switch {
	case asked < 0 || limit < 0:
		return 0, fault.New(fault.OutOfRange, "size %d and limit %d must not be negative", asked, limit)
	case limit > 0 && asked > limit:
		return 0, fault.New(fault.OutOfRange, "size %d is above the limit %d", asked, limit)
	case source > 0 && asked > 0 && asked < source, source > 0 && limit > 0 && limit < source:
		return 0, fault.New(fault.OutOfRange, "size %d (limit %d) is below the source's size %d", asked, limit, source)
	}
	size := asked
	if size == 0 {
		size = DefaultSize
		if source > 0 {
			size = source
		} else if limit > 0 {
			size = min(size, limit)
		}
	}
	size = max(size, minSizes[fs])
	unit := of(size)
	if size > math.MaxInt64-unit {
		return 0, fault.New(fault.OutOfRange, "size %d is too large: at most %d is possible", size, math.MaxInt64-unit)
	}
	if rest := size % unit; rest != 0 {
		size += unit - rest
	}
	switch {
	case limit > 0 && size > limit:
		return 0, fault.New(fault.OutOfRange, "the limit %s (%d bytes) is too small: a volume with %s has at least %s (%d bytes) and is a multiple of %d", bytesText(limit), limit, cmp.Or(fs, "no filesystem"), bytesText(minSizes[fs]), minSizes[fs], unit)
	case maxSlab > 0 && size > maxSlab:
		return 0, fault.New(fault.OutOfRange, "size %d is above %d, the largest that the storage allows", size, maxSlab)
	}
	return size, nil
}

// filesystemOf the accesses asked for: "" for raw block and directories.
func filesystemOf(accesses []Access, layout Layout) string {
	for _, a := range accesses {
		if layout == LayoutImage && !a.Block {
			return cmp.Or(a.Filesystem, DefaultFilesystem)
		}
	}
	return ""
}

// fingerprint identifies a request, so that only equal ones join.
func fingerprint(parts ...any) string { return fmt.Sprintf("%+v", parts) }
