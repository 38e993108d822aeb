package layer

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// memory is a slab that can lose power: what was not synced may be lost.
type memory struct {
	b      []byte
	writes int
	syncs  int
	fail   error // of every write
	log    []string
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if m.fail != nil {
		return 0, m.fail
	}
	m.writes++
	m.log = append(m.log, "write")
	return copy(m.b[off:], p), nil
}

func (m *memory) Sync() error {
	m.syncs++
	m.log = append(m.log, "sync")
	return nil
}

// commit writes exceptions as the kernel does: the next area is zeroed before one is full.
func (m *memory) commit(t *testing.T, chunk int64, olds ...int64) {
	t.Helper()
	per := chunk / 16
	n := int64(0)
	if err := Exceptions(m, int64(len(m.b)), func(_, _ int64) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, old := range olds {
		area, i := n/per, n%per
		meta := 1 + area*(per+1)
		if i == per-1 {
			next := (1 + (area+1)*(per+1)) * chunk
			clear(m.b[next : next+chunk])
		}
		m.put(meta*chunk+i*16, old, meta+1+i)
		n++
	}
}

func (m *memory) put(at, old, new int64) {
	binary.LittleEndian.PutUint64(m.b[at:], uint64(old))
	binary.LittleEndian.PutUint64(m.b[at+8:], uint64(new))
}

func (m *memory) invalidate() { binary.LittleEndian.PutUint32(m.b[4:], 0) }

func store(t *testing.T, size, chunk int64) *memory {
	t.Helper()
	m := &memory{b: make([]byte, StoreSize(size, chunk))}
	for i := range m.b { // recycled space is not zero
		m.b[i] = 0xa5
	}
	if err := Format(m, chunk); err != nil {
		t.Fatal(err)
	}
	return m
}

func olds(t *testing.T, m *memory) []int64 {
	t.Helper()
	var out []int64
	if err := Exceptions(m, int64(len(m.b)), func(old, _ int64) error { out = append(out, old); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestChunkSizeBoundsTheNumberOfExceptions(t *testing.T) {
	for _, c := range []struct{ size, chunk int64 }{
		{32 << 10, 32 << 10}, {1 << 30, 32 << 10}, {512 << 30, 32 << 10}, {512<<30 + 64<<10, 64 << 10},
		{1 << 40, 64 << 10}, {16 << 40, 1 << 20}, {1 << 50, 64 << 20},
	} {
		if got := ChunkSize(c.size); got != c.chunk {
			t.Errorf("ChunkSize(%d) = %d, want %d", c.size, got, c.chunk)
		}
	}
}

// Behind the end of an image, in its last chunk, a store keeps what it held.
func TestChunksDivideTheImage(t *testing.T) {
	for _, c := range []struct{ size, chunk int64 }{
		{1, 4096}, {4096, 4096}, {1<<30 + 4096, 4096}, {1<<30 + 3*8192, 8192}, {1<<40 + 32<<10, 32 << 10}, {1<<30 + 1, 4096},
	} {
		if got := ChunkSize(c.size); got != c.chunk {
			t.Errorf("ChunkSize(%d) = %d, want %d", c.size, got, c.chunk)
		}
	}
	for _, c := range []struct{ size, granularity, unit int64 }{
		{1 << 30, 512, 32 << 10}, {1 << 30, 4096, 32 << 10}, {1 << 30, 4 << 20, 4 << 20}, {1 << 30, 384 << 10, 384 << 10},
		{1 << 30, 3 * 4096, 3 * 32 << 10}, {16 << 40, 4096, 1 << 20}, {16 << 40, 384 << 10, 3 << 20},
	} {
		unit := Unit(c.size, c.granularity)
		if unit != c.unit {
			t.Errorf("Unit(%d, %d) = %d, want %d", c.size, c.granularity, unit, c.unit)
		}
		if size := (c.size + unit - 1) / unit * unit; ChunkSize(size) < ChunkSize(c.size) {
			t.Errorf("a size of %d is rounded up to %d, with chunks of %d", c.size, size, ChunkSize(size))
		}
	}
}

// What is used ends behind the last exception's chunk, or behind the metadata that
// the kernel zeroed when it filled the area before.
func TestUsed(t *testing.T) {
	const chunk = 32 << 10
	for _, c := range []struct{ n, want int64 }{{0, 2}, {1, 3}, {12, 14}, {2047, 2049}, {2048, 2051}, {2049, 2052}, {4096, 4100}} {
		if got := Used(c.n, chunk); got != c.want*chunk {
			t.Errorf("%d exceptions: %d chunks, want %d", c.n, got/chunk, c.want)
		}
	}
}

func TestAStoreHasRoomForEveryChunkAndTheAreaAhead(t *testing.T) {
	const chunk, per = 4096, 256
	for _, c := range []struct{ image, want int64 }{ // in chunks
		{0, 2},
		{1, 3},
		{per - 1, 1 + 1 + per - 1},
		{per, 1 + 2 + per}, // the second area is zeroed when the first is full
		{per + 1, 1 + 2 + per + 1},
		{5 * per, 1 + 6 + 5*per},
	} {
		if got := StoreSize(c.image*chunk, chunk); got != c.want*chunk {
			t.Errorf("a store for %d chunks has %d, want %d", c.image, got/chunk, c.want)
		}
	}
	if a, b := StoreSize(4097, chunk), StoreSize(8192, chunk); a != b {
		t.Errorf("part of a chunk needs a whole one: %d, %d", a, b)
	}
}

func TestAFullRewriteInRandomOrderFitsAndIsListed(t *testing.T) {
	const chunk, n = 4096, 3 * 256
	m := store(t, n*chunk, chunk)
	want := make([]int64, n)
	for i, p := range rand.Perm(n) {
		want[i] = int64(p)
	}
	m.commit(t, chunk, want...)
	if got := olds(t, m); !slices.Equal(got, want) {
		t.Errorf("listed %d exceptions that are not those of %d writes", len(got), n)
	}
	got, err := Changed(m, int64(len(m.b)))
	if err != nil || !slices.Equal(got, []engine.Extent{{Offset: 0, Length: n * chunk}}) {
		t.Errorf("changed %v, %v: the whole image was", got, err)
	}
}

func TestChangedIsSortedAndCoalesced(t *testing.T) {
	const chunk = 4096
	m := store(t, 1<<30, chunk)
	m.commit(t, chunk, 70000, 5, 6, 4, 0, 69999, 262143)
	got, err := Changed(m, int64(len(m.b)))
	if err != nil {
		t.Fatal(err)
	}
	want := []engine.Extent{{Offset: 0, Length: chunk}, {Offset: 4 * chunk, Length: 3 * chunk},
		{Offset: 69999 * chunk, Length: 2 * chunk}, {Offset: 262143 * chunk, Length: chunk}}
	if !slices.Equal(got, want) {
		t.Errorf("changed %v, want %v", got, want)
	}
}

func TestWhatLayInTheSpaceBeforeIsNotBelieved(t *testing.T) {
	const chunk = 4096
	m := store(t, 1024*chunk, chunk)
	var all []int64
	for i := range int64(1000) {
		all = append(all, 999-i)
	}
	m.commit(t, chunk, all...)
	if err := Format(m, chunk); err != nil {
		t.Fatal(err)
	}
	if got := olds(t, m); len(got) != 0 {
		t.Errorf("a new store has %d exceptions of an old one", len(got))
	}
	m.commit(t, chunk, all[:256]...) // the first area is full, the second still held the old ones
	if got := olds(t, m); !slices.Equal(got, all[:256]) {
		t.Errorf("%d exceptions, want 256", len(got))
	}
}

func TestFormatMakesAnOldStoreDisappearWithOneFlush(t *testing.T) {
	m := store(t, 1<<20, 4096)
	m.log = nil
	if err := Format(m, 8192); err != nil {
		t.Fatal(err)
	}
	if want := []string{"write", "write", "sync"}; !slices.Equal(m.log, want) {
		t.Errorf("order %v, want %v", m.log, want)
	}
	h, err := ReadHeader(m)
	if err != nil || h != (Header{Chunk: 8192, Valid: true}) {
		t.Errorf("header %+v, %v", h, err)
	}
}

func TestFormatTakesTheChunkSizesOfTheKernel(t *testing.T) {
	m := &memory{b: make([]byte, 1<<20)}
	for _, chunk := range []int64{0, 512, 2048, 4097, 12288, 1 << 40} {
		if err := Format(m, chunk); !errors.Is(err, fault.Invalid) {
			t.Errorf("chunk size %d: %v", chunk, err)
		}
	}
}

func TestDamageIsRefused(t *testing.T) {
	const chunk = 4096
	for name, hurt := range map[string]func(*memory){
		"no header":                 func(m *memory) { clear(m.b[:16]) },
		"another magic":             func(m *memory) { m.b[0]++ },
		"another version":           func(m *memory) { m.b[8]++ },
		"a chunk size of 3 sectors": func(m *memory) { m.b[12] = 3 },
		"no chunk size":             func(m *memory) { clear(m.b[12:16]) },
		"invalid":                   func(m *memory) { m.invalidate() },
		"a chunk out of place":      func(m *memory) { m.put(chunk+16, 5, 9) },
		"metadata as data":          func(m *memory) { m.put(chunk+16, 5, 258) },
		"a negative chunk":          func(m *memory) { m.put(chunk+16, -1, 3) },
		"truncated in area 1":       func(m *memory) { m.commit(t, chunk, seq(2, 257)...); m.b = m.b[:258*chunk] },
		"truncated in the header":   func(m *memory) { m.b = m.b[:100] },
		"truncated in area 0":       func(m *memory) { m.b = m.b[:chunk] },
	} {
		t.Run(name, func(t *testing.T) {
			m := store(t, 512*chunk, chunk)
			m.commit(t, chunk, 0, 1)
			hurt(m)
			_, err := Changed(m, int64(len(m.b)))
			if !errors.Is(err, fault.Corrupt) {
				t.Errorf("error %v, want corrupt", err)
			}
		})
	}
}

func seq(from, n int64) []int64 {
	var out []int64
	for i := range n {
		out = append(out, from+i)
	}
	return out
}

func TestRepairMakesAnInvalidStoreReadable(t *testing.T) {
	const chunk = 4096
	m := store(t, 512*chunk, chunk)
	m.commit(t, chunk, seq(100, 300)...)
	m.invalidate()
	n, err := Repair(m, int64(len(m.b)))
	if err != nil || n != 300 {
		t.Fatalf("repair: %d, %v", n, err)
	}
	if got := olds(t, m); !slices.Equal(got, seq(100, 300)) {
		t.Errorf("%d exceptions after the repair", len(got))
	}
	m.log = nil
	if n, err := Repair(m, int64(len(m.b))); err != nil || n != 300 || len(m.log) != 0 {
		t.Errorf("a second repair: %d, %v, %v: it has nothing to do", n, err, m.log)
	}
}

func TestRepairRefusesWhatContradictsItself(t *testing.T) {
	const chunk = 4096
	m := store(t, 512*chunk, chunk)
	m.commit(t, chunk, 1, 2, 1)
	m.invalidate()
	m.log = nil
	if _, err := Repair(m, int64(len(m.b))); !errors.Is(err, fault.Corrupt) {
		t.Errorf("one chunk in two places: %v", err)
	}
	if len(m.log) != 0 {
		t.Errorf("a store that cannot be repaired was written: %v", m.log)
	}
	if h, _ := ReadHeader(m); h.Valid {
		t.Error("the store is valid")
	}
}

// A power cut while an area of several sectors was written: a later sector
// arrived and an earlier one did not.
func TestExceptionsBehindAGapAreNeverBelieved(t *testing.T) {
	for _, chunk := range []int64{4096, 16384, 2 << 20} {
		m := store(t, 60*chunk, chunk)
		m.commit(t, chunk, 7, 8, 9)
		for i := int64(40); i < 250; i++ { // unacknowledged
			m.put(chunk+i*16, i, 2+i)
		}
		n, err := Settle(m, int64(len(m.b)))
		if err != nil || n != 3 {
			t.Fatalf("settle: %d, %v", n, err)
		}
		if m.log[len(m.log)-1] != "sync" {
			t.Error("not synced")
		}
		m.commit(t, chunk, seq(60, 37)...) // fills the gap
		if got := olds(t, m); len(got) != 40 {
			t.Errorf("chunk %d: %d exceptions, 40 were made", chunk, len(got))
		}
		m.log = nil
		if _, err := Settle(m, int64(len(m.b))); err != nil || len(m.log) != 0 {
			t.Errorf("a settled store was written again: %v, %v", err, m.log)
		}
	}
}

func TestSettleRefusesAnInvalidStore(t *testing.T) {
	m := store(t, 1<<20, 4096)
	m.invalidate()
	if _, err := Settle(m, int64(len(m.b))); !errors.Is(err, fault.Corrupt) {
		t.Errorf("error %v, want corrupt", err)
	}
}

func TestBuffersSuitDirectIO(t *testing.T) {
	r := &strict{t: t, memory: store(t, 1024*16384, 16384)}
	r.commit(t, 16384, seq(0, 1024)...)
	if _, err := Settle(r, int64(len(r.b))); err != nil {
		t.Error(err)
	}
	if err := Format(r, 8192); err != nil {
		t.Error(err)
	}
}

type strict struct {
	*memory
	t *testing.T
}

func (s *strict) check(p []byte, off int64) {
	if off%MinChunk != 0 || len(p)%MinChunk != 0 || uintptr(unsafe.Pointer(&p[0]))%MinChunk != 0 {
		s.t.Errorf("%d bytes at %d are not aligned", len(p), off)
	}
}
func (s *strict) ReadAt(p []byte, off int64) (int, error) {
	s.check(p, off)
	return s.memory.ReadAt(p, off)
}
func (s *strict) WriteAt(p []byte, off int64) (int, error) {
	s.check(p, off)
	return s.memory.WriteAt(p, off)
}

func TestAWriteErrorIsTold(t *testing.T) {
	m := store(t, 1<<20, 4096)
	m.fail = errors.New("no")
	if err := Format(m, 4096); !errors.Is(err, fault.Unavailable) {
		t.Errorf("error %v", err)
	}
	m.invalidate()
	if _, err := Repair(m, int64(len(m.b))); !errors.Is(err, fault.Unavailable) {
		t.Errorf("error %v", err)
	}
}
