package sharedfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

func refused(t *testing.T, params map[string]string, kind fault.Kind, says ...string) {
	t.Helper()
	_, err := Open(t.Context(), params, host.NewLocal(host.Exec{}))
	if !errors.Is(err, kind) {
		t.Fatalf("%v: error %v, want kind %q", params, err, kind)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

func empty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("made in %s: %v, %v", dir, left, err)
	}
}

// TestBadParams: each mistake has its error, and nothing is changed.
func TestBadParams(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	ok(t, os.WriteFile(file, nil, 0o600))
	for _, bad := range []struct {
		params map[string]string
		kind   fault.Kind
		says   string
	}{
		{nil, fault.Invalid, "absolute path"},
		{map[string]string{"path": "relative"}, fault.Invalid, "relative"},
		{map[string]string{"path": dir, "size": "1"}, fault.Invalid, `"size" is unknown: engine sharedfs knows allowLocal, path`},
		{map[string]string{"path": dir, "allowLocal": "yes"}, fault.Invalid, `"allowLocal" is "yes"`},
		{map[string]string{"path": file, "allowLocal": "true"}, fault.Invalid, "not a directory"},
		{map[string]string{"path": file + "/below"}, fault.Invalid, "not a directory"},
		{map[string]string{"path": dir + "/missing"}, fault.Unavailable, "is the file system mounted"},
		{map[string]string{"path": "/proc/self", "allowLocal": "true"}, fault.Invalid, "keeps no files"},
	} {
		t.Run(fmt.Sprint(bad.params), func(t *testing.T) { refused(t, bad.params, bad.kind, bad.says) })
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("something was made: %v, %v", entries, err)
	}
}

// TestTheNodesOwnDiskIsNotTakenForTheShare: neither the file system of "/", as on a host, nor another local
// one, as in a container. It may be mounted later, so it is tried again.
func TestTheNodesOwnDiskIsNotTakenForTheShare(t *testing.T) {
	root, err := os.MkdirTemp("/var", "quarry-sharedfs-")
	ok(t, err)
	t.Cleanup(func() { ok(t, os.RemoveAll(root)) })
	refused(t, map[string]string{"path": root}, fault.Unavailable, "no shared file system is mounted there", root, "allowLocal")
	empty(t, root)
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		dir := newDirectory(t, hosttest.Filesystem(t, fstype, 1<<20))
		refused(t, map[string]string{"path": dir}, fault.Unavailable, "of type "+fstype, "this node alone")
		empty(t, dir)
	}
	point := t.TempDir()
	ok(t, unix.Mount("none", point, "tmpfs", 0, ""))
	defer unix.Unmount(point, unix.MNT_DETACH)
	refused(t, map[string]string{"path": point}, fault.Unavailable, "tmpfs")
	empty(t, point)
}

// TestAnyOtherTypeIsShared, and where its mount goes away later, the disk below is not touched.
func TestAnyOtherTypeIsShared(t *testing.T) {
	dir, point := t.TempDir(), t.TempDir()
	server := farfs.New(t, dir)
	ok(t, server.Mount("", point))
	link := filepath.Join(t.TempDir(), "link")
	ok(t, os.Symlink(point, link))
	e, err := Open(t.Context(), map[string]string{"path": link}, host.NewLocal(host.Exec{}))
	ok(t, err)
	defer func() { ok(t, e.Close()) }()
	d, err := e.Describe(t.Context())
	ok(t, err)
	if d.Location != point+" (farfs)" || !d.SharedAccess || d.MountOptions {
		t.Errorf("%+v", d)
	}
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 1 << 20}))
	server.Crash(t)
	ok(t, host.NewLocal(host.Exec{}).UnmountLazily(t.Context(), point))
	_, err = e.ListSlabs(t.Context())
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "no shared file system is mounted there") && !strings.Contains(err.Error(), "this node alone") {
		t.Errorf("%v", err)
	}
	empty(t, point)
	ok(t, server.Mount("", point))
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 1 {
		t.Errorf("%v, %v", slabs, err)
	}
}

// TestAShareThatDoesNotAnswer does not hold the opening up.
func TestAShareThatDoesNotAnswer(t *testing.T) {
	point := t.TempDir()
	server := farfs.New(t, t.TempDir())
	ok(t, server.Mount("", point))
	server.Hang(func(farfs.Op) bool { return true })
	begun := time.Now()
	refused(t, map[string]string{"path": point}, fault.Unavailable, "does not answer")
	if took := time.Since(begun); took > 2*lookLimit {
		t.Errorf("it took %s", took)
	}
	server.Release()
}

// TestSharesWithAnEngineOfTheirOwnAreRefused: their clients remember too much for a domain, as others mount them.
func TestSharesWithAnEngineOfTheirOwnAreRefused(t *testing.T) {
	dir, point := t.TempDir(), t.TempDir()
	ok(t, farfs.New(t, dir).MountAs("fuse.glusterfs", "", point))
	for _, params := range []map[string]string{{"path": point}, {"path": point, "allowLocal": "true"}} {
		refused(t, params, fault.Invalid, "fuse.glusterfs", point, "use engine gluster")
	}
	empty(t, dir)
	for fsType, instead := range map[string]string{"nfs": "nfs3 or nfs4", "nfs4": "nfs3 or nfs4", "cifs": "smb", "smb3": "smb", "ceph": "", "fuse.ceph-fuse": "", "ext4": ""} {
		if have := ownEngine(fsType); have != instead {
			t.Errorf("instead of %s on sharedfs: engine %q, want %q", fsType, have, instead)
		}
	}
}

// TestImportsWithoutLeases: that a file system gives no lease on a file, since others have it open or because it gives none at all, does
// not keep it from being imported.
func TestImportsWithoutLeases(t *testing.T) {
	dir, point := t.TempDir(), t.TempDir()
	ok(t, farfs.New(t, dir).Mount("", point))
	e, err := Open(t.Context(), map[string]string{"path": point}, host.NewLocal(host.Exec{}))
	ok(t, err)
	defer func() { ok(t, e.Close()) }()
	ok(t, os.Mkdir(filepath.Join(dir, "import"), 0o755))
	ok(t, os.WriteFile(filepath.Join(dir, "import", "disk.img"), make([]byte, 4096), 0o644))
	open, err := os.Open(filepath.Join(point, "import", "disk.img")) // the kernel gives no lease now
	ok(t, err)
	defer open.Close()
	ok(t, e.(engine.Importer).ImportSlab(t.Context(), "disk.img", engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 4096}))
}
