package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

var bg = context.Background()

func filesystems(t *testing.T, f func(t *testing.T, fs string)) {
	for _, fs := range []string{host.Ext4, host.XFS, host.Btrfs} {
		t.Run(fs, func(t *testing.T) { f(t, fs) })
	}
}

const testSize = 320 << 20

func TestVolumeLivesThroughStagingTwice(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		h := w.volume("v", testSize)
		for round := range 2 {
			w.stage(h, fs)
			w.stage(h, fs) // idempotent
			w.ok(w.node.Publish(bg, w.publication(h, "target")))
			w.restart()
			w.ok(w.node.Publish(bg, w.publication(h, "target")))
			if round == 0 {
				w.write(w.path("target/f"), "kept")
			}
			w.reads(w.path("target/f"), "kept")
			s, err := w.node.Stats(bg, h, w.path("target"))
			w.ok(err)
			if s.Total == 0 || s.Available == 0 || s.Used == 0 || len(s.Conditions) > 0 || fs != host.Btrfs && s.Inodes == 0 {
				t.Fatalf("stats: %+v", s)
			}
			w.fails(w.node.Unstage(bg, h, w.staging(h)), fault.InUse, w.path("target"))
			w.ok(w.node.Unpublish(bg, h, w.path("target")))
			w.ok(w.node.Unpublish(bg, h, w.path("target")))
			w.absent(w.path("target"))
			w.restart()
			w.unstage(h)
			w.unstage(h)
		}
		if w.formatted[h] != 1 || w.unstaged[h] != 4 {
			t.Fatalf("formatted %d times, unstaged %d", w.formatted[h], w.unstaged[h])
		}
	})
}

func TestFormattingStartsOverUntilItIsSealed(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		h := w.volume("v", testSize)
		w.failSeal = fault.New(fault.Unavailable, "crash")
		w.fails(w.node.Stage(bg, w.request(h, fs)), fault.Unavailable, "crash")
		if staged, err := w.node.Staged(bg, h); err != nil || staged {
			t.Fatalf("staged=%v %v after a failure", staged, err)
		}
		w.failSeal = nil
		w.restart()
		w.stage(h, fs)
		if w.formatted[h] != 1 {
			t.Fatalf("formatted %d times", w.formatted[h])
		}
	})
}

func TestFormattedVolumeIsNeverFormattedAgain(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", testSize)
	w.change(h, func(s *image.Staging) { s.Fresh, s.Filesystem = false, host.Ext4 })
	w.fails(w.node.Stage(bg, w.request(h, "")), fault.Corrupt, "shows nothing", "not formatted again")
	b, err := os.ReadFile(w.path("v"))
	w.ok(err)
	if strings.Trim(string(b[:1<<20]), "\x00") != "" {
		t.Fatal("something was written to a blank device that had been formatted once")
	}
	w.fails(w.node.Stage(bg, w.request(h, host.XFS)), fault.Invalid, `"xfs"`, `"ext4"`)
}

func TestFreshVolumeWithForeignContentIsRefused(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", testSize)
	_, err := host.Exec{}.Run(bg, host.Command{Name: "mkfs.xfs", Args: []string{"-q", w.path("v")}})
	w.ok(err)
	w.fails(w.node.Stage(bg, w.request(h, host.Ext4)), fault.Corrupt, "xfs")
	h = w.volume("p", testSize)
	f, err := os.OpenFile(w.path("p"), os.O_WRONLY, 0)
	w.ok(err)
	// One Linux partition of 1 MiB from 1 MiB on.
	_, err = f.WriteAt([]byte{0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0}, 446)
	w.ok(err)
	_, err = f.WriteAt([]byte{0x55, 0xaa}, 510)
	w.ok(err)
	w.ok(f.Close())
	w.fails(w.node.Stage(bg, w.request(h, host.Ext4)), fault.Corrupt, "dos partition table")
}

func TestFilesystemsRefuseWhatIsTooSmall(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		least, err := host.MinimumSize(fs)
		w.ok(err)
		h := w.volume("small", least-512)
		w.fails(w.node.Stage(bg, w.request(h, fs)), fault.OutOfRange, "MiB")
		h = w.volume("least", least)
		w.stage(h, fs)
	})
	w := newWorld(t)
	w.fails(w.node.Stage(bg, w.request(w.volume("v", testSize), "ntfs")), fault.Invalid, `"ntfs"`, "ext4")
}

func TestClonesAreStagedBesideTheirSourceAndGrow(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		source := w.volume("v", testSize)
		w.stage(source, fs)
		w.write(filepath.Join(w.staging(source), "f"), "of the source")
		w.ok(unix.Unmount(w.staging(source), 0)) // as if the agent died in the middle
		clone := w.clone(source, "c", 2*testSize)
		w.restart()
		w.stage(source, fs)
		w.stage(clone, fs)
		w.reads(filepath.Join(w.staging(clone), "f"), "of the source")
		w.write(filepath.Join(w.staging(clone), "f"), "of the clone")
		w.reads(filepath.Join(w.staging(source), "f"), "of the source")
		s, err := w.node.Stats(bg, clone, w.staging(clone))
		w.ok(err)
		if s.Total < testSize*3/2 {
			t.Fatalf("the clone was restored to %d bytes, and its filesystem has %d", 2*testSize, s.Total)
		}
		w.unstage(source)
		w.unstage(clone)
		w.stage(clone, fs) // the other order
		w.stage(source, fs)
		w.reads(filepath.Join(w.staging(clone), "f"), "of the clone")
		w.reads(filepath.Join(w.staging(source), "f"), "of the source")
	})
}

func TestGrowthOnlineAndOffline(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		h := w.volume("v", testSize)
		w.stage(h, fs)
		w.ok(w.node.Publish(bg, w.publication(h, "target")))
		w.write(w.path("target/f"), "kept")
		grow := func(size int64) {
			w.ok(os.Truncate(w.path("v"), size))
			w.change(h, func(s *image.Staging) { s.Size = size })
		}
		_, err := w.node.Expand(bg, h, w.path("target"), 2*testSize)
		w.fails(err, fault.OutOfRange)
		grow(2 * testSize)
		got, err := w.node.Expand(bg, h, w.path("target"), 2*testSize)
		if w.node.host.GrowsOnline(fs) {
			w.ok(err)
		} else {
			w.fails(err, fault.InUse, "CAP_SYS_RESOURCE", "staged next")
			w.stage(h, fs) // repeated, it is still staged
			w.ok(w.node.Unpublish(bg, h, w.path("target")))
			w.unstage(h)
			w.stage(h, fs)
			w.ok(w.node.Publish(bg, w.publication(h, "target")))
			got, err = w.node.Expand(bg, h, w.path("target"), 2*testSize)
			w.ok(err)
		}
		if got != 2*testSize {
			t.Fatalf("expanded to %d", got)
		}
		s, err := w.node.Stats(bg, h, w.path("target"))
		w.ok(err)
		if s.Total < testSize*3/2 {
			t.Fatalf("online: %d bytes", s.Total)
		}
		w.ok(w.node.Unpublish(bg, h, w.path("target")))
		w.unstage(h)
		grow(3 * testSize)
		w.stage(h, fs)
		w.reads(filepath.Join(w.staging(h), "f"), "kept")
		s, err = w.node.Stats(bg, h, w.staging(h))
		w.ok(err)
		if s.Total < testSize*5/2 {
			t.Fatalf("offline: %d bytes", s.Total)
		}
	})
}

func TestRawBlock(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 8<<20)
	w.change(h, func(s *image.Staging) { s.Block = true })
	r := w.request(h, "")
	w.fails(w.node.Stage(bg, r), fault.Exists, "block=false")
	r.Access.Block = true
	p := w.publication(h, "dev")
	p.Access.Block = true
	w.fails(w.node.Publish(bg, p), fault.InUse, "not staged")
	for range 2 {
		w.ok(w.node.Stage(bg, r))
		w.restart()
		w.ok(w.node.Publish(bg, p))
		w.ok(w.node.Publish(bg, p))
	}
	f, err := os.OpenFile(p.TargetPath, os.O_RDWR, 0)
	w.ok(err)
	_, err = f.WriteString("raw")
	w.ok(err)
	w.ok(f.Sync())
	w.ok(f.Close())
	if frozen, err := w.node.Freeze(bg, h, 1e9); err != nil || frozen != image.NotFreezable {
		t.Fatalf("freeze: %v %v", frozen, err)
	}
	w.ok(os.Truncate(w.path("v"), 16<<20))
	w.change(h, func(s *image.Staging) { s.Size = 12 << 20 }) // the record counts, not the file
	_, err = w.node.Expand(bg, h, p.TargetPath, 0)
	w.ok(err)
	s, err := w.node.Stats(bg, h, p.TargetPath)
	w.ok(err)
	if !s.Block || s.Total != 12<<20 {
		t.Fatalf("stats: %+v", s)
	}
	w.change(h, func(s *image.Staging) { s.Size = 16 << 20 })
	_, err = w.node.Expand(bg, h, p.TargetPath, 0)
	w.ok(err)
	if s, err = w.node.Stats(bg, h, p.TargetPath); err != nil || s.Total != 16<<20 {
		t.Fatalf("stats: %+v %v", s, err)
	}

	ro := p
	ro.TargetPath, ro.ReadOnly = w.path("ro"), true
	w.ok(w.node.Publish(bg, ro))
	w.ok(w.node.Publish(bg, ro))
	if f, err = os.OpenFile(ro.TargetPath, os.O_RDWR, 0); err == nil {
		_, err = f.WriteString("bad")
		f.Close()
	}
	if !errors.Is(err, os.ErrPermission) {
		t.Fatalf("writing to a read-only raw block volume: %v", err)
	}
	b := make([]byte, 3)
	f, err = os.Open(ro.TargetPath)
	w.ok(err)
	_, err = f.ReadAt(b, 0)
	w.ok(err)
	w.ok(f.Close())
	if string(b) != "raw" {
		t.Fatalf("read %q", b)
	}
	for range 2 {
		w.ok(w.node.Unpublish(bg, h, ro.TargetPath))
		w.ok(w.node.Unpublish(bg, h, p.TargetPath))
	}
	w.absent(p.TargetPath)
	w.restart()
	w.unstage(h)
	w.unstage(h)
}

func TestDirectoryVolume(t *testing.T) {
	w := newWorld(t)
	w.ok(os.Mkdir(w.path("tree"), 0o755))
	h := w.handle("tree")
	w.set(h, image.Staging{Handle: h, Layout: image.LayoutDirectory, Size: 1 << 30, Slabs: []image.SlabRef{{ID: "tree"}}})
	r := w.request(h, "")
	r.MountFlags = []string{"commit=30"}
	w.fails(w.node.Stage(bg, r), fault.Invalid, `mount option "commit"`)
	r.MountFlags = []string{"noexec", "actimeo=1"} // the first is the bind's, the second the storage's
	for range 2 {
		w.ok(w.node.Stage(bg, r))
		if have := w.slabs.options["tree"]; !slices.Equal(have, []string{"actimeo=1"}) {
			t.Fatalf("the storage was told the mount options %q", have)
		}
		w.restart()
		w.ok(w.node.Publish(bg, w.publication(h, "a")))
		w.ok(w.node.Publish(bg, w.publication(h, "a")))
		ro := w.publication(h, "b")
		ro.ReadOnly = true
		w.ok(w.node.Publish(bg, ro))
		w.write(w.path("a/f"), "x")
		w.reads(w.path("b/f"), "x")
		w.reads(w.path("tree/f"), "x")
		if err := os.WriteFile(w.path("b/g"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Fatalf("writing through a read-only publish: %v", err)
		}
		if frozen, err := w.node.Freeze(bg, h, 1e9); err != nil || frozen != image.NotFreezable {
			t.Fatalf("freeze: %v %v", frozen, err)
		}
		_, err := w.node.Stats(bg, h, w.path("a"))
		w.ok(err)
		w.fails(w.node.Unstage(bg, h, w.staging(h)), fault.InUse)
		w.ok(w.node.Unpublish(bg, h, w.path("a")))
		w.ok(w.node.Unpublish(bg, h, w.path("b")))
		w.restart()
		w.unstage(h)
		w.unstage(h)
		w.reads(w.path("tree/f"), "x")
	}
}

func TestReadOnly(t *testing.T) {
	filesystems(t, func(t *testing.T, fs string) {
		w := newWorld(t)
		h := w.volume("v", testSize)
		w.change(h, func(s *image.Staging) { s.ReadOnly = true })
		w.fails(w.node.Stage(bg, w.request(h, fs)), fault.InUse, "never been formatted")
		w.change(h, func(s *image.Staging) { s.ReadOnly = false })
		w.stage(h, fs)
		p := w.publication(h, "target")
		p.ReadOnly = true
		w.ok(w.node.Publish(bg, p))
		if err := os.WriteFile(w.path("target/g"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Fatalf("writing through a read-only publish: %v", err)
		}
		p.ReadOnly = false
		w.fails(w.node.Publish(bg, p), fault.Exists, "read-only=true")
		w.ok(w.node.Unpublish(bg, h, p.TargetPath))

		// An image cut from a filesystem in use but frozen: its log may need a
		// replay, and the device must not be written.
		w.write(filepath.Join(w.staging(h), "f"), "before the cut")
		frozen, err := w.node.Freeze(bg, h, time.Minute)
		w.ok(err)
		if frozen != image.IsFrozen {
			t.Fatalf("freeze: %v", frozen)
		}
		cut := w.clone(h, "cut", testSize)
		w.ok(w.node.Thaw(bg, h))
		w.ok(os.Chmod(w.path("cut"), 0o400))
		w.change(cut, func(s *image.Staging) { s.ReadOnly = true })
		before, err := os.ReadFile(w.path("cut"))
		w.ok(err)
		w.stage(cut, fs)
		w.reads(filepath.Join(w.staging(cut), "f"), "before the cut")
		w.unstage(cut)
		after, err := os.ReadFile(w.path("cut"))
		w.ok(err)
		if string(before) != string(after) {
			t.Fatal("staging a read-only image wrote to it")
		}
	})
}

func TestOneTargetForASingleWriter(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	for _, mode := range []image.Mode{image.SingleNodeSingleWriter, image.SingleNodeWriter, image.SingleNodeReaderOnly} {
		p := w.publication(h, "a")
		p.Access.Mode = mode
		w.ok(w.node.Publish(bg, p))
		w.restart()
		w.ok(w.node.Publish(bg, p))
		p.TargetPath = w.path("b")
		w.fails(w.node.Publish(bg, p), fault.InUse, w.path("a"), string(mode))
		w.absent(w.path("b"))
		w.ok(w.node.Unpublish(bg, h, w.path("a")))
	}
	for _, target := range []string{"a", "b"} {
		w.ok(w.node.Publish(bg, w.publication(h, target)))
	}
}

func TestPathsThatNoKubeletWouldGive(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	w.ok(os.Mkdir(w.path("real"), 0o755))
	w.ok(os.Symlink(w.path("real"), w.path("link")))
	elsewhere := t.TempDir()
	for target, word := range map[string]string{
		"": "empty", "rel": "absolute", w.dir + "/a/../b": "clean", elsewhere + "/x": elsewhere,
		w.path("link"): "symbolic link", w.path("link/below"): "symbolic link", w.staging(h): "staging path",
	} {
		p := w.publication(h, "")
		p.TargetPath = target
		w.fails(w.node.Publish(bg, p), fault.Invalid, word)
		if target != w.staging(h) {
			w.fails(w.node.Unpublish(bg, h, target), fault.Invalid, word)
		}
	}
	w.write(w.path("real/f"), "not the volume's")
	w.fails(w.node.Unpublish(bg, h, w.path("real")), fault.InUse, w.path("real"))
	w.fails(w.node.Unpublish(bg, h, w.path("real/f")), fault.Invalid, "stays")
	w.reads(w.path("real/f"), "not the volume's")
	other := w.volume("other", 16<<20)
	w.stage(other, host.Ext4)
	w.ok(w.node.Publish(bg, w.publication(other, "o")))
	w.fails(w.node.Unpublish(bg, h, w.path("o")), fault.Invalid, "another volume")
	w.fails(w.node.Publish(bg, w.publication(h, "o")), fault.Exists, w.path("o"))
	r := w.request(h, host.Ext4)
	for _, flag := range []string{"bind", "remount", "loop=/dev/loop0", "ro,suid", "", "X-mount.mkdir", "-o"} {
		r.MountFlags = []string{flag}
		w.fails(w.node.Stage(bg, r), fault.Invalid, "mount flag")
	}
}

func TestDamagedSlabs(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.ok(os.Truncate(w.path("v"), 5<<20))
	w.fails(w.node.Stage(bg, w.request(h, "")), fault.Corrupt, "5242880", "16777216")
	c, err := w.node.Health(bg, h)
	w.ok(err)
	wantCondition(t, c, DataLoss, "SlabTruncated")
	w.ok(os.Truncate(w.path("v"), 16<<20))
	w.stage(h, "")
	if c, err = w.node.Health(bg, h); err != nil || len(c) != 0 {
		t.Fatalf("healthy: %v %v", c, err)
	}
	w.ok(os.Truncate(w.path("v"), 15<<20))
	c, err = w.node.Health(bg, h)
	w.ok(err)
	wantCondition(t, c, DataLoss, "SlabTruncated")
	w.ok(os.Truncate(w.path("v"), 16<<20))
	w.ok(os.Rename(w.path("v"), w.path("moved")))
	w.ok(os.Rename(w.path("moved"), w.path("v")))
	w.ok(os.Remove(w.path("v")))
	c, err = w.node.Health(bg, h)
	w.ok(err)
	wantCondition(t, c, DataLoss, "SlabMissing")
	w.unstage(h) // also of a slab that is gone
	c, err = w.node.Health(bg, h)
	w.ok(err)
	wantCondition(t, c, DataLoss, "SlabMissing")
	_, err = w.node.Health(bg, w.handle("unknown"))
	w.fails(err, fault.NotFound)
	bad := w.node.StorageHealth(bg, []string{w.domain, "gone"})
	if len(bad) != 1 || bad[0].Status != StorageUnreachable || !strings.Contains(bad[0].Message, "gone") {
		t.Fatalf("storage health: %v", bad)
	}
	warns := New(Config{NodeID: "n1", Engines: func(string) (*engine.Users, error) { return engine.NewUsers(warning{}), nil }})
	bad = warns.StorageHealth(bg, []string{"a", "b"})
	if len(bad) != 1 || bad[0] != (Condition{StorageDegraded, "DomainDegraded", "domain a: nearly full; domain b: nearly full"}) {
		t.Fatalf("storage that warns: %v", bad)
	}
}

// warning is an engine whose storage is nearly full.
type warning struct{ engine.Engine }

func (warning) DomainUsage(context.Context) (engine.Usage, error) {
	return engine.Usage{Warning: "nearly full"}, nil
}

func (warning) SlabUsage(context.Context, string) (engine.Usage, error) {
	return engine.Usage{}, engine.ErrDeclined
}

func wantCondition(t *testing.T, got []Condition, s Status, reason string) {
	t.Helper()
	for _, c := range got {
		if c.Status == s && c.Reason == reason {
			return
		}
	}
	t.Fatalf("conditions %v, wanted %s %s", got, s, reason)
}

func TestFilesystemThatTurnedReadOnlyIsReported(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	s, err := w.node.find(bg, h)
	w.ok(err)
	dev := filepath.Base(s.devices[0].Path)
	w.ok(os.WriteFile("/sys/fs/ext4/"+dev+"/trigger_fs_error", []byte("tested"), 0o200))
	c, err := w.node.Health(bg, h)
	w.ok(err)
	wantCondition(t, c, Degraded, "FilesystemErrors")
	var turned bool
	for _, x := range c {
		turned = turned || x.Reason == "FilesystemReadOnly" || x.Reason == "FilesystemShutDown"
	}
	if !turned {
		t.Fatalf("conditions %v do not say that nothing can be written", c)
	}
	w.unstage(h)
	w.stage(h, host.Ext4) // checks and repairs
	if c, err = w.node.Health(bg, h); err != nil || len(c) != 0 {
		t.Fatalf("after staging again: %v %v", c, err)
	}
}

func TestLeftOversOfAKilledAgent(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	w.unstage(h)
	// Killed between attaching and mounting.
	attach := func() block.Device {
		d, err := w.node.devices.Attach(bg, block.Spec{Owner: h.String(), Use: block.Filesystem, Slabs: []block.Slab{{ID: h.String(), Path: w.path("v"), Size: 16 << 20}}, Size: 16 << 20})
		w.ok(err)
		w.restart()
		return d
	}
	left := attach()
	w.stage(h, host.Ext4)
	s, err := w.node.find(bg, h)
	w.ok(err)
	if len(s.devices) != 1 || s.devices[0].Path != left.Path {
		t.Fatalf("devices %v, the left-over one was %s", s.devices, left.Path)
	}
	w.unstage(h)
	attach()
	w.unstage(h)
	// Killed between a directory's anchor and its bind mount.
	w.ok(os.Mkdir(w.path("tree"), 0o755))
	tree := w.handle("tree")
	w.set(tree, image.Staging{Handle: tree, Layout: image.LayoutDirectory, Size: 1 << 30, Slabs: []image.SlabRef{{ID: "tree"}}})
	for _, again := range []bool{true, false} {
		w.ok(w.node.host.MountFilesystem(bg, anchorPrefix+tree.String(), w.staging(tree), "tmpfs", []string{"ro", "size=4k", "nr_inodes=2"}))
		w.restart()
		if again {
			w.stage(tree, "")
			w.write(filepath.Join(w.staging(tree), "f"), "x")
			w.reads(w.path("tree/f"), "x")
		}
		w.unstage(tree)
	}
	// The manager is gone or has forgotten the image: what is mounted comes down.
	w.stage(h, host.Ext4)
	w.restart()
	w.down = fault.New(fault.Unavailable, "no manager")
	w.fails(w.node.Unstage(bg, h, w.staging(h)), fault.Unavailable, "no manager")
	if staged, err := w.node.Staged(bg, h); err != nil || staged {
		t.Fatalf("staged=%v %v", staged, err)
	}
	w.down = fault.New(fault.NotFound, "no image")
	w.unstage(h)
}

func TestConcurrentCallsForManyImages(t *testing.T) {
	w := newWorld(t)
	var all []image.Handle
	for _, name := range []string{"a", "b", "c"} {
		all = append(all, w.volume(name, 16<<20))
		w.staging(all[len(all)-1])
	}
	each := func(f func(image.Handle) error) {
		t.Helper()
		var wg sync.WaitGroup
		errs := make(chan error, 100)
		for _, h := range all {
			for range 4 {
				wg.Go(func() { errs <- f(h) })
			}
		}
		wg.Wait()
		close(errs)
		for err := range errs {
			if err != nil {
				t.Error(err)
			}
		}
	}
	each(func(h image.Handle) error { return w.node.Stage(bg, w.request(h, host.Ext4)) })
	each(func(h image.Handle) error { return w.node.Publish(bg, w.publication(h, "t-"+h.Image)) })
	for _, h := range all {
		s, err := w.node.find(bg, h)
		w.ok(err)
		if len(s.devices) != 1 || len(s.mounts) != 2 {
			t.Fatalf("%s: %+v", h, s)
		}
	}
	each(func(h image.Handle) error { return w.node.Unpublish(bg, h, w.path("t-"+h.Image)) })
	each(func(h image.Handle) error { return w.node.Unstage(bg, h, w.path("staging-"+h.Image)) })
}

func TestKubeletFolderMayBeALink(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	link := filepath.Join(t.TempDir(), "kubelet")
	w.ok(os.Symlink(w.dir, link))
	w.node.cfg.KubeletDir = link
	staging, target := filepath.Join(link, "s"), filepath.Join(link, "pods/1/mount")
	for range 2 {
		w.ok(w.node.Stage(bg, StageRequest{Handle: h, StagingPath: staging, Access: image.Access{Mode: image.SingleNodeMultiWriter}}))
		w.ok(w.node.Publish(bg, PublishRequest{Handle: h, StagingPath: staging, TargetPath: target, Access: image.Access{Mode: image.SingleNodeMultiWriter}}))
	}
	if at, err := w.node.host.MountsAt(w.path("pods/1/mount")); err != nil || len(at) != 1 {
		t.Fatalf("mounts: %v %v", at, err)
	}
	w.ok(w.node.Unpublish(bg, h, target))
	w.ok(w.node.Unstage(bg, h, staging))
}

func TestAVolumeInUseIsNotTornDown(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	w.stage(h, host.Ext4)
	w.ok(w.node.Publish(bg, w.publication(h, "target")))
	f, err := os.Create(w.path("target/open"))
	w.ok(err)
	w.fails(w.node.Unpublish(bg, h, w.path("target")), fault.InUse, w.path("target"))
	w.ok(f.Close())
	w.ok(w.node.Unpublish(bg, h, w.path("target")))
	other := w.request(h, host.Ext4)
	other.StagingPath = w.path("elsewhere")
	w.fails(w.node.Stage(bg, other), fault.Unavailable, "staged in part", w.staging(h))
	xfs := w.request(h, host.XFS)
	w.fails(w.node.Stage(bg, xfs), fault.Unavailable, "staged in part", "xfs", "ext4")
}

func TestWaitingCallersLearnThatWorkGoesOn(t *testing.T) {
	w := newWorld(t)
	h := w.volume("v", 16<<20)
	unlock, err := w.node.lock(bg, h)
	w.ok(err)
	ctx, cancel := context.WithCancel(bg)
	cancel()
	_, err = w.node.lock(ctx, h)
	w.fails(err, fault.Pending, "still running")
	_, err = w.node.Freeze(bg, h, time.Minute)
	w.fails(err, fault.Pending)
	other := w.volume("other", 16<<20)
	w.stage(other, "") // does not wait
	unlock()
	w.stage(h, "")
}
