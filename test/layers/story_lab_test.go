package layers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
)

// subject is a load on a volume that can tell what the volume held at a cut.
type subject interface {
	// mark is what is acknowledged by now; it grows.
	mark() mark
	// holds checks that a device shows the volume as it was at one moment between
	// two marks. at is that moment, exactly.
	holds(device string, before, after mark) (at mark, err error)
	// use writes to a clone of what held at, published at target; check tells later
	// that the clone still holds that.
	use(target string, at mark, seed uint64) (check func() error, err error)
	// end stops the load and returns why it had ended before.
	end() error
	// going ends when the load does.
	going() context.Context
}

// workers are the goroutines of a load.
type workers struct {
	g    *errgroup.Group
	ctx  context.Context
	stop func()
	quit context.Context // done when they are to end well
}

func newWorkers(t *testing.T) *workers {
	w := &workers{}
	w.g, w.ctx = errgroup.WithContext(t.Context())
	w.quit, w.stop = context.WithCancel(t.Context())
	return w
}

func (w *workers) going() context.Context { return w.ctx }

func (w *workers) end() error {
	w.stop()
	return w.g.Wait()
}

// tick waits for the next turn of a worker; false: it is to end.
func (w *workers) tick(pace *time.Ticker) bool {
	select {
	case <-w.quit.Done():
		return false
	case <-w.ctx.Done(): // another one has failed
		return false
	case <-pace.C:
		return true
	}
}

// mark counts what each writer has had acknowledged.
type mark []uint64

func (m mark) sum() (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}

// plot says how much happens.
type plot struct {
	size      int64
	snapshots int
	clones    int // that are written, and stay to the end, all at once
	alive     int // snapshots at a time
	busy      int // of them that are being looked at
}

// story is a plot under way. Every snapshot has a life of its own: it is compared with the marks
// of its cut, cloned, compared again when others have come and gone, and deleted
// before or after its clones.
type story struct {
	plot
	r    *rig
	v    *volume
	load subject
	cap  *csi.VolumeCapability // of the clones that are written
	seed uint64

	busyNow chan struct{}

	mu      sync.Mutex
	made    int
	news    chan struct{} // closed when made grows
	written []*clone
}

// clone is one that is written.
type clone struct {
	v     *volume
	check func() error
}

// play goes through all of it, with the load running to the end of the last merge.
func (s *story) play(t *testing.T) error {
	s.news, s.busyNow = make(chan struct{}), make(chan struct{}, s.busy)
	slots := make(chan struct{}, s.alive)
	lives, ctx := errgroup.WithContext(s.load.going())
	var slowest time.Duration
	for i := range s.snapshots {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return errors.Join(ctx.Err(), lives.Wait())
		}
		from := s.load.mark().sum()
		if err := during(ctx, "the load to go on", patience, func() error {
			if now := s.load.mark().sum(); now < from+20 {
				return fmt.Errorf("%d writes after %d", now, from)
			}
			return nil
		}); err != nil {
			return errors.Join(err, lives.Wait())
		}
		before, began := s.load.mark(), time.Now()
		reply, err := call(s.r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: fmt.Sprintf("s%d", i), SourceVolumeId: s.v.id})
		if err != nil {
			return errors.Join(err, lives.Wait())
		}
		took := time.Since(began)
		after := s.load.mark()
		slowest = max(slowest, took)
		t.Logf("snapshot %d: %s, between %v and %v", i, took.Round(time.Millisecond), before, after)
		s.born()
		lives.Go(func() error {
			defer func() { <-slots }()
			if err := s.life(ctx, i, reply.GetSnapshot().GetSnapshotId(), before, after); err != nil {
				return fmt.Errorf("snapshot %d: %w", i, err)
			}
			return nil
		})
	}
	s.mu.Lock()
	s.made += s.snapshots // nobody waits for another one
	close(s.news)
	s.mu.Unlock()
	if err := lives.Wait(); err != nil {
		return err
	}
	t.Logf("slowest snapshot: %s", slowest.Round(time.Millisecond))
	return s.epilogue(t)
}

func (s *story) born() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
	close(s.news)
	s.news = make(chan struct{})
}

// reached waits until so many snapshots were made.
func (s *story) reached(ctx context.Context, n int) error {
	for {
		s.mu.Lock()
		made, news := s.made, s.news
		s.mu.Unlock()
		if made >= n {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// life of one snapshot.
func (s *story) life(ctx context.Context, i int, id string, before, after mark) error {
	rnd := rand.New(rand.NewPCG(s.seed, uint64(i)))
	var probe *volume
	var first []uint32
	if err := s.busily(ctx, func() (err error) {
		if probe, err = s.r.volume(fmt.Sprintf("s%d-probe", i), s.size, rawBlock(), id); err != nil {
			return err
		}
		at, err := s.load.holds(probe.target, before, after)
		if err == nil {
			first, err = sums(probe.target, s.size)
		}
		if err != nil || i%max(1, s.snapshots/s.clones) != 0 {
			return err
		}
		return s.branch(i, id, at, rnd.Uint64())
	}); err != nil {
		return err
	}
	// The oldest of those that live has to be content with what was made.
	if err := s.reached(ctx, i+1+rnd.IntN(min(8, s.alive))); err != nil {
		return err
	}
	return s.busily(ctx, func() error {
		if err := s.compare(probe.target, first); err != nil {
			return fmt.Errorf("a clone of it that was there all the time: %w", err)
		}
		deeds := []func() error{func() error { return s.r.removeSnapshot(id) }, probe.remove}
		if long() || i%3 == 0 {
			again, err := s.r.volume(fmt.Sprintf("s%d-again", i), s.size, rawBlock(), id)
			if err != nil {
				return err
			}
			if err := s.compare(again.target, first); err != nil {
				return fmt.Errorf("a new clone of it: %w", err)
			}
			deeds = append(deeds, again.remove)
		}
		rnd.Shuffle(len(deeds), func(a, b int) { deeds[a], deeds[b] = deeds[b], deeds[a] })
		for _, do := range deeds {
			if err := do(); err != nil {
				return err
			}
		}
		return nil
	})
}

// busily does something while not many others do.
func (s *story) busily(ctx context.Context, do func() error) error {
	select {
	case s.busyNow <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.busyNow }()
	return do()
}

func (s *story) compare(device string, want []uint32) error {
	got, err := sums(device, s.size)
	if err != nil {
		return err
	}
	return same(want, got)
}

// branch makes a clone that is written and stays.
func (s *story) branch(i int, id string, at mark, seed uint64) error {
	v, err := s.r.volume(fmt.Sprintf("s%d-clone", i), s.size, s.cap, id)
	if err != nil {
		return err
	}
	check, err := s.load.use(v.target, at, seed)
	if err != nil {
		return fmt.Errorf("the clone %s: %w", v.name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written = append(s.written, &clone{v, check})
	return nil
}

// epilogue verifies all written clones at the same time, removes them in random
// order while the load goes on, and waits for the last merge.
func (s *story) epilogue(t *testing.T) error {
	var g errgroup.Group
	g.SetLimit(4)
	for _, c := range s.written {
		g.Go(func() error {
			if err := c.check(); err != nil {
				return fmt.Errorf("the clone %s: %w", c.v.name, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	t.Logf("%d clones verified", len(s.written))
	rnd := rand.New(rand.NewPCG(s.seed, 1<<32))
	rnd.Shuffle(len(s.written), func(a, b int) { s.written[a], s.written[b] = s.written[b], s.written[a] })
	for _, c := range s.written {
		if err := c.v.remove(); err != nil {
			return err
		}
	}
	from := s.load.mark().sum()
	if err := s.r.alone(s.v); err != nil {
		return err
	}
	t.Logf("all merged, after another %d writes", s.load.mark().sum()-from)
	return s.load.end()
}
