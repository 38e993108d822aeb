package layers

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSnapshotsOfARawVolumeUnderLoad: two writers with direct I/O and fsync, and a plain model
// of the sectors in memory, to which every snapshot is equal as of its cut.
func TestSnapshotsOfARawVolumeUnderLoad(t *testing.T) {
	disk := spare(t)
	p := plot{size: 16 * mib, snapshots: 12, clones: 4, alive: 6, busy: 2}
	if long() {
		p.snapshots, p.clones, p.alive = 50, 20, 12
	}
	seed := seedOf(t)
	r := newRig(t, disk)
	v, err := r.volume("v", p.size, rawBlock(), "")
	if err != nil {
		t.Fatal(err)
	}
	load, err := startRaw(t, v.target, p.size, seed)
	if err != nil {
		t.Fatal(err)
	}
	s := &story{plot: p, r: r, v: v, load: load, cap: rawBlock(), seed: seed}
	if err := s.play(t); err != nil {
		t.Fatal(errors.Join(err, load.end()))
	}
	if err := errors.Join(v.unpublish(), v.publish()); err != nil {
		t.Fatal(err)
	}
	if _, err := load.holds(v.target, load.mark(), load.mark()); err != nil {
		t.Errorf("the volume itself at the end: %v", err)
	}
	if err := v.remove(); err != nil {
		t.Fatal(err)
	}
	if err := r.leavesNothing(); err != nil {
		t.Fatal(err)
	}
	if err := r.leavesNoTags(); err != nil {
		t.Fatal(err)
	}
}

const sector = 512

// most is how many sectors one write has at most: more than a chunk, and
// less, and across the border of two.
const most = 48

// write of some sectors. The writer's n-th is numbered n, from 1.
type write struct{ first, count int64 }

// writer writes its own part of a device, one write after the other.
type writer struct {
	tag         uint64 // part of what it writes
	first, last int64  // sectors, last not included

	mu    sync.Mutex
	log   []write // begun
	acked int     // of them, durable
}

// raw is the load on a raw volume.
type raw struct {
	*workers
	size    int64
	writers []*writer
}

func startRaw(t *testing.T, path string, size int64, seed uint64) (*raw, error) {
	m := &raw{workers: newWorkers(t), size: size}
	const parts = 2
	for i := range int64(parts) {
		m.writers = append(m.writers, &writer{tag: uint64(i) + 1, first: size / sector / parts * i, last: size / sector / parts * (i + 1)})
	}
	for i, w := range m.writers {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			return nil, errors.Join(err, m.end())
		}
		m.g.Go(func() error {
			return errors.Join(m.run(w, f, rand.New(rand.NewPCG(seed, uint64(i)+1<<40))), f.Close())
		})
	}
	return m, nil
}

// run lets a writer write, at most ten times a second. Half of it
// goes to a sixteenth of the place, so that much is written again.
func (m *raw) run(w *writer, f *os.File, rnd *rand.Rand) error {
	pace := time.NewTicker(100 * time.Millisecond)
	defer pace.Stop()
	for m.tick(pace) {
		room := w.last - w.first
		if rnd.IntN(2) == 0 {
			room /= 16
		}
		count := 1 + rnd.Int64N(most)
		if err := w.write(f, write{w.first + rnd.Int64N(room-count), count}); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) write(f *os.File, what write) error {
	w.mu.Lock()
	w.log = append(w.log, what)
	n := uint64(len(w.log))
	w.mu.Unlock()
	buf := aligned(int(what.count * sector))
	for i := range what.count {
		fillSector(buf[i*sector:][:sector], w.tag, n, what.first+i)
	}
	if _, err := f.WriteAt(buf, what.first*sector); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	w.mu.Lock()
	w.acked = int(n)
	w.mu.Unlock()
	return nil
}

// fillSector makes a sector say which write it is of and where it belongs, all over.
func fillSector(b []byte, tag, n uint64, at int64) {
	le := binary.LittleEndian
	le.PutUint64(b, n)
	x := tag<<56 ^ n<<20 ^ uint64(at)
	for i := 8; i < sector; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		le.PutUint64(b[i:], x)
	}
}

// checkSector says of which write a sector is; 0: of none.
func checkSector(b []byte, tag uint64, at int64) (uint64, error) {
	n := binary.LittleEndian.Uint64(b)
	var want [sector]byte
	if n != 0 {
		fillSector(want[:], tag, n, at)
	}
	if string(b) != string(want[:]) {
		return 0, fmt.Errorf("sector %d begins with %x: no write %d of writer %d made that", at, b[:32], n, tag)
	}
	return n, nil
}

func (m *raw) mark() mark {
	var out mark
	for _, w := range m.writers {
		w.mu.Lock()
		out = append(out, uint64(w.acked))
		w.mu.Unlock()
	}
	return out
}

// holds finds for each writer the write after which the device looks like that.
func (m *raw) holds(device string, before, after mark) (mark, error) {
	got, err := m.read(device)
	if err != nil {
		return nil, err
	}
	at := make(mark, len(m.writers))
	for i, w := range m.writers {
		for _, n := range got[w.first:w.last] {
			at[i] = max(at[i], n)
		}
		if at[i] < before[i] || at[i] > after[i]+1 {
			return nil, fmt.Errorf("the last write of writer %d in it is %d; %d was acknowledged before the cut, %d after it", w.tag, at[i], before[i], after[i])
		}
	}
	return at, m.equal(got, m.model(at))
}

// read tells of every sector which write it is of.
func (m *raw) read(device string) ([]uint64, error) {
	out := make([]uint64, m.size/sector)
	err := pieces(device, m.size, func(offset int64, data []byte) error {
		for i := 0; i < len(data); i += sector {
			at := (offset + int64(i)) / sector
			n, err := checkSector(data[i:i+sector], m.writerOf(at).tag, at)
			if err != nil {
				return err
			}
			out[at] = n
		}
		return nil
	})
	return out, err
}

func (m *raw) writerOf(at int64) *writer {
	for _, w := range m.writers {
		if at < w.last {
			return w
		}
	}
	return m.writers[len(m.writers)-1]
}

// model is what the sectors hold after so many writes.
func (m *raw) model(at mark) []uint64 {
	out := make([]uint64, m.size/sector)
	for i, w := range m.writers {
		w.mu.Lock()
		log := w.log[:at[i]]
		w.mu.Unlock()
		for n, what := range log {
			for s := range what.count {
				out[what.first+s] = uint64(n) + 1
			}
		}
	}
	return out
}

func (m *raw) equal(got, want []uint64) error {
	var wrong []string
	n := 0
	for i := range want {
		if got[i] != want[i] {
			if n++; n <= 10 {
				wrong = append(wrong, fmt.Sprintf("%d is of write %d, not %d", i, got[i], want[i]))
			}
		}
	}
	if n > 0 {
		return fmt.Errorf("%d sectors are wrong: %q", n, wrong)
	}
	return nil
}

// use writes to a clone what its model gets as well.
func (m *raw) use(target string, at mark, seed uint64) (func() error, error) {
	c := &raw{size: m.size}
	rnd := rand.New(rand.NewPCG(seed, 0))
	f, err := os.OpenFile(target, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	for i, w := range m.writers {
		w.mu.Lock()
		own := &writer{tag: w.tag, first: w.first, last: w.last, log: append([]write(nil), w.log[:at[i]]...)}
		w.mu.Unlock()
		c.writers = append(c.writers, own)
		for range 40 {
			count := 1 + rnd.Int64N(most)
			if err := own.write(f, write{own.first + rnd.Int64N(own.last-own.first-count), count}); err != nil {
				return nil, errors.Join(err, f.Close())
			}
		}
	}
	check := func() error {
		_, err := c.holds(target, c.mark(), c.mark())
		return err
	}
	return check, errors.Join(f.Close(), check())
}
