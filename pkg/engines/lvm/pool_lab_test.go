package lvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/lab"
)

// stripes are blocks of a device that are written in order, and what of it was
// acknowledged: by an fsync that succeeded.
type stripes struct {
	step int64
	have []uint64 // by stripe
	sure []uint64
	next uint64
}

func newStripes(n, step int64) *stripes {
	return &stripes{step: step, have: make([]uint64, n), sure: make([]uint64, n)}
}

func (s *stripes) block(n uint64) []byte {
	return bytes.Repeat(binary.BigEndian.AppendUint64(nil, n), 512)
}

// write writes every nth stripe from first on, 16 to an fsync, until all are
// written or one fails.
func (s *stripes) write(f *os.File, first, nth int) error {
	var batch []int
	for i := first; i < len(s.have); i += nth {
		s.next++
		s.have[i] = s.next
		if _, err := f.WriteAt(s.block(s.next), int64(i)*s.step); err != nil {
			return err
		}
		if batch = append(batch, i); len(batch) == 16 || i+nth >= len(s.have) {
			if err := f.Sync(); err != nil {
				return err
			}
			for _, i := range batch {
				s.sure[i] = s.have[i]
			}
			batch = batch[:0]
		}
	}
	return nil
}

// check reads the device: each stripe holds what was acknowledged, or what was
// written after that and may have arrived.
func (s *stripes) check(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	ok(t, err)
	defer f.Close()
	sure := 0
	have := make([]byte, 4096)
	for i := range s.have {
		if s.have[i] == 0 {
			continue
		}
		_, err := f.ReadAt(have, int64(i)*s.step)
		ok(t, err)
		if !bytes.Equal(have, s.block(s.sure[i])) && !bytes.Equal(have, s.block(s.have[i])) {
			t.Fatalf("stripe %d of %s: %x..., acknowledged was %x", i, path, have[:16], s.sure[i])
		}
		if s.sure[i] > 0 {
			sure++
		}
	}
	if sure == 0 {
		t.Fatal("nothing was acknowledged")
	}
}

// full is how writing fails where there is no room: the page cache tells fsync of
// either.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EIO) }

// names are the group's volumes, as LVM lists them.
func (g *group) names(t *testing.T) []string {
	t.Helper()
	names := strings.Fields(g.lvm(t, "lvs", "--noheadings", "-o", "lv_name", g.name))
	slices.Sort(names)
	return names
}

// refusesNewSlabs checks that a pool that is full refuses what is new, says why,
// and leaves nothing of it; tags are made, for deleting.
func refusesNewSlabs(t *testing.T, g *group, e engine.Engine, part string) {
	t.Helper()
	before := g.names(t)
	caps := engine.Discover(e)
	spec := engine.SlabSpec{ID: "new", Kind: engine.Block, Size: 8 * mib}
	is(t, "CreateSlab", e.CreateSlab(t.Context(), spec), fault.Exhausted, "lvextend")
	spec.Size = 4 << 30
	is(t, "SnapshotSlab", caps.Snapshotter.SnapshotSlab(t.Context(), "a", spec), fault.Exhausted, "lvextend")
	is(t, "CloneSlab", caps.Cloner.CloneSlab(t.Context(), "a", spec), fault.Exhausted, "lvextend")
	if after := g.names(t); !slices.Equal(before, after) {
		t.Errorf("volumes before %v, and after what was refused %v", before, after)
	}
	u, err := caps.Meter.DomainUsage(t.Context())
	if err != nil || u.Available != 0 || !strings.Contains(u.Warning, part) {
		t.Errorf("the domain's usage: %+v, %v", u, err)
	}
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.2", Slab: "a"}))
	ok(t, e.DeleteTag(t.Context(), "i.a.2"))
}

// again detaches a slab and attaches it: what is read then comes from the disk.
func again(t *testing.T, e engine.Engine, id string) string {
	t.Helper()
	ok(t, e.DetachSlab(t.Context(), id))
	a, err := e.AttachSlab(t.Context(), id, engine.AttachOptions{})
	ok(t, err)
	t.Cleanup(func() { ok(t, e.DetachSlab(context.WithoutCancel(t.Context()), id)) })
	return a.Path
}

func TestAPoolFullOfData(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 200).withPool(t, "32m", "4m")
	g.lvm(t, "lvchange", "--errorwhenfull", "y", g.name+"/pool")
	e := g.open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 64 * mib})) // more than there is
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 8 * mib}))
	b := open(t, attach(t, e, "b"))
	_, err := b.WriteAt(bytes.Repeat([]byte{7}, 8*mib), 0)
	ok(t, errors.Join(err, b.Sync(), b.Close()))
	a := open(t, attach(t, e, "a"))
	s := newStripes(64*16, 64<<10)
	if err := s.write(a, 0, 1); !full(err) {
		t.Fatalf("writing 64 MiB into a pool of 32: %v, want it to fail", err)
	}
	refusesNewSlabs(t, g, e, "of the data of thin pool")
	ok(t, a.Close())
	s.check(t, again(t, e, "a"))

	// Space comes back, and everything goes on.
	ok(t, e.DetachSlab(t.Context(), "b"))
	ok(t, e.DeleteSlab(t.Context(), "b"))
	a = open(t, again(t, e, "a"))
	ok(t, s.write(a, 0, 16))
	ok(t, a.Close())
	s.check(t, again(t, e, "a"))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "new", Kind: engine.Block, Size: 8 * mib}))
	if u, err := engine.Discover(e).Meter.DomainUsage(t.Context()); err != nil || u.Available == 0 {
		t.Errorf("with space again: %+v, %v", u, err)
	}
}

// TestAPoolOfARestoredGroup: the backup knows nothing of the last volume, the
// kernel's part of the pool does.
func TestAPoolOfARestoredGroup(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 200).withPool(t, "64m", "4m")
	e := g.open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 8 * mib}))
	file := filepath.Join(t.TempDir(), "backup")
	g.lvm(t, "vgcfgbackup", "-f", file, g.name)
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "lost", Kind: engine.Block, Size: 8 * mib}))
	newest := filepath.Join(t.TempDir(), "newest")
	g.lvm(t, "vgcfgbackup", "-f", newest, g.name)
	_ = g.open(t, host.Exec{}) // a pool that is as it should be

	g.lvm(t, "vgcfgrestore", "-y", "--force", "-f", file, g.name)
	_, err := Open(t.Context(), g.params, host.Exec{})
	is(t, "Open, the pool is active", err, fault.Corrupt, "docs/engines/lvm.md")
	g.lvm(t, "vgchange", "-an", g.name)
	_, err = Open(t.Context(), g.params, host.Exec{})
	is(t, "Open, the pool was not active", err, fault.Corrupt, "docs/engines/lvm.md")

	g.lvm(t, "vgcfgrestore", "-y", "--force", "-f", newest, g.name)
	e = g.open(t, host.Exec{})
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 2 {
		t.Errorf("with the newest backup: %v, %v", slabs, err)
	}
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 8 * mib}))
}

func TestAPoolFullOfMetadata(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 4000)
	g.lvm(t, "lvcreate", "-y", "--type", "thin-pool", "-L", "3g", "--poolmetadatasize", "2m", "-c", "64k", "-n", "pool", g.name)
	g.params["thinPool"] = "pool"
	e := g.open(t, host.Exec{})
	caps := engine.Discover(e)
	const size = 512 * mib
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: size}))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 4 * size}))
	a := open(t, attach(t, e, "a"))
	s := newStripes(size/(64<<10), 64<<10)
	ok(t, s.write(a, 0, 1))
	// A snapshot shares all of the metadata; what is written then copies it.
	warned := false
	for i := range 20 {
		u, err := caps.Meter.DomainUsage(t.Context())
		ok(t, err)
		warned = warned || strings.Contains(u.Warning, "of the metadata of thin pool") && u.Available > 0
		err = caps.Snapshotter.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: fmt.Sprintf("s%d", i), Kind: engine.Block, Size: size})
		if errors.Is(err, fault.Exhausted) {
			break
		}
		ok(t, err)
		ok(t, s.write(a, i, 32))
	}
	refusesNewSlabs(t, g, e, "of the metadata of thin pool")
	if !warned {
		t.Error("nothing was said before the metadata was full")
	}
	b := open(t, attach(t, e, "b"))
	sb := newStripes(4*size/(64<<10), 64<<10)
	err := sb.write(b, 0, 1)
	if !full(err) {
		t.Fatalf("the metadata was not to be filled: %v", err)
	}
	t.Logf("%d stripes later: %v", sb.next, err)
	refusesNewSlabs(t, g, e, "of the metadata of thin pool")
	ok(t, errors.Join(a.Close(), b.Close()))
	s.check(t, again(t, e, "a"))
	sb.check(t, again(t, e, "b"))

	// The way out, as the documentation has it.
	slabs, err := e.ListSlabs(t.Context())
	ok(t, err)
	ok(t, errors.Join(e.DetachSlab(t.Context(), "a"), e.DetachSlab(t.Context(), "b")))
	g.lvm(t, "lvchange", "-an", g.name+"/pool")
	g.lvm(t, "lvextend", "--poolmetadatasize", "+16m", g.name+"/pool")
	e = g.open(t, host.Exec{})
	path := again(t, e, "a")
	s.check(t, path)
	a = open(t, path)
	ok(t, s.write(a, 0, 16))
	ok(t, a.Close())
	s.check(t, again(t, e, "a"))
	sb.check(t, again(t, e, "b"))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "new", Kind: engine.Block, Size: 8 * mib}))
	u, err := engine.Discover(e).Meter.DomainUsage(t.Context())
	if err != nil || u.Available == 0 || strings.Contains(u.Warning, "metadata of thin pool") {
		t.Errorf("with more metadata: %+v, %v", u, err)
	}
	for _, slab := range slabs {
		ok(t, e.DetachSlab(t.Context(), slab.ID))
		ok(t, e.DeleteSlab(t.Context(), slab.ID))
	}
}
