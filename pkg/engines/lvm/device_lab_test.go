package lvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/test/lab"
)

func attach(t *testing.T, e engine.Engine, id string) string {
	t.Helper()
	a, err := e.AttachSlab(t.Context(), id, engine.AttachOptions{})
	ok(t, err)
	t.Cleanup(func() { ok(t, e.DetachSlab(context.WithoutCancel(t.Context()), id)) })
	return a.Path
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	ok(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func TestASlabThatIsOpen(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 100)
	e := g.open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 8 * mib}))
	path := attach(t, e, "a")
	f := open(t, path)
	ok(t, e.DetachSlab(t.Context(), "a")) // stays: somebody has it open
	if again := attach(t, e, "a"); again != path {
		t.Errorf("attached at %s, then at %s", path, again)
	}
	is(t, "deleting", e.DeleteSlab(t.Context(), "a"), fault.InUse, "open")
	ok(t, e.ResizeSlab(t.Context(), "a", 16*mib)) // under its user
	if size, err := f.Seek(0, 2); err != nil || size != 16*mib {
		t.Errorf("the open device has %d bytes: %v", size, err)
	}
	ok(t, f.Close())
	ok(t, e.DetachSlab(t.Context(), "a"))
	if _, err := os.Stat("/dev/mapper/" + lvm.DeviceName(g.name, "qs.a")); err == nil {
		t.Error("its device is still there")
	}
	attach(t, e, "a")
	ok(t, e.DeleteSlab(t.Context(), "a")) // attached, but not open
}

// TestASlabThatIsAboutToBeOpened: the engine cannot see who has only been told
// the path; those of one process keep out of one another's way.
func TestASlabThatIsAboutToBeOpened(t *testing.T) {
	lab.Need(t)
	e := newGroup(t, 100).open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 8 * mib}))
	users := engine.NewUsers(e)
	a, release, err := users.Attach(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	_, other, err := users.Attach(t.Context(), "a", engine.AttachOptions{})
	ok(t, err)
	ok(t, errors.Join(other(t.Context(), true), users.Detach(t.Context(), "a")))
	f := open(t, a.Path) // still there
	ok(t, release(t.Context(), false))
	_, err = f.WriteAt(make([]byte, 4096), 0)
	ok(t, errors.Join(err, f.Sync()))
	ok(t, users.Detach(t.Context(), "a")) // open: stays
	ok(t, f.Close())
	ok(t, users.Detach(t.Context(), "a"))
	if _, err := os.Stat(a.Path); err == nil {
		t.Error("its device is still there")
	}
}

// TestNobodySeesOldBytes: the manager wipes what a volume gets, at creation and
// at growth.
func TestNobodySeesOldBytes(t *testing.T) {
	lab.Need(t)
	w := &world{t: t, group: newGroup(t, 40, "--metadatasize", "1m"), now: time.UnixMilli(1_700_000_000_000)}
	disk := open(t, w.group.disk)
	old := bytes.Repeat([]byte("old bytes"), mib)
	_, err := disk.WriteAt(old[:8*mib], 4*mib)
	ok(t, err)
	ok(t, disk.Sync())
	ok(t, w.start(0, false))
	defer w.Close()
	img, err := w.CreateVolume(t.Context(), image.CreateRequest{Name: "v", Domains: []string{"a"}, Layout: image.LayoutImage, Size: 4 * mib,
		Accesses: []image.Access{{Mode: image.SingleNodeWriter, Block: true}}})
	ok(t, err)
	img, err = w.Expand(t.Context(), img.Handle, 10*mib, 0)
	ok(t, err)
	path := attach(t, w.engine, img.Slab)
	have, err := os.ReadFile(path)
	ok(t, err)
	if len(have) != 10*mib || bytes.ContainsFunc(have, func(r rune) bool { return r != 0 }) {
		t.Errorf("a new volume of %d bytes shows what the disk held", len(have))
	}
}

func TestAFullPool(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 200).withPool(t, "32m", "4m")
	e := g.open(t, host.Exec{})
	caps := engine.Discover(e)
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 64 * mib})) // more than there is
	f := open(t, attach(t, e, "a"))
	_, err := f.WriteAt(bytes.Repeat([]byte{7}, 31*mib), 0)
	ok(t, errors.Join(err, f.Sync()))
	u, err := caps.Meter.DomainUsage(t.Context())
	if err != nil || u.Total != 32*mib || u.Used < 31*mib || u.Available != 0 {
		t.Errorf("a pool at 97%%: %+v, %v", u, err)
	}
	su, err := caps.Meter.SlabUsage(t.Context(), "a")
	if err != nil || su.Used < 31*mib || su.Available > mib {
		t.Errorf("a slab in it: %+v, %v", su, err)
	}
	is(t, "CreateSlab", e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: mib}), fault.Exhausted, "lvextend")
	is(t, "SnapshotSlab", caps.Snapshotter.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: "c", Kind: engine.Block, Size: 64 * mib}), fault.Exhausted, "lvextend")
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 1 {
		t.Errorf("slabs %v, %v", slabs, err)
	}
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.2", Slab: "a"})) // for deleting
	ok(t, f.Close())
	ok(t, e.DeleteSlab(t.Context(), "a"))
	u, err = caps.Meter.DomainUsage(t.Context())
	if err != nil || u.Available < 31*mib {
		t.Errorf("an empty pool: %+v, %v", u, err)
	}
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: mib}))
	ok(t, e.DeleteSlab(t.Context(), "b"))
}

// TestASnapshotBeneathAFrozenFilesystem: Quarry freezes what is mounted, and has
// a device between it and the slab.
func TestASnapshotBeneathAFrozenFilesystem(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 200).withPool(t, "100m", "4m")
	e := g.open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 32 * mib}))
	path := attach(t, e, "a")
	run := func(name string, args ...string) {
		t.Helper()
		if _, err := (host.Exec{}).Run(t.Context(), host.Command{Name: name, Args: args}); err != nil {
			t.Fatal(err)
		}
	}
	for _, direct := range []bool{false, true} {
		on := path
		if !direct {
			run("dmsetup", "create", "quarry-test-top", "--table", fmt.Sprintf("0 %d linear %s 0", 32*mib/512, path))
			on = "/dev/mapper/quarry-test-top"
		}
		dir := t.TempDir()
		run("mkfs.ext4", "-q", on)
		run("mount", on, dir)
		run("fsfreeze", "-f", dir)
		err := engine.Discover(e).Snapshotter.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: "s", Kind: engine.Block, Size: 32 * mib})
		run("fsfreeze", "-u", dir)
		run("umount", dir)
		if !direct {
			run("dmsetup", "remove", "quarry-test-top")
			ok(t, err)
			run("e2fsck", "-fn", attach(t, e, "s"))
			ok(t, e.DeleteSlab(t.Context(), "s"))
		} else if slabs, lerr := e.ListSlabs(t.Context()); !errors.Is(err, engine.ErrDeclined) || lerr != nil || len(slabs) != 1 {
			t.Errorf("right on the slab: %v; slabs %v, %v", err, slabs, lerr)
		}
	}
}

// TestKilledSnapshotsLetWritersGoOn: lvcreate suspends what it cuts. Killed at
// that moment, the next call or opening resumes it.
func TestKilledSnapshotsLetWritersGoOn(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 200).withPool(t, "100m", "4m")
	e := g.open(t, host.Exec{}).(*lvmEngine)
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 8 * mib}))
	f := open(t, attach(t, e, "a"))
	begin := time.Now()
	ok(t, e.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: "first", Kind: engine.Block, Size: 8 * mib}))
	whole := time.Since(begin)
	sound := e.group
	suspended := 0
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		spec := engine.SlabSpec{ID: fmt.Sprintf("s%d", i), Kind: engine.Block, Size: int64(8+i%2) * mib}
		e.group = newEngineGroupRun(g, snapshotKiller{after: func() time.Duration { return rand.N(whole) }, saw: func() {
			if s, err := sound.Suspended(t.Context(), e.uuid); err == nil && s {
				suspended++
			}
		}})
		_ = e.SnapshotSlab(t.Context(), "a", spec)
		e.group = sound
		// A new process opens the domain.
		next := g.open(t, host.Exec{}).(*lvmEngine)
		if s, err := sound.Suspended(t.Context(), e.uuid); err != nil || s {
			t.Fatalf("still suspended after a new opening: %v, %v", s, err)
		}
		_, err := f.WriteAt([]byte(spec.ID), 0)
		ok(t, errors.Join(err, f.Sync()))
		slabs, err := next.ListSlabs(t.Context())
		ok(t, err)
		for _, s := range slabs {
			if s.ID == spec.ID && s.Size != spec.Size {
				t.Errorf("half made: %+v", s)
			}
		}
		ok(t, next.SnapshotSlab(t.Context(), "a", spec))
		have := make([]byte, 2)
		_, err = open(t, attach(t, next, spec.ID)).ReadAt(have, 0)
		ok(t, err)
	}
	t.Logf("%d of %d left something suspended", suspended, rounds)
}

// snapshotKiller kills lvcreate after a while, and no other program.
type snapshotKiller struct {
	after func() time.Duration
	saw   func()
}

func (k snapshotKiller) Run(ctx context.Context, c host.Command) (host.Result, error) {
	if c.Args[0] != "lvcreate" || !strings.Contains(c.String(), " -s ") {
		return host.Exec{}.Run(ctx, c)
	}
	cmd := exec.Command(c.Name, c.Args...)
	cmd.Env = append(cmd.Environ(), "LC_ALL=C")
	if err := cmd.Start(); err != nil {
		return host.Result{}, err
	}
	timer := time.AfterFunc(k.after(), func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
	err := cmd.Wait()
	timer.Stop()
	if err != nil {
		k.saw()
		return host.Result{}, fault.New(fault.Unavailable, "killed")
	}
	return host.Result{}, nil
}
