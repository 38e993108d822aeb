package mover

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const (
	// sparseUnit is the granularity in which zeros are looked for in a source
	// that cannot tell where its holes are.
	sparseUnit = 64 << 10
	// cloneStep and zeroStep bound a system call that moves no data through this
	// process, so that cancelling does not wait for terabytes.
	cloneStep = 4 << 30
	zeroStep  = 128 << 20
)

// pair copies spans between two open files. Its methods may be called by many
// goroutines at once, each with a buffer of its own.
type pair struct {
	src, dst         int
	direct           *direct // nil: everything goes through the page cache
	srcName, dstName string
	srcDev, dstDev   bool
	dstZeroed        bool
	detectZeros      bool
	// noRange is set once copy_file_range turned out not to work here.
	noRange  *atomic.Bool
	throttle *throttle // of all copies together
	own      *throttle // of this one
	zeros    []byte    // sparseUnit bytes

	ranged, written atomic.Int64 // bytes copied by copy_file_range, by write
}

// clone shares [from, from+n) of the source. false: not possible here, nothing
// was changed.
func (p *pair) clone(from, n int64) (bool, error) {
	if p.srcDev || p.dstDev {
		return false, nil
	}
	r := unix.FileCloneRange{Src_fd: int64(p.src), Src_offset: uint64(from), Src_length: uint64(n), Dest_offset: uint64(from)}
	err := retry(func() error { return unix.IoctlFileCloneRange(p.dst, &r) })
	switch err {
	case nil:
		return true, nil
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.EXDEV, unix.EINVAL, unix.ENOSYS, unix.EPERM, unix.EBADF, unix.ETXTBSY, unix.EISDIR:
		return false, nil
	}
	return false, sysErr(err, "share extents with", p.dstName)
}

// copy copies [off, off+n) of data, n at most len(buf).
func (p *pair) copy(ctx context.Context, off, n int64, buf []byte) error {
	if err := p.wait(ctx, n); err != nil {
		return err
	}
	if !p.detectZeros && !p.noRange.Load() {
		done, err := p.copyRange(off, n)
		if err != nil || done == n {
			return err
		}
		off, n = off+done, n-done
	}
	buf = buf[:n]
	if err := p.readFull(buf, off); err != nil {
		return err
	}
	if p.detectZeros {
		return p.writeSparse(ctx, buf, off)
	}
	return p.writeFull(buf, off)
}

// copyRange returns how much copy_file_range did; less than n without an error
// means that the rest has to be read and written.
func (p *pair) copyRange(off, n int64) (int64, error) {
	r, w, end := off, off, off+n
	for r < end {
		c, err := retryN(func() (int, error) { return unix.CopyFileRange(p.src, &r, p.dst, &w, int(end-r), 0) })
		switch err {
		case nil:
			if c == 0 { // the end of the source, or a file system that cannot: reading tells
				return r - off, nil
			}
			p.ranged.Add(int64(c))
		case unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EFBIG, unix.ESTALE, unix.EROFS:
			return r - off, sysErr(err, "copy into", p.dstName)
		default: // EXDEV, EINVAL, EOPNOTSUPP, EPERM, ENOSYS, ...: as if it did not exist
			p.noRange.Store(true)
			return r - off, nil
		}
	}
	return n, nil
}

func (p *pair) readFull(buf []byte, off int64) error {
	for len(buf) > 0 {
		c, err := p.direct.read(buf, off)
		if errors.Is(err, errBuffered) {
			c, err = retryN(func() (int, error) { return unix.Pread(p.src, buf, off) })
		}
		if err != nil {
			return sysErr(err, "read", p.srcName)
		}
		if c == 0 {
			return fault.New(fault.Corrupt, "copy source %q ended at byte %d: it shrank while it was being copied", p.srcName, off)
		}
		buf, off = buf[c:], off+int64(c)
	}
	return nil
}

func (p *pair) writeFull(buf []byte, off int64) error {
	for len(buf) > 0 {
		c, err := p.direct.write(buf, off)
		if errors.Is(err, errBuffered) {
			c, err = retryN(func() (int, error) { return unix.Pwrite(p.dst, buf, off) })
		}
		if err != nil {
			return sysErr(err, "write", p.dstName)
		}
		p.written.Add(int64(c))
		buf, off = buf[c:], off+int64(c)
	}
	return nil
}

// writeSparse writes buf, leaving out what is zero.
func (p *pair) writeSparse(ctx context.Context, buf []byte, off int64) error {
	for i := 0; i < len(buf); {
		isZero := p.isZero(buf[i:min(i+sparseUnit, len(buf))])
		j := i
		for j < len(buf) && p.isZero(buf[j:min(j+sparseUnit, len(buf))]) == isZero {
			j = min(j+sparseUnit, len(buf))
		}
		var err error
		switch {
		case !isZero:
			err = p.writeFull(buf[i:j], off+int64(i))
		case !p.dstZeroed:
			err = p.zero(ctx, off+int64(i), int64(j-i))
		}
		if err != nil {
			return err
		}
		i = j
	}
	return nil
}

func (p *pair) isZero(b []byte) bool { return bytes.Equal(b, p.zeros[:len(b)]) }

// zero makes [off, off+n) of the target read as zero, without data where that
// is possible.
func (p *pair) zero(ctx context.Context, off, n int64) error {
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := min(n, zeroStep)
		err := p.zeroCheaply(off, step)
		if err == unix.EOPNOTSUPP {
			err = p.writeZeros(ctx, off, step)
		}
		if err != nil {
			return sysErr(err, "zero a part of", p.dstName)
		}
		off, n = off+step, n-step
	}
	return nil
}

// zeroCheaply returns EOPNOTSUPP when zeros have to be written.
func (p *pair) zeroCheaply(off, n int64) error {
	if p.dstDev && (off%align != 0 || n%align != 0) {
		return unix.EOPNOTSUPP
	}
	// A punched hole keeps the copy as sparse as its source, also on a device
	// with thin storage; a zeroed range, which stays allocated, comes second.
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE} {
		err := retry(func() error { return unix.Fallocate(p.dst, mode|unix.FALLOC_FL_KEEP_SIZE, off, n) })
		if err != unix.EOPNOTSUPP && err != unix.ENOSYS && err != unix.EINVAL {
			return err
		}
	}
	if p.dstDev {
		return zeroOut(p.dst, off, n) // here the kernel writes zeros if it must
	}
	return unix.EOPNOTSUPP
}

func (p *pair) writeZeros(ctx context.Context, off, n int64) error {
	for n > 0 {
		step := min(n, int64(len(p.zeros)))
		if err := p.wait(ctx, step); err != nil {
			return err
		}
		if err := p.writeFull(p.zeros[:step], off); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}
