package engine

import (
	"context"
	"errors"
	"time"
)

// ErrDeclined is returned by a capability that cannot do this one call:
// nothing was changed; take the default. Any other error is an error and
// never a reason to fall back.
var ErrDeclined = errors.New("declined: take the default")

// Capability names something that an engine may do natively.
type Capability string

// The capabilities, by the names that users see.
const (
	CapSnapshot Capability = "snapshot"
	CapClone    Capability = "clone"
	CapCopy     Capability = "copy"
	CapMeter    Capability = "meter"
	CapQuota    Capability = "quota"
	CapDiff     Capability = "diff"
	CapFence    Capability = "fence"
	CapGroup    Capability = "groupSnapshot"
	CapModify   Capability = "modify"
	CapImport   Capability = "import"
)

// Snapshotter makes a point-in-time copy of a slab that may be in use. The new
// slab appears under spec.ID complete or not at all, with the size that
// CreateSlab would give it; bytes beyond the source's end read as zero.
type Snapshotter interface {
	SnapshotSlab(ctx context.Context, source string, spec SlabSpec) error
}

// Cloner makes a cheap copy of a slab that nobody writes. Same duties as
// Snapshotter otherwise.
type Cloner interface {
	CloneSlab(ctx context.Context, source string, spec SlabSpec) error
}

// Copier copies a slab that nobody writes inside the storage, without moving
// bytes through this host. progress may be nil; it is told bytes done.
type Copier interface {
	CopySlab(ctx context.Context, source string, spec SlabSpec, progress func(done int64)) error
}

// Usage of a domain or a slab in bytes.
type Usage struct {
	// Total is the size of the storage, or of the slab.
	Total int64
	// Used is what is taken of it.
	Used int64
	// Available is what could still be written.
	Available int64
	// InodesTotal and InodesFree are zero where the storage counts no inodes.
	InodesTotal, InodesFree int64
	// Warning, of a domain, says what will go wrong or has, and what to do: "thin
	// pool data/pool: 85% of its metadata is used: ..."; empty: nothing.
	Warning string
}

// Meter measures.
type Meter interface {
	// DomainUsage measures the whole storage.
	DomainUsage(ctx context.Context) (Usage, error)
	// SlabUsage measures one slab. fault.NotFound: no such slab.
	SlabUsage(ctx context.Context, id string) (Usage, error)
}

// Quota enforces the size of tree slabs: writes beyond it fail with ENOSPC or
// EDQUOT. CreateSlab and ResizeSlab of an engine with Quota set the limit
// themselves; SetQuota sets it again, for repair. The new limit takes the
// place of the old one at once.
type Quota interface {
	SetQuota(ctx context.Context, id string, size int64) error
}

// Extent is a byte range of a block slab.
type Extent struct{ Offset, Length int64 }

// Differ lists what differs between two block slabs of one domain, in order
// and without overlaps. from may be empty: then what is allocated.
type Differ interface {
	DiffSlabs(ctx context.Context, from, to string) ([]Extent, error)
}

// Fencer cuts a node off: when Fence returns, nothing that the node still
// writes reaches the slab.
type Fencer interface {
	Fence(ctx context.Context, node, slab string) error
	Unfence(ctx context.Context, node, slab string) error
}

// GroupSnapshotter cuts several slabs at one moment: specs[i] from sources[i];
// all or none.
type GroupSnapshotter interface {
	SnapshotSlabs(ctx context.Context, sources []string, specs []SlabSpec) error
}

// Modifier changes qualities of a slab in use.
type Modifier interface {
	// ModifyParams are the parameters taken, with one line of help each.
	ModifyParams() map[string]string
	ModifySlab(ctx context.Context, id string, params map[string]string) error
}

// Importable is something in the storage that can become a slab.
type Importable struct {
	// Size and Allocated in bytes.
	Size, Allocated int64
	// Holds is what blkid finds in it: "ext4", or "nothing".
	Holds string
}

// Importer adopts what lies in the storage beside the slabs, by a name that its type
// has for such things: a file in a certain folder, a logical volume. No bytes move.
type Importer interface {
	// Importable looks at it and changes nothing. fault.NotFound: there is none, and the
	// error says where it has to be. fault.InUse: somebody has it open. fault.Invalid: it can be no slab.
	Importable(ctx context.Context, source string) (Importable, error)
	// ImportSlab makes it a block slab. The kinds are those of Importable and CreateSlab.
	// Until KeepSlab, DeleteSlab gives it back under its own name, unchanged.
	ImportSlab(ctx context.Context, source string, spec SlabSpec) error
	// KeepSlab makes an import final: the slab has no other name any more. What is final
	// already is success.
	KeepSlab(ctx context.Context, source, id string) error
}

// Narrower is implemented by an engine whose type has more methods than its
// storage has capabilities: a remote engine's proxy, or an engine that found
// out at opening what its file system can do.
type Narrower interface {
	Supports(c Capability) bool
}

// Capabilities holds the capabilities of one domain; a field is nil where the
// domain does not have it. It is made once by Discover.
type Capabilities struct {
	Snapshotter      Snapshotter
	Cloner           Cloner
	Copier           Copier
	Meter            Meter
	Quota            Quota
	Differ           Differ
	Fencer           Fencer
	GroupSnapshotter GroupSnapshotter
	Modifier         Modifier
	Importer         Importer
}

// Discover finds the capabilities of an engine. Call it once, at opening.
func Discover(e Engine) Capabilities {
	return Capabilities{
		Snapshotter:      discover[Snapshotter](e, CapSnapshot),
		Cloner:           discover[Cloner](e, CapClone),
		Copier:           discover[Copier](e, CapCopy),
		Meter:            discover[Meter](e, CapMeter),
		Quota:            discover[Quota](e, CapQuota),
		Differ:           discover[Differ](e, CapDiff),
		Fencer:           discover[Fencer](e, CapFence),
		GroupSnapshotter: discover[GroupSnapshotter](e, CapGroup),
		Modifier:         discover[Modifier](e, CapModify),
		Importer:         discover[Importer](e, CapImport),
	}
}

func discover[T any](e Engine, c Capability) T {
	var none T
	t, ok := e.(T)
	if !ok {
		return none
	}
	if n, ok := e.(Narrower); ok && !n.Supports(c) {
		return none
	}
	return t
}

// List names the capabilities that are there, in a fixed order.
func (c Capabilities) List() []Capability {
	var out []Capability
	add := func(have bool, name Capability) {
		if have {
			out = append(out, name)
		}
	}
	add(c.Snapshotter != nil, CapSnapshot)
	add(c.Cloner != nil, CapClone)
	add(c.Copier != nil, CapCopy)
	add(c.Meter != nil, CapMeter)
	add(c.Quota != nil, CapQuota)
	add(c.Differ != nil, CapDiff)
	add(c.Fencer != nil, CapFence)
	add(c.GroupSnapshotter != nil, CapGroup)
	add(c.Modifier != nil, CapModify)
	add(c.Importer != nil, CapImport)
	return out
}

// Minimal hides every capability of e, so that every default can be tested on
// every engine.
func Minimal(e Engine) Engine { return minimal{e} }

type minimal struct{ Engine }

// ListingLimit is how long a listing may take: one that has not ended by then
// fails with fault.Deadline. The Image Manager keeps superseded tags twice as
// long, so that a listing that races with a replacement misses nothing.
const ListingLimit = 5 * time.Minute
