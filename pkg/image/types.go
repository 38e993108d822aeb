package image

import (
	"context"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// MaxHandle is the longest volume or snapshot handle in bytes (CSI allows 128).
const MaxHandle = 128

// Handle names an image for ever: the domain's ID and the image's incarnation.
type Handle struct {
	Domain string
	Image  string
}

// String renders "<domain ID>/<image ID>", the CSI volume, snapshot or group ID.
func (h Handle) String() string { return h.Domain + "/" + h.Image }

// ParseHandle is the reverse of String. The error is fault.Invalid: the handle
// cannot have come from Quarry.
func ParseHandle(s string) (Handle, error) {
	d, i, ok := strings.Cut(s, "/")
	if !ok || len(s) > MaxHandle || engine.CheckName("domain", d) != nil || engine.CheckName("image", i) != nil {
		return Handle{}, fault.New(fault.Invalid, "handle %q is not of the form <domain>/<image>", s)
	}
	return Handle{Domain: d, Image: i}, nil
}

// Layout says how an image keeps its data.
type Layout string

const (
	// LayoutImage is a block slab, with or without a filesystem on it.
	LayoutImage Layout = "image"
	// LayoutDirectory is a tree slab: files straight in the storage.
	LayoutDirectory Layout = "directory"
)

// Kind is the kind of slab that carries the layout.
func (l Layout) Kind() engine.Kind {
	if l == LayoutDirectory {
		return engine.Tree
	}
	return engine.Block
}

// Mode is how many nodes and workloads may use an image at once; the CSI access modes.
type Mode string

// The access modes, named as in CSI.
const (
	SingleNodeWriter       Mode = "SINGLE_NODE_WRITER"
	SingleNodeReaderOnly   Mode = "SINGLE_NODE_READER_ONLY"
	SingleNodeSingleWriter Mode = "SINGLE_NODE_SINGLE_WRITER"
	SingleNodeMultiWriter  Mode = "SINGLE_NODE_MULTI_WRITER"
	MultiNodeReaderOnly    Mode = "MULTI_NODE_READER_ONLY"
	MultiNodeSingleWriter  Mode = "MULTI_NODE_SINGLE_WRITER"
	MultiNodeMultiWriter   Mode = "MULTI_NODE_MULTI_WRITER"
)

// MultiNode says whether several nodes may use the image at the same time.
func (m Mode) MultiNode() bool { return strings.HasPrefix(string(m), "MULTI_NODE") }

// ReadOnly says whether nobody may write.
func (m Mode) ReadOnly() bool { return strings.HasSuffix(string(m), "READER_ONLY") }

// Access is one way in which an image is going to be used (a CSI volume capability).
type Access struct {
	// Block asks for a raw block device, otherwise a mounted filesystem.
	Block bool
	// Filesystem is "ext4", "xfs" or "btrfs"; empty for the default (ext4), for
	// Block and for directories.
	Filesystem string
	Mode       Mode
}

// State of an image.
type State string

// The states, as users see them.
const (
	// Optimized: one raw slab (or a chain within its limit), nothing to do.
	Optimized State = "optimized"
	// Degraded: correct, but slower or larger than it could be.
	Degraded State = "degraded"
	// Broken: its record or its slab cannot be read or is not what was recorded.
	Broken State = "broken"
	// Creating: not yet sealed; invisible to CSI, shown to operators.
	Creating State = "creating"
	// Deleting: sealed as deleted; space comes back when nothing needs it.
	Deleting State = "deleting"
)

// Image is what users see: a volume (Mutable) or a snapshot.
type Image struct {
	Handle  Handle
	Name    string // the CSI name; empty for a hidden snapshot
	Layout  Layout
	Mutable bool
	Size    int64 // bytes
	// Promised are the bytes of its domain that it may come to need.
	Promised int64
	Slab     string
	// Source is the handle of the volume or snapshot that it was made from, or "".
	// SourceMutable says that it is a volume.
	Source        string
	SourceMutable bool
	Created       time.Time
	State         State
	// Reason says why the state is not Optimized.
	Reason string
	// Warning is what its domain's storage said of itself when it was last
	// measured; empty: all is well.
	Warning string
	// Ready is false while work after a snapshot's cut is going on.
	Ready bool
	// Fresh: never formatted. Filesystem: what it was formatted with, or "".
	Fresh      bool
	Filesystem string
	// Group is the handle of the group snapshot that it belongs to, or "".
	Group string
	// Inexact: a copy of a directory that was being written.
	Inexact bool
	// How its content came to be: "native: reflink", "default: copy", ....
	How string
	// Encrypted: its slabs hold ciphertext, and a header beside Size.
	Encrypted bool
	// ThinLayers: see CreateRequest.
	ThinLayers bool
	// Params that were asked for at creation and count for idempotency.
	Params map[string]string
	// Mutable parameters in force.
	Tuning      Tuning
	Attachments []Attachment
	// Parent is the ID of the image whose slab lies below this one's, or "".
	Parent string
	// Chain of slabs from head to base; one where nothing lies below.
	Chain []SlabRef
	// Children are the IDs of the images whose slabs depend on this one's.
	Children []string
	// Described is the content of the image's description for people; may be empty.
	Described Described
}

// Tuning holds the parameters that may be changed during an image's life.
type Tuning struct {
	// ChainLimit is the longest chain of layers before a background merge. 0: default (8).
	ChainLimit int `json:"cl,omitempty"`
	// QuiesceLimit is how long a filesystem may stay frozen for a copy. 0: default (10 s).
	QuiesceLimit time.Duration `json:"ql,omitempty"`
}

// Described describes an image for people and for disaster recovery. It is
// never compared and may be missing.
type Described struct {
	Namespace  string   `json:"ns,omitempty"`    // of the claim or VolumeSnapshot
	Claim      string   `json:"claim,omitempty"` // its name
	Volume     string   `json:"pv,omitempty"`
	Class      string   `json:"class,omitempty"`
	Filesystem string   `json:"fs,omitempty"`
	Modes      []string `json:"modes,omitempty"`
	Block      bool     `json:"block,omitempty"`
}

// Attachment is the use of an image on a node.
type Attachment struct {
	Node       string
	Mode       Mode
	Block      bool
	ReadOnly   bool
	Generation int64
	// Staged: the node has asked for the chain and has not confirmed its removal.
	Staged bool
}

// CreateRequest asks for a volume.
type CreateRequest struct {
	Name string
	// Domains to place on, in order of preference; names or IDs.
	Domains []string
	// Layout as the class says it, or "" to decide from Accesses.
	Layout   Layout
	Accesses []Access
	// Size asked for in bytes (0: the source's, else DefaultSize) and the most
	// allowed (0: no limit).
	Size, Limit int64
	// Source is the handle of an image to start from, or "". SourceMutable says
	// whether it must be a volume or a snapshot.
	Source        string
	SourceMutable bool
	// RequireNative names capabilities that the domain must have.
	RequireNative []engine.Capability
	// RestoreToSource places on the source's domain rather than moving the data.
	RestoreToSource bool
	// Encrypted: what is written to the slab is ciphertext.
	Encrypted bool
	// ThinLayers: the space of its layers is not allocated. Writes to them wait while the
	// storage is nearly full: see layer.Reserve.
	ThinLayers bool
	// Params for the engine.
	Params    map[string]string
	Tuning    Tuning
	Described Described
	// Nodes: if not empty, the image must be reachable from one of them.
	// Preferred come first.
	Nodes []string
}

// DefaultSize of a volume that was asked for without a size.
const DefaultSize = 1 << 30

// SnapshotRequest asks for a snapshot of a volume.
type SnapshotRequest struct {
	Name   string
	Source Handle
	// Inexact allows a copy of a directory while it is being written.
	Inexact       bool
	RequireNative []engine.Capability
	Described     Described
}

// GroupRequest asks for snapshots of several volumes at one moment.
type GroupRequest struct {
	Name          string
	Sources       []Handle
	Inexact       bool
	RequireNative []engine.Capability
	Described     Described
}

// Group is a group snapshot.
type Group struct {
	Handle    Handle
	Name      string
	Created   time.Time
	Ready     bool
	Snapshots []Image
}

// SlabRef is one slab of a chain.
type SlabRef struct {
	ID   string
	Size int64 // bytes that it stands for: those of the image that it was the head of
	// Chunk is that of a layer's store, in bytes; 0: a raw slab.
	Chunk int64
	// Replaces is the layer in whose place a raw slab came, with the same content:
	// devices may still stand on it, and have to go over. "" for most.
	Replaces string
}

// Staging is what a node needs to build an image's device or directory.
type Staging struct {
	Handle Handle
	// Domain is the domain's ID, whatever name of it the handle has.
	Domain string
	// Epoch of the manager that says so: an agent refuses one that is lower than
	// what it has heard of for the domain.
	Epoch  int64
	Layout Layout
	Size   int64 // bytes of the chain: what users see, and Crypt
	// Crypt is how many bytes a LUKS2 header takes before what users see; 0: not encrypted.
	Crypt int64
	// Slabs from head to base.
	Slabs    []SlabRef
	ReadOnly bool
	// Fresh: it must be formatted, and Formatted called, before the first mount.
	// Once it is false nothing may ever be formatted, whatever the device looks like.
	Fresh      bool
	Filesystem string // recorded at formatting, or ""
	// Cloned: the filesystem's UUID may be that of another image on this node.
	Cloned bool
	// Block and Mode as attached.
	Block bool
	Mode  Mode
	// Told is for Manager.Built.
	Told int64
}

// Frozen is the answer of an agent that was asked to freeze an image.
type Frozen string

const (
	// NotStaged: nothing of the image is in use on the node.
	NotStaged Frozen = "not staged"
	// IsFrozen: the filesystem is frozen until Thaw, or until the time is up.
	IsFrozen Frozen = "frozen"
	// NotFreezable: in use, but without a filesystem of its own to freeze (raw
	// block, directory).
	NotFreezable Frozen = "not freezable"
)

// Agent is what the Image Manager asks of a node. Every call is idempotent.
type Agent interface {
	// Freeze makes the filesystem inside the image consistent and still. It
	// thaws by itself after limit, or when the agent dies.
	Freeze(ctx context.Context, h Handle, limit time.Duration) (Frozen, error)
	// Thaw ends a Freeze. It fails with fault.Conflict when the freeze did not
	// hold without a break until now: what was cut meanwhile does not count.
	Thaw(ctx context.Context, h Handle) error
	// Staged says whether the node still has the image's device or directory in use.
	Staged(ctx context.Context, h Handle) (bool, error)
}

// ChainAgent is an Agent of a node whose kernel can build chains of layers, if
// Layers says so. Every call is idempotent, and may be lost, repeated or late.
type ChainAgent interface {
	Agent
	// Layers says whether a layer can be put over the image's slab here:
	// fault.Unsupported with the reason if not, because the node has no
	// device-mapper or has the image staged without it. fault.Pending: another
	// operation on the image is running.
	Layers(ctx context.Context, h Handle) error
	// Switch gives the devices of images in use here the chains that the
	// stagings say, all at one moment: their filesystems are frozen and everything
	// written before is durable when the first of them goes on. What is not
	// staged here, or has its chain already, is left alone. prepared is what Prepare of the
	// same stagings returned, or ""; if that is over, it costs nothing but time. fault.Conflict: they
	// were not all still at one moment.
	Switch(ctx context.Context, images []Staging, prepared string) error
	// Prepare does what a switch can do while the images are in use: it builds the new chains
	// beside the present ones. Nobody else works on the images on this node until Switch or Release
	// takes what it returned, for ten seconds at most.
	Prepare(ctx context.Context, images []Staging) (prepared string, err error)
	// Hold, of the same images, is what Prepare was for up to the moment that counts: what was written is durable, and I/O
	// waits until Release, for ten seconds at most. Release lets it go on, through the new
	// chains; it does so by itself when the time is up, or the agent dies. fault.Conflict from either: it
	// was over, or had gone on before. So several nodes switch at one moment: all are prepared, then
	// all hold, then all release, and none had gone on. After Prepare alone Release changes nothing.
	Hold(ctx context.Context, images []Staging, prepared string) error
	Release(ctx context.Context, prepared string) error
	// Merge starts to merge the first slab of a chain into the second, or goes on
	// with it, and says how far it is. The image is that of the first slab. It
	// returns at once.
	Merge(ctx context.Context, chain Staging) (Merging, error)
	// StopMerge stops Merge; the chain is as good as before. What does not run is success.
	StopMerge(ctx context.Context, chain Staging) error
}

// Merging says how far a merge is.
type Merging struct {
	Left int64 // bytes still to be merged
	// Done: the first slab is empty, and nothing reads or writes it any more.
	Done bool
}

// Agents finds the agents of nodes.
type Agents interface {
	// Agent of a node. fault.Unavailable: it cannot be reached now.
	Agent(node string) (Agent, error)
	// Nodes that have an agent, sorted.
	Nodes() []string
}

// DomainConfig is a domain as configured, beside its engine.
type DomainConfig struct {
	Name   string
	Engine string // the type
	// Scope is "shared" or "node". A node-scope domain has an ID of its own.
	Scope string
	// Node that a node-scope domain belongs to.
	Node string
	// NativeOnly takes a CSI capability away where the native one is missing.
	NativeOnly bool
	// Overcommit is how many times the capacity may be promised; 0 means 1.0.
	Overcommit float64
	// CapacityLimit in bytes; 0: the storage's own.
	CapacityLimit int64
	// BackgroundRate is how many bytes per second merging and flattening may move,
	// each by itself, as an average; 0: as many as they can.
	BackgroundRate int64
	Aliases        []string
	// TakeOver a domain that belongs to another installation.
	TakeOver bool
}

// DomainInfo is what operators see of a domain.
type DomainInfo struct {
	ID           string
	Config       DomainConfig
	Open         bool
	Problem      string // why it is not open
	Warning      string // what its storage says of itself: engine.Usage.Warning
	Epoch        int64
	Owner        string
	Description  engine.Description
	Capabilities []engine.Capability
	Usage        *engine.Usage
	Promised     int64 // bytes of all images
	Capacity     int64 // bytes that can still be promised
	Volumes      int
	Snapshots    int
	Operations   int
}

// Operation is a piece of work under way, or the last error of one that is retried.
type Operation struct {
	ID      string
	Op      string // "create volume", "snapshot", "delete", ...
	Domain  string
	Image   string
	Name    string
	Step    string // what it is doing, for people: "copying 43% of 20 GiB from nas to local"
	Done    int64
	Total   int64
	Started time.Time
	Path    string // "native", "default" or ""
	Reason  string
}

// FindingKind says what a fix would do.
type FindingKind string

// The kinds of finding.
const (
	FindingClean    FindingKind = "clean"    // frees space
	FindingOptimize FindingKind = "optimize" // degraded to optimized
	FindingMerge    FindingKind = "merge"
	FindingMend     FindingKind = "mend" // broken to usable
	FindingReport   FindingKind = "report"
)

// Finding is something that Check found.
type Finding struct {
	ID      string // stable while the finding stands
	Kind    FindingKind
	Domain  string
	Object  string // image, slab or tag
	Message string // what is wrong
	Fix     string // what Fix would do; empty when only a person can help
	Bytes   int64  // that would be freed
}
