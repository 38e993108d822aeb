// Package nfs3 is the engine for an export of an NFS 3 server.
//
// The protocol keeps no state on the server, and everything here follows from that:
//
//   - Exclusive is what link(2) and rename(2) of package posix are, by names that nobody else has.
//     A repeated call whose first reply was lost answers EEXIST or ENOENT; posix looks whose name it is.
//   - Directories are cached by their times, which two changes in one tick of the server's clock leave
//     equal: a listing first changes the folder itself (posix.Options.Refresh).
//   - Locks are another protocol, with daemons of its own (NLM, rpc.statd). The domain's own mount uses none:
//     what the engine locks, it locks against processes of this host.
package nfs3

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/nfs"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/host"
)

const version = 3

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	params := nfs.Params()
	params["options"] += ", " + strings.Join(slices.Sorted(maps.Keys(own().Domain)), ", ")
	return params
}

// own are the options that NFS 4 does not have, or has as a parameter.
func own() nfs.Options {
	return nfs.Options{
		Domain: map[string]string{"mountport": nfs.Port, "sec": nfs.Security},
		// Users of a directory volume on several nodes need locks that hold on all of them: nolock is refused, and
		// where a node has no rpc.statd, a lock fails with ENOLCK rather than being one that only this node knows.
		Class: map[string]string{"lock": "", "sec": nfs.Security},
	}
}

// Open opens the export that params name as a domain. Mounts are made below the folder mounts; "": share.DefaultMounts.
func Open(ctx context.Context, params map[string]string, h *host.Local, mounts string) (engine.Engine, error) {
	x, err := nfs.Parse("nfs3", Params(), params, own())
	if err != nil {
		return nil, err
	}
	e, err := share.Open(ctx, h, mounts, share.Storage{
		Type:     "nfs3",
		Location: x.Source(x.Folder) + " (NFS 3)",
		Folder:   x.Folder,
		Mount: func(ctx context.Context, folder, target string, class []string) error {
			server, err := x.Reach(ctx, version)
			if err != nil {
				return err
			}
			return x.Mount(ctx, h, folder, target, mountOptions(x, server, class))
		},
		CheckOptions: func(options []string) error { return nfs.CheckClass(options, own()) },
		Ping: func(ctx context.Context) error {
			_, err := x.Reach(ctx, version)
			return err
		},
		TreesApart: true,
		Posix:      posix.Options{Refresh: true, PastCache: true},
	})
	if err != nil {
		return nil, x.Unopened(err)
	}
	return e, nil
}

// mountOptions are those of a mount from a server's address; class is nil for the domain's own mount.
//
// The own mount asks the server for every name (lookupcache=none): a name that the kernel remembers to be missing, or
// there, for as long as it caches a folder's times would hide what another node did. Attributes may be cached as
// usual: opening a file asks for them (close-to-open), every path's last name comes with them, a listing is
// refreshed, and tags never change. That is one round trip less for each name than with actimeo=0, which
// has the kernel ask for the right to search a folder before each of them.
//
// Trees have the caches and locks that users of NFS expect, and what their class says.
func mountOptions(x nfs.Export, server netip.Addr, class []string) []string {
	options := append([]string{"vers=3"}, x.MountOptions(server, class)...)
	if server.Is6() {
		options = append(options, "mountproto=tcp6")
	} else {
		options = append(options, "mountproto=tcp")
	}
	if class == nil {
		options = append(options, "nolock", "lookupcache=none")
	}
	return options
}
