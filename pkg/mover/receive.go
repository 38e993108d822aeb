package mover

import (
	"context"
	"io"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// ReceiveBlock implements Files: it is the target's half of Block, over a connection
// from SendBlock. The reader has to end with ctx.
func (m *Mover) ReceiveBlock(ctx context.Context, dst string, opts image.BlockCopy, from io.Reader) error {
	if opts.Size < 0 || opts.From < 0 || opts.From > opts.Size {
		return fault.New(fault.Invalid, "copy of bytes %d to %d: both must be at least 0 and in order", opts.From, opts.Size)
	}
	d, err := openTarget(dst)
	if err != nil {
		return err
	}
	defer d.close()
	if d.size < opts.Size {
		return fault.New(fault.Invalid, "copy target %q has %d bytes, at least %d are needed: resize it first", dst, d.size, opts.Size)
	}
	c := &blockCopy{m: m, dst: d, opts: opts, offset: alignDown(opts.From, align), synced: opts.From}
	c.pair = pair{dst: d.fd, direct: &direct{src: -1, dst: d.direct}, dstName: d.path, dstDev: d.device, dstZeroed: opts.DstZeroed,
		noRange: new(atomic.Bool), throttle: m.throttle, zeros: make([]byte, sparseUnit)}
	err = c.receive(ctx, newWireReader(from))
	if err == nil {
		err = sysErr(retry(func() error { return unix.Fsync(d.fd) }), "flush", d.path)
	}
	if err != nil {
		if ctx.Err() != nil {
			return canceled(ctx, "copy into "+dst)
		}
		return err
	}
	c.report(opts.Size, true)
	return nil
}

// receive writes while the next piece comes.
func (c *blockCopy) receive(ctx context.Context, r *wireReader) error {
	g, ctx := errgroup.WithContext(ctx)
	full, free := make(chan read), make(chan []byte, 2)
	for range cap(free) {
		free <- alignedBuffer(c.m.buffer)
	}
	g.Go(func() error {
		defer close(full)
		return c.take(ctx, r, c.offset, full, free)
	})
	g.Go(func() error {
		for p := range full {
			var err error
			switch {
			case p.data:
				if err = c.pair.wait(ctx, int64(len(p.buf))); err == nil {
					err = c.pair.writeFull(p.buf, p.off)
				}
			case !c.opts.DstZeroed:
				err = c.pair.zero(ctx, p.off, p.end-p.off)
			}
			if err == nil {
				err = c.collect(p.piece)
			}
			if err != nil {
				return err
			}
			if p.data {
				free <- p.buf[:cap(p.buf)] // it has room: there are no more
			}
		}
		return nil
	})
	return g.Wait()
}

// take reads frames from an offset to the end of the content.
func (c *blockCopy) take(ctx context.Context, r *wireReader, at int64, full chan<- read, free <-chan []byte) error {
	give := func(p read) error {
		select {
		case full <- p:
			at = p.end
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		h, err := r.head()
		if err != nil {
			return err
		}
		if h.off != at || h.n > c.opts.Size-at {
			return garbled("%c of %d bytes at %d, where byte %d of %d is next", h.kind, h.n, h.off, at, c.opts.Size)
		}
		switch h.kind {
		case wireEnd:
			if at != c.opts.Size {
				return garbled("the end at byte %d of %d", at, c.opts.Size)
			}
			return nil
		case wireHole:
			if h.n == 0 {
				return garbled("a hole without a length")
			}
			if err := give(read{piece: piece{off: at, end: at + h.n}}); err != nil {
				return err
			}
		case wireData:
			for end := at + h.n; at < end; {
				var buf []byte
				select {
				case buf = <-free:
				case <-ctx.Done():
					return ctx.Err()
				}
				buf = buf[:min(end-at, int64(len(buf)))]
				if err := r.body(buf); err != nil {
					return err
				}
				if err := give(read{piece{off: at, end: at + int64(len(buf)), data: true}, buf}); err != nil {
					return err
				}
			}
		default:
			return garbled("a frame of kind %q", byte(h.kind))
		}
	}
}
