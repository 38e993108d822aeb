package mover

import (
	"context"
	"io"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// FormatLayer implements Files: it makes path an empty layer, after its
// space is taken. fault.Exhausted: the storage has not so much, or not the reserve that it
// keeps for a layer without all its space.
func (m *Mover) FormatLayer(ctx context.Context, path string, size, chunk int64) error {
	if err := layer.Harmless(path, chunk); err != nil { // before anybody relies on it
		return err
	}
	d, err := openTarget(path)
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.allocate(ctx, size); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return canceled(ctx, "formatting of layer "+path)
	}
	return layer.Format(d.file(), chunk)
}

// Allocate implements Files.
func (m *Mover) Allocate(ctx context.Context, path string, size int64) error {
	d, err := openStore(path, unix.O_RDWR) // not locked: a node that attaches the file waits for its lock
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.allocate(ctx, size); err != nil {
		return err
	}
	return sysErr(retry(func() error { return unix.Fsync(d.fd) }), "flush", path)
}

// TrimLayer implements Files. Who attaches the file waits for its lock; somebody who has it
// open already and writes to it shows in that the layer holds more than a moment ago.
func (m *Mover) TrimLayer(ctx context.Context, path string, size int64) error {
	d, err := openStore(path, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer d.close()
	if d.device {
		return nil
	}
	first, err := d.used(ctx, size)
	if err != nil || first >= size {
		return err
	}
	if err := d.lock("layer"); err != nil {
		return err
	}
	from, err := d.used(ctx, size)
	if err != nil {
		return err
	}
	if from != first {
		return fault.New(fault.InUse, "layer %s is being written: it is not trimmed now", strconv.Quote(path))
	}
	err = retry(func() error {
		return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, size-from)
	})
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
		return nil
	}
	return sysErr(err, "give back the space of", path)
}

// used is where the space behind what a layer of size bytes holds begins.
func (s *store) used(ctx context.Context, size int64) (int64, error) {
	h, err := layer.ReadHeader(s.file())
	if err != nil {
		return 0, err
	}
	n := int64(0)
	err = layer.Exceptions(s.file(), size, func(_, _ int64) error { n++; return ctx.Err() })
	if ctx.Err() != nil {
		return 0, canceled(ctx, "trimming of layer "+s.path)
	}
	return layer.Used(n, h.Chunk), err
}

// CheckLayer implements Files.
func (m *Mover) CheckLayer(_ context.Context, path string) error {
	d, err := openSource(path)
	if err != nil {
		return err
	}
	defer d.close()
	h, err := layer.ReadHeader(d.file())
	if err == nil && !h.Valid {
		err = fault.New(fault.Corrupt, "the kernel has given up this layer after a failed write: what was acknowledged is still in it")
	}
	return err
}

// RepairLayer implements Files.
func (m *Mover) RepairLayer(_ context.Context, path string, size int64) (int64, error) {
	d, err := openTarget(path)
	if err != nil {
		return 0, err
	}
	defer d.close()
	return layer.Repair(d.file(), size)
}

// allocateStep is how much is allocated at once: writes to the file wait meanwhile, and the storage
// may turn out to be full in the middle.
const allocateStep = 64 << 20

// allocate takes the space of a file's first size bytes, where the storage can
// do that. A device has its space. Where the file has not all its space then, the
// storage must have its reserve.
func (s *store) allocate(ctx context.Context, size int64) error {
	if s.size < size {
		return fault.New(fault.Corrupt, "%q has %d bytes, %d were recorded: it was truncated", s.path, s.size, size)
	}
	if s.device {
		return nil
	}
	taken, err := s.take(ctx, size)
	if err != nil || taken && size == s.size {
		return err
	}
	return s.reserved()
}

// take is allocate without a look at all of the reserve. taken is false where the storage cannot do that. It goes no
// further than to the reserve's floor: where a storage is full at once, nobody can make others wait before that.
func (s *store) take(ctx context.Context, size int64) (taken bool, err error) {
	const least = 4096 // is enough to find out
	for off, n := int64(0), min(least, size); off < size; off, n = off+n, min(allocateStep, size-off-n) {
		if ctx.Err() != nil {
			return false, canceled(ctx, "allocating the space of "+s.path)
		}
		if off > 0 {
			if err := s.spare(size); err != nil {
				return false, err
			}
		}
		err := retry(func() error { return unix.Fallocate(s.fd, unix.FALLOC_FL_KEEP_SIZE, off, n) })
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
			return false, nil
		}
		if err != nil {
			return false, sysErr(err, "allocate the space of", s.path)
		}
	}
	return true, nil
}

// spare refuses to take another piece of a file's first size bytes where that would not leave the floor.
func (s *store) spare(size int64) error {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(s.fd, &st) }); err != nil {
		return sysErr(err, "stat", s.path)
	}
	const unit = 512 // of st_blocks, stat(2)
	missing := size - st.Blocks*unit
	if missing <= 0 {
		return nil
	}
	u, err := s.usage()
	if err != nil {
		return err
	}
	if floor := layer.ReserveOf(u.Total).Floor; u.Available-min(missing, allocateStep) < floor {
		return fault.New(fault.Exhausted, "the storage has %d bytes free, %d are still to be allocated for a layer, and %d have to stay, so that writes can wait before the storage is full: delete something, or give it more space", u.Available, missing, floor)
	}
	return nil
}

// usage of the file's storage.
func (s *store) usage() (host.Usage, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(s.fd, &st) }); err != nil {
		return host.Usage{}, sysErr(err, "measure the storage of", s.path)
	}
	return host.UsageOf(&st), nil
}

// reserved refuses a file whose storage has less free than its reserve: what is written
// to it would have to wait at once. A storage that counts nothing has none.
func (s *store) reserved() error {
	u, err := s.usage()
	if err != nil {
		return err
	}
	if low := layer.ReserveOf(u.Total).Low; u.Available < low {
		return fault.New(fault.Exhausted, "the storage has %d bytes free, and keeps %d for layers that have not all their space, because it cannot allocate it or their class has thinLayers: delete something, or give it more space", u.Available, low)
	}
	return nil
}

// file is the store past the page cache where that can be.
func (s *store) file() layer.File {
	if s.direct >= 0 {
		return descriptor(s.direct)
	}
	return descriptor(s.fd)
}

// descriptor is an open file.
type descriptor int

func (d descriptor) ReadAt(b []byte, off int64) (int, error) {
	return all(b, func(b []byte, n int64) (int, error) { return unix.Pread(int(d), b, off+n) }, io.EOF)
}

func (d descriptor) WriteAt(b []byte, off int64) (int, error) {
	return all(b, func(b []byte, n int64) (int, error) { return unix.Pwrite(int(d), b, off+n) }, io.ErrShortWrite)
}

// all repeats f, which is told how much is done, until it has done all of b; end
// is the error of one that does nothing.
func all(b []byte, f func(b []byte, done int64) (int, error), end error) (int, error) {
	done := 0
	for done < len(b) {
		n, err := retryN(func() (int, error) { return f(b[done:], int64(done)) })
		if err == nil && n == 0 {
			err = end
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func (d descriptor) Sync() error { return retry(func() error { return unix.Fsync(int(d)) }) }
