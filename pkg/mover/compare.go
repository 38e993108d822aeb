package mover

import (
	"bytes"
	"context"
	"errors"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// compareUnit is the block in which a difference is told: the page size of most
// machines, and what file systems on images use.
const compareUnit = 4096

// Compare implements image.Reader. Blocks begin at multiples of their size; those
// at the ends of a range are cut. Ranges are in order and do not overlap, and so
// are the differences, which do not touch either.
func (m *Mover) Compare(ctx context.Context, a, b Side, ranges []engine.Extent, emit func([]engine.Extent) error) error {
	var sides [2]*side
	for i, c := range []Side{a, b} {
		s, err := openSized(c.Path, c.Size)
		if err != nil {
			return err
		}
		defer s.close()
		sides[i] = &side{store: s, size: c.Size, direct: &direct{src: s.direct, dst: -1}}
	}
	c := comparison{m: m, a: sides[0], b: sides[1], emit: emit}
	if err := c.run(ctx, unshared(sides[0], sides[1], ranges)); err != nil {
		if ctx.Err() != nil {
			return canceled(ctx, "comparison of "+a.Path+" with "+b.Path)
		}
		return err
	}
	return nil
}

// side is one of two images that are compared.
type side struct {
	*store
	size   int64
	direct *direct
}

// fill reads len(buf) bytes; what lies behind the image's end is zero.
func (s *side) fill(buf []byte, off int64) error {
	n := max(0, min(int64(len(buf)), s.size-off))
	clear(buf[n:])
	for buf = buf[:n]; len(buf) > 0; {
		c, err := s.direct.read(buf, off)
		if errors.Is(err, errBuffered) {
			c, err = retryN(func() (int, error) { return unix.Pread(s.fd, buf, off) })
		}
		if err != nil {
			return sysErr(err, "read", s.path)
		}
		if c == 0 {
			return fault.New(fault.Corrupt, "%q ended at byte %d, %d are recorded: it shrank while it was compared", s.path, off, s.size)
		}
		buf, off = buf[c:], off+int64(c)
	}
	return nil
}

// comparison is one that runs.
type comparison struct {
	m    *Mover
	a, b *side
	emit func([]engine.Extent) error
}

// part of a comparison, and its result.
type part struct {
	engine.Extent
	differs chan []engine.Extent // one, unless the comparison failed
}

// run compares with workers. One goroutine cuts parts, which the workers compare
// in any order; the caller's goroutine takes the results in theirs.
func (c *comparison) run(ctx context.Context, ranges []engine.Extent) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	todo, inOrder := make(chan part), make(chan part, 4*c.m.workers)
	g.Go(func() error {
		defer close(todo)
		defer close(inOrder)
		return c.cut(ctx, ranges, todo, inOrder)
	})
	for range c.m.workers {
		g.Go(func() error { return c.work(ctx, todo) })
	}
	err := c.collect(ctx, inOrder)
	if err != nil {
		cancel()
	}
	if failed := g.Wait(); err == nil {
		err = failed
	}
	return err
}

func (c *comparison) cut(ctx context.Context, ranges []engine.Extent, todo, inOrder chan<- part) error {
	step := int64(c.m.buffer)
	for _, r := range ranges {
		for off, end := r.Offset, r.Offset+r.Length; off < end; {
			stop := min(alignDown(off, step)+step, end)
			p := part{Extent: engine.Extent{Offset: off, Length: stop - off}, differs: make(chan []engine.Extent, 1)}
			for _, to := range []chan<- part{inOrder, todo} {
				select {
				case to <- p:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			off = stop
		}
	}
	return nil
}

// work compares parts until there are no more.
func (c *comparison) work(ctx context.Context, todo <-chan part) error {
	a, b := alignedBuffer(c.m.buffer), alignedBuffer(c.m.buffer)
	for p := range todo {
		if err := c.m.throttle.wait(ctx, 2*p.Length); err != nil {
			return err
		}
		a, b := a[:p.Length], b[:p.Length]
		if err := c.a.fill(a, p.Offset); err != nil {
			return err
		}
		if err := c.b.fill(b, p.Offset); err != nil {
			return err
		}
		p.differs <- differences(a, b, p.Offset)
	}
	return ctx.Err()
}

// differences lists the blocks in which a and b, which begin at byte off, differ.
func differences(a, b []byte, off int64) []engine.Extent {
	if bytes.Equal(a, b) {
		return nil
	}
	var out []engine.Extent
	for i, end := int64(0), int64(len(a)); i < end; {
		stop := min(alignDown(off+i, compareUnit)+compareUnit-off, end)
		if !bytes.Equal(a[i:stop], b[i:stop]) {
			out = extend(out, engine.Extent{Offset: off + i, Length: stop - i})
		}
		i = stop
	}
	return out
}

// extend appends e to an ordered list, to its last extent if they touch.
func extend(list []engine.Extent, e engine.Extent) []engine.Extent {
	if n := len(list); n > 0 && list[n-1].Offset+list[n-1].Length == e.Offset {
		list[n-1].Length += e.Length
		return list
	}
	return append(list, e)
}

// collect emits what the parts give. A difference that reaches the end of a part
// is held back until the next one says where it ends. The error is emit's.
func (c *comparison) collect(ctx context.Context, inOrder <-chan part) error {
	var pending []engine.Extent
	for p := range inOrder {
		select {
		case found := <-p.differs:
			for _, e := range found {
				pending = extend(pending, e)
			}
		case <-ctx.Done(): // the goroutines say why
			return nil
		}
		n := len(pending)
		if n > 0 && pending[n-1].Offset+pending[n-1].Length == p.Offset+p.Length {
			n--
		}
		if n > 0 {
			if err := c.emit(pending[:n:n]); err != nil {
				return err
			}
			pending = append([]engine.Extent(nil), pending[n:]...)
		}
	}
	if len(pending) == 0 {
		return nil
	}
	return c.emit(pending)
}
