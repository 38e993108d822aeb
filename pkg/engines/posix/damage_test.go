package posix

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

func open(t testing.TB, path string) *Directory {
	t.Helper()
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ok(t, d.Close()) })
	return d
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

// TestDamagedTagIsSeenAndKeepsItsName: whatever becomes of a tag's file, the tag
// is listed without a record, its name stays taken, and others are not affected.
func TestDamagedTagIsSeenAndKeepsItsName(t *testing.T) {
	tag := engine.Tag{Name: "i.a.1", Slab: "slab-a", Record: []byte("a record of some length")}
	whole := encodeTag(tag)
	damages := map[string]func(path string) error{
		"emptied":     func(path string) error { return os.Truncate(path, 0) },
		"made longer": func(path string) error { return os.WriteFile(path, append(whole[:len(whole):len(whole)], 'x'), 0o600) },
		"made huge":   func(path string) error { return os.Truncate(path, 1<<30) },
		"another tag's file": func(path string) error {
			return os.WriteFile(path, encodeTag(engine.Tag{Name: "i.a.2", Slab: tag.Slab, Record: tag.Record}), 0o600)
		},
		"of another version": func(path string) error {
			return os.WriteFile(path, append([]byte("quarry tag 2 "), whole[len(tagHeader):]...), 0o600)
		},
		"replaced by a symlink to a good one": func(path string) error {
			return errors.Join(os.Rename(path, path+"~"), os.Symlink(path+"~", path))
		},
		"replaced by a dangling symlink": func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/nowhere", path)) },
		"replaced by a directory":        func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"replaced by a pipe":             func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
	}
	for n := range whole {
		damages[fmt.Sprintf("cut to %d of %d bytes", n, len(whole))] = func(path string) error { return os.Truncate(path, int64(n)) }
		damages[fmt.Sprintf("scribbled on at %d", n)] = func(path string) error {
			bad := append([]byte{}, whole...)
			bad[n] ^= 0x20
			return os.WriteFile(path, bad, 0o600)
		}
	}
	for what, damage := range damages {
		t.Run(what, func(t *testing.T) {
			path := t.TempDir()
			d := open(t, path)
			ok(t, d.CreateTag(t.Context(), tag))
			ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.b.1", Record: []byte("not affected")}))
			file := filepath.Join(path, "tags", "i", tag.Name)
			ok(t, damage(file))

			tags, err := d.ListTags(t.Context(), "i.")
			ok(t, err)
			if len(tags) != 2 {
				t.Fatalf("listed: %v", tags)
			}
			for _, have := range tags {
				if have.Name == tag.Name && (have.Record != nil || have.Slab != "") {
					t.Errorf("a damaged tag is listed as %v", have)
				} else if have.Name != tag.Name && string(have.Record) != "not affected" {
					t.Errorf("a good tag is listed as %v", have)
				}
			}
			fails(t, d.CreateTag(t.Context(), tag), fault.Exists)
			if info, err := os.Lstat(file); err == nil && info.IsDir() {
				fails(t, d.DeleteTag(t.Context(), tag.Name), fault.Corrupt)
				return
			}
			ok(t, d.DeleteTag(t.Context(), tag.Name))
			if _, err := os.Lstat(file); !os.IsNotExist(err) {
				t.Errorf("deleted, but still there: %v", err)
			}
		})
	}
}

// TestDamagedSlabIsCorrupt: what is under a slab's ID but was not made by
// CreateSlab is refused, keeps its ID, and can be deleted.
func TestDamagedSlabIsCorrupt(t *testing.T) {
	for what, damage := range map[string]struct {
		kind engine.Kind
		do   func(path string) error
	}{
		"file cut":                     {engine.Block, func(path string) error { return os.Truncate(path, 1000) }},
		"file emptied":                 {engine.Block, func(path string) error { return os.Truncate(path, 0) }},
		"file replaced by a symlink":   {engine.Block, func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)) }},
		"file replaced by a directory": {engine.Block, func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) }},
		"file replaced by a pipe":      {engine.Block, func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) }},
		"tree without data":            {engine.Tree, func(path string) error { return os.Remove(path + "/data") }},
		"tree with a symlink as data":  {engine.Tree, func(path string) error { return errors.Join(os.Remove(path+"/data"), os.Symlink("/etc", path+"/data")) }},
		"tree with a file as data": {engine.Tree, func(path string) error {
			return errors.Join(os.Remove(path+"/data"), os.WriteFile(path+"/data", nil, 0o600))
		}},
		"tree without spec":            {engine.Tree, func(path string) error { return os.Remove(path + "/spec") }},
		"tree with a spec cut in half": {engine.Tree, func(path string) error { return os.Truncate(path+"/spec", 12) }},
		"tree with another size in its spec": {engine.Tree, func(path string) error {
			return os.WriteFile(path+"/spec", []byte("quarry tree 1 4096 00000000\n"), 0o600)
		}},
		"tree with a directory as spec":       {engine.Tree, func(path string) error { return errors.Join(os.Remove(path+"/spec"), os.Mkdir(path+"/spec", 0o700)) }},
		"directory replaced by a symlink":     {engine.Tree, func(path string) error { return errors.Join(os.RemoveAll(path), os.Symlink("/etc", path)) }},
		"directory replaced by an empty one":  {engine.Tree, func(path string) error { return errors.Join(os.RemoveAll(path), os.Mkdir(path, 0o700)) }},
		"directory replaced by an empty file": {engine.Tree, func(path string) error { return errors.Join(os.RemoveAll(path), os.WriteFile(path, nil, 0o600)) }},
	} {
		t.Run(what, func(t *testing.T) {
			path := t.TempDir()
			d := open(t, path)
			spec := engine.SlabSpec{ID: "a", Kind: damage.kind, Size: 1 << 20}
			ok(t, d.CreateSlab(t.Context(), spec))
			ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: damage.kind, Size: 1 << 20}))
			ok(t, damage.do(filepath.Join(path, "slabs", "a")))
			_, err := d.AttachSlab(t.Context(), "a", engine.AttachOptions{})
			fails(t, err, fault.Corrupt)
			fails(t, d.ResizeSlab(t.Context(), "a", 2<<20), fault.Corrupt)
			fails(t, d.CreateSlab(t.Context(), spec), fault.Exists)
			_, err = d.AttachSlab(t.Context(), "b", engine.AttachOptions{})
			ok(t, err)
			if _, err := d.ListSlabs(t.Context()); err != nil {
				t.Errorf("one damaged slab makes the listing fail: %v", err)
			}
			ok(t, d.DeleteSlab(t.Context(), "a"))
			ok(t, d.CreateSlab(t.Context(), spec))
			if entries, err := os.ReadDir(filepath.Join(path, "trash")); err != nil || len(entries) > 0 {
				t.Errorf("left in trash/: %v, %v", entries, err)
			}
		})
	}
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Error(err)
	}
}

// TestStrangersAreNoTagsAndNoSlabs: what cannot be ours is not listed and not touched.
func TestStrangersAreNoTagsAndNoSlabs(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
	strangers := []string{"tags/README", "tags/i/.nfs000001", "tags/i/i.a.1~", "tags/i/e.1", "tags/i/B", "slabs/.hidden", "slabs/lost+found", "tmp/x", "README"}
	for _, s := range strangers {
		ok(t, os.WriteFile(filepath.Join(path, s), nil, 0o600))
	}
	ok(t, d.Clean(t.Context()))
	tags, err := d.ListTags(t.Context(), "")
	if err != nil || len(tags) != 1 {
		t.Errorf("tags %v, %v", tags, err)
	}
	slabs, err := d.ListSlabs(t.Context())
	if err != nil || len(slabs) != 0 {
		t.Errorf("slabs %v, %v", slabs, err)
	}
	for _, s := range strangers {
		if _, err := os.Stat(filepath.Join(path, s)); err != nil {
			t.Error(err)
		}
	}
}

// TestCleanRemovesOnlyWhatIsDead: trees in the trash, what this host left in tmp/, and
// what any host left there long ago, as a pod does that never comes back.
func TestCleanRemovesOnlyWhatIsDead(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	old := time.Now().Add(-deadAfter - time.Hour)
	make := func(name string, when time.Time) string {
		file := filepath.Join(path, name)
		ok(t, os.MkdirAll(file+"/data/deep", 0o700))
		ok(t, os.WriteFile(file+"/data/deep/file", nil, 0o400))
		ok(t, os.Chtimes(file, when, when))
		return file
	}
	dead := []string{make("trash/"+d.unique(), time.Now()), make("trash/00000000.X", time.Now()), make("tmp/"+d.unique(), old), make("tmp/00000000.OTHERHOST", old)}
	alive := []string{make("tmp/"+d.unique(), time.Now()), make("tmp/00000000.ANOTHER", old.Add(2*time.Hour))}
	for name, when := range map[string]time.Time{"tmp/00000000.OLDCOPY": old, "tmp/00000000.COPY": time.Now()} {
		file := filepath.Join(path, name)
		ok(t, os.WriteFile(file, bytes.Repeat([]byte("copied"), 1<<20), 0o600))
		ok(t, os.Chtimes(file, when, when))
		if when.Equal(old) {
			dead = append(dead, file)
		} else {
			alive = append(alive, file)
		}
	}
	// Of what is neither new nor old, the lock tells.
	recent := time.Now().Add(-10 * time.Second)
	dead = append(dead, make("tmp/"+d.unique(), recent))
	held := make("tmp/"+d.unique(), recent)
	f, err := os.Open(held)
	ok(t, err)
	defer f.Close()
	d.hold(f)
	alive = append(alive, held)
	ok(t, d.Clean(t.Context()))
	for _, p := range dead {
		if _, err := os.Stat(p); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", p, err)
		}
	}
	for _, p := range alive {
		if _, err := os.Stat(p); err != nil {
			t.Error(err)
		}
	}
}

// TestMountedOver: an engine never goes astray when its path leads elsewhere.
func TestMountedOver(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 4096}))
	ok(t, os.Rename(path, path+".moved"))
	ok(t, os.MkdirAll(path+"/slabs", 0o700))
	t.Cleanup(func() { ok(t, os.RemoveAll(path+".moved")) })
	_, err := d.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	fails(t, err, fault.Unavailable)
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 4096}))
	if entries, err := os.ReadDir(path + "/slabs"); err != nil || len(entries) > 0 {
		t.Errorf("made in the wrong place: %v, %v", entries, err)
	}
}

// TestFullDisk: without room every verb that needs some is Exhausted, leaves
// nothing, harms nothing, and works once there is room.
func TestFullDisk(t *testing.T) {
	t.Run("no inode is free", func(t *testing.T) { fullDisk(t, true) })
	t.Run("no block is free", func(t *testing.T) { fullDisk(t, false) })
}

func fullDisk(t *testing.T, inodes bool) {
	path := hosttest.Filesystem(t, "ext4", 4<<20)
	d := open(t, path)
	tree := engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: 1 << 20}
	block := engine.SlabSpec{ID: "block", Kind: engine.Block, Size: 1 << 20}
	ok(t, d.CreateSlab(t.Context(), tree))
	ok(t, d.CreateSlab(t.Context(), block))
	ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
	free := fillDisk(t, path, inodes)
	before := everything(t, path)
	verbs := map[string]func() error{
		"CreateTag":              func() error { return d.CreateTag(t.Context(), engine.Tag{Name: "i.a.2", Record: []byte("r")}) },
		"CreateTag of new class": func() error { return d.CreateTag(t.Context(), engine.Tag{Name: "d.a"}) },
		"CreateSlab tree": func() error {
			return d.CreateSlab(t.Context(), engine.SlabSpec{ID: "t2", Kind: engine.Tree, Size: 4096})
		},
		"ResizeSlab tree": func() error { return d.ResizeSlab(t.Context(), "tree", 2<<20) },
		"Scratch":         func() error { return d.Scratch(func(*os.File) error { return nil }) },
	}
	if inodes { // a sparse file needs no block
		verbs["CreateSlab block"] = func() error {
			return d.CreateSlab(t.Context(), engine.SlabSpec{ID: "b2", Kind: engine.Block, Size: 4096})
		}
	}
	for name, verb := range verbs {
		t.Run(name, func(t *testing.T) {
			fails(t, verb(), fault.Exhausted)
			if after := everything(t, path); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
	ok(t, d.CreateSlab(t.Context(), tree)) // replies that were lost
	ok(t, d.CreateSlab(t.Context(), block))
	ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
	fails(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "other"}), fault.Exists)
	ok(t, d.ResizeSlab(t.Context(), "block", 2<<20)) // a hole needs no room
	again := open(t, path)                           // opening works, and so does listing
	if slabs, err := again.ListSlabs(t.Context()); err != nil || len(slabs) != 2 {
		t.Errorf("slabs %v, %v", slabs, err)
	}
	ok(t, d.DeleteTag(t.Context(), "i.a.1"))
	ok(t, d.DeleteSlab(t.Context(), "block"))
	free()
	for name, verb := range verbs {
		if err := verb(); err != nil {
			t.Errorf("%s with room: %v", name, err)
		}
	}
}

// fillDisk takes every block, or also every inode, and returns what gives them back.
func fillDisk(t *testing.T, path string, inodes bool) (free func()) {
	t.Helper()
	dir := filepath.Join(path, "ballast")
	ok(t, os.Mkdir(dir, 0o700))
	for i := 0; i == 0 || inodes; i++ {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, i), nil, 0o600); errors.Is(err, unix.ENOSPC) {
			break
		} else {
			ok(t, err)
		}
	}
	f, err := os.OpenFile(dir+"/0", os.O_WRONLY, 0)
	ok(t, err)
	for size := 64 << 10; size > 0; { // ever smaller
		if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else {
			ok(t, err)
		}
	}
	ok(t, f.Sync())
	ok(t, f.Close())
	return func() { ok(t, os.RemoveAll(dir)) }
}

// everything lists all files of a domain.
func everything(t *testing.T, path string) (all string) {
	t.Helper()
	for _, folder := range []string{"slabs", "tags", "tmp", "trash"} {
		ok(t, filepath.Walk(filepath.Join(path, folder), func(p string, info os.FileInfo, err error) error {
			if err == nil {
				all += fmt.Sprintf("%s %v\n", p, info.Mode())
				if info.Mode().IsRegular() && info.Size() < 4096 {
					content, err := os.ReadFile(p)
					ok(t, err)
					all += string(content) + "\n"
				}
			}
			return err
		}))
	}
	return all
}

// BenchmarkListTags: 10,000 images are up to 30,000 tags; what the Image
// Manager lists after every creation must not grow with them.
func BenchmarkListTags(b *testing.B) {
	d := open(b, b.TempDir())
	class, err := d.class("i.0", true)
	ok(b, err)
	defer class.Close()
	for i := range 30000 {
		tag := engine.Tag{Name: fmt.Sprintf("i.0123456789abcdef0123456789abcdef.%d", i), Slab: "s-0123456789abcdef", Record: make([]byte, 300)}
		ok(b, os.WriteFile(filepath.Join(class.Name(), tag.Name), encodeTag(tag), 0o600)) // not durable: faster to make
	}
	ok(b, d.CreateTag(b.Context(), engine.Tag{Name: "e.1"}))
	for _, prefix := range []string{"", "e."} {
		b.Run("prefix="+prefix, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := d.ListTags(b.Context(), prefix); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestANewSlabIsNotLocked: also while programs are being started, which have every
// file open until their exec.
func TestANewSlabIsNotLocked(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = exec.Command("/bin/true").Run()
			}
		}
	}()
	defer func() { close(stop); <-done }()
	for i := range 400 {
		id := fmt.Sprintf("s%d", i)
		ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: id, Kind: engine.Block, Size: 4096}))
		f, err := os.OpenFile(filepath.Join(path, "slabs", id), os.O_RDWR, 0)
		ok(t, err)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			t.Fatalf("slab %s, just made, is locked: %v", id, err)
		}
		ok(t, f.Close())
	}
}
