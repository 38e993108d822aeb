package mover

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// progressEvery is the shortest time between two calls of Progress.
const progressEvery = 100 * time.Millisecond

// BlockStats says how a block copy went.
type BlockStats struct {
	// Way that moved most of the bytes; Reflink also for a source without data.
	Way Way
	// Bytes that were shared, copied by the kernel and written, in that order.
	// Holes do not count, except in Shared, which counts the whole range.
	Shared, Ranged, Written int64
}

// Block copies the bytes [opts.From, opts.Size) of src to the same place in
// dst. Each is a regular file or a block device, in any combination. dst must
// exist and be at least opts.Size bytes long; what it holds beyond that is not
// touched.
//
// Holes of src stay holes. A source that cannot tell its holes, such as a
// device, is read, and its zeros are left out. Where dst is not known to read
// as zero (opts.DstZeroed), its bytes under holes are zeroed. After a copy of
// the same unchanged source that was broken off, a dst that read as zero before
// still counts as zeroed: only data was written.
//
// opts.Progress is called by one goroutine, at most ten times per second and
// once at the end, with a growing offset out of opts.Size. opts.Checkpoint gets
// growing offsets before which everything in dst is durable.
//
// Errors: fault.Invalid: sizes that do not fit, src is dst, not a file or
// device. fault.NotFound. fault.InUse: dst is locked, mounted or part of another
// device. fault.Corrupt: src is shorter than opts.Size or shrank.
// fault.Exhausted: no space. fault.Unavailable: an I/O error. fault.Canceled,
// fault.Deadline: ctx ended. The error of opts.Checkpoint as it is.
func (m *Mover) Block(ctx context.Context, src, dst string, opts image.BlockCopy) (BlockStats, error) {
	if opts.Size < 0 || opts.From < 0 || opts.From > opts.Size {
		return BlockStats{}, fault.New(fault.Invalid, "copy of bytes %d to %d: both must be at least 0 and in order", opts.From, opts.Size)
	}
	s, err := openSource(src)
	if err != nil {
		return BlockStats{}, err
	}
	defer s.close()
	d, err := openTarget(dst)
	if err != nil {
		return BlockStats{}, err
	}
	defer d.close()
	switch {
	case same(s, d):
		return BlockStats{}, fault.New(fault.Invalid, "copy source %q and target %q are the same", src, dst)
	case s.size < opts.Size:
		return BlockStats{}, fault.New(fault.Corrupt, "copy source %q has %d bytes, %d are recorded: it was truncated", src, s.size, opts.Size)
	case d.size < opts.Size:
		return BlockStats{}, fault.New(fault.Invalid, "copy target %q has %d bytes, at least %d are needed: resize it first", dst, d.size, opts.Size)
	}
	c := newBlockCopy(m, s, d, opts)
	if err := c.run(ctx); err != nil {
		if ctx.Err() != nil {
			return c.stats(), canceled(ctx, "copy of "+src)
		}
		return c.stats(), err
	}
	return c.stats(), nil
}

// blockCopy is one running block copy.
type blockCopy struct {
	m        *Mover
	src, dst *store
	opts     image.BlockCopy
	pair     pair
	noRange  atomic.Bool
	shared   int64
	extents  extents

	// Of the collecting goroutine alone.
	offset   int64 // everything before it is copied
	reported time.Time
	fresh    int64 // bytes of data copied since the last checkpoint
	synced   int64 // offset of the last checkpoint
}

func newBlockCopy(m *Mover, s, d *store, opts image.BlockCopy) *blockCopy {
	c := &blockCopy{m: m, src: s, dst: d, opts: opts}
	c.extents = extents{fd: s.fd, blind: s.device}
	// Elsewhere the kernel would copy through the page cache, in small steps.
	c.noRange.Store(!s.remote() || !d.remote())
	c.pair = pair{
		src: s.fd, dst: d.fd, direct: &direct{src: s.direct, dst: d.direct}, srcName: s.path, dstName: d.path, srcDev: s.device, dstDev: d.device,
		dstZeroed: opts.DstZeroed,
		noRange:   &c.noRange, throttle: m.throttle, own: newThrottle(opts.Rate), zeros: make([]byte, sparseUnit),
	}
	return c
}

func (c *blockCopy) stats() BlockStats {
	st := BlockStats{Way: Reflink, Shared: c.shared, Ranged: c.pair.ranged.Load(), Written: c.pair.written.Load()}
	if st.Ranged > st.Shared {
		st.Way = CopyRange
	}
	if st.Written > max(st.Shared, st.Ranged) {
		st.Way = ReadWrite
	}
	return st
}

func (c *blockCopy) run(ctx context.Context) error {
	// Copying a little again is harmless, and keeps every piece aligned.
	from := alignDown(c.opts.From, align)
	c.offset, c.synced = from, c.opts.From
	from, err := c.share(ctx, from)
	if err != nil {
		return err
	}
	if c.pair.detectZeros, err = c.extents.hidden(c.opts.Size); err != nil {
		return sysErr(err, "find the holes of", c.src.path)
	}
	if err := c.transfer(ctx, from); err != nil {
		return err
	}
	if err := retry(func() error { return unix.Fsync(c.dst.fd) }); err != nil {
		return sysErr(err, "flush", c.dst.path)
	}
	// A source that lost its tail has no data there, only an end: look again.
	size, err := c.src.currentSize()
	if err != nil {
		return err
	}
	if size < c.opts.Size {
		return fault.New(fault.Corrupt, "copy source %q shrank from %d to %d bytes while it was being copied", c.src.path, c.opts.Size, size)
	}
	c.report(c.opts.Size, true)
	return nil
}

// share reflinks as much as possible and returns where it ended: at the last
// whole block, or where it began.
func (c *blockCopy) share(ctx context.Context, from int64) (int64, error) {
	unit := max(int64(c.src.st.Blksize), int64(c.dst.st.Blksize), align)
	if from%unit != 0 {
		return from, nil
	}
	for end := alignDown(c.opts.Size, unit); from < end; {
		if err := ctx.Err(); err != nil {
			return from, err
		}
		n := min(end-from, alignDown(cloneStep, unit))
		ok, err := c.pair.clone(from, n)
		if err != nil || !ok {
			return from, err
		}
		from += n
		c.shared += n
		c.report(from, false)
	}
	return from, nil
}

// piece is a part of the copy: data, or a hole (data false).
type piece struct {
	seq      int64
	off, end int64
	data     bool
}

// transfer copies [from, Size) with workers. One goroutine cuts pieces, the
// workers copy them in any order, and the caller's goroutine puts their ends in
// order again for progress and checkpoints.
func (c *blockCopy) transfer(ctx context.Context, from int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	todo := make(chan piece)
	done := make(chan piece, 1024) // a checkpoint's flush must not stop the workers
	g.Go(func() error {
		defer close(todo)
		return c.cut(ctx, from, todo)
	})
	for range c.m.workers {
		g.Go(func() error { return c.work(ctx, todo, done) })
	}
	var copyErr error
	go func() {
		copyErr = g.Wait()
		close(done)
	}()
	var collectErr error
	waiting := map[int64]piece{} // copied, but not everything before them
	next := int64(0)
	for p := range done {
		waiting[p.seq] = p
		for q, ok := waiting[next]; ok && collectErr == nil; q, ok = waiting[next] {
			delete(waiting, next)
			next++
			collectErr = c.collect(q)
		}
		if collectErr != nil {
			cancel() // and drain, so that the workers end
		}
	}
	if collectErr != nil {
		return collectErr
	}
	return copyErr
}

// cut sends the pieces of [from, Size) in order.
func (c *blockCopy) cut(ctx context.Context, from int64, todo chan<- piece) error {
	seq, end := int64(0), c.opts.Size
	send := func(off, stop int64, data bool) error {
		step := int64(c.m.buffer)
		if !data {
			step = cloneStep
		}
		for off < stop {
			// Cut at multiples of the step, so that writes stay aligned.
			p := piece{seq: seq, off: off, end: min(alignDown(off, step)+step, stop), data: data}
			select {
			case todo <- p:
			case <-ctx.Done():
				return ctx.Err()
			}
			seq++
			off = p.end
		}
		return nil
	}
	for off := from; off < end; {
		start, stop, err := c.extents.next(off, end)
		if err != nil {
			return sysErr(err, "find the data of", c.src.path)
		}
		if err := send(off, start, false); err != nil {
			return err
		}
		if err := send(start, stop, true); err != nil {
			return err
		}
		off = stop
	}
	return nil
}

// work copies pieces until there are no more.
func (c *blockCopy) work(ctx context.Context, todo <-chan piece, done chan<- piece) error {
	buf := alignedBuffer(c.m.buffer)
	for p := range todo {
		var err error
		switch {
		case p.data:
			err = c.pair.copy(ctx, p.off, p.end-p.off, buf)
		case !c.opts.DstZeroed:
			err = c.pair.zero(ctx, p.off, p.end-p.off)
		}
		if err != nil {
			return err
		}
		done <- p // always received: see transfer
	}
	return ctx.Err()
}

// collect takes note of the next piece in order.
func (c *blockCopy) collect(p piece) error {
	c.offset = p.end
	if p.data {
		c.fresh += p.end - p.off
	}
	c.report(c.offset, false)
	if c.opts.Checkpoint == nil || c.fresh < c.m.every || c.offset <= c.synced {
		return nil
	}
	if err := retry(func() error { return unix.Fdatasync(c.dst.fd) }); err != nil {
		return sysErr(err, "flush", c.dst.path)
	}
	c.fresh, c.synced = 0, c.offset
	return c.opts.Checkpoint(c.offset)
}

// report calls Progress, not too often. Offsets only grow.
func (c *blockCopy) report(offset int64, last bool) {
	if c.opts.Progress == nil || !last && time.Since(c.reported) < progressEvery {
		return
	}
	c.reported = time.Now()
	c.opts.Progress(max(offset, c.opts.From), c.opts.Size)
}
