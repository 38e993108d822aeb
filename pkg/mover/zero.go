package mover

import (
	"context"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Zero implements Files: it makes bytes from to to of the file or device
// path read as zero, without writing them where the storage can do that, and
// flushes. The errors are those of Block.
func (m *Mover) Zero(ctx context.Context, path string, from, to int64) error {
	if from < 0 || to < from {
		return fault.New(fault.Invalid, "zeroing of bytes %d to %d: both must be at least 0 and in order", from, to)
	}
	d, err := openLocked(path, unix.O_RDWR) // what is zeroed may be new space of a slab in use
	if err != nil {
		return err
	}
	defer d.close()
	if d.size < to {
		return fault.New(fault.Corrupt, "%q has %d bytes, %d are to be zeroed: it was truncated", path, d.size, to)
	}
	p := pair{dst: d.fd, dstName: path, dstDev: d.device, noRange: new(atomic.Bool), throttle: m.throttle, zeros: make([]byte, sparseUnit)}
	if err := p.zero(ctx, from, to-from); err != nil {
		if ctx.Err() != nil {
			return canceled(ctx, "zeroing of "+path)
		}
		return err
	}
	if err := retry(func() error { return unix.Fsync(d.fd) }); err != nil {
		return sysErr(err, "flush", path)
	}
	return nil
}
