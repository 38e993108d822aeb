package kill_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// What is in a volume is a sequence of writes, one after the other: write k puts
// a token that is used nowhere else into a slot and makes it durable, then the
// number k into the counter and makes that durable. So what a volume or snapshot
// holds tells exactly at which moment it was, or that there was no such moment.
const (
	slots    = 24
	slotSize = 4096
	// hang is how long a write may take. A frozen filesystem is thawed within
	// seconds; only one that stays frozen runs into this.
	hang = 90 * time.Second
)

type write struct {
	slot  int
	token uint64
	begin time.Time
	end   time.Time // zero until it and its counter are durable
}

// history of a volume's writes.
type history struct {
	mu      sync.Mutex
	writes  []write
	acked   int // of these are durable; at most one more is under way
	counter int // what the counter shows at least
}

func (h *history) marks() (acked, begun int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.acked, len(h.writes)
}

// moment is what is known about the content of an image: the state after `low` to
// `high` of the writes. counter is the least that the counter shows.
type moment struct {
	writes    []write
	low, high int
	counter   int
}

// now is what a cut shows that begins now; the end of the cut completes it.
func (h *history) now() moment {
	h.mu.Lock()
	defer h.mu.Unlock()
	return moment{low: h.acked, counter: h.counter}
}

func (h *history) cutBy(m *moment) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m.writes = slices.Clone(h.writes)
	m.high = len(h.writes)
}

// resumed is the history of a volume whose content is m, which is exactly known.
func (m moment) resumed() *history {
	return &history{writes: append([]write{}, m.writes[:m.high]...), acked: m.high, counter: m.counter}
}

// content as read.
type content struct {
	tokens  [slots]uint64
	counter int
}

// narrow finds the one moment that c shows, or says that there was none.
func (m *moment) narrow(c content) error {
	var state [slots]uint64
	for i, w := range m.writes[:m.high] {
		if i == m.low && state == c.tokens {
			return m.found(i, c)
		}
		state[w.slot] = w.token
		if i+1 >= m.low && state == c.tokens {
			return m.found(i+1, c)
		}
	}
	if m.high == 0 && state == c.tokens {
		return m.found(0, c)
	}
	return fmt.Errorf("the content is of no moment from write %d to %d: %s", m.low, m.high, m.explain(c))
}

func (m *moment) found(k int, c content) error {
	if c.counter < m.counter || c.counter > k || c.counter < k-1 {
		return fmt.Errorf("the content is that after write %d, and the counter says %d (at least %d was acknowledged)", k, c.counter, m.counter)
	}
	m.low, m.high, m.counter = k, k, c.counter
	return nil
}

// explain says of which write each slot is.
func (m *moment) explain(c content) string {
	number := map[uint64]int{0: 0}
	for i, w := range m.writes {
		number[w.token] = i + 1
	}
	out := fmt.Sprintf("counter %d, slots of writes", c.counter)
	for _, t := range c.tokens {
		if k, known := number[t]; known {
			out += fmt.Sprintf(" %d", k)
		} else {
			out += fmt.Sprintf(" ?%x", t)
		}
	}
	return out
}

// block is what a token looks like on disk; 0 is nothing yet.
func block(token uint64) []byte {
	b := make([]byte, slotSize)
	if token == 0 {
		return b
	}
	r := rand.NewPCG(token, 1)
	binary.LittleEndian.PutUint64(b, token)
	for i := 8; i < slotSize; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// place is where a volume's content is: two files, or a raw block device.
type place struct{ data, counter *os.File }

// openPlace opens what is at a published target.
func openPlace(target string, raw bool) (p place, err error) {
	if raw {
		p.data, err = os.OpenFile(target, os.O_RDWR, 0)
		p.counter = p.data
		return p, err
	}
	if p.data, err = os.OpenFile(filepath.Join(target, "data"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return p, err
	}
	if p.counter, err = os.OpenFile(filepath.Join(target, "counter"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return p, errors.Join(err, p.data.Close())
	}
	return p, nil
}

func (p place) close() error {
	if p.counter == p.data {
		return p.data.Close()
	}
	return errors.Join(p.data.Close(), p.counter.Close())
}

// counterAt is the counter's offset: on a raw device it stands behind the slots.
func (p place) counterAt() int64 {
	if p.counter == p.data {
		return slots * slotSize
	}
	return 0
}

func (p place) read() (c content, err error) {
	buf := make([]byte, slots*slotSize)
	if n, err := p.data.ReadAt(buf, 0); err != nil && err != io.EOF {
		return c, err
	} else if n%slotSize != 0 {
		return c, fmt.Errorf("%s has %d bytes: a write is there by halves", p.data.Name(), n)
	}
	for i := range c.tokens {
		b := buf[i*slotSize : (i+1)*slotSize]
		c.tokens[i] = binary.LittleEndian.Uint64(b)
		if string(b) != string(block(c.tokens[i])) {
			return c, fmt.Errorf("%s: slot %d begins with token %x and is not what was written with it", p.data.Name(), i, c.tokens[i])
		}
	}
	var n [8]byte
	if _, err := p.counter.ReadAt(n[:], p.counterAt()); err != nil && err != io.EOF {
		return c, err
	}
	c.counter = int(binary.LittleEndian.Uint64(n[:]))
	return c, nil
}

func (p place) write(k int, w write) error {
	if _, err := p.data.WriteAt(block(w.token), int64(w.slot)*slotSize); err != nil {
		return err
	}
	if err := p.data.Sync(); err != nil {
		return err
	}
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(k))
	if _, err := p.counter.WriteAt(n[:], p.counterAt()); err != nil {
		return err
	}
	return p.counter.Sync()
}

// writer writes to a volume until it is told to stop.
type writer struct {
	name string
	h    *history
	p    place
	stop context.CancelFunc
	done chan struct{}
	err  error // when done is closed
}

// pace lets others have the disk between two writes.
const pace = 15 * time.Millisecond

func startWriter(name string, p place, h *history, rnd *rand.Rand) *writer {
	ctx, stop := context.WithCancel(context.Background())
	w := &writer{name: name, h: h, p: p, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for ctx.Err() == nil && w.err == nil {
			w.err = w.once(rnd)
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(rnd.Int64N(int64(pace)))):
			}
		}
	}()
	return w
}

func (w *writer) once(rnd *rand.Rand) error {
	next := write{slot: rnd.IntN(slots), token: rnd.Uint64() | 1, begin: time.Now()}
	w.h.mu.Lock()
	w.h.writes = append(w.h.writes, next)
	k := len(w.h.writes)
	w.h.mu.Unlock()
	if err := w.p.write(k, next); err != nil {
		return fmt.Errorf("write %d to %s: %w", k, w.name, err)
	}
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	w.h.writes[k-1].end = time.Now()
	w.h.acked, w.h.counter = k, k
	return nil
}

// finish waits for the write under way and closes the files.
func (w *writer) finish() error {
	w.stop()
	select {
	case <-w.done:
	case <-time.After(hang):
		return fmt.Errorf("a write to %s has not come back: its filesystem stays frozen", w.name)
	}
	return errors.Join(w.err, w.p.close())
}

// goesOn waits until the writer has completed a write that began after this call.
func (w *writer) goesOn(ctx context.Context) error {
	_, begun := w.h.marks()
	ctx, cancel := context.WithTimeout(ctx, hang)
	defer cancel()
	for {
		if acked, _ := w.h.marks(); acked > begun {
			return nil
		}
		select {
		case <-w.done:
			return w.err
		case <-ctx.Done():
			return fmt.Errorf("writes to %s do not go through: its filesystem stays frozen", w.name)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
