package image

import (
	"context"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// Config of a Manager.
type Config struct {
	// Installation is the identity that owns domains.
	Installation string
	Agents       Agents
	// Mover copies slabs by default.
	Mover Mover
	// Observe is told of every finished operation; may be nil. path is "native" or "default".
	Observe func(op, domain, path string, took time.Duration, err error)
	// Clock; nil: the real one.
	Now func() time.Time
}

// Mover copies slab contents; implemented by package mover.
type Mover interface {
	// CopyBlock copies size bytes of the file or device src to dst, from offset
	// from on (both whole slabs, dst at least as large and reading as zero where
	// nothing was written when zeroed is true). It keeps holes, and calls
	// checkpoint from time to time with an offset up to which dst is durable;
	// an error of checkpoint ends the copy. dst is durable when it returns.
	CopyBlock(ctx context.Context, src, dst string, opts BlockCopy) error
	// CopyTree makes dst equal to src, content and metadata; dst may hold an
	// earlier, incomplete copy.
	CopyTree(ctx context.Context, src, dst string, progress func(done, total int64)) error
}

// BlockCopy are the options of Mover.CopyBlock.
type BlockCopy struct {
	Size       int64 // bytes of src to copy
	From       int64 // resume: everything before is already durable in dst
	DstZeroed  bool  // dst reads as zero from From on
	Progress   func(done, total int64)
	Checkpoint func(offset int64) error // nil: no checkpoints
}

// Manager does all image work. Its methods may be called by many goroutines.
type Manager struct{}

// New makes a Manager without domains.
func New(cfg Config) *Manager { panic("x") }

// AddDomain opens a domain: claims a new epoch, indexes it, recovers what was
// left over. It returns the domain's ID. The engine is closed by Close.
// fault.Permission: it belongs to another installation.
func (m *Manager) AddDomain(ctx context.Context, cfg DomainConfig, e engine.Engine) (string, error) {
	panic("x")
}

// Unopened records a configured domain that could not be opened, so that its
// objects are unavailable rather than absent.
func (m *Manager) Unopened(cfg DomainConfig, reason error) { panic("x") }

// Close stops background work, waits for it, and closes the engines. Running
// operations are abandoned where they are, to be recovered at the next opening.
func (m *Manager) Close() error { panic("x") }

// Engine of an open domain, for attaching slabs. fault.Unavailable: not open.
func (m *Manager) Engine(domain string) (engine.Engine, error) { panic("x") }

func (m *Manager) Domains(ctx context.Context) []DomainInfo { panic("x") }

func (m *Manager) CreateVolume(ctx context.Context, r CreateRequest) (Image, error) { panic("x") }
func (m *Manager) DeleteVolume(ctx context.Context, h Handle) error                 { panic("x") }
func (m *Manager) CreateSnapshot(ctx context.Context, r SnapshotRequest) (Image, error) {
	panic("x")
}
func (m *Manager) DeleteSnapshot(ctx context.Context, h Handle) error             { panic("x") }
func (m *Manager) CreateGroup(ctx context.Context, r GroupRequest) (Group, error) { panic("x") }
func (m *Manager) GetGroup(ctx context.Context, h Handle) (Group, error)          { panic("x") }
func (m *Manager) DeleteGroup(ctx context.Context, h Handle) error                { panic("x") }
func (m *Manager) Expand(ctx context.Context, h Handle, size, limit int64) (Image, error) {
	panic("x")
}
func (m *Manager) Modify(ctx context.Context, h Handle, t Tuning, engineParams map[string]string) error {
	panic("x")
}

// Get returns a visible image. fault.NotFound, or fault.Unavailable when its domain is not open.
func (m *Manager) Get(ctx context.Context, h Handle) (Image, error) { panic("x") }

// List returns visible images ordered by handle, beginning after the handle
// `after` ("" for all), at most max (0: all), and whether there are more.
// fault.Unavailable until every configured domain was indexed.
func (m *Manager) List(ctx context.Context, mutable bool, after string, max int) ([]Image, bool, error) {
	panic("x")
}

// All returns every image of every open domain, hidden, creating and deleting
// ones too: for operators.
func (m *Manager) All(ctx context.Context) []Image { panic("x") }

// Attach lets node use an image. fault.InUse: single-writer, attached elsewhere.
// fault.Exists: attached to the node in an incompatible way.
func (m *Manager) Attach(ctx context.Context, h Handle, node string, a Access, readOnly bool) (Attachment, error) {
	panic("x")
}

// Detach ends an attachment; node "" means all. fault.Unavailable: the agent
// has not confirmed that the image is unstaged.
func (m *Manager) Detach(ctx context.Context, h Handle, node string) error { panic("x") }

// Stage tells a node what to build. generation is the attachment's; fault.InUse
// when the attachment was withdrawn since.
func (m *Manager) Stage(ctx context.Context, h Handle, node string, generation int64) (Staging, error) {
	panic("x")
}

// Formatted seals that a fresh image now carries a filesystem. Called after
// formatting and flushing, before the first mount.
func (m *Manager) Formatted(ctx context.Context, h Handle, node, filesystem string) error {
	panic("x")
}

// Unstaged tells that a node has taken everything down.
func (m *Manager) Unstaged(ctx context.Context, h Handle, node string) error { panic("x") }

// Capacity that can still be promised, its largest volume and the smallest,
// of the named domains (or all) reachable from node ("" any).
func (m *Manager) Capacity(ctx context.Context, domains []string, node string) (available, maxVolume, minVolume int64, err error) {
	panic("x")
}

// Topology says from which node an image or a domain can be reached; "" from all.
func (m *Manager) Topology(domain string) (node string, err error) { panic("x") }

func (m *Manager) Operations() []Operation                                     { panic("x") }
func (m *Manager) Check(ctx context.Context, domain string) ([]Finding, error) { panic("x") }

// Fix verifies a finding again and acts on it.
func (m *Manager) Fix(ctx context.Context, f Finding) (string, error) { panic("x") }
