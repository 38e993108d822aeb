// Package smb is the engine for a share of a server that speaks SMB 2.1 to 3.1.1: Samba, Windows,
// the boxes that build on them.
//
// What all engines over a server have in common is in package share, slabs and tags are kept by
// package posix. What is special about SMB is here: whom the server lets in and as whom
// (params.go, guest.go), how the kernel's client has to be mounted so that several hosts see one truth
// (mount.go), what a class may ask for and what would lose data (options.go), and whether the
// server answers in a version that is wanted (version.go, negotiate.go). docs/engines/smb.md is for operators.
package smb

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Open opens a folder of a share as a domain. mounts is the folder for this process's mounts; "":
// share.DefaultMounts. No error shows a secret.
//
// fault.Invalid: a parameter or a secret is missing or wrong, the server has no such share or
// version, or the share can be no domain. fault.Permission: the server refuses the user, or lets
// the user only read. fault.Unavailable: the server cannot be reached now.
func Open(ctx context.Context, params, secrets map[string]string, local *host.Local, mounts string) (engine.Engine, error) {
	s, err := check(params, secrets)
	if err != nil {
		return nil, err
	}
	v := &volume{settings: s, local: local}
	_, spoken, err := v.reach(ctx)
	if err != nil {
		return nil, err
	}
	e, err := share.Open(ctx, v.local, mounts, share.Storage{
		Type:         "smb",
		Location:     fmt.Sprintf("%s (SMB %s)", v.source(v.folder), spoken),
		Folder:       v.folder,
		Mount:        v.mount,
		CheckOptions: func(options []string) error { return checkClassOptions(options, v.dialect) },
		TreesApart:   true,
		Copies:       true,
		Posix: posix.Options{
			Decorate: true, NoDirSync: true, NoOwner: true, DeletePending: true, LateNames: true,
			// Locks are this host's own (nobrl), and known to all of its processes that share a connection.
			NoLocks: slices.Contains(v.options, "nosharesock"),
		},
	})
	if errors.Is(err, unix.EACCES) && !errors.Is(err, errRefused) {
		return nil, fault.New(fault.Permission, "%s: user %q may not write there: the share is read-only, or its folder belongs to others: %w", v.source(v.folder), v.user, err)
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}
