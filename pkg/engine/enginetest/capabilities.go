package enginetest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// TestCapabilitiesHaveTests: a capability that the suite does not check yet must
// not be declared silently.
func (s suite) TestCapabilitiesHaveTests(t *testing.T) {
	checked := []engine.Capability{engine.CapSnapshot, engine.CapClone, engine.CapCopy, engine.CapMeter, engine.CapQuota, engine.CapImport}
	for _, c := range s.Expect {
		if !slices.Contains(checked, c) {
			t.Errorf("capability %q: write its conformance test first", c)
		}
	}
}

// native is what the engine does natively, c with it. The test ends when c is
// expected of the engine, but not declared by it.
func (s suite) native(t *testing.T, e engine.Engine, c engine.Capability) engine.Capabilities {
	t.Helper()
	caps := engine.Discover(e)
	if !slices.Contains(caps.List(), c) {
		t.Fatalf("capability %q is expected (Harness.Expect), but the engine does not declare it: it declares %v; its notes: %q",
			c, caps.List(), describe(t, e).Notes)
	}
	return caps
}

type copyFunc func(ctx context.Context, source string, spec engine.SlabSpec) error

// copies runs test with each native way of making a slab from another, on each
// kind of slab. A kind is left out where the engine declines it, but one must
// work.
func (s suite) copies(t *testing.T, only engine.Capability, test func(t *testing.T, e engine.Engine, k engine.Kind, make copyFunc)) {
	ways := map[engine.Capability]func(engine.Capabilities) copyFunc{
		engine.CapSnapshot: func(c engine.Capabilities) copyFunc { return c.Snapshotter.SnapshotSlab },
		engine.CapClone:    func(c engine.Capabilities) copyFunc { return c.Cloner.CloneSlab },
		engine.CapCopy: func(c engine.Capabilities) copyFunc {
			return func(ctx context.Context, source string, spec engine.SlabSpec) error {
				return c.Copier.CopySlab(ctx, source, spec, nil)
			}
		},
	}
	for way, get := range ways {
		if !slices.Contains(s.Expect, way) || only != "" && way != only {
			continue
		}
		t.Run(string(way), func(t *testing.T) {
			s.native(t, s.one(t), way)
			works := 0
			s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
				create(t, e, "probe", k, mib)
				make := get(s.native(t, e, way))
				switch err := make(t.Context(), "probe", engine.SlabSpec{ID: "probed", Kind: k, Size: mib}); {
				case errors.Is(err, engine.ErrDeclined):
					same(t, "slabs after a call that was declined", slabIDs(t, e), []string{"probe"})
					return
				case err != nil:
					t.Fatal(err)
				}
				works++
				ok(t, e.DeleteSlab(t.Context(), "probe"))
				ok(t, e.DeleteSlab(t.Context(), "probed"))
				test(t, e, k, make)
			})
			if works == 0 {
				t.Errorf("%s is declared, but declined for every kind", way)
			}
		})
	}
}

// TestCopyIsIndependent: a copy has the source's bytes, and neither changes the
// other. More space than the source has reads as zero.
func (s suite) TestCopyIsIndependent(t *testing.T) {
	s.copies(t, "", func(t *testing.T, e engine.Engine, k engine.Kind, make copyFunc) {
		const size, larger = 4 * mib, 6 * mib
		create(t, e, "a", k, size)
		a := attach(t, e, "a")
		put(t, a, k, 0, pattern(1, 4096))
		put(t, a, k, size-4096, pattern(2, 4096))
		specs := []engine.SlabSpec{{ID: "same", Kind: k, Size: size}, {ID: "larger", Kind: k, Size: larger}}
		for _, spec := range specs {
			ok(t, make(t.Context(), "a", spec))
			if have := slabsOf(t, e)[spec.ID]; have.Kind != k || have.Size != spec.Size {
				t.Errorf("made %+v, listed %+v", spec, have)
			}
			b := attach(t, e, spec.ID)
			has(t, b, k, 0, pattern(1, 4096))
			has(t, b, k, size-4096, pattern(2, 4096))
			if k == engine.Block {
				zero(t, b, 4096, size-8192)
				zero(t, b, size, spec.Size-size)
			}
			put(t, b, k, mib, pattern(3, 4096)) // in the copy only
			if k == engine.Block {
				zero(t, a, mib, 4096)
			} else if _, err := os.Stat(fmt.Sprintf("%s/%d", a, mib)); !os.IsNotExist(err) {
				t.Errorf("a file made in the copy is in the source: %v", err)
			}
		}
		put(t, a, k, 0, pattern(9, 4096)) // in the source only
		for _, spec := range specs {
			ok(t, make(t.Context(), "a", spec)) // lost reply: nothing is cut again
			has(t, attach(t, e, spec.ID), k, 0, pattern(1, 4096))
		}
		ok(t, e.DetachSlab(t.Context(), "a"))
		ok(t, e.DeleteSlab(t.Context(), "a"))
		has(t, attach(t, e, "same"), k, 0, pattern(1, 4096))
		ok(t, make(t.Context(), "a", specs[0])) // its reply was lost, its source is gone
		ok(t, e.ResizeSlab(t.Context(), "same", larger))
		ok(t, e.DetachSlab(t.Context(), "same"))
		same := attach(t, e, "same")
		has(t, same, k, size-4096, pattern(2, 4096))
		if k == engine.Block {
			zero(t, same, size, larger-size)
		}
		ok(t, e.DetachSlab(t.Context(), "same"))
		ok(t, e.DeleteSlab(t.Context(), "same"))
		has(t, attach(t, e, "larger"), k, 0, pattern(1, 4096))
	})
}

// TestCopyOfACopy: generations, and their deletion from the oldest on.
func (s suite) TestCopyOfACopy(t *testing.T) {
	s.copies(t, "", func(t *testing.T, e engine.Engine, k engine.Kind, make copyFunc) {
		create(t, e, "g0", k, mib)
		for i := range 5 {
			from, to := fmt.Sprintf("g%d", i), fmt.Sprintf("g%d", i+1)
			put(t, attach(t, e, from), k, int64(i)*4096, pattern(byte(i), 4096))
			ok(t, make(t.Context(), from, engine.SlabSpec{ID: to, Kind: k, Size: mib}))
		}
		for i := range 5 {
			id := fmt.Sprintf("g%d", i)
			ok(t, e.DetachSlab(t.Context(), id))
			ok(t, e.DeleteSlab(t.Context(), id))
		}
		last := attach(t, e, "g5")
		for i := range 5 {
			has(t, last, k, int64(i)*4096, pattern(byte(i), 4096))
		}
	})
}

// TestCopyRefusals: each error is precise and leaves nothing.
func (s suite) TestCopyRefusals(t *testing.T) {
	s.copies(t, "", func(t *testing.T, e engine.Engine, k engine.Kind, make copyFunc) {
		create(t, e, "a", k, mib)
		create(t, e, "b", k, 2*mib)
		fails(t, make(t.Context(), "nothing", engine.SlabSpec{ID: "c", Kind: k, Size: mib}), fault.NotFound)
		fails(t, make(t.Context(), "a", engine.SlabSpec{ID: "b", Kind: k, Size: mib}), fault.Exists)
		fails(t, make(t.Context(), "a", engine.SlabSpec{ID: "B", Kind: k, Size: mib}), fault.Invalid)
		fails(t, make(t.Context(), "../a", engine.SlabSpec{ID: "c", Kind: k, Size: mib}), fault.Invalid)
		fails(t, make(t.Context(), "a", engine.SlabSpec{ID: "c", Kind: k, Size: 0}), fault.Invalid)
		fails(t, make(t.Context(), "a", engine.SlabSpec{ID: "c", Kind: "disk", Size: mib}), fault.Invalid)
		same(t, "slabs", slabIDs(t, e), []string{"a", "b"})
	})
}

// TestSnapshotIsAPointInTime: while one writer writes in order, a snapshot holds
// everything up to some write, and nothing after it.
func (s suite) TestSnapshotIsAPointInTime(t *testing.T) {
	s.copies(t, engine.CapSnapshot, func(t *testing.T, e engine.Engine, k engine.Kind, make copyFunc) {
		const blocks, block = 64, 4096
		create(t, e, "a", k, mib)
		write, last := blockWriter(attach(t, e, "a"), blocks, block), lastBlock
		if k == engine.Tree {
			write, last = treeWriter(attach(t, e, "a")), lastFile
		}
		var done atomic.Int64
		stop, ended := context.WithCancel(t.Context())
		result := startWriter(stop, write, &done)
		defer ended()
		for i := range 5 {
			reach(t, &done, done.Load()+2*blocks)
			id := fmt.Sprintf("snap%d", i)
			before := done.Load()
			ok(t, make(t.Context(), "a", engine.SlabSpec{ID: id, Kind: k, Size: mib}))
			after := done.Load()
			// The write that is under way may be in it, so one more than after.
			if have := last(t, attach(t, e, id), blocks, block); have < before || have > after+1 {
				t.Errorf("cut between writes %d and %d, but the snapshot ends with %d", before, after, have)
			}
		}
		ended()
		ok(t, <-result)
	})
}

func startWriter(ctx context.Context, write func(n int64) error, done *atomic.Int64) <-chan error {
	result := make(chan error, 1)
	go func() {
		for n := int64(1); ctx.Err() == nil; n++ {
			if err := write(n); err != nil {
				result <- err
				return
			}
			done.Store(n)
		}
		result <- nil
	}()
	return result
}

// reach waits until a writer got somewhere.
func reach(t *testing.T, done *atomic.Int64, n int64) {
	t.Helper()
	look := time.NewTicker(100 * time.Microsecond)
	defer look.Stop()
	for done.Load() < n {
		select {
		case <-t.Context().Done():
			t.Fatal("the test is over, the writer is not")
		case <-look.C:
		}
	}
}

// blockWriter writes n into block n mod blocks.
func blockWriter(path string, blocks, block int64) func(n int64) error {
	return func(n int64) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(binary.BigEndian.AppendUint64(nil, uint64(n)), n%blocks*block)
		return errors.Join(err, f.Close())
	}
}

// lastBlock returns the last write that is there, and fails if an earlier one is not.
func lastBlock(t *testing.T, path string, blocks, block int64) (last int64) {
	t.Helper()
	data := make([]byte, blocks*block)
	f, err := os.Open(path)
	ok(t, err)
	defer f.Close()
	_, err = f.ReadAt(data, 0)
	ok(t, err)
	at := func(i int64) int64 { return int64(binary.BigEndian.Uint64(data[i*block:])) }
	for i := range blocks {
		last = max(last, at(i))
	}
	for n := max(1, last-blocks+1); n <= last; n++ {
		if at(n%blocks) != n {
			t.Errorf("write %d is there, but write %d is not: its block holds %d", last, n, at(n%blocks))
		}
	}
	return last
}

// treeWriter makes file n and removes the one before it.
func treeWriter(path string) func(n int64) error {
	return func(n int64) error {
		err := os.WriteFile(fmt.Sprintf("%s/%d", path, n), fmt.Append(nil, n), 0o644)
		if err == nil && n > 1 {
			err = os.Remove(fmt.Sprintf("%s/%d", path, n-1))
		}
		return err
	}
}

// lastFile returns the newest file that is there; the one before it may be, others not.
func lastFile(t *testing.T, path string, _, _ int64) (last int64) {
	t.Helper()
	entries, err := os.ReadDir(path)
	ok(t, err)
	var all []int64
	for _, entry := range entries {
		var n int64
		_, err := fmt.Sscan(entry.Name(), &n)
		ok(t, err)
		all = append(all, n)
	}
	slices.Sort(all)
	if len(all) == 0 || len(all) > 2 || all[len(all)-1]-all[0] != int64(len(all)-1) {
		t.Fatalf("files %v: that was never so at one moment", all)
	}
	return all[len(all)-1]
}

// TestMeter measures what was written.
func (s suite) TestMeter(t *testing.T) {
	if !slices.Contains(s.Expect, engine.CapMeter) {
		return
	}
	s.kinds(t, func(t *testing.T, e engine.Engine, k engine.Kind) {
		meter := s.native(t, e, engine.CapMeter).Meter
		u, err := meter.DomainUsage(t.Context())
		ok(t, err)
		if u.Total <= 0 || u.Used < 0 || u.Available <= 0 || u.Used+u.Available > u.Total {
			t.Errorf("the domain's usage cannot be: %+v", u)
		}
		create(t, e, "a", k, 32*mib)
		path := attach(t, e, "a")
		fresh, _ := meter.SlabUsage(t.Context(), "a") // an error comes again below
		put(t, path, k, 0, pattern(1, 8*mib))
		settle(t, path)
		u, err = meter.SlabUsage(t.Context(), "a")
		if k == engine.Tree && errors.Is(err, engine.ErrDeclined) && !slices.Contains(s.Expect, engine.CapQuota) {
			return
		}
		ok(t, err)
		if full := fresh.Total == 32*mib && fresh.Used == fresh.Total; full {
			// All of its space was allocated when it was made.
			if u != fresh {
				t.Errorf("a slab that was made as %+v is %+v after writing", fresh, u)
			}
		} else if u.Total != 32*mib || u.Used < 8*mib || u.Used > 16*mib || u.Available != u.Total-u.Used {
			t.Errorf("after writing 8 MiB of 32: %+v", u)
		}
		_, err = meter.SlabUsage(t.Context(), "nothing")
		fails(t, err, fault.NotFound)
		_, err = meter.SlabUsage(t.Context(), "../a")
		fails(t, err, fault.Invalid)
	})
}

// settle makes a file system bring its accounts up to date: btrfs counts when it
// commits.
func settle(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	ok(t, err)
	defer f.Close()
	ok(t, unix.Syncfs(int(f.Fd())))
}

// TestQuotaStopsAWriter: a tree takes no more than its size, until it grows.
func (s suite) TestQuotaStopsAWriter(t *testing.T) {
	if !slices.Contains(s.Expect, engine.CapQuota) {
		return
	}
	e := s.one(t)
	caps := s.native(t, e, engine.CapQuota)
	const size, slack = 16 * mib, 4 * mib
	create(t, e, "a", engine.Tree, size)
	a := attach(t, e, "a")
	first := fill(t, a+"/first", 64*mib)
	if first < size-slack || first > size+slack {
		t.Errorf("a tree of %d bytes took %d", size, first)
	}
	ok(t, e.ResizeSlab(t.Context(), "a", 2*size))
	if both := first + fill(t, a+"/second", 64*mib); both < 2*size-slack || both > 2*size+slack {
		t.Errorf("a tree that grew to %d bytes took %d", 2*size, both)
	}
	quota := caps.Quota
	ok(t, quota.SetQuota(t.Context(), "a", 3*size))
	if third := fill(t, a+"/third", 64*mib); third < size-slack {
		t.Errorf("with a quota of %d more bytes the tree took %d", size, third)
	}
	fails(t, quota.SetQuota(t.Context(), "nothing", size), fault.NotFound)
	fails(t, quota.SetQuota(t.Context(), "a", 0), fault.Invalid)
	if snapshotter := caps.Snapshotter; snapshotter != nil {
		switch err := snapshotter.SnapshotSlab(t.Context(), "a", engine.SlabSpec{ID: "b", Kind: engine.Tree, Size: 4 * size}); {
		case errors.Is(err, engine.ErrDeclined):
		case err != nil:
			t.Error(err)
		default:
			if more := fill(t, attach(t, e, "b")+"/fourth", 64*mib); more < size-slack || more > size+slack {
				t.Errorf("a copy with room for %d more bytes took %d", size, more)
			}
		}
	}
}

// fill writes until there is no room, or limit bytes are written, and returns
// how many reached the disk.
func fill(t *testing.T, path string, limit int64) (written int64) {
	t.Helper()
	f, err := os.Create(path)
	ok(t, err)
	defer f.Close()
	chunk := pattern(7, 256<<10)
	for written < limit {
		n, err := f.Write(chunk)
		if err == nil {
			err = f.Sync()
		}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return written
		}
		ok(t, err)
		written += int64(n)
	}
	return written
}
