// Package engines is the list of storage types that Quarry's programs are
// built with. Nothing else names them.
package engines

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/engines/gluster"
	"github.com/quarry-csi/quarry/pkg/engines/lvm"
	"github.com/quarry-csi/quarry/pkg/engines/nfs"
	"github.com/quarry-csi/quarry/pkg/engines/nfs3"
	"github.com/quarry-csi/quarry/pkg/engines/nfs4"
	"github.com/quarry-csi/quarry/pkg/engines/sharedfs"
	"github.com/quarry-csi/quarry/pkg/engines/smb"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Registry of every type of storage; programs are run by run.
func Registry(run host.Runner) domain.Registry {
	local := host.NewLocal(run) // one for all: what hangs is counted once
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
		"gluster": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return gluster.Open(ctx, params, run, local, "")
			},
			Params: gluster.Params,
			Place:  gluster.Place,
		},
		"lvm": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return lvm.Open(ctx, params, run)
			},
			Params: lvm.Params,
			Scope:  domain.ScopeNode,
		},
		"nfs3": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return nfs3.Open(ctx, params, local, "")
			},
			Params: nfs3.Params,
			Place:  nfs.Place,
			Needs:  mounting(),
		},
		"nfs4": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return nfs4.Open(ctx, params, local, "")
			},
			Params: nfs4.Params,
			Place:  nfs.Place,
			Needs:  mounting(),
		},
		"sharedfs": {
			Open: func(ctx context.Context, params, _ map[string]string) (engine.Engine, error) {
				return sharedfs.Open(ctx, params, local)
			},
			Params:    sharedfs.Params,
			Directory: "path",
			Needs:     []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID},
		},
		"smb": {
			Open: func(ctx context.Context, params, secrets map[string]string) (engine.Engine, error) {
				return smb.Open(ctx, params, secrets, local, "")
			},
			Params: smb.Params,
			Place:  smb.Place,
		},
	}
}

// mounting are the capabilities of an engine that mounts its storage itself, and keeps trees there that are
// root's and hold what anybody left in them.
func mounting() []uint {
	return []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_SYS_ADMIN}
}
