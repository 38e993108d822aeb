// Package nfs4 is the engine for an export of an NFS 4.1 or 4.2 server.
//
// The protocol keeps state on the server, and the engine relies on it:
//
//   - An open that is to create is exclusive at the server, and a session answers a repeated request
//     with the reply that was lost.
//   - Locks are part of it. They hold on all nodes, and nothing but the server is needed for them.
//   - A server that was restarted lets clients reclaim what they had and delays all else (its grace period, 90 s
//     unless it is set; less with 4.1, whose clients say when they are done). Verbs wait no longer than
//     their limit, are Unavailable until then, and are asked for again.
//   - With 4.2 a server whose file system can makes copies itself (CLONE, COPY), allocates space and gives it back.
package nfs4

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/nfs"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

const version = 4

// Params are the parameters of a domain of this type, with one line of help each.
func Params() map[string]string {
	params := nfs.Params()
	params["version"] = "4.1 or 4.2 (default: 4.2, and 4.1 where the server has no 4.2)"
	params["sec"] = "sys, krb5, krb5i or krb5p: how the server knows who asks (default: what it wants first)"
	params["options"] += ", max_connect"
	return params
}

// own are the options that NFS 3 does not have, or has elsewhere.
func own() nfs.Options {
	refused := map[string]string{
		"sec":       "it is the parameter \"sec\"",
		"mountport": "NFS 4 has no second protocol for mounting",
		"lock":      "NFS 4 always locks at the server",
	}
	for _, o := range []string{"vers", "nfsvers", "minorversion", "v4.1", "v4.2"} {
		refused[o] = "it is the parameter \"version\""
	}
	return nfs.Options{
		Domain:  map[string]string{"max_connect": `[1-9]|1[0-6]`},
		Class:   map[string]string{"sec": nfs.Security},
		Refused: refused,
	}
}

// nfs4 is an opened domain.
type nfs4 struct {
	*share.Engine
	minor *minor
}

// Describe implements engine.Engine.
func (e nfs4) Describe(ctx context.Context) (engine.Description, error) {
	d, err := e.Engine.Describe(ctx)
	if v := e.minor.found.Load(); err == nil && v != nil {
		d.Notes = append(d.Notes, "version of NFS: "+*v)
	}
	return d, err
}

// minor are the versions to mount with: those wished for, best first, until one was found.
type minor struct {
	wished []string
	found  atomic.Pointer[string]
}

func parseMinor(version string) (*minor, error) {
	switch version {
	case "":
		return &minor{wished: []string{"4.2", "4.1"}}, nil
	case "4.1", "4.2":
		return &minor{wished: []string{version}}, nil
	case "3":
		return nil, fault.New(fault.Invalid, "parameter \"version\" is \"3\": NFS 3 is the engine nfs3")
	case "4", "4.0":
		return nil, fault.New(fault.Invalid, "parameter \"version\" is %q: NFS 4.0 has no sessions, so that a lost reply can be carried out twice: \"4.1\" or \"4.2\" is needed", version)
	}
	return nil, fault.New(fault.Invalid, "parameter \"version\" is %q: \"4.1\" and \"4.2\" are known", version)
}

// mount mounts with the first version that the server has. Which one that is, is found out once: all mounts of a
// domain have the same.
func (m *minor) mount(do func(version string) error) error {
	versions := m.wished
	if v := m.found.Load(); v != nil {
		versions = []string{*v}
	}
	var err error
	for _, v := range versions {
		if err = do(v); err == nil {
			m.found.Store(&v)
			return nil
		}
		if !errors.Is(err, fault.Unsupported) {
			return err
		}
	}
	return fmt.Errorf("NFS %s: %w", strings.Join(versions, " and "), err)
}

// Open opens the export that params name as a domain. Mounts are made below the folder mounts; "": share.DefaultMounts.
func Open(ctx context.Context, params map[string]string, h *host.Local, mounts string) (engine.Engine, error) {
	x, err := nfs.Parse("nfs4", Params(), params, own())
	if err != nil {
		return nil, err
	}
	m, err := parseMinor(params["version"])
	if err != nil {
		return nil, err
	}
	if sec := params["sec"]; sec != "" {
		if !slices.Contains(strings.Split(nfs.Security, "|"), sec) {
			return nil, fault.New(fault.Invalid, "parameter \"sec\" is %q: sys, krb5, krb5i and krb5p are known", sec)
		}
		x.Options = append(x.Options, "sec="+sec)
	}
	e, err := share.Open(ctx, h, mounts, share.Storage{
		Type:     "nfs4",
		Location: x.Source(x.Folder) + " (NFS 4)",
		Folder:   x.Folder,
		Mount: func(ctx context.Context, folder, target string, class []string) error {
			server, err := x.Reach(ctx, version)
			if err != nil {
				return err
			}
			return m.mount(func(v string) error {
				return x.Mount(ctx, h, folder, target, mountOptions(x, v, server, class))
			})
		},
		CheckOptions: func(options []string) error { return nfs.CheckClass(options, own()) },
		Ping: func(ctx context.Context) error {
			_, err := x.Reach(ctx, version)
			return err
		},
		TreesApart: true,
		Copies:     true,
		// A folder's change attribute has to change with every change (RFC 7530, 5.8.1.4), but Linux before 6.1 has
		// ext4's times in it, with the same equal ticks as NFS 3; and nothing tells a client which it has.
		Posix: posix.Options{Refresh: true, PastCache: true},
	})
	if err != nil {
		return nil, x.Unopened(err)
	}
	return nfs4{e, m}, nil
}

// mountOptions are those of a mount from a server's address; class is nil for the domain's own mount.
//
// The own mount asks the server for every name, as that of nfs3 does and for the same reason. clientaddr is not
// given: with sessions the server calls back on the client's own connection.
func mountOptions(x nfs.Export, version string, server netip.Addr, class []string) []string {
	options := append([]string{"vers=" + version}, x.MountOptions(server, class)...)
	if class == nil {
		options = append(options, "lookupcache=none")
	}
	return options
}
