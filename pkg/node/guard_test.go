package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
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
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// fakeLayers are thin layers that only remember; the real ones are in guard_lab_test.go.
type fakeLayers struct {
	mu      sync.Mutex
	changes int64
	thin    []block.Thin
	paused  map[string]block.Thin
	calls   []string // what was paused, and resumed
	kept    int
	pending bool // other work goes on
	free    map[uint64]int64
	fails   error         // what measuring answers
	hangs   chan struct{} // measuring file system 1 waits for it, if it is not nil
}

const testTotal = 100 << 30 // of which 1 GiB is kept, and half of that the floor

func newFakeLayers(fs ...uint64) (*fakeLayers, *guard) {
	f := &fakeLayers{paused: map[string]block.Thin{}, free: map[uint64]int64{}}
	for i, n := range fs {
		f.thin = append(f.thin, block.Thin{Name: fmt.Sprintf("layer%d", i), File: "/f", FS: n})
		f.free[n] = testTotal
	}
	return f, newGuard(f, f.usage)
}

func (f *fakeLayers) usage(_ context.Context, of []block.Thin) (host.Usage, error) {
	f.mu.Lock()
	hangs, fails, free := f.hangs, f.fails, f.free[of[0].FS]
	f.mu.Unlock()
	if hangs != nil && of[0].FS == 1 {
		<-hangs
	}
	return host.Usage{Total: testTotal, Available: free}, fails
}

func (f *fakeLayers) Changes() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changes
}

func (f *fakeLayers) Thin(context.Context) ([]block.Thin, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.thin), nil
}

func (f *fakeLayers) Pause(_ context.Context, list []block.Thin, why string, atOnce bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if why == "" {
		return errors.New("nobody says why")
	}
	if f.pending && !atOnce {
		return fault.New(fault.Pending, "busy")
	}
	for _, t := range list {
		if _, is := f.paused[t.Name]; !is {
			f.paused[t.Name] = t
			f.calls = append(f.calls, "pause "+t.Name)
		}
	}
	return nil
}

func (f *fakeLayers) Paused() (out []block.Thin) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.paused {
		out = append(out, t)
	}
	return out
}

func (f *fakeLayers) Keep(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept++
	return nil
}

func (f *fakeLayers) Unpause(list []block.Thin) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range list {
		if _, is := f.paused[t.Name]; is {
			delete(f.paused, t.Name)
			f.calls = append(f.calls, "resume "+t.Name)
		}
	}
	return nil
}

func (f *fakeLayers) did() (calls []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls, f.calls = f.calls, nil
	return calls
}

func (f *fakeLayers) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// guarded is a guard that a test moves on, and its clock.
type guarded struct {
	*testing.T
	*fakeLayers
	*guard
	now time.Time
}

func newGuarded(t *testing.T, fs ...uint64) *guarded {
	f, g := newFakeLayers(fs...)
	w := &guarded{t, f, g, time.UnixMilli(1_700_000_000_000)}
	g.list(t.Context(), 0, w.now)
	return w
}

// at says what the guard does when so much is free.
func (w *guarded) at(after time.Duration, free int64, want ...string) {
	w.Helper()
	w.set(func() { w.free[1] = free })
	w.now = w.now.Add(after)
	w.look(w.Context(), 1, w.now)
	if got := w.did(); !slices.Equal(got, want) {
		w.Errorf("with %d bytes free it did %q, want %q", free, got, want)
	}
}

func TestLayersWaitBeforeTheirStorageIsFullUntilThereIsSpace(t *testing.T) {
	r := layer.ReserveOf(testTotal)
	w := newGuarded(t, 1, 1, 2)
	w.at(0, r.High)
	w.at(time.Second, r.Low)
	if w.waiting(1) || w.scarce() != nil {
		t.Error("it says that they wait")
	}
	w.at(time.Second, r.Low-1, "pause layer0", "pause layer1")
	said := strings.Join(w.scarce(), "; ")
	for _, word := range []string{"2 layers", "1023 MiB free", "1024 MiB", "1536 MiB"} {
		if !strings.Contains(said, word) || !w.waiting(1) || w.waiting(2) {
			t.Errorf("%q does not say %q", said, word)
		}
	}
	w.at(time.Second, r.Low)
	w.at(time.Second, r.High-1)
	w.at(time.Second, r.High, "resume layer0", "resume layer1")
	if w.waiting(1) {
		t.Error("they still wait")
	}
	w.at(time.Second, r.Low)
}

func TestWhatWaitsBreathesAboveTheFloorOnly(t *testing.T) {
	r := layer.ReserveOf(testTotal)
	w := newGuarded(t, 1)
	w.at(0, r.Floor, "pause layer0")
	w.at(breathEvery-time.Second, r.Floor)
	w.at(time.Second, r.Floor, "resume layer0", "pause layer0")
	w.at(breathEvery/2, r.Floor)
	if w.closed(1) != "" {
		t.Error("nothing may be taken down")
	}
	w.at(breathEvery, r.Floor-1)
	if w.closed(1) == "" || w.closed(2) != "" {
		t.Error("everything may be written")
	}
	w.at(0, r.Floor, "resume layer0", "pause layer0")
}

func TestOtherWorkIsWaitedForAboveTheFloorOnly(t *testing.T) {
	r := layer.ReserveOf(testTotal)
	w := newGuarded(t, 1)
	w.set(func() { w.pending = true })
	w.at(0, r.Low-1)
	if !w.waiting(1) {
		t.Error("new work is let in")
	}
	w.at(time.Second, r.Floor-1, "pause layer0")
	w.at(time.Second, r.High, "resume layer0")
	w.at(time.Second, r.Low-1)
	w.set(func() { w.pending = false })
	w.at(time.Second, r.Low-1, "pause layer0")
}

func TestAStorageThatCannotBeMeasuredStaysAsItIs(t *testing.T) {
	r := layer.ReserveOf(testTotal)
	w := newGuarded(t, 1)
	w.set(func() { w.fails = fault.New(fault.Unavailable, "no answer") })
	w.at(0, 0)
	w.set(func() { w.fails = nil })
	w.at(time.Second, r.Low-1, "pause layer0")
	w.set(func() { w.fails = fault.New(fault.Unavailable, "no answer") })
	w.at(time.Hour, r.High)
	w.set(func() { w.fails = nil })
	w.at(time.Second, r.High, "resume layer0")
}

func TestWhatIsNotThinAnyMoreGoesOn(t *testing.T) {
	r := layer.ReserveOf(testTotal)
	w := newGuarded(t, 1, 1)
	w.at(0, r.Floor-1, "pause layer0", "pause layer1")
	w.set(func() { w.thin = w.thin[1:] })
	w.list(t.Context(), 1, w.now)
	if got := w.did(); !slices.Equal(got, []string{"resume layer0"}) {
		t.Errorf("%q", got)
	}
	w.set(func() { w.thin = nil })
	w.list(t.Context(), 2, w.now)
	if got := w.did(); !slices.Equal(got, []string{"resume layer1"}) || w.waiting(1) {
		t.Errorf("%q, it waits: %t", got, w.waiting(1))
	}
	// A new one is paused at the next look.
	w.set(func() { w.thin = []block.Thin{{Name: "new", FS: 1}} })
	w.list(t.Context(), 3, w.now)
	w.at(0, r.Low-1, "pause new")
}

func TestADeadStorageHoldsUpNobodysGuard(t *testing.T) {
	r := layer.ReserveOf(testTotal)
	f, g := newFakeLayers(1, 2)
	release := make(chan struct{})
	f.hangs = release
	f.free[1], f.free[2] = 0, r.Low-1
	now := time.UnixMilli(1_700_000_000_000)
	until := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("never %s", what)
			}
			now = now.Add(lookSoon)
			g.turn(t.Context(), now)
		}
	}
	isPaused := func(name string) bool {
		return slices.ContainsFunc(f.Paused(), func(p block.Thin) bool { return p.Name == name })
	}
	until("paused", func() bool { return isPaused("layer1") })
	f.set(func() { f.kept = 0 })
	until("kept", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.kept > 2 })
	f.set(func() { f.free[2] = r.High })
	until("resumed", func() bool { return !isPaused("layer1") })
	if isPaused("layer0") {
		t.Error("what was not measured is paused")
	}
	close(release)
	until("paused", func() bool { return isPaused("layer0") })
	// Devices that changed are looked for.
	f.set(func() { f.changes++; f.thin = f.thin[1:] })
	until("resumed", func() bool { return !isPaused("layer0") })
}

func TestALayerWithoutAllItsSpaceIsNotStagedOnAFullStorage(t *testing.T) {
	dir := hosttest.Filesystem(t, "ext4", 256<<20)
	w := newWorld(t)
	const size, chunk = 8 << 20, 32 << 10
	thin := block.Slab{ID: "d/thin", Path: filepath.Join(dir, "thin"), Size: size, Chunk: chunk}
	whole := thin
	whole.Path = filepath.Join(dir, "whole")
	for _, s := range []block.Slab{thin, whole} {
		w.ok(os.WriteFile(s.Path, nil, 0o600))
		w.ok(os.Truncate(s.Path, layer.StoreSize(size, chunk)))
	}
	f, err := os.OpenFile(whole.Path, os.O_RDWR, 0)
	w.ok(err)
	w.ok(unix.Fallocate(int(f.Fd()), 0, 0, layer.StoreSize(size, chunk)))
	w.ok(f.Close())
	raw := block.Slab{ID: "d/raw", Path: thin.Path, Size: size}
	ctx := context.Background()
	w.ok(w.node.roomFor(ctx, []block.Slab{thin, raw}))

	u, err := w.node.host.Usage(ctx, dir)
	w.ok(err)
	filler, err := os.Create(filepath.Join(dir, "filler"))
	w.ok(err)
	defer filler.Close()
	r := layer.ReserveOf(u.Total)
	w.ok(unix.Fallocate(int(filler.Fd()), 0, 0, u.Available-r.Low+1<<20))
	w.fails(w.node.roomFor(ctx, []block.Slab{thin, raw}), fault.Exhausted, "would wait", "MiB free")
	w.ok(w.node.roomFor(ctx, []block.Slab{whole, raw}))
	w.ok(w.node.roomFor(ctx, []block.Slab{raw}))

	// Where writes wait, no others begin before they go on.
	var st unix.Stat_t
	w.ok(unix.Stat(thin.Path, &st))
	w.ok(filler.Truncate(u.Available - r.High + 1<<20))
	w.ok(filler.Sync())
	w.ok(w.node.roomFor(ctx, []block.Slab{thin, raw}))
	w.node.guard.storages[st.Dev] = &storage{low: true, usage: u}
	w.fails(w.node.roomFor(ctx, []block.Slab{thin, raw}), fault.Exhausted, "would wait")

	// What is measured is the storage of the file, whether its path is seen or not.
	of := []block.Thin{{File: thin.Path, FS: st.Dev, Inode: st.Ino}}
	for _, path := range []string{thin.Path, "/nonexistent/thin", whole.Path} {
		of[0].File = path
		got, err := w.node.storageUsage(ctx, of)
		w.ok(err)
		if got.Total != u.Total {
			t.Errorf("as %s the storage has %d bytes, want %d", path, got.Total, u.Total)
		}
	}
	of[0].FS = unix.Mkdev(4095, 77)
	_, err = w.node.storageUsage(ctx, of)
	w.fails(err, fault.Unavailable, "cannot be found")
}

func TestAStorageOnBtrfsIsFoundByItsMount(t *testing.T) {
	w := newWorld(t)
	dir := hosttest.Filesystem(t, "btrfs", 256<<20)
	var st unix.Stat_t
	w.ok(unix.Stat(dir, &st))
	want, err := w.node.host.Usage(t.Context(), dir)
	w.ok(err)
	got, err := w.node.storageUsage(t.Context(), []block.Thin{{File: "/nonexistent/thin", FS: st.Dev, Inode: 257}})
	w.ok(err)
	if got.Total != want.Total {
		t.Errorf("it has %d bytes, want %d", got.Total, want.Total)
	}
}

// metered is a storage that is measured by its engine.
type metered struct{ engine.Engine }

func (metered) DomainUsage(context.Context) (engine.Usage, error) {
	return engine.Usage{Total: testTotal, Used: 1 << 30, Available: testTotal - 1<<30}, nil
}

func (metered) SlabUsage(context.Context, string) (engine.Usage, error) { return engine.Usage{}, nil }

// known are the domains that are open.
type known []string

func (k known) KnownDomains() (out []image.DomainInfo) {
	for _, id := range k {
		out = append(out, image.DomainInfo{ID: id})
	}
	return out
}

// TestAStorageWithoutAMountIsMeasuredByItsDomain, as one that an earlier process mounted by FUSE.
func TestAStorageWithoutAMountIsMeasuredByItsDomain(t *testing.T) {
	n := New(Config{NodeID: "n1", Domains: known{"other", "d"}, Engines: func(domain string) (*engine.Users, error) {
		if domain != "d" {
			return nil, fault.New(fault.Unavailable, "domain %s is not open", domain)
		}
		return engine.NewUsers(metered{}), nil
	}})
	of := func(domain string) []block.Thin {
		sum := sha256.Sum256([]byte(domain))
		return []block.Thin{{Name: "quarry-s-" + hex.EncodeToString(sum[:4]) + "-1", File: "/nonexistent/thin", FS: unix.Mkdev(4095, 77)}}
	}
	got, err := n.storageUsage(t.Context(), of("d"))
	if err != nil || got.Total != testTotal || got.Available != testTotal-1<<30 {
		t.Errorf("%+v, %v", got, err)
	}
	for domain, word := range map[string]string{"other": "not open", "unknown": "cannot be found"} {
		if _, err := n.storageUsage(t.Context(), of(domain)); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", domain, err)
		}
	}
}
