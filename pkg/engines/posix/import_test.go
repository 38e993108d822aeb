package posix

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

func importing(t *testing.T) (d *Directory, put func(name string, size int64) string) {
	t.Helper()
	root := t.TempDir()
	d, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d, func(name string, size int64) string {
		t.Helper()
		path := filepath.Join(root, "import", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
}

func spec(id string, size int64) engine.SlabSpec {
	return engine.SlabSpec{ID: id, Kind: engine.Block, Size: size}
}

func there(path string) bool { _, err := os.Lstat(path); return err == nil }

func TestAnImportIsTheFileItselfAndTakesItsNameOnlyAtLast(t *testing.T) {
	d, put := importing(t)
	ctx := t.Context()
	path := put("disk.img", 8192)
	before, _ := os.Stat(path)
	for range 2 { // an answer may be lost
		if err := d.ImportSlab(ctx, "disk.img", spec("s1", 8192)); err != nil {
			t.Fatal(err)
		}
	}
	f, slab, err := d.OpenSlab("s1")
	if err != nil || slab.Size != 8192 {
		t.Fatalf("%+v, %v", slab, err)
	}
	now, _ := f.Stat()
	f.Close()
	if !os.SameFile(before, now) || !there(path) {
		t.Error("the slab is another file, or the old name is gone before it is final")
	}
	// It is given back.
	if err := d.DeleteSlab(ctx, "s1"); err != nil || !there(path) {
		t.Fatalf("deleted before it was final: %v, there %t", err, there(path))
	}
	if err := d.ImportSlab(ctx, "disk.img", spec("s2", 8192)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.KeepSlab(ctx, "disk.img", "s2"); err != nil || there(path) {
			t.Fatalf("final: %v, there %t", err, there(path))
		}
	}
	if st, err := os.Stat(filepath.Join(d.path, "slabs", "s2")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// Another file of that name is nobody's business.
	put("disk.img", 4096)
	if err := d.KeepSlab(ctx, "disk.img", "s2"); err != nil || !there(path) {
		t.Errorf("another file of that name: %v, there %t", err, there(path))
	}
}

func TestWhatCannotBeImportedIsLeftAlone(t *testing.T) {
	d, put := importing(t)
	path := put("used.img", 4096)
	user, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	linked := put("linked.img", 4096)
	folder := filepath.Dir(path)
	for _, err := range []error{os.Link(linked, filepath.Join(folder, "again")), os.Symlink("/etc/passwd", filepath.Join(folder, "outside")), os.Mkdir(filepath.Join(folder, "folder"), 0o755)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	put("odd.img", 5000)
	put("empty.img", 0)
	put("fine.img", 8192)
	for source, want := range map[string]fault.Kind{
		"used.img": fault.InUse, "linked.img": fault.InUse, "odd.img": fault.Invalid, "empty.img": fault.Invalid, "outside": fault.Invalid, "folder": fault.Invalid,
		"none": fault.NotFound, "": fault.Invalid, "..": fault.Invalid, "../slabs/x": fault.Invalid, "fine.img": fault.Conflict,
	} {
		if err := d.ImportSlab(t.Context(), source, spec("s", 4096)); !errors.Is(err, want) {
			t.Errorf("%q: %v (%v), want %v", source, err, fault.KindOf(err), want)
		}
	}
	if slabs, err := d.ListSlabs(t.Context()); err != nil || len(slabs) > 0 {
		t.Errorf("slabs %v, %v", slabs, err)
	}
	if err := d.CreateSlab(t.Context(), spec("s", 8192)); err != nil {
		t.Fatal(err)
	}
	if err := d.ImportSlab(t.Context(), "fine.img", spec("s", 8192)); !errors.Is(err, fault.Exists) {
		t.Errorf("over a slab: %v", err)
	}
	if err := d.KeepSlab(t.Context(), "fine.img", "s"); err != nil || !there(filepath.Join(folder, "fine.img")) {
		t.Errorf("a slab that is another file: %v", err)
	}
}

// TestAFileIsImportedByOneAtMost: the slabs of two would be one file.
func TestAFileIsImportedByOneAtMost(t *testing.T) {
	t.Run("alone with the file", func(t *testing.T) {
		importedAtOnce(t, func(string) {}, func() {})
	})
	// Who may not take a lease, as nobody may on NFS, cannot tell whether it is alone.
	t.Run("without leases", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("giving files away needs root")
		}
		importedAtOnce(t, func(path string) {
			if err := os.Chown(path, 1234, 1234); err != nil {
				t.Fatal(err)
			}
		}, func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its goroutine
			h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var all [2]unix.CapUserData
			if err := unix.Capget(&h, &all[0]); err != nil {
				t.Error(err)
			}
			all[0].Effective &^= 1 << unix.CAP_LEASE
			if err := unix.Capset(&h, &all[0]); err != nil {
				t.Error(err)
			}
		})
	})
}

// importedAtOnce imports files, each four times at once: after prepare, and each time after first.
func importedAtOnce(t *testing.T, prepare func(path string), first func()) {
	d, put := importing(t)
	content := make([]byte, 64<<10)
	_, _ = rand.Read(content)
	for round := range 50 {
		source := fmt.Sprintf("disk%d.img", round)
		path := put(source, 0)
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		prepare(path)
		id := func(i int) string { return fmt.Sprintf("s%d-%d", round, i) }
		begin := make(chan struct{})
		var all sync.WaitGroup
		var errs [4]error
		for i := range errs {
			all.Go(func() {
				first()
				<-begin
				errs[i] = d.ImportSlab(t.Context(), source, spec(id(i), int64(len(content))))
			})
		}
		close(begin)
		all.Wait()
		names := []string{path}
		for i, err := range errs {
			switch {
			case err == nil:
				names = append(names, filepath.Join(d.path, "slabs", id(i)))
			case !errors.Is(err, fault.InUse):
				t.Errorf("one that was refused: %v", err)
			}
		}
		if len(names) == 1 { // each has seen another one
			if err := d.ImportSlab(t.Context(), source, spec(id(0), int64(len(content)))); err != nil {
				t.Fatalf("nobody got it, and then: %v", err)
			}
			names = append(names, filepath.Join(d.path, "slabs", id(0)))
		}
		slabs, err := d.ListSlabs(t.Context())
		if err != nil || len(names) > 2 || len(slabs) != round+1 {
			t.Fatalf("one file is %q; there are %d slabs of %d files; %v", names, len(slabs), round+1, err)
		}
		for _, name := range names {
			if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, content) {
				t.Fatalf("%s holds something else: %v", name, err)
			}
		}
	}
}

// TestAnImportWhoseReplyIsLost was done, whatever comes of the second request.
func TestAnImportWhoseReplyIsLost(t *testing.T) {
	s, dir, point := onShare(t)
	d := openWith(t, point, Options{NoLeases: true})
	ok(t, os.Mkdir(filepath.Join(dir, "import"), 0o755))
	ok(t, os.WriteFile(filepath.Join(dir, "import", "disk.img"), make([]byte, 4096), 0o644))
	s.Twice(func(op farfs.Op) bool { return op == farfs.Link })
	ok(t, d.ImportSlab(t.Context(), "disk.img", spec("s1", 4096)))
	s.Twice(nil)
	ok(t, os.WriteFile(filepath.Join(dir, "import", "other.img"), make([]byte, 4096), 0o644))
	fails(t, d.ImportSlab(t.Context(), "other.img", spec("s1", 4096)), fault.Exists)
	ok(t, d.KeepSlab(t.Context(), "disk.img", "s1"))
	if there(filepath.Join(dir, "import", "disk.img")) || !there(filepath.Join(dir, "slabs", "s1")) {
		t.Error("the import was not finished")
	}
}
