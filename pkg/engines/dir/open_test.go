package dir

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// TestBadInput: each mistake has its error, and nothing is changed.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	ok(t, os.WriteFile(file, nil, 0o600))
	ok(t, os.Symlink("/nowhere", filepath.Join(dir, "dangling")))
	taken := filepath.Join(dir, "taken")
	ok(t, os.Mkdir(taken, 0o700))
	ok(t, os.WriteFile(filepath.Join(taken, "tags"), nil, 0o600))
	for _, bad := range []struct {
		params map[string]string
		kind   fault.Kind
		says   string
	}{
		{nil, fault.Invalid, "absolute path"},
		{map[string]string{"path": ""}, fault.Invalid, "absolute path"},
		{map[string]string{"path": "relative/path"}, fault.Invalid, "relative/path"},
		{map[string]string{"path": dir, "size": "1"}, fault.Invalid, `"size" is unknown: engine dir knows path`},
		{map[string]string{"path": dir + "/missing"}, fault.NotFound, "does not exist"},
		{map[string]string{"path": dir + "/dangling"}, fault.NotFound, "does not exist"},
		{map[string]string{"path": file}, fault.Invalid, "not a directory"},
		{map[string]string{"path": file + "/below"}, fault.Invalid, "not a directory"},
		{map[string]string{"path": taken}, fault.Invalid, "taken/tags is not a directory"},
	} {
		t.Run(fmt.Sprint(bad.params), func(t *testing.T) {
			_, err := Open(t.Context(), bad.params, host.Exec{})
			fails(t, err, bad.kind)
			if !strings.Contains(err.Error(), bad.says) {
				t.Errorf("%q does not say %q", err, bad.says)
			}
		})
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("something was made: %v, %v", entries, err)
	}
	for name, help := range Params() {
		if name == "" || help == "" || strings.Contains(help, "\n") {
			t.Errorf("parameter %q: help %q is not one line", name, help)
		}
	}
}

// TestReadOnly: a read-only file system is refused before anything is tried.
func TestReadOnly(t *testing.T) {
	path := hosttest.Filesystem(t, "ext4", 16<<20)
	ok(t, unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	_, err := Open(t.Context(), map[string]string{"path": path}, host.Exec{})
	fails(t, err, fault.Permission)
	if !strings.Contains(err.Error(), "read-only") {
		t.Error(err)
	}
}

// TestWhatADomainSays: an operator can see what is native, and why not.
func TestWhatADomainSays(t *testing.T) {
	path := newDirectory(t, hosttest.Filesystem(t, "ext4", 16<<20))
	link := filepath.Join(t.TempDir(), "link")
	ok(t, os.Symlink(path, link))
	e := opener(link)(t)
	defer e.Close()
	d, err := e.Describe(t.Context())
	ok(t, err)
	if d.Location != path+" (ext4)" || d.AtomicListing || !d.ZeroedSpace || d.Granularity != 4096 {
		t.Errorf("%+v", d)
	}
	if d.MaxSlabSize <= 0 || d.MaxSlabSize%d.Granularity != 0 {
		t.Errorf("largest slab: %d", d.MaxSlabSize)
	}
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "largest", Kind: engine.Block, Size: d.MaxSlabSize}))
	fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "larger", Kind: engine.Block, Size: d.MaxSlabSize + 1}), fault.OutOfRange)
	notes := strings.Join(d.Notes, "\n")
	for _, say := range []string{"snapshot and clone of block slabs: default: the file system has no reflinks", "tree slabs: default: only btrfs",
		"quota of tree slabs: default: the file system has no project quotas", "meter: native"} {
		if !strings.Contains(notes, say) {
			t.Errorf("notes do not say %q:\n%s", say, notes)
		}
	}
	slab, err := e.AttachSlab(t.Context(), "largest", engine.AttachOptions{})
	if err != nil || !strings.HasPrefix(slab.Path, path+"/") {
		t.Errorf("attached at %q, %v: want a path without symlinks", slab.Path, err)
	}
}

// TestSnapshotOnAFullDisk: a native copy without room is Exhausted, leaves
// nothing, and works once there is room.
func TestSnapshotOnAFullDisk(t *testing.T) {
	filesystem := hosttest.Filesystem(t, "xfs", hosttest.MinXFS)
	path := newDirectory(t, filesystem)
	e := opener(path)(t).(*dirEngine)
	defer func() { ok(t, e.Close()) }()
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 1 << 20}))
	ok(t, os.WriteFile(filepath.Join(path, "slabs", "a"), make([]byte, 1<<20), 0o600))
	free := fillDisk(t, filesystem)
	var made int
	var failed error
	for failed == nil { // inodes that are allocated in a chunk are still free
		failed = e.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: fmt.Sprintf("copy%d", made), Kind: engine.Block, Size: 1 << 20})
		made++
	}
	fails(t, failed, fault.Exhausted)
	if slabs, err := e.ListSlabs(t.Context()); err != nil || len(slabs) != made {
		t.Errorf("%d copies were made, %d slabs are there, %v", made-1, len(slabs), err)
	}
	if entries, err := os.ReadDir(filepath.Join(path, "tmp")); err != nil || len(entries) > 0 {
		t.Errorf("left in tmp/: %v, %v", entries, err)
	}
	free()
	ok(t, e.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: "with-room", Kind: engine.Block, Size: 1 << 20}))
}

// TestOpenOnAFullDisk: or nothing could be deleted; and the capabilities are there.
func TestOpenOnAFullDisk(t *testing.T) {
	for fstype, want := range map[string]int{"ext4": 2, "xfs": 4, "btrfs": 4} {
		t.Run(fstype, func(t *testing.T) {
			filesystem := hosttest.Filesystem(t, fstype, 16<<20)
			path := newDirectory(t, filesystem)
			e := opener(path)(t)
			ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 1 << 20}))
			ok(t, e.Close())
			fillDisk(t, filesystem)
			e = opener(path)(t)
			defer func() { ok(t, e.Close()) }()
			if have := engine.Discover(e).List(); len(have) != want {
				t.Errorf("capabilities: %v, want %d", have, want)
			}
			ok(t, e.DeleteSlab(t.Context(), "a"))
		})
	}
}

// fillDisk takes all space, and returns what gives it back.
func fillDisk(t *testing.T, filesystem string) (free func()) {
	t.Helper()
	name := filepath.Join(filesystem, "ballast")
	for i := range 3 { // what a file system held back at first
		f, err := os.Create(fmt.Sprintf("%s%d", name, i))
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		ok(t, err)
		for size := 1 << 20; size >= 4096; {
			if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
				size /= 2
			} else {
				ok(t, err)
			}
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	return func() {
		files, err := filepath.Glob(name + "*")
		ok(t, err)
		for _, f := range files {
			ok(t, os.Remove(f))
		}
	}
}

// TestTreesThatCannotBeSnapshotWholeAreDeclined: better a slow copy than one
// with empty folders.
func TestTreesThatCannotBeSnapshotWholeAreDeclined(t *testing.T) {
	path := newDirectory(t, hosttest.Filesystem(t, "btrfs", 256<<20))
	e := opener(path)(t).(*dirEngine)
	defer func() { ok(t, e.Close()) }()
	spec := engine.SlabSpec{ID: "copy", Kind: engine.Tree, Size: 1 << 20}
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "nested", Kind: engine.Tree, Size: 1 << 20}))
	a, err := e.AttachSlab(t.Context(), "nested", engine.AttachOptions{})
	ok(t, err)
	data, err := os.Open(a.Path)
	ok(t, err)
	ok(t, createSubvolume(data, "inner"))
	ok(t, data.Close())
	ok(t, os.WriteFile(a.Path+"/inner/file", []byte("x"), 0o600))
	declined(t, e, "nested", spec)
	ok(t, e.DeleteSlab(t.Context(), "nested")) // with what is in it

	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "moved", Kind: engine.Tree, Size: 1 << 20}))
	moved := filepath.Join(path, "slabs", "moved", "data")
	ok(t, os.Remove(moved))
	ok(t, os.Mkdir(moved, 0o755)) // as after a copy of the domain with another tool
	declined(t, e, "moved", spec)
	ok(t, e.DeleteSlab(t.Context(), "moved"))
	for _, folder := range []string{"slabs", "tmp", "trash"} {
		if entries, err := os.ReadDir(filepath.Join(path, folder)); err != nil || len(entries) > 0 {
			t.Errorf("left in %s: %v, %v", folder, entries, err)
		}
	}
}

// TestNewTreesIgnoreTheUmask of the process.
func TestNewTreesIgnoreTheUmask(t *testing.T) {
	for _, fstype := range []string{"ext4", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			e := opener(newDirectory(t, hosttest.Filesystem(t, fstype, 16<<20)))(t)
			defer func() { ok(t, e.Close()) }()
			old := unix.Umask(0o077)
			err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Tree, Size: 1 << 20})
			unix.Umask(old)
			ok(t, err)
			a, err := e.AttachSlab(t.Context(), "a", engine.AttachOptions{})
			ok(t, err)
			info, err := os.Stat(a.Path)
			ok(t, err)
			if info.Mode().Perm() != 0o755 {
				t.Errorf("mode %v, want 0755", info.Mode())
			}
		})
	}
}

func declined(t *testing.T, e *dirEngine, source string, spec engine.SlabSpec) {
	t.Helper()
	if err := e.SnapshotSlab(context.Background(), source, spec); !errors.Is(err, engine.ErrDeclined) {
		t.Errorf("snapshot of %q: %v, want %v", source, err, engine.ErrDeclined)
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func fails(t testing.TB, err error, kind fault.Kind) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		t.Fatalf("error %v, want kind %v", err, kind)
	}
}
