package csi

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/image"
)

// Node is what the services use of package node. Every call is idempotent and
// none waits for a dead server without a limit.
type Node interface {
	// Stage makes the image ready at req.Path.
	Stage(ctx context.Context, req StageRequest) error
	// Unstage undoes Stage. What is not staged is success.
	Unstage(ctx context.Context, h image.Handle, path string) error
	// Publish makes the staged image appear at req.Target.
	Publish(ctx context.Context, req PublishRequest) error
	// Unpublish undoes Publish and removes the target. What is not published is success.
	Unpublish(ctx context.Context, h image.Handle, target string) error
	// Stats measures. fault.NotFound: the image is not at the path.
	Stats(ctx context.Context, h image.Handle, path string) (Stats, error)
	// Expand grows what is on the node to the image's size, which it returns.
	// fault.NotFound: the image is not at the path.
	Expand(ctx context.Context, h image.Handle, path string, size int64) (int64, error)
	// Health says what is wrong with an image here; nothing, if nothing is.
	Health(ctx context.Context, h image.Handle) ([]Condition, error)
}

// StageRequest asks a node to stage an image.
type StageRequest struct {
	Handle     image.Handle
	Generation int64  // of the attachment
	Path       string // an absolute path; a directory that exists
	Access     image.Access
	MountFlags []string
}

// PublishRequest asks a node to publish a staged image.
type PublishRequest struct {
	Handle     image.Handle
	Staging    string // where it is staged
	Target     string // an absolute path that does not exist; its parent does
	Access     image.Access
	ReadOnly   bool
	MountFlags []string
}

// Stats of an image in use.
type Stats struct {
	// Block: only TotalBytes is known.
	Block                               bool
	TotalBytes, UsedBytes, FreeBytes    int64
	TotalInodes, UsedInodes, FreeInodes int64
}

// Condition is something that is wrong with an image on a node.
type Condition struct {
	// Inaccessible: it cannot be used here; otherwise it is merely degraded.
	Inaccessible bool
	Reason       string // CamelCase
	Message      string
}
