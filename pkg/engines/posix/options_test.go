package posix

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

func openWith(t testing.TB, path string, o Options) *Directory {
	t.Helper()
	d, err := Open(path, o)
	ok(t, err)
	t.Cleanup(func() { ok(t, d.Close()) })
	return d
}

// onShare is a directory on a server that a test can break.
func onShare(t testing.TB) (s *farfs.Server, dir, point string) {
	dir, point = t.TempDir(), t.TempDir()
	s = farfs.New(t, dir)
	ok(t, s.Mount("", point))
	return s, dir, point
}

func tagNames(t testing.TB, d *Directory) (names []string) {
	t.Helper()
	tags, err := d.ListTags(t.Context(), "")
	ok(t, err)
	for _, tag := range tags {
		names = append(names, tag.Name)
	}
	slices.Sort(names)
	return names
}

// TestDecoratedNames: on the disk no name is one that a server may reserve or shorten, and what has no
// such name is nothing of ours.
func TestDecoratedNames(t *testing.T) {
	path := t.TempDir()
	d := openWith(t, path, Options{Decorate: true})
	for _, name := range []string{"con", "aux.1", "ends.with."} {
		ok(t, d.CreateTag(t.Context(), engine.Tag{Name: name, Slab: "con"}))
	}
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "con", Kind: engine.Block, Size: 1}))
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "prn.", Kind: engine.Tree, Size: 1}))
	for _, name := range []string{"tags/_con_/_con_", "tags/_aux_/_aux.1_", "tags/_ends_/_ends.with._", "slabs/_con_", "slabs/_prn._/data"} {
		if _, err := os.Lstat(filepath.Join(path, name)); err != nil {
			t.Error(err)
		}
	}
	ok(t, os.WriteFile(filepath.Join(path, "slabs", "stray"), make([]byte, Granularity), 0o600))
	ok(t, os.WriteFile(filepath.Join(path, "slabs", "_"), make([]byte, Granularity), 0o600))
	ok(t, os.MkdirAll(filepath.Join(path, "tags", "stray"), 0o700))
	if have := tagNames(t, d); !slices.Equal(have, []string{"aux.1", "con", "ends.with."}) {
		t.Errorf("tags %q", have)
	}
	if tags, err := d.ListTags(t.Context(), "aux."); err != nil || len(tags) != 1 || tags[0].Slab != "con" {
		t.Errorf("%v, %v", tags, err)
	}
	slabs, err := d.ListSlabs(t.Context())
	if err != nil || len(slabs) != 2 {
		t.Errorf("%v, %v", slabs, err)
	}
	for _, id := range []string{"con", "prn."} {
		ok(t, d.ResizeSlab(t.Context(), id, 1<<20))
		a, err := d.AttachSlab(t.Context(), id, engine.AttachOptions{})
		ok(t, err)
		if !strings.Contains(a.Path, "/_"+id+"_") {
			t.Errorf("attached at %s", a.Path)
		}
		ok(t, d.DeleteSlab(t.Context(), id))
	}
	ok(t, d.DeleteTag(t.Context(), "con"))
	if have := tagNames(t, d); !slices.Equal(have, []string{"aux.1", "ends.with."}) {
		t.Errorf("tags after one was deleted: %q", have)
	}
}

// TestRefresh: each folder is changed before it is listed, nothing of that is left or ever listed, and a full
// disk is in nobody's way.
func TestRefresh(t *testing.T) {
	s, dir, point := onShare(t)
	d := openWith(t, point, Options{Refresh: true})
	ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.a"}))
	ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "e.1"}))
	left := filepath.Join(dir, "tags", "i", refreshPrefix+"LEFT")
	ok(t, os.WriteFile(left, nil, 0o600))
	made, removed := s.Count(farfs.Create), s.Count(farfs.Unlink)
	if have := tagNames(t, d); !slices.Equal(have, []string{"e.1", "i.a"}) {
		t.Errorf("tags %q", have)
	}
	if n := s.Count(farfs.Create) - made; n != 3 {
		t.Errorf("%d names were made to list the tags' folder and those of two classes", n)
	}
	if n := s.Count(farfs.Unlink) - removed; n != 4 {
		t.Errorf("%d names were removed: three of this listing and one of another were there", n)
	}
	if _, err := os.Lstat(left); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", left, err)
	}
	s.Refuse(farfs.Create, unix.ENOSPC)
	before, err := os.Stat(filepath.Join(dir, "slabs"))
	ok(t, err)
	if slabs, err := d.ListSlabs(t.Context()); err != nil || len(slabs) != 0 {
		t.Errorf("on a full disk: %v, %v", slabs, err)
	}
	if after, err := os.Stat(filepath.Join(dir, "slabs")); err != nil || !after.ModTime().After(before.ModTime()) {
		t.Errorf("the folder was not changed: %v", err)
	}
}

// TestFoldersWithoutFsync are refused, unless files are made durable instead, after their names were given.
func TestFoldersWithoutFsync(t *testing.T) {
	s, dir, point := onShare(t)
	s.Refuse(farfs.Fsyncdir, unix.EINVAL)
	_, err := Open(point, Options{})
	fails(t, err, fault.Invalid)
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	d := openWith(t, point, Options{NoDirSync: true})
	steps := []struct {
		name string
		do   func() error
		last farfs.Op // what has to be durable afterwards
	}{
		{"first tag", func() error { return d.CreateTag(t.Context(), engine.Tag{Name: "i.a"}) }, farfs.Link},
		{"block slab", func() error {
			return d.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 1})
		}, farfs.Link},
		{"tree slab", func() error { return d.CreateSlab(t.Context(), engine.SlabSpec{ID: "t", Kind: engine.Tree, Size: 1}) }, farfs.Rename},
		{"growth of a tree", func() error { return d.ResizeSlab(t.Context(), "t", 2) }, farfs.Link},
		{"deletion of a tag", func() error { return d.DeleteTag(t.Context(), "i.a") }, farfs.Unlink},
	}
	for _, step := range steps {
		s.Forget()
		ok(t, step.do())
		seen := s.Seen()
		if at := slices.Index(seen, step.last); at < 0 || !slices.Contains(seen[at:], farfs.Fsync) {
			t.Errorf("%s: no file was synced after %d in %v", step.name, step.last, seen)
		}
	}
	s.Refuse(farfs.Fsync, unix.EIO)
	fails(t, d.DeleteSlab(t.Context(), "t"), fault.Unavailable)
}

// TestWithoutOwners: trees are made where everything belongs to one user, and no mode can be asked for.
func TestWithoutOwners(t *testing.T) {
	s, _, point := onShare(t)
	s.Squash(12345)
	d := openWith(t, point, Options{NoOwner: true})
	_, err := d.Try(t.Context())
	ok(t, err)
	var desc engine.Description
	d.Describe(&desc)
	if len(desc.Params)+len(desc.ParamValues)+len(desc.TreeParams) != 0 {
		t.Errorf("%+v", desc)
	}
	spec := engine.SlabSpec{ID: "t", Kind: engine.Tree, Size: 1, Params: map[string]string{"mode": "0777"}}
	fails(t, d.CreateSlab(t.Context(), spec), fault.Invalid)
	spec.Params = nil
	setattrs := s.Count(farfs.Setattr)
	ok(t, d.CreateSlab(t.Context(), spec))
	if n := s.Count(farfs.Setattr) - setattrs; n != 0 {
		t.Errorf("owner or mode were set %d times", n)
	}
}

// TestLocksThatAreInTheWay are not taken: somebody who has locked a slab as a whole keeps nobody from growing it.
func TestLocksThatAreInTheWay(t *testing.T) {
	path := t.TempDir()
	d := openWith(t, path, Options{NoLocks: true})
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: Granularity}))
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "t", Kind: engine.Tree, Size: 1}))
	for _, id := range []string{"a", "t"} {
		f, err := os.Open(filepath.Join(path, "slabs", id))
		ok(t, err)
		defer f.Close()
		ok(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
		done := make(chan error, 1)
		go func() { done <- d.ResizeSlab(t.Context(), id, 1<<20) }()
		select {
		case err := <-done:
			ok(t, err)
		case <-time.After(10 * time.Second):
			t.Fatalf("the growth of slab %s waits for a lock", id)
		}
	}
	var g errgroup.Group
	for i := range 20 {
		g.Go(func() error { return d.ResizeSlab(t.Context(), "a", int64(2+i)<<20) })
	}
	ok(t, g.Wait())
	if info, err := os.Stat(filepath.Join(path, "slabs", "a")); err != nil || info.Size() != 21<<20 {
		t.Errorf("after growths at once: %v, %v", info.Size(), err)
	}
}

// TestIdentity: of many who open a new storage at once all see the same, and it stays.
func TestIdentity(t *testing.T) {
	path := t.TempDir()
	_, err := IdentityAt(path)
	fails(t, err, fault.NotFound)
	ids := make([]string, 16)
	var g errgroup.Group
	for i := range ids {
		d := open(t, path)
		g.Go(func() (err error) { ids[i], err = d.Identity(); return err })
	}
	ok(t, g.Wait())
	again, err := IdentityAt(path)
	ok(t, err)
	for _, id := range append(ids, again) {
		if id == "" || id != ids[0] {
			t.Fatalf("identities %q", ids)
		}
	}
	other, err := open(t, t.TempDir()).Identity()
	ok(t, err)
	if other == again {
		t.Errorf("two storages have the identity %s", again)
	}
	file := filepath.Join(path, "identity")
	for name, damage := range map[string]func() error{
		"emptied":     func() error { return os.WriteFile(file, nil, 0o600) },
		"a directory": func() error { return os.Mkdir(file, 0o700) },
		"a symlink":   func() error { return os.Symlink("/etc/passwd", file) },
	} {
		t.Run(name, func(t *testing.T) {
			ok(t, os.RemoveAll(file))
			ok(t, damage())
			_, err := IdentityAt(path)
			fails(t, err, fault.Corrupt)
			_, err = open(t, path).Identity()
			fails(t, err, fault.Corrupt)
		})
	}
}

// TestTrialsOnFileSystems: what is found is what these are known to do.
func TestTrialsOnFileSystems(t *testing.T) {
	for fstype, reflinks := range map[string]bool{"ext4": false, "xfs": true, "btrfs": true} {
		t.Run(fstype, func(t *testing.T) {
			path := hosttest.Filesystem(t, fstype, 64<<20)
			d := open(t, path)
			tried, err := d.Try(t.Context())
			ok(t, err)
			if have := tried.Reflink == nil; have != reflinks {
				t.Errorf("reflinks: %v", tried.Reflink)
			}
			if !reflinks && (tried.Copy == nil || !strings.Contains(tried.Copy.Error(), "pass through this host")) {
				t.Errorf("copies by itself: %v", tried.Copy)
			}
			if tried.Locks != nil || tried.Sparse != nil || tried.DirectIO != nil {
				t.Errorf("locks %v, sparse files %v, direct I/O %v", tried.Locks, tried.Sparse, tried.DirectIO)
			}
			if left, err := os.ReadDir(filepath.Join(path, "tmp")); err != nil || len(left) != 0 {
				t.Errorf("left in tmp: %v, %v", left, err)
			}
		})
	}
}

// TestWhatAStorageLacks is said with its reason; what it lacks only for now is no reason to refuse it.
func TestWhatAStorageLacks(t *testing.T) {
	s, _, point := onShare(t)
	d := openWith(t, point, Options{})
	for _, c := range []struct {
		op   farfs.Op
		with unix.Errno
		kind fault.Kind
		says string
	}{
		{farfs.Link, unix.EPERM, fault.Invalid, "no hard links"},
		{farfs.Rename, unix.EXDEV, fault.Invalid, "cannot be renamed"},
		{farfs.Fsync, unix.EINVAL, fault.Invalid, "a file cannot be made durable"},
		{farfs.Setattr, unix.EPERM, fault.Invalid, "cannot be given a mode"},
		{farfs.Link, unix.ESTALE, fault.Unavailable, ""},
		{farfs.Fsync, unix.EIO, fault.Unavailable, ""},
		{farfs.Write, unix.ENOSPC, fault.Exhausted, ""},
		{farfs.Mkdir, unix.EROFS, fault.Permission, ""},
	} {
		s.Refuse(c.op, c.with)
		_, err := d.Try(t.Context())
		s.Refuse(c.op, 0)
		if fault.KindOf(err) != c.kind || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%d fails with %v: %v", c.op, c.with, err)
		}
	}
	_, err := d.Try(t.Context())
	ok(t, err)
}

// TestCopyInTheStorage keeps holes, tells how far it is, and stops with its context.
func TestCopyInTheStorage(t *testing.T) {
	path := hosttest.Filesystem(t, "ext4", 64<<20)
	d := open(t, path)
	const size = 1 << 30
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: size}))
	f, err := os.OpenFile(filepath.Join(path, "slabs", "a"), os.O_RDWR, 0)
	ok(t, err)
	for _, at := range []int64{0, 100 << 20, size - Granularity} {
		_, err := f.WriteAt([]byte(fmt.Sprintf("at %d", at)), at)
		ok(t, err)
	}
	ok(t, f.Close())
	var told []int64
	spec := engine.SlabSpec{ID: "b", Kind: engine.Block, Size: size + Granularity}
	ok(t, d.Copy(t.Context(), "a", spec, func(done int64) { told = append(told, done) }))
	if !slices.IsSorted(told) || len(told) < 3 || told[len(told)-1] != size {
		t.Errorf("told %v", told)
	}
	g, err := os.Open(filepath.Join(path, "slabs", "b"))
	ok(t, err)
	defer g.Close()
	for _, at := range []int64{0, 100 << 20, size - Granularity} {
		want := fmt.Sprintf("at %d", at)
		have := make([]byte, len(want))
		if _, err := g.ReadAt(have, at); err != nil || string(have) != want {
			t.Errorf("at %d: %q, %v", at, have, err)
		}
	}
	if u, err := d.SlabUsage(t.Context(), "b"); err != nil || u.Used > 1<<20 || u.Total != size+Granularity {
		t.Errorf("%+v, %v", u, err)
	}
	fails(t, d.Copy(t.Context(), "missing", engine.SlabSpec{ID: "c", Kind: engine.Block, Size: size}, nil), fault.NotFound)
}

// TestWhatIsDeletedAndStillOpenElsewhere is listed by the server, and by nobody else; on other storages, it is
// an error as any other.
func TestWhatIsDeletedAndStillOpenElsewhere(t *testing.T) {
	s, _, point := onShare(t)
	d, local := openWith(t, point, Options{DeletePending: true}), openWith(t, point, Options{})
	for _, name := range []string{"i.a", "i.b"} {
		ok(t, d.CreateTag(t.Context(), engine.Tag{Name: name}))
		ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: engine.Block, Size: 1}))
	}
	for _, errno := range []unix.Errno{unix.EBUSY, unix.ENOENT} {
		s.RefuseName("i.a", errno)
		if have := tagNames(t, d); !slices.Equal(have, []string{"i.b"}) {
			t.Errorf("%v: tags %q", errno, have)
		}
		if slabs, err := d.ListSlabs(t.Context()); err != nil || len(slabs) != 1 || slabs[0].ID != "i.b" {
			t.Errorf("%v: slabs %v, %v", errno, slabs, err)
		}
		_, err := local.ListTags(t.Context(), "i.")
		fails(t, err, fault.Unavailable)
		_, err = local.ListSlabs(t.Context())
		fails(t, err, fault.Unavailable)
	}
	s.RefuseName("i.a", 0)
	s.Refuse(farfs.Open, unix.EBUSY) // it is there, and somebody lets nobody else open it
	_, err := d.ListTags(t.Context(), "i.")
	fails(t, err, fault.Unavailable)
}
