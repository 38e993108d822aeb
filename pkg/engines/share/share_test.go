package share

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func fails(t testing.TB, err error, kind fault.Kind, says ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want kind %q", err, kind)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

// far is a share on a server that a test can break.
type far struct {
	*farfs.Server
	dir    string // on the server
	mounts string
}

func newFar(t testing.TB) *far {
	dir := t.TempDir()
	return &far{farfs.New(t, dir), dir, t.TempDir()}
}

// storage mounts the share by FUSE. Of mount options it takes "opt=...".
func (f *far) storage() Storage {
	return Storage{
		Type: "far", Location: "far:/share",
		Mount: func(_ context.Context, folder, target string, _ []string) error {
			err := f.Mount(folder, target)
			if errors.Is(err, unix.ENOENT) {
				return fault.New(fault.NotFound, "the share has no folder %q", folder)
			}
			return posix.Fault(err)
		},
		CheckOptions: func(options []string) error {
			return Allow(options, map[string]string{"opt": "[a-z]+"}, map[string]string{"soft": "an interrupted server would lose writes"})
		},
	}
}

func (f *far) open(t testing.TB, change ...func(*Storage)) *Engine {
	t.Helper()
	s := f.storage()
	for _, c := range change {
		c(&s)
	}
	e, err := Open(t.Context(), host.NewLocal(host.Exec{}), f.mounts, s)
	ok(t, err)
	t.Cleanup(func() { ok(t, e.Close()) })
	return e
}

// mountsBelow are the mounts that this process sees below a folder.
func mountsBelow(t testing.TB, folder string) (points []string) {
	t.Helper()
	all, err := host.NewLocal(host.Exec{}).Mounts()
	ok(t, err)
	for _, m := range all {
		if strings.HasPrefix(m.Point, folder+"/") {
			points = append(points, m.Point)
		}
	}
	return points
}

func slab(id string) engine.SlabSpec {
	return engine.SlabSpec{ID: id, Kind: engine.Block, Size: 1 << 20}
}

func tree(id string) engine.SlabSpec {
	return engine.SlabSpec{ID: id, Kind: engine.Tree, Size: 1 << 20}
}

// TestConformance of a domain in a folder of a share that needs every option, with trees apart.
func TestConformance(t *testing.T) {
	var last *far
	storage := func(f *far) Storage {
		s := f.storage()
		s.Folder, s.TreesApart = "teams/k8s", true
		s.Posix = posix.Options{Refresh: true, Decorate: true, NoDirSync: true, NoOwner: true}
		return s
	}
	enginetest.Run(t, enginetest.Harness{
		Expect: []engine.Capability{engine.CapMeter, engine.CapImport},
		Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
			f := newFar(t)
			last = f
			return func(t testing.TB) engine.Engine {
				e, err := Open(t.Context(), host.NewLocal(host.Exec{}), f.mounts, storage(f))
				ok(t, err)
				return e
			}
		},
		Foreign: func(t testing.TB, content []byte) string {
			folder := filepath.Join(last.dir, "teams/k8s/import")
			ok(t, os.Mkdir(folder, 0o755))
			ok(t, os.WriteFile(filepath.Join(folder, "disk.img"), content, 0o644))
			return "disk.img"
		},
	})
}

// TestLostReplies: everything that names are made and removed with is done twice, and the second answer
// is all that is heard. No verb sees a difference, also when many are at work.
func TestLostReplies(t *testing.T) {
	f := newFar(t)
	f.Twice(func(op farfs.Op) bool {
		switch op {
		case farfs.Link, farfs.Mkdir, farfs.Rename, farfs.Create, farfs.Unlink, farfs.Rmdir:
			return true
		}
		return false
	})
	e := f.open(t)
	var g errgroup.Group
	for i := range 16 {
		tag := engine.Tag{Name: fmt.Sprintf("i.%d", i), Slab: "a", Record: []byte{byte(i)}}
		for _, spec := range []engine.SlabSpec{slab(fmt.Sprintf("b%d", i)), tree(fmt.Sprintf("t%d", i))} {
			g.Go(func() error { return e.CreateSlab(t.Context(), spec) })
		}
		g.Go(func() error { return e.CreateTag(t.Context(), tag) })
	}
	ok(t, g.Wait())
	fails(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.0", Record: []byte("another")}), fault.Exists)
	fails(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "t0", Kind: engine.Tree, Size: 7}), fault.Exists)
	ok(t, e.ResizeSlab(t.Context(), "t0", 3<<20))
	ok(t, e.ResizeSlab(t.Context(), "b0", 3<<20))
	slabs, err := e.ListSlabs(t.Context())
	ok(t, err)
	for _, s := range slabs {
		if want := map[bool]int64{true: 3 << 20, false: 1 << 20}[s.ID == "t0" || s.ID == "b0"]; s.Size != want {
			t.Errorf("%+v", s)
		}
		g.Go(func() error { return e.DeleteSlab(t.Context(), s.ID) })
	}
	tags, err := e.ListTags(t.Context(), "")
	ok(t, err)
	for _, tag := range tags {
		if len(tag.Record) != 1 {
			t.Errorf("%+v", tag)
		}
		g.Go(func() error { return e.DeleteTag(t.Context(), tag.Name) })
	}
	ok(t, g.Wait())
	if len(slabs) != 32 || len(tags) != 16 {
		t.Errorf("%d slabs, %d tags", len(slabs), len(tags))
	}
	for _, folder := range []string{"slabs", "tags/i", "tmp", "trash"} {
		if left, err := os.ReadDir(filepath.Join(f.dir, folder)); err != nil || len(left) != 0 {
			t.Errorf("left in %s: %v, %v", folder, left, err)
		}
	}
}

// TestMountsAreOfOneOpening, and gone with it.
func TestMountsAreOfOneOpening(t *testing.T) {
	f := newFar(t)
	s := f.storage()
	a, err := Open(t.Context(), host.NewLocal(host.Exec{}), f.mounts, s)
	ok(t, err)
	b := f.open(t)
	if n := len(mountsBelow(t, f.mounts)); n != 2 {
		t.Errorf("%d mounts of two openings", n)
	}
	ok(t, a.CreateSlab(t.Context(), slab("a")))
	at, err := a.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	open, err := os.OpenFile(at.Path, os.O_RDWR, 0)
	ok(t, err)
	defer open.Close()
	ok(t, a.Close())
	if n := len(mountsBelow(t, f.mounts)); n != 1 {
		t.Errorf("%d mounts after one of two was closed", n)
	}
	if _, err := open.WriteAt([]byte("still"), 0); err != nil || open.Sync() != nil {
		t.Errorf("what is in use went with the mount: %v", err)
	}
	fails(t, a.CreateSlab(t.Context(), slab("late")), fault.Unavailable, "closed")
	at, err = b.AttachSlab(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	if got, err := os.ReadFile(at.Path); err != nil || string(got[:5]) != "still" {
		t.Errorf("%q, %v", got[:5], err)
	}
	ok(t, b.Close())
	if left, err := os.ReadDir(f.mounts); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestADeadProcessesMountsAreTakenDown by the next one, and those of a living one are not.
func TestADeadProcessesMountsAreTakenDown(t *testing.T) {
	f := newFar(t)
	alive := f.open(t)
	// As a killed process leaves it: mounted, and the lock free.
	dead, err := newHome(t.Context(), host.NewLocal(host.Exec{}), f.mounts)
	ok(t, err)
	point, err := dead.point("")
	ok(t, err)
	ok(t, f.Mount("", point))
	ok(t, dead.lock.Close())
	if n := len(mountsBelow(t, f.mounts)); n != 2 {
		t.Fatalf("%d mounts", n)
	}
	next := f.open(t)
	for _, p := range mountsBelow(t, f.mounts) {
		if p == point {
			t.Error("a dead process's mount is still there")
		}
	}
	for _, path := range []string{dead.path, dead.path + lockSuffix} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	ok(t, alive.CreateSlab(t.Context(), slab("a")))
	ok(t, next.CreateSlab(t.Context(), slab("b")))
}

// TestTreesApart: a tree has a mount of its own, with its class's options; it goes at the detachment,
// and what was bound from it stays.
func TestTreesApart(t *testing.T) {
	f := newFar(t)
	var options [][]string
	e := f.open(t, func(s *Storage) {
		s.Folder = "k8s"
		mount := s.Mount
		s.Mount = func(ctx context.Context, folder, target string, o []string) error {
			if o != nil {
				options = append(options, append([]string{folder}, o...))
			}
			return mount(ctx, folder, target, o)
		}
	})
	ok(t, e.CreateSlab(t.Context(), tree("t")))
	ok(t, e.CreateSlab(t.Context(), slab("b")))
	plain, err := e.AttachSlab(t.Context(), "t", engine.AttachOptions{})
	ok(t, err)
	before := len(mountsBelow(t, f.mounts))
	with := engine.AttachOptions{MountOptions: []string{"opt=yes"}}
	apart, err := e.AttachSlab(t.Context(), "t", with)
	ok(t, err)
	if apart.Path == plain.Path || len(mountsBelow(t, f.mounts)) != before+1 {
		t.Errorf("attached at %s and %s; mounts: %q", plain.Path, apart.Path, mountsBelow(t, f.mounts))
	}
	if again, err := e.AttachSlab(t.Context(), "t", with); err != nil || again != apart {
		t.Errorf("attached again at %v, %v", again, err)
	}
	if len(options) != 1 || strings.Join(options[0], " ") != "k8s/slabs/t opt=yes" {
		t.Errorf("mounted with %q", options)
	}
	ok(t, os.WriteFile(filepath.Join(apart.Path, "file"), []byte("x"), 0o600))
	if _, err := os.Stat(filepath.Join(plain.Path, "file")); err != nil {
		t.Errorf("the two are not the same tree: %v", err)
	}
	bound := t.TempDir()
	ok(t, host.NewLocal(host.Exec{}).Bind(t.Context(), apart.Path, bound, 0))
	defer unix.Unmount(bound, unix.MNT_DETACH)
	ok(t, e.DetachSlab(t.Context(), "t"))
	if n := len(mountsBelow(t, f.mounts)); n != before {
		t.Errorf("%d mounts after the detachment, %d before", n, before)
	}
	if _, err := os.Stat(filepath.Join(bound, "file")); err != nil {
		t.Errorf("what was bound from it is gone: %v", err)
	}
	for o, says := range map[string]string{"other=geheim": `"other" is unknown`, "soft": "lose writes", "opt=GEHEIM": `"opt"`} {
		_, err := e.AttachSlab(t.Context(), "t", engine.AttachOptions{MountOptions: []string{o}})
		fails(t, err, fault.Invalid, says)
		if strings.Contains(strings.ToLower(err.Error()), "geheim") {
			t.Errorf("%q shows the value", err)
		}
	}
	_, err = e.AttachSlab(t.Context(), "b", with)
	fails(t, err, fault.Invalid, "block slab")
	_, err = f.open(t, func(s *Storage) { s.CheckOptions = nil; s.Folder = "k8s" }).AttachSlab(t.Context(), "t", with)
	fails(t, err, fault.Invalid, `"opt"`)
}

// TestWhatCannotHoldADomainIsRefused, and nothing is left of the attempt.
func TestWhatCannotHoldADomainIsRefused(t *testing.T) {
	f := newFar(t)
	refusing := func(t *testing.T, change func(*Storage), kind fault.Kind, says ...string) {
		t.Helper()
		s := f.storage()
		change(&s)
		_, err := Open(t.Context(), host.NewLocal(host.Exec{}), f.mounts, s)
		fails(t, err, kind, says...)
		if left, err := os.ReadDir(f.dir); err != nil || len(left) != 0 {
			t.Errorf("left on the share: %v, %v", left, err)
		}
		if left, err := os.ReadDir(f.mounts); err != nil || len(left) != 0 {
			t.Errorf("left of the mounts: %v, %v", left, err)
		}
	}
	refusing(t, func(s *Storage) {
		s.Ping = func(context.Context) error { return fault.New(fault.Unavailable, "the server does not answer") }
	}, fault.Unavailable, "does not answer")
	refusing(t, func(s *Storage) {
		s.Mount = func(context.Context, string, string, []string) error {
			return fault.New(fault.Permission, "the server refuses this client")
		}
	}, fault.Permission, "refuses")
	f.Refuse(farfs.Link, unix.EPERM)
	refusing(t, func(*Storage) {}, fault.Invalid, "far:/share", "no hard links")
	f.Refuse(farfs.Link, 0)
	f.Refuse(farfs.Fsyncdir, unix.EINVAL)
	refusing(t, func(*Storage) {}, fault.Invalid, "folder cannot be made durable")
	f.Refuse(farfs.Fsyncdir, 0)
	f.Refuse(farfs.Mkdir, unix.EROFS)
	refusing(t, func(*Storage) {}, fault.Permission, "read-only")
	f.Refuse(farfs.Mkdir, 0)
	f.Squash(65534)
	refusing(t, func(*Storage) {}, fault.Invalid, "root_squash", "65534")
}

// TestADomainSaysWhatItFound: identity, capabilities and the reasons for those that are not there.
func TestADomainSaysWhatItFound(t *testing.T) {
	f := newFar(t)
	e := f.open(t, func(s *Storage) { s.Copies = true })
	d, err := e.Describe(t.Context())
	ok(t, err)
	if !d.SharedAccess || !d.MountOptions || d.Location != "far:/share" {
		t.Errorf("%+v", d)
	}
	notes := strings.Join(d.Notes, "\n")
	for _, say := range []string{"identity: " + e.identity, "snapshot and clone of block slabs: default: the file system has no reflinks",
		"copy of block slabs: default: ", "meter: native"} {
		if !strings.Contains(notes, say) {
			t.Errorf("the notes do not say %q:\n%s", say, notes)
		}
	}
	again := f.open(t)
	if again.identity != e.identity || len(e.identity) < 20 {
		t.Errorf("identities %q and %q of the same storage", e.identity, again.identity)
	}
	warned := f.open(t, func(s *Storage) { s.Health = func(context.Context) (string, error) { return "two copies differ", nil } })
	if u, err := warned.DomainUsage(t.Context()); err != nil || u.Warning != "two copies differ" || u.Total != total(t, f.dir) {
		t.Errorf("%+v, %v; the storage has %d bytes", u, err, total(t, f.dir))
	}
}

// total is what statvfs(3) says of a file system, whose block is not what a server likes to transfer at once.
func total(t testing.TB, dir string) int64 {
	t.Helper()
	out, err := (host.Exec{}).Run(t.Context(), host.Command{Name: "stat", Args: []string{"-f", "-c", "%S %b", dir}})
	ok(t, err)
	var unit, blocks int64
	_, err = fmt.Sscan(string(out.Stdout), &unit, &blocks)
	ok(t, err)
	return unit * blocks
}

// within fails the test when f takes longer than limit.
func within(t *testing.T, limit time.Duration, what string, f func()) {
	t.Helper()
	begun := time.Now()
	f()
	if took := time.Since(begun); took > limit {
		t.Errorf("%s took %s, more than %s", what, took, limit)
	}
}

// TestATreesMountIsOfTheDomainsStorage: when the server's name leads to another one by now, which has a copy of the
// volume, nothing is attached there.
func TestATreesMountIsOfTheDomainsStorage(t *testing.T) {
	f := newFar(t)
	e := f.open(t)
	ok(t, e.CreateSlab(t.Context(), tree("t")))
	with := engine.AttachOptions{MountOptions: []string{"opt=yes"}}
	mounts := len(mountsBelow(t, f.mounts))
	restored := t.TempDir()
	ok(t, os.CopyFS(restored, os.DirFS(f.dir)))
	f.Move(restored)
	_, err := e.AttachSlab(t.Context(), "t", with)
	fails(t, err, fault.Unavailable, `slab "t"`, "another storage", "restart")
	if n := len(mountsBelow(t, f.mounts)); n != mounts {
		t.Errorf("%d mounts are left of the attempt", n-mounts)
	}
	f.Move(f.dir)
	_, err = e.AttachSlab(t.Context(), "t", with)
	ok(t, err)
}
