// Package engines is the list of storage types that Quarry's programs are
// built with. Nothing else names them.
package engines

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/engines/lvm"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Registry of every type of storage; programs are run by run.
func Registry(run host.Runner) domain.Registry {
	return domain.Registry{
		"dir": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return dir.Open(ctx, params, run)
			},
			Params:    dir.Params,
			Scope:     domain.ScopeNode,
			Directory: "path",
		},
		"lvm": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return lvm.Open(ctx, params, run)
			},
			Params: lvm.Params,
			Scope:  domain.ScopeNode,
		},
	}
}
