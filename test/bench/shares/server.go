package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engines/share"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/bench/rig"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
	"github.com/quarry-csi/quarry/test/process"
)

// domain is its name, and that of its folder in the share.
const domain = "domain"

// served is a share of a server on this machine, with XFS under it.
type served struct {
	engine string
	folder string // of the domain, at the server
	entry  string // of the domains file
	// source, fstype and options mount the share as somebody does who is not Quarry.
	source, fstype string
	options        []string
	// requests of the domain's own mount so far.
	requests func() (requests, error)
	// bulk are the kinds of requests that carry content.
	bulk []string
}

// serve starts the server of an engine's storage. It and all that it needs are gone when t ends.
func serve(t testing.TB, engine string) *served {
	if engine == "smb" {
		return serveSMB(t)
	}
	x := lab.StartNFS(t).Export(t, "xfs")
	s := &served{engine: engine, folder: filepath.Join(x.Dir, domain), fstype: "nfs", bulk: []string{"READ", "WRITE", "COMMIT"}}
	export, version := x.Dir, "3"
	if engine == "nfs4" {
		export, version = x.V4, "4.2"
	}
	s.source = "127.0.0.1:" + export
	s.options = []string{"vers=" + version, "proto=tcp", "addr=127.0.0.1", "hard"}
	if version == "3" {
		s.options = append(s.options, "mountproto=tcp")
	}
	s.entry = fmt.Sprintf("- name: %s\n  engine: %s\n  scope: node\n  params: {server: 127.0.0.1, export: %s, folder: %[1]s}\n", domain, engine, export)
	s.requests = func() (requests, error) {
		text, err := os.ReadFile("/proc/self/mountstats")
		if err != nil {
			return nil, err
		}
		return ofNFS(string(text), share.DefaultMounts)
	}
	return s
}

func serveSMB(t testing.TB) *served {
	const name = "k8s"
	disk, at := lab.Disk(t), t.TempDir()
	if _, err := rig.Run(t.Context(), "mkfs.xfs", "-q", "-f", disk); err != nil {
		t.Fatal(err)
	}
	if _, err := rig.Run(t.Context(), "mount", disk, at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount %s at the server: %v", at, err)
		}
	})
	shared, secrets := filepath.Join(at, "shared"), filepath.Join(t.TempDir(), "secrets.yaml")
	if err := errors.Join(os.Mkdir(shared, 0o755),
		os.WriteFile(secrets, fmt.Appendf(nil, "username: %s\npassword: '%s'\n", samba.User, samba.YAMLPassword()), 0o600)); err != nil {
		t.Fatal(err)
	}
	server := samba.Start(t, nil, samba.Share{Name: name, Path: shared})
	return &served{
		engine: "smb", folder: filepath.Join(shared, domain), fstype: "cifs", source: "//127.0.0.1/" + name,
		entry: fmt.Sprintf("- name: %s\n  engine: smb\n  scope: node\n  params: {server: %q, share: %s, folder: %[1]s}\n  secretsFile: %[4]s\n", domain, server.Address(), name, secrets),
		options: []string{"ip=127.0.0.1", "port=" + strconv.Itoa(server.Port), "username=" + samba.User,
			"password=" + strings.ReplaceAll(samba.Password, ",", ",,"), "hard", "uid=0", "gid=0"},
		requests: func() (requests, error) {
			text, err := os.ReadFile("/proc/fs/cifs/Stats")
			if err != nil {
				return nil, err
			}
			return ofSMB(string(text), name)
		},
		bulk: []string{"Reads", "Writes", "Flushes"},
	}
}

// mount mounts the share with the kernel's defaults until t ends.
func (s *served) mount(t testing.TB) string {
	at := t.TempDir()
	if err := host.NewLocal(host.Exec{}).MountFilesystem(t.Context(), s.source, at, s.fstype, s.options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount %s: %v", at, err)
		}
	})
	return at
}

// slabs counts what the domain has at the server.
func (s *served) slabs() (int, error) {
	found, err := os.ReadDir(filepath.Join(s.folder, "slabs"))
	return len(found), err
}

// quarry starts the real process with the domain, until t ends.
func (s *served) quarry(t testing.TB, bin string) *process.Quarry {
	q, err := process.New(process.Config{Binary: filepath.Join(bin, "quarry"), Dir: t.TempDir(), Node: rig.Node,
		Installation: rig.Installation, Domains: process.DomainsFile(s.entry)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of quarry's log:\n%s", q.LastLog(40))
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := errors.Join(q.Stop(ctx), q.Close()); err != nil {
			t.Error(err)
		}
	})
	if err := q.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return q
}
