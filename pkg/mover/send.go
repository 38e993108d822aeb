package mover

import (
	"context"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// SendBlock implements Files: it is the source's half of Block, over a connection.
// Receiving is ReceiveBlock with the same From and Size.
func (m *Mover) SendBlock(ctx context.Context, src string, opts image.BlockCopy, to io.Writer) error {
	if opts.Size < 0 || opts.From < 0 || opts.From > opts.Size {
		return fault.New(fault.Invalid, "copy of bytes %d to %d: both must be at least 0 and in order", opts.From, opts.Size)
	}
	s, err := openSource(src)
	if err != nil {
		return err
	}
	defer s.close()
	if s.size < opts.Size {
		return fault.New(fault.Corrupt, "copy source %q has %d bytes, %d are recorded: it was truncated", src, s.size, opts.Size)
	}
	c := &blockCopy{m: m, src: s, opts: opts, extents: extents{fd: s.fd, blind: s.device}}
	c.pair = pair{src: s.fd, direct: &direct{src: s.direct, dst: -1}, srcName: s.path, throttle: m.throttle, own: newThrottle(opts.Rate), zeros: make([]byte, sparseUnit)}
	w := newWireWriter(to)
	if err := c.send(ctx, w); err != nil {
		if ctx.Err() != nil {
			return canceled(ctx, "copy of "+src)
		}
		return err
	}
	size, err := s.currentSize()
	if err != nil {
		return err
	}
	if size < opts.Size {
		return fault.New(fault.Corrupt, "copy source %q shrank from %d to %d bytes while it was being copied", src, opts.Size, size)
	}
	if err := w.frame(wireHead{kind: wireEnd, off: opts.Size}, nil); err != nil {
		return err
	}
	return w.flush()
}

// read is a piece with what it holds.
type read struct {
	piece
	buf []byte // nil: a hole
}

// send reads pieces ahead of what is written to the connection.
func (c *blockCopy) send(ctx context.Context, w *wireWriter) (err error) {
	if c.pair.detectZeros, err = c.extents.hidden(c.opts.Size); err != nil {
		return sysErr(err, "find the holes of", c.src.path)
	}
	g, ctx := errgroup.WithContext(ctx)
	todo, full := make(chan piece), make(chan read)
	free := make(chan []byte, 2)
	for range cap(free) {
		free <- alignedBuffer(c.m.buffer)
	}
	g.Go(func() error {
		defer close(todo)
		return c.cut(ctx, alignDown(c.opts.From, align), todo)
	})
	g.Go(func() error {
		defer close(full)
		for p := range todo {
			r := read{piece: p}
			if p.data {
				select {
				case r.buf = <-free:
				case <-ctx.Done():
					return ctx.Err()
				}
				r.buf = r.buf[:p.end-p.off]
				if err := c.pair.wait(ctx, p.end-p.off); err != nil {
					return err
				}
				if err := c.pair.readFull(r.buf, p.off); err != nil {
					return err
				}
			}
			select {
			case full <- r:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	g.Go(func() error {
		for r := range full {
			if !r.data {
				if err := w.hole(r.off, r.end-r.off); err != nil {
					return err
				}
				continue
			}
			if err := c.pair.sendData(w, r.off, r.buf); err != nil {
				return err
			}
			free <- r.buf[:cap(r.buf)] // it has room: there are no more
		}
		return nil
	})
	return g.Wait()
}

// sendData sends what was read, and zeros as a hole where the source cannot tell them.
func (p *pair) sendData(w *wireWriter, off int64, buf []byte) error {
	if !p.detectZeros {
		return w.data(off, buf)
	}
	for i := 0; i < len(buf); {
		isZero := p.isZero(buf[i:min(i+sparseUnit, len(buf))])
		j := i
		for j < len(buf) && p.isZero(buf[j:min(j+sparseUnit, len(buf))]) == isZero {
			j = min(j+sparseUnit, len(buf))
		}
		var err error
		if isZero {
			err = w.hole(off+int64(i), int64(j-i))
		} else {
			err = w.data(off+int64(i), buf[i:j])
		}
		if err != nil {
			return err
		}
		i = j
	}
	return nil
}
