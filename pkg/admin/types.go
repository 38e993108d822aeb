// Package admin is the operator's way into a running Quarry: HTTP with JSON
// over a Unix socket that only its owner may use, a typed server over the
// Image Manager and a typed client.
//
//	GET  /v1/version
//	GET  /v1/domains
//	GET  /v1/images
//	GET  /v1/chain?image=HANDLE|PREFIX|NAME
//	GET  /v1/operations
//	GET  /v1/usage
//	GET  /v1/check?domain=NAME|ID           all domains without it
//	POST /v1/fix         FixRequest
//	POST /v1/import      ImportRequest
//
// A failure is {"error":{"kind":"not found","message":"..."}} with the words of
// package fault; the client gives it back as a fault.Error.
package admin

import (
	"context"
	"time"

	"github.com/quarry-csi/quarry/pkg/image"
)

// Manager is what the server needs of the Image Manager.
type Manager interface {
	Domains(ctx context.Context) []image.DomainInfo
	All(ctx context.Context) []image.Image
	Usage(ctx context.Context) []image.Use
	Operations() []image.Operation
	Check(ctx context.Context, domain string) ([]image.Finding, error)
	Fix(ctx context.Context, f image.Finding) (string, error)
	Import(ctx context.Context, r image.ImportRequest) (image.Image, error)
	Topology(domain string) (node string, err error)
}

// Cluster is what the server asks of Kubernetes.
type Cluster interface {
	// References lists the objects of Kubernetes that name images.
	References(ctx context.Context) ([]Reference, error)
}

// Reference is an object of Kubernetes that names an image.
type Reference struct {
	Kind     string // "PersistentVolume" or "VolumeSnapshotContent"
	Name     string
	Handle   string
	Snapshot bool // of a snapshot rather than a volume
	// Going: it is being deleted, and its image before it.
	Going bool
}

// Version says what runs.
type Version struct {
	Version      string `json:"version"`
	Go           string `json:"go"`
	Platform     string `json:"platform"`
	Node         string `json:"node,omitempty"`
	Installation string `json:"installation,omitempty"`
	Driver       string `json:"driver,omitempty"` // the CSI driver's name
}

// Domain is a configured domain. Sizes are in bytes.
type Domain struct {
	ID            string   `json:"id,omitempty"`
	Name          string   `json:"name"`
	Engine        string   `json:"engine"`
	Scope         string   `json:"scope"`
	Node          string   `json:"node,omitempty"`
	Aliases       []string `json:"aliases,omitempty"`
	NativeOnly    bool     `json:"nativeOnly"`
	Overcommit    float64  `json:"overcommit"`
	CapacityLimit int64    `json:"capacityLimit,omitempty"`
	Open          bool     `json:"open"`
	Problem       string   `json:"problem,omitempty"`
	Warning       string   `json:"warning,omitempty"` // of an open one: what its storage says of itself
	Location      string   `json:"location,omitempty"`
	Notes         []string `json:"notes,omitempty"`
	Kinds         []string `json:"kinds,omitempty"`
	Capabilities  []string `json:"capabilities,omitempty"`
	Epoch         int64    `json:"epoch,omitempty"`
	Owner         string   `json:"owner,omitempty"`
	Usage         *Usage   `json:"usage,omitempty"`
	Promised      int64    `json:"promised"`
	Capacity      int64    `json:"capacity"`
	Volumes       int      `json:"volumes"`
	Snapshots     int      `json:"snapshots"`
	Operations    int      `json:"operations"`
}

// Usage of a domain's storage in bytes, as the storage itself counts.
type Usage struct {
	Total     int64 `json:"total"`
	Used      int64 `json:"used"`
	Available int64 `json:"available"`
}

// The kinds of image.
const (
	KindVolume   = "volume"
	KindSnapshot = "snapshot"
)

// Image is a volume or a snapshot, in any state. Size is in bytes.
type Image struct {
	Handle     string            `json:"handle"`
	Name       string            `json:"name,omitempty"`
	Kind       string            `json:"kind"`
	Layout     string            `json:"layout"`
	Size       int64             `json:"size"`
	Promised   int64             `json:"promised"`
	Slab       string            `json:"slab,omitempty"`
	Slabs      []string          `json:"slabs,omitempty"` // from head to base
	Source     string            `json:"source,omitempty"`
	Created    time.Time         `json:"created"`
	State      string            `json:"state"`
	Reason     string            `json:"reason,omitempty"`
	Ready      bool              `json:"ready"`
	Fresh      bool              `json:"fresh"`
	Filesystem string            `json:"filesystem,omitempty"`
	Group      string            `json:"group,omitempty"`
	Inexact    bool              `json:"inexact,omitempty"`
	How        string            `json:"how,omitempty"`
	Params     map[string]string `json:"params,omitempty"`
	Nodes      []Attachment      `json:"attachments,omitempty"`
	Children   []string          `json:"children,omitempty"`
	Namespace  string            `json:"namespace,omitempty"`
	Claim      string            `json:"claim,omitempty"`
	Volume     string            `json:"volume,omitempty"`
	Class      string            `json:"class,omitempty"`
}

// Attachment is the use of an image on a node.
type Attachment struct {
	Node     string `json:"node"`
	Mode     string `json:"mode"`
	Block    bool   `json:"block,omitempty"`
	ReadOnly bool   `json:"readOnly,omitempty"`
	Staged   bool   `json:"staged"`
}

// Chain is an image with its family and its slabs.
type Chain struct {
	Image Image `json:"image"`
	// Lineage holds the image's ancestors, itself and its descendants; an
	// image stands after its source.
	Lineage []Image `json:"lineage"`
	// Slabs of the image from head to base.
	Slabs []string `json:"slabs"`
}

// Operation is a piece of work under way, or one that is being retried.
type Operation struct {
	ID      string    `json:"id"`
	Op      string    `json:"op"`
	Domain  string    `json:"domain"`
	Image   string    `json:"image,omitempty"`
	Name    string    `json:"name,omitempty"`
	Step    string    `json:"step,omitempty"`
	Done    int64     `json:"done,omitempty"`
	Total   int64     `json:"total,omitempty"`
	Started time.Time `json:"started"`
	Path    string    `json:"path,omitempty"`
	Reason  string    `json:"reason,omitempty"`
}

// NamespaceUsage is the usage of a domain by the claims and snapshots of a namespace. Sizes are in bytes.
type NamespaceUsage struct {
	Namespace string `json:"namespace,omitempty"` // empty: of images that no claim is known of
	Domain    string `json:"domain"`
	Volumes   int    `json:"volumes"`
	Snapshots int    `json:"snapshots"`
	// Size that users see, of those. Promised and Allocated also have what was
	// deleted and still has its slab.
	Size      int64 `json:"size"`
	Promised  int64 `json:"promised"`
	Allocated int64 `json:"allocated"`
	// Unmeasured are the images whose allocation nobody can tell.
	Unmeasured int `json:"unmeasured,omitempty"`
}

// Finding is something that a check found.
type Finding struct {
	ID      string `json:"id"`
	Kind    string `json:"kind"`
	Domain  string `json:"domain"`
	Object  string `json:"object"`
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"` // empty when only a person can help
	Bytes   int64  `json:"bytes,omitempty"`
}

// Checked is the result of a check.
type Checked struct {
	Findings []Finding `json:"findings"`
	// Unchecked says why a domain could not be checked, by its ID or name.
	Unchecked map[string]string `json:"unchecked,omitempty"`
}

// FixRequest asks for findings to be fixed.
type FixRequest struct {
	Domain string   `json:"domain,omitempty"` // name or ID; all without it
	IDs    []string `json:"ids,omitempty"`    // only these findings
	Kinds  []string `json:"kinds,omitempty"`  // only these kinds
	Apply  bool     `json:"apply"`            // false: only tell what would be done
}

// Fixed is what became of one finding.
type Fixed struct {
	Finding
	// Done says what was done; empty in a dry run.
	Done string `json:"done,omitempty"`
	// Error says why nothing was done.
	Error string `json:"error,omitempty"`
}

// FixResult is the result of a fix.
type FixResult struct {
	Applied   bool              `json:"applied"`
	Results   []Fixed           `json:"results"`
	Unchecked map[string]string `json:"unchecked,omitempty"`
}

// ImportRequest asks for a volume of what lies in a domain's storage.
type ImportRequest struct {
	Name       string `json:"name"`
	Domain     string `json:"domain"` // name or ID
	Source     string `json:"source"`
	Block      bool   `json:"block,omitempty"`
	Filesystem string `json:"filesystem,omitempty"`
	// Namespace and Claim that it is going to be bound to, if that is known.
	Namespace string `json:"namespace,omitempty"`
	Claim     string `json:"claim,omitempty"`
	DryRun    bool   `json:"dryRun,omitempty"`
}

// Imported is what became, or in a dry run would become, of an import.
type Imported struct {
	Image  Image  `json:"image"`
	Driver string `json:"driver"`
	// Node that alone reaches it, or "".
	Node   string `json:"node,omitempty"`
	DryRun bool   `json:"dryRun,omitempty"`
}
