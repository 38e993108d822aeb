package host

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// LoopSpec says what loop device to make.
type LoopSpec struct {
	File string // a regular file or a block device
	// Size of the device in bytes; the file must be at least that large.
	Size     int64
	ReadOnly bool
	// Mark by which the device is found again: 1 to MaxMark bytes.
	Mark string
	// Known, if not nil, was seen over the file. While that is so, nobody has to look for one.
	Known *Loop
}

const loopTimeout = 30 * time.Second

// AttachLoop returns the loop device over a file, and makes it if there is
// none: concurrent callers, in other processes too, get the same one. Direct
// I/O is used where the file's storage can.
//
// fault.Corrupt: the file is shorter than Size. fault.InUse: the file has a
// loop device with another mark, or one in use the other way (read-only or not).
func (l *Local) AttachLoop(ctx context.Context, spec LoopSpec) (Loop, error) {
	if spec.Mark == "" || len(spec.Mark) > MaxMark {
		return Loop{}, fault.New(fault.Internal, "loop device for %s: mark %q has %d bytes: 1 to %d are allowed", spec.File, spec.Mark, len(spec.Mark), MaxMark)
	}
	var out Loop
	err := l.guard.offer(ctx, "attach a loop device to "+spec.File, loopTimeout, func(ctx context.Context, hand func(error) bool) {
		lp, h, err := l.attachLoop(ctx, spec)
		if err != nil {
			h.undo()
			h.letGo()
			hand(err)
			return
		}
		out = lp
		if !hand(nil) {
			h.undo()
		}
		h.letGo()
	})
	if err != nil {
		return Loop{}, err // out may still be written by what was left behind
	}
	return out, nil
}

// loopHold keeps a device that was just attached from everybody else until it
// is clear whether somebody still wants it. The zero loopHold holds nothing.
type loopHold struct {
	device *os.File
	made   bool // by this call
	kept   bool // this call kept it from going
	unlock func()
}

// undo leaves the device as it was before; while the hold lasts nobody can have
// found it.
func (h loopHold) undo() {
	switch {
	case h.made:
		_ = unix.IoctlSetInt(int(h.device.Fd()), unix.LOOP_CLR_FD, 0) // it goes when it is closed
	case h.kept:
		if info, err := unix.IoctlLoopGetStatus64(int(h.device.Fd())); err == nil {
			info.Flags |= unix.LO_FLAGS_AUTOCLEAR
			_ = unix.IoctlLoopSetStatus64(int(h.device.Fd()), info)
		}
	}
}

func (h loopHold) letGo() {
	if h.device != nil {
		_ = h.device.Close()
	}
	if h.unlock != nil {
		h.unlock()
	}
}

// attachLoop does the work of AttachLoop. The hold is to be let go in any case.
func (l *Local) attachLoop(ctx context.Context, spec LoopSpec) (lp Loop, h loopHold, err error) {
	flags := os.O_RDWR
	if spec.ReadOnly {
		flags = os.O_RDONLY
	}
	through := 0
	if !spec.ReadOnly {
		if through, err = WriteThrough(spec.File); err != nil {
			return Loop{}, h, err
		}
	}
	f, err := openFile(spec.File, flags|through)
	if err != nil {
		return Loop{}, h, ioError("open", spec.File, err)
	}
	defer f.Close()
	if err := largeEnough(f, spec.Size); err != nil {
		return Loop{}, h, err
	}
	if h.unlock, err = lockLoops(ctx, spec.File, flags); err != nil {
		return Loop{}, h, err
	}
	found := spec.Known
	if found == nil || !found.stillOver(f) {
		if found, err = l.loopOf(ctx, f, spec.Mark); err != nil {
			return Loop{}, h, err
		}
	}
	if found != nil {
		lp, ok, err := l.reuseLoop(ctx, *found, spec, &h)
		if ok || err != nil {
			return lp, h, err
		}
	}
	lp, err = l.newLoop(ctx, f, spec, &h)
	return lp, h, err
}

// largeEnough refuses a file shorter than the size that was recorded.
func largeEnough(f *os.File, size int64) error {
	have, err := f.Seek(0, 2) // the size of a block device too
	if err != nil {
		return ioError("measure", f.Name(), err)
	}
	if have < size {
		return fault.New(fault.Corrupt, "%s is truncated: it has %d bytes and %d were recorded", f.Name(), have, size)
	}
	return nil
}

// lockLoops lets one process at a time attach a file. The lock is the file's
// own; where the storage has no locks, it is that of all loop devices. It needs
// an open file of its own: the one that a device is given lives on with the
// device, and its lock would too when this process is killed.
func lockLoops(ctx context.Context, file string, flags int) (unlock func(), err error) {
	for _, path := range []string{file, "/dev/loop-control"} {
		var f *os.File
		if f, err = openFile(path, flags); err != nil {
			return nil, ioError("open", path, err)
		}
		if err = flock(ctx, f); err == nil {
			return func() { _ = f.Close() }, nil
		}
		_ = f.Close()
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

func flock(ctx context.Context, f *os.File) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return ioError("lock", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.KindOf(ctx.Err()), "lock %s: %w", f.Name(), ctx.Err())
		case <-tick.C:
		}
	}
}

// reuseLoop takes an existing device over. ok is false when a new one must be made.
func (l *Local) reuseLoop(ctx context.Context, lp Loop, spec LoopSpec, h *loopHold) (_ Loop, ok bool, _ error) {
	if lp.Mark != spec.Mark {
		return lp, false, fault.New(fault.InUse, "%s has the loop device %s, which was not made for this volume (mark %q): detach it with \"losetup -d %s\"", spec.File, lp.Path, lp.Mark, lp.Path)
	}
	if lp.ReadOnly != spec.ReadOnly {
		return lp, false, l.detachLoop(ctx, lp)
	}
	d, err := openFile(lp.Path, os.O_RDONLY) // while it is open it stays
	if err != nil {
		return lp, false, ioError("open", lp.Path, err)
	}
	info, err := unix.IoctlLoopGetStatus64(int(d.Fd()))
	if err != nil {
		_ = d.Close()
	}
	if errors.Is(err, unix.ENXIO) {
		return lp, false, nil // it went meanwhile
	}
	if errors.Is(err, unix.ENOTCONN) {
		// The process behind its mount of the file has ended, and that of ours has not.
		if err := l.detachLoop(ctx, lp); err != nil {
			return lp, false, fault.New(fault.KindOf(err), "%s over %s gets no answer any more, for the process that served its storage has ended, and it cannot be replaced while it is in use: %w", lp.Path, lp.Backing, err)
		}
		return lp, false, nil
	}
	if err != nil {
		return lp, false, ioError("ask", lp.Path, err)
	}
	h.device = d
	if info.Flags&unix.LO_FLAGS_AUTOCLEAR != 0 { // on its way out with its last user
		info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
		if err := unix.IoctlLoopSetStatus64(int(d.Fd()), info); err != nil {
			return lp, false, ioError("keep", lp.Path, err)
		}
		h.kept = true
	}
	lp.remember() // an earlier version made it
	if lp.Size < spec.Size {
		lp, err = growLoop(d, lp, spec.Size)
	}
	return lp, err == nil, err
}

func (l *Local) newLoop(ctx context.Context, f *os.File, spec LoopSpec, h *loopHold) (Loop, error) {
	control, err := openFile("/dev/loop-control", os.O_RDWR)
	if err != nil {
		return Loop{}, loopError(err)
	}
	defer control.Close()
	have, err := f.Seek(0, 2)
	if err != nil {
		return Loop{}, ioError("measure", f.Name(), err)
	}
	cfg := unix.LoopConfig{Fd: uint32(f.Fd()), Size: uint32(sectorSize(f, spec.Size))}
	cfg.Info.Flags = unix.LO_FLAGS_DIRECT_IO // the kernel leaves it out where it cannot
	if spec.ReadOnly {
		cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if have > spec.Size { // without need no limit: it makes growing simpler
		cfg.Info.Sizelimit = uint64(spec.Size)
	}
	copy(cfg.Info.File_name[:MaxMark], spec.Mark)
	for {
		if err := ctx.Err(); err != nil {
			return Loop{}, fault.New(fault.KindOf(err), "attach a loop device to %s: %w", spec.File, err)
		}
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return Loop{}, loopError(err)
		}
		d, err := configure(n, &cfg)
		if err != nil {
			return Loop{}, err
		}
		if d == nil { // somebody else was faster, or is still closing it
			select {
			case <-ctx.Done():
			case <-time.After(time.Millisecond):
			}
			continue
		}
		h.device, h.made = d, true
		if !spec.ReadOnly {
			cache := writeBack
			if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil {
				return Loop{}, ioError("ask", spec.File, err)
			} else if flags&unix.O_SYNC != 0 {
				cache = writeThrough
			}
			if err := setCache(n, cache); err != nil {
				return Loop{}, err
			}
		}
		lp, err := l.loop(ctx, n, sysfs(n, "loop/backing_file"))
		if err == nil {
			lp.remember()
		}
		return lp, err
	}
}

// configure gives a device its file, and leaves it open. nil: it has one already.
func configure(n int, cfg *unix.LoopConfig) (*os.File, error) {
	path, err := loopNode(n)
	if err != nil {
		return nil, err
	}
	d, err := openFile(path, os.O_RDWR)
	if err != nil {
		return nil, ioError("open", path, err)
	}
	if err = unix.IoctlLoopConfigure(int(d.Fd()), cfg); err == nil {
		return d, nil
	}
	_ = d.Close()
	if errors.Is(err, unix.EBUSY) {
		return nil, nil
	}
	return nil, ioError("configure", path, err)
}

// sectorSize is 512, which suits every filesystem and partition table, unless
// direct I/O to the file needs more and the size is a multiple of that.
func sectorSize(f *os.File, size int64) int64 {
	const least, most = 512, 4096
	var st unix.Statx_t
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	need := int64(st.Dio_offset_align)
	if err != nil || st.Mask&unix.STATX_DIOALIGN == 0 || need <= least || need > most || size%need != 0 {
		return least
	}
	return need
}

// GrowLoop lets a device show size bytes of its file. A device that is as
// large already is success. fault.Corrupt: the file is shorter.
func (l *Local) GrowLoop(ctx context.Context, lp Loop, size int64) (Loop, error) {
	return guarded(ctx, &l.guard, "grow "+lp.Path, loopTimeout, func() (Loop, error) {
		d, err := l.openSame(lp, os.O_RDONLY)
		if err != nil {
			return lp, err
		}
		defer d.Close()
		return growLoop(d, lp, size)
	})
}

func growLoop(d *os.File, lp Loop, size int64) (Loop, error) {
	if lp.Size >= size {
		return lp, nil
	}
	info, err := unix.IoctlLoopGetStatus64(int(d.Fd()))
	if err != nil {
		return lp, ioError("ask", lp.Path, err)
	}
	if info.Sizelimit != 0 {
		info.Sizelimit = uint64(size)
		err = unix.IoctlLoopSetStatus64(int(d.Fd()), info)
	} else if err = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_SET_CAPACITY, 0); err == nil {
		if lp.Size, err = d.Seek(0, 2); err == nil && lp.Size > size {
			info.Sizelimit = uint64(size) // the file is larger than was recorded
			err = unix.IoctlLoopSetStatus64(int(d.Fd()), info)
		}
	}
	if err != nil {
		return lp, ioError("grow", lp.Path, err)
	}
	if lp.Size, err = d.Seek(0, 2); err != nil {
		return lp, ioError("measure", lp.Path, err)
	}
	if lp.Size < size {
		return lp, fault.New(fault.Corrupt, "%s is truncated: it gives %s %d bytes and %d were recorded", lp.Backing, lp.Path, lp.Size, size)
	}
	return lp, nil
}

// DetachLoop writes out and takes a device down; one that is gone already is
// success. fault.InUse: it is mounted somewhere, or a process has it open: in
// that case it goes as soon as that process closes it.
func (l *Local) DetachLoop(ctx context.Context, lp Loop) error {
	return l.guard.offer(ctx, "detach "+lp.Path, flush, func(ctx context.Context, hand func(error) bool) {
		hand(l.detachLoop(ctx, lp))
	})
}

func (l *Local) detachLoop(ctx context.Context, lp Loop) error {
	// Exclusive, because the kernel would otherwise only mark a mounted device
	// to go with its last user, whoever that may be by then.
	d, err := l.openSame(lp, os.O_RDONLY|unix.O_EXCL)
	switch {
	case errors.Is(err, fault.NotFound):
		return nil
	case err != nil:
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !orphaned(d) { // else it is lost, and whoever wrote it was told
		return ioError("sync", lp.Path, err)
	}
	if ctx.Err() != nil { // nobody waits any more: by now somebody may use it again
		return fault.New(fault.KindOf(ctx.Err()), "detach %s: %w", lp.Path, ctx.Err())
	}
	if !lp.ReadOnly { // newer kernels (6.11) keep it for the next file
		if err := setCache(lp.Number, writeBack); err != nil {
			return err
		}
	}
	err = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0)
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return ioError("detach", lp.Path, err)
	}
	_ = d.Close() // the kernel takes it down with the last close
	defer func() {
		if sequence(lp.Number) != lp.sequence || !exists(sysLoop(lp.Number)+"/loop/backing_file") {
			lp.forget()
		}
	}()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	patience := time.NewTimer(quick)
	defer patience.Stop()
	for sequence(lp.Number) == lp.sequence && exists(sysLoop(lp.Number)+"/loop/backing_file") {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fault.New(fault.KindOf(ctx.Err()), "detach %s: %w", lp.Path, ctx.Err())
		case <-patience.C:
			return fault.New(fault.InUse, "%s over %s is still open in another process: it goes when that process closes it", lp.Path, lp.Backing)
		}
	}
	return nil
}

// orphaned says whether the process that served a device's file (FUSE) has ended, or has no server.
func orphaned(device *os.File) bool {
	_, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	return errors.Is(err, unix.ENOTCONN)
}
