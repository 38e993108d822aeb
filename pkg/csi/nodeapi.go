package csi

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/node"
)

// Node is what the services use of node.Node.
type Node interface {
	Stage(ctx context.Context, r node.StageRequest) error
	Unstage(ctx context.Context, h image.Handle, staging string) error
	Publish(ctx context.Context, r node.PublishRequest) error
	Unpublish(ctx context.Context, h image.Handle, target string) error
	Stats(ctx context.Context, h image.Handle, path string) (node.Stats, error)
	Expand(ctx context.Context, h image.Handle, path string, size int64) (int64, error)
	Health(ctx context.Context, h image.Handle) ([]node.Condition, error)
	StorageHealth(ctx context.Context, domains []string) []node.Condition
}

var _ Node = (*node.Node)(nil)
