// Package lvm is the engine for a volume group of the Linux logical volume
// manager.
//
// A slab is a logical volume: thick in the group, or thin in a pool of it. A tag
// is a logical volume without physical extents, never active, whose LVM tags carry
// the record: lvcreate refuses a name that is taken. names.go says how they are called.
package lvm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	return map[string]string{
		"vg":       "name of an existing volume group that this host alone uses (required)",
		"thinPool": "name of a thin pool in the group: slabs are then thin volumes in it, with native snapshots and clones",
		"devices":  "paths of the group's physical volumes, separated by commas: LVM then looks at no other device",
		"discard":  "\"true\": what a deleted slab had is discarded on the physical volumes (default \"false\")",
	}
}

// lvmEngine is an opened domain.
type lvmEngine struct {
	group  *lvm.Group
	host   *host.Local
	name   string      // of the group
	uuid   string      // of the group
	disks  []string    // as they were at opening
	grown  atomic.Bool // it has others by now
	known  knowledge
	pool   string // of thin slabs; "": slabs are thick
	extent int64
	desc   engine.Description

	area    int64        // bytes of the metadata area that can be used
	reserve int64        // bytes of the metadata area that slabs leave to tags
	room    atomic.Int64 // what was free of it when it was last seen
	changes atomic.Int64 // slabs made, grown and removed by this engine

	importing chan struct{} // has room for one

	measuring    sync.Mutex
	measured     map[string]lvm.Volume // by slab
	measuredPool lvm.Volume
	as           time.Time
	at           int64 // changes
}

const (
	// tagBytes is what a tag takes of the metadata area at most, slabs included: an
	// image has two or three tags for each slab.
	tagBytes = 2048
	// areaCopies have to fit into a metadata area: the new one is written beside the old.
	areaCopies = 2
	maxExtents = 1<<32 - 1 // of a logical volume
)

// Open opens the volume group params["vg"] as a domain, and marks it as one.
// fault.Unavailable: it is not there, or a disk of it is missing.
// fault.Permission: it belongs to another host, or cannot be written.
// fault.Invalid: a parameter, or a group that cannot be a domain.
func Open(ctx context.Context, params map[string]string, run host.Runner) (engine.Engine, error) {
	options, err := checkParams(params)
	if err != nil {
		return nil, err
	}
	e := &lvmEngine{name: params["vg"], pool: params["thinPool"], group: lvm.New(run, params["vg"], options), host: host.NewLocal(run),
		importing: make(chan struct{}, 1), known: knowledge{changing: make(chan struct{}, 1)}}
	info, err := e.group.Info(ctx)
	if err != nil {
		return nil, err
	}
	if err := e.checkGroup(info); err != nil {
		return nil, err
	}
	e.uuid, e.extent, e.disks = info.UUID, info.Extent, info.Devices
	e.area = info.MetadataSize / areaCopies
	e.reserve = min(e.area/8, 256<<10)
	e.room.Store(info.MetadataFree)
	e.desc = engine.Description{
		Kinds:         []engine.Kind{engine.Block},
		Granularity:   info.Extent,
		MaxSlabSize:   info.Extent * maxExtents,
		MaxTags:       e.area / tagBytes,
		AtomicListing: true,
		Location:      fmt.Sprintf("volume group %s (%s)", e.name, strings.Join(info.Devices, ", ")),
	}
	e.note("the metadata area of %d KiB has room for about %d tags; an image needs four: vgcreate --metadatasize makes a larger one", info.MetadataSize>>10, e.desc.MaxTags)
	if info.SystemID == "" {
		e.note("the volume group has no system ID: another host that sees its disks may change it (vgchange --systemid)")
	}
	if e.pool != "" {
		if err := e.openPool(ctx); err != nil {
			return nil, err
		}
	}
	if err := e.mark(ctx); err != nil {
		return nil, err
	}
	if err := e.resume(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

func checkParams(params map[string]string) (lvm.Options, error) {
	var o lvm.Options
	known := slices.Sorted(maps.Keys(Params()))
	for name := range params {
		if !slices.Contains(known, name) {
			return o, fault.New(fault.Invalid, "parameter %q is unknown: engine lvm knows %s", name, strings.Join(known, ", "))
		}
	}
	if vg := params["vg"]; !lvmName(vg) || len(lvm.Escape(vg)) > maxGroup {
		return o, fault.New(fault.Invalid, "parameter \"vg\" is %q: the name of a volume group is needed, at most %d characters of [a-zA-Z0-9+_.-] with each hyphen counted twice", vg, maxGroup)
	}
	if pool := params["thinPool"]; pool != "" && !lvmName(pool) {
		return o, fault.New(fault.Invalid, "parameter \"thinPool\" is %q: the name of a thin pool in the volume group is needed, without the group's", pool)
	}
	if list := params["devices"]; list != "" {
		for path := range strings.SplitSeq(list, ",") {
			path = strings.TrimSpace(path)
			if !filepath.IsAbs(path) {
				return o, fault.New(fault.Invalid, "parameter \"devices\": %q is no absolute path: paths like /dev/disk/by-id/... are needed, separated by commas", path)
			}
			o.Devices = append(o.Devices, path)
		}
	}
	if said := params["discard"]; said != "" {
		yes, err := strconv.ParseBool(said)
		if err != nil {
			return o, fault.New(fault.Invalid, "parameter \"discard\" is %q: \"true\" or \"false\" is needed", said)
		}
		o.Discard = yes
	}
	return o, nil
}

func lvmName(s string) bool {
	return s != "" && s != "." && s != ".." && s[0] != '-' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+_.-") == "" && len(s) <= 127
}

// checkGroup refuses a group that cannot be a domain.
func (e *lvmEngine) checkGroup(info lvm.Info) error {
	switch {
	case info.LockType != "" || info.Clustered:
		return fault.New(fault.Invalid, "volume group %s is shared between hosts (lock type %q): a domain of engine lvm belongs to one host; use a group of its own", e.name, info.LockType)
	case info.Exported:
		return fault.New(fault.Permission, "volume group %s is exported, so it is about to move to another host: vgimport it here, if it is to stay", e.name)
	case info.ReadOnly:
		return fault.New(fault.Permission, "volume group %s is read-only (vgs -o vg_permissions): it must be writeable", e.name)
	case info.Missing > 0:
		return e.missing(info.Missing)
	case info.Extent < 512 || info.Extent&(info.Extent-1) != 0:
		return fault.New(fault.Invalid, "volume group %s has extents of %d bytes: a power of two is needed (vgchange --physicalextentsize)", e.name, info.Extent)
	}
	return nil
}

func (e *lvmEngine) missing(n int64) error {
	return fault.New(fault.Unavailable, "volume group %s: %d of its disks cannot be seen from this node: bring them back (pvs shows which)", e.name, n)
}

// mark finds or makes the marker. It says what the group is used for, for nobody
// else may then use it for something different, and is in every listing.
func (e *lvmEngine) mark(ctx context.Context) error {
	mode := markTag + "thick"
	if e.pool != "" {
		mode = markTag + "thin"
	}
	there, err := e.group.Volumes(ctx, lvm.Names([]string{marker}, nil), false)
	if err != nil {
		return err
	}
	l := there.Volumes
	if len(l) == 0 {
		if err := e.group.CreateRecord(ctx, marker, mode); err != nil && !errors.Is(err, fault.Exists) {
			return err
		}
		if there, err = e.list(ctx, lvm.Names([]string{marker}, nil), false); err != nil {
			return err
		}
		l = there.Volumes
	}
	for _, v := range l {
		if v.Name == marker && slices.Contains(v.Tags, mode) {
			return nil
		}
		for _, t := range v.Tags {
			if used, is := strings.CutPrefix(t, markTag); is {
				return fault.New(fault.Invalid, "volume group %s holds a domain with %s slabs: parameter \"thinPool\" cannot come or go; use another group", e.name, used)
			}
		}
	}
	return fault.New(fault.Invalid, "volume group %s has a logical volume named %s that is not the mark of a domain: rename it (lvrename), or use another group", e.name, marker)
}

// list is every listing: of volumes by name, those of this group and no other,
// with no disk missing.
func (e *lvmEngine) list(ctx context.Context, selection string, used bool) (lvm.Listing, error) {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	l, err := e.group.Volumes(ctx, selection, used)
	if err == nil {
		err = e.believe(l)
	}
	if err != nil {
		return lvm.Listing{}, err
	}
	return l, nil
}

// details lists volumes by name with their details, as list does.
func (e *lvmEngine) details(ctx context.Context, lvs ...string) (map[string]lvm.Details, error) {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	l, all, err := e.group.Details(ctx, append(lvs, marker)...)
	if err == nil {
		err = e.believe(l)
	}
	return all, err
}

// believe checks a listing that the marker must be in.
func (e *lvmEngine) believe(l lvm.Listing) error {
	switch {
	case len(l.Volumes) == 0:
		return fault.New(fault.Unavailable, "volume group %s has lost the logical volume %s that marks it as a domain: it was emptied or replaced from outside", e.name, marker)
	case l.UUID != e.uuid:
		return fault.New(fault.Unavailable, "volume group %s is another one (UUID %s) than was opened (UUID %s): bring the right disks back", e.name, l.UUID, e.uuid)
	case l.Missing > 0:
		return e.missing(l.Missing)
	}
	e.room.Store(l.MetadataFree)
	e.grown.Store(l.Disks != int64(len(e.disks)))
	return nil
}

// confirm is called when something was not there, before that is believed: nil if
// the group is the one that was opened, with all of its disks, and not another of
// that name.
func (e *lvmEngine) confirm(ctx context.Context) error {
	if _, ok := e.now(ctx); ok {
		return nil
	}
	_, err := e.list(ctx, lvm.Names([]string{marker}, nil), false)
	return err
}

// resume lets devices run again that a killed program left suspended.
func (e *lvmEngine) resume(ctx context.Context) error {
	suspended, err := e.group.Suspended(ctx, e.uuid)
	if err != nil || !suspended {
		return err
	}
	return e.group.Refresh(ctx) // waits for a program that is still at work
}

// changed is called with the outcome of whatever changes slabs. A program that
// did not come to its end may have left a device suspended.
func (e *lvmEngine) changed(ctx context.Context, err error) error {
	e.changes.Add(1)
	if errors.Is(err, fault.Unavailable) || errors.Is(err, fault.Deadline) || errors.Is(err, fault.Internal) || errors.Is(err, fault.Corrupt) {
		if more := e.resume(context.WithoutCancel(ctx)); more != nil {
			return fault.New(fault.KindOf(err), "%w; devices may be suspended: %w", err, more)
		}
	}
	return err
}

// Describe implements engine.Engine.
func (e *lvmEngine) Describe(context.Context) (engine.Description, error) {
	desc := e.desc
	desc.Kinds, desc.Notes = slices.Clone(desc.Kinds), slices.Clone(desc.Notes)
	return desc, nil
}

// Close implements engine.Engine. Devices stay, also the thin pool's.
func (e *lvmEngine) Close() error { return nil }

func (e *lvmEngine) note(format string, args ...any) {
	e.desc.Notes = append(e.desc.Notes, fmt.Sprintf(format, args...))
}
