// Package engine is the contract between Quarry and a type of storage.
//
// # Terms
//
// A domain is one configured storage backend: a directory, an export, a volume
// group. An Engine is the opened form of a domain. It knows two objects:
//
//   - A slab is a block of writable storage with an ID chosen by the caller. Its
//     kind is Block (a LUN, a logical volume, a file) or Tree (a directory).
//   - A tag is a named pointer to a slab with a record of at most MaxRecord bytes.
//     Tags are the only metadata that Quarry keeps, and they live in the domain.
//
// An engine is stateless about images. It does not know what a snapshot's tag
// means, does not retry, and does not decide. All of that is the Image
// Manager's work, done once for every storage.
//
// # Life cycle
//
// A slab is made by CreateSlab (or by a capability such as Snapshotter),
// filled and used through AttachSlab, grown by ResizeSlab, and removed by
// DeleteSlab. A tag is made by CreateTag and removed by DeleteTag; it is never
// changed. A tag may name a slab that does not exist yet, or any more.
//
// # Rules
//
// The conformance suite (package enginetest) checks each of these.
//
//  1. Every verb is atomic: after a crash or a lost reply it has happened or it
//     has not. It is durable when it returns: a power cut does not undo it.
//  2. Slab IDs and tag names are chosen by the caller and never reused. Create
//     and delete are idempotent: creating an existing slab with the same spec
//     succeeds, with another spec fails with fault.Exists; deleting what is not
//     there succeeds.
//  3. CreateTag is exclusive: of any number of concurrent callers, on any number
//     of hosts, exactly one wins a name; the others get fault.Exists. A caller
//     that finds its own slab and record under the name has lost a reply, and
//     gets success.
//  4. A tag may name a slab that does not exist. Records of up to MaxRecord
//     bytes of any content are kept exactly.
//  5. ListTags and ListSlabs return at least everything that existed during the
//     whole listing, also what another host made before the listing began. What
//     is made or removed meanwhile may or may not be there. What is half made is
//     never there.
//  6. An engine holds no image logic, no retry policy, no gRPC, no Kubernetes.
//  7. Errors carry a kind of package fault. A failure whose cause is not known is
//     fault.Unavailable or fault.Internal, never a guess. A full storage is
//     fault.Exhausted. An ID or a name outside its alphabet is fault.Invalid.
//
// All methods may be called by many goroutines at once and honour their
// context where they wait.
//
// # Example
//
// A snapshot on a storage that can copy cheaply, as the Image Manager does it:
//
//	e.CreateTag(ctx, Tag{Name: "i.snap-7.1", Slab: "snap-7", Record: weak})   // intent
//	caps := engine.Discover(e)
//	if caps.Snapshotter != nil {
//		err = caps.Snapshotter.SnapshotSlab(ctx, "vol-3", SlabSpec{ID: "snap-7", Kind: Block, Size: n})
//	}
//	if caps.Snapshotter == nil || errors.Is(err, engine.ErrDeclined) {
//		e.CreateSlab(ctx, SlabSpec{ID: "snap-7", Kind: Block, Size: n})       // default: slab, then copy
//		...
//	}
//	e.CreateTag(ctx, Tag{Name: "i.snap-7.2", Slab: "snap-7", Record: strong}) // seal
package engine

import "context"

// Kind is the kind of a slab.
type Kind string

const (
	// Block slabs are fixed-size byte ranges.
	Block Kind = "block"
	// Tree slabs are directories.
	Tree Kind = "tree"
)

const (
	// MaxRecord is the largest tag record in bytes. It is what fits, base64
	// encoded, into the tags of an LVM metadata area's entry (1 KiB).
	MaxRecord = 640
	// MaxName is the longest tag name and slab ID in bytes: what is left of a
	// Linux NAME_MAX of 255 for an engine's own prefix and suffix.
	MaxName = 200
)

// SlabSpec says what slab to make.
type SlabSpec struct {
	// ID names the slab: 1 to MaxName characters of [a-z0-9._-], beginning with
	// a letter or a digit.
	ID   string
	Kind Kind
	// Size in bytes, greater than zero. Block: the slab is at least that large,
	// rounded up to the granularity. Tree: the size that was promised, enforced
	// only by an engine with Quota.
	Size int64
	// Params are what the engine declared in Description.Params, by name.
	Params map[string]string
}

// Slab is a slab that exists.
type Slab struct {
	ID   string
	Kind Kind
	// Size in bytes: the real one (Block), the promised one (Tree).
	Size int64
}

// Tag is a named pointer to a slab.
type Tag struct {
	// Name: 1 to MaxName characters of [a-z0-9._-], beginning with a letter or digit.
	Name string
	// Slab is the ID of the slab pointed to, or empty. It need not exist.
	Slab string
	// Record: 0 to MaxRecord bytes.
	Record []byte
}

// Description is what a domain says of itself. It is asked once at opening.
type Description struct {
	// Kinds that the domain can hold.
	Kinds []Kind
	// Granularity of block sizes in bytes; a power of two, at least 512.
	Granularity int64
	// MaxSlabSize in bytes; 0 when no limit is known.
	MaxSlabSize int64
	// MaxTags that the domain can hold; 0 when no limit is known.
	MaxTags int64
	// ZeroedSpace says that new space of a block slab reads as zero.
	ZeroedSpace bool
	// AtomicListing says that a listing shows the state of one moment.
	AtomicListing bool
	// SharedAccess says that other hosts may open the same domain at the same time. Block
	// slabs that are files of a server's client are in such domains only: layers have smaller chunks there.
	SharedAccess bool
	// MultiWriterBlock says that a block slab may be written on many nodes at once.
	MultiWriterBlock bool
	// MountOptions says that tree slabs take AttachOptions.MountOptions.
	MountOptions bool
	// Location is the storage in words, for people: "/srv/quarry (ext4)".
	Location string
	// Params are the class parameters that the engine takes in SlabSpec.Params,
	// with one line of help each.
	Params map[string]string
	// ParamValues has, by name, a regular expression (RE2) that the whole value of a
	// parameter matches; TreeParams names those that only trees take. What does not fit is refused
	// before anything is made.
	ParamValues map[string]string
	TreeParams  []string
	// Notes are facts found out at opening that an operator should know: which
	// capabilities are there, which are not, and why.
	Notes []string
}

// AttachOptions say how a slab is going to be used.
type AttachOptions struct {
	ReadOnly bool
	// MountOptions, of a tree slab, are the class's options of mount(8) that the storage itself has
	// to take ("actimeo=1"); those of every mount ("noexec") are not among them. An engine that does
	// not take one refuses it by its name: fault.Invalid.
	MountOptions []string
}

// Attachment is a slab that can be used on this host.
type Attachment struct {
	// Path of a Block slab is a block device or a regular file of at least the
	// slab's size (package block puts a loop device over a file); that of a Tree
	// slab is a directory.
	Path string
}

// Engine is an opened domain. See the package documentation for the rules.
type Engine interface {
	// Describe says what the domain is. It must not wait for a dead server.
	Describe(ctx context.Context) (Description, error)

	// CreateSlab makes a slab. A new Tree is empty, owned by root, mode 0755
	// unless Params say otherwise. fault.Exists: the ID is taken by a slab with
	// another spec. fault.Exhausted: no room.
	CreateSlab(ctx context.Context, spec SlabSpec) error
	// ResizeSlab grows a slab to at least size bytes. A size at or below the
	// present one changes nothing and succeeds. fault.NotFound: no such slab.
	ResizeSlab(ctx context.Context, id string, size int64) error
	// DeleteSlab removes a slab and everything in it. fault.InUse: it is attached.
	DeleteSlab(ctx context.Context, id string) error
	// ListSlabs returns the slabs, in no order.
	ListSlabs(ctx context.Context) ([]Slab, error)

	// CreateTag makes a tag exclusively. fault.Exists: the name is taken by
	// another record.
	CreateTag(ctx context.Context, tag Tag) error
	// DeleteTag removes a tag.
	DeleteTag(ctx context.Context, name string) error
	// ListTags returns the tags whose names begin with prefix, in no order. A
	// tag whose content cannot be read back is returned with a nil Record and
	// an empty Slab: its existence is never hidden.
	ListTags(ctx context.Context, prefix string) ([]Tag, error)

	// AttachSlab makes a slab usable on this host. Attaching again gives the
	// same Attachment. fault.NotFound: no such slab. fault.Corrupt: what is
	// there is not what was created.
	AttachSlab(ctx context.Context, id string, opts AttachOptions) (Attachment, error)
	// DetachSlab undoes AttachSlab. A slab that is not attached is success.
	DetachSlab(ctx context.Context, id string) error

	// Close releases the domain. It deletes nothing.
	Close() error
}
