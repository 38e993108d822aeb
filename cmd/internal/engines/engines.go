// Package engines is the list of storage types that Quarry's programs are
// built with. Nothing else names them.
package engines

import (
	"context"

	"golang.org/x/sys/unix"

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
			// Trees are root's, and hold what anybody left in them; project quotas and
			// subvolumes need CAP_SYS_ADMIN.
			Needs: []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_SYS_ADMIN},
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
