package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// How long the kernel may take for an answer that needs no data to move, and
// for one that has to write out what is dirty.
const (
	quick = 10 * time.Second
	flush = 5 * time.Minute
)

// Local is the host that this process runs on: its mounts, devices and
// filesystems. Nothing is remembered that the kernel does not know.
type Local struct {
	run   Runner
	guard Guard
	// thawing is how long a thaw, which writes to the storage, is waited for.
	thawing time.Duration

	mu     sync.Mutex
	marks  map[int]Loop // by number, valid for one disk sequence
	tools  map[string]*tool
	mapper *os.File // device-mapper's control node, once it was opened
	// leaving are suspensions that are over, whose watchdogs may not have gone yet.
	leaving map[*Suspension]struct{}
}

// NewLocal returns the host on which programs are started with run.
func NewLocal(run Runner) *Local {
	return &Local{run: run, thawing: quick, marks: map[int]Loop{}, tools: map[string]*tool{}, leaving: map[*Suspension]struct{}{}}
}

// Abandoned is how many system calls and programs hang now.
func (l *Local) Abandoned() int {
	n := l.guard.Abandoned()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.tools {
		if t.hangs {
			n++
		}
	}
	return n
}

// Usage of a filesystem.
type Usage struct {
	Total, Used, Available         int64 // bytes
	Inodes, InodesUsed, InodesFree int64 // zero where the filesystem counts none
}

// Usage measures the filesystem at path. It never waits longer than 10 s.
func (l *Local) Usage(ctx context.Context, path string) (Usage, error) {
	st, err := guarded(ctx, &l.guard, "statfs "+path, quick, func() (unix.Statfs_t, error) {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		return st, ioError("measure", path, err)
	})
	if err != nil {
		return Usage{}, err
	}
	return UsageOf(&st), nil
}

// UsageOf is what the kernel says of a filesystem. Its blocks are of f_frsize bytes; f_bsize is what to transfer at
// once, which FUSE servers make larger (statfs(2), statvfs(3)).
func UsageOf(st *unix.Statfs_t) Usage {
	block := int64(st.Frsize) // 32 bits on some architectures
	if block == 0 {
		block = int64(st.Bsize)
	}
	u := Usage{
		Total:      int64(st.Blocks) * block,
		Available:  int64(st.Bavail) * block,
		Used:       int64(st.Blocks-st.Bfree) * block,
		Inodes:     int64(st.Files),
		InodesFree: int64(st.Ffree),
	}
	u.InodesUsed = u.Inodes - u.InodesFree
	return u
}

// FileInfo is what stat says of a path, itself and not what it links to.
type FileInfo struct {
	Mode       fs.FileMode
	Size       int64 // of a block device too
	Allocated  int64 // bytes that a file takes of its storage
	Dev, Inode uint64
	RDev       uint64 // the number of a device node
	GID        uint32
}

// Stat describes a path without following a symbolic link at its end.
// fault.NotFound: nothing is there. It never waits longer than 10 s.
func (l *Local) Stat(ctx context.Context, path string) (FileInfo, error) {
	return guarded(ctx, &l.guard, "stat "+path, quick, func() (FileInfo, error) { return stat(path) })
}

func stat(path string) (FileInfo, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return FileInfo{}, ioError("stat", path, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return FileInfo{}, ioError("stat", path, err)
	}
	return FileInfo{Mode: fi.Mode(), Size: fi.Size(), Allocated: st.Blocks * 512, Dev: st.Dev, Inode: st.Ino, RDev: st.Rdev, GID: st.Gid}, nil
}

// Sync writes out the filesystem that path is on. The error tells that
// something that was written earlier has been lost.
func (l *Local) Sync(ctx context.Context, path string) error {
	return l.guard.Do(ctx, "sync "+path, flush, func() error {
		f, err := openFile(path, os.O_RDONLY)
		if err != nil {
			return ioError("sync", path, err)
		}
		defer f.Close()
		return ioError("sync", path, unix.Syncfs(int(f.Fd())))
	})
}

// SyncDevice writes out a block device's cache and that of what is below.
func (l *Local) SyncDevice(ctx context.Context, device string) error {
	return l.guard.Do(ctx, "sync "+device, flush, func() error {
		f, err := openFile(device, os.O_RDONLY)
		if err != nil {
			return ioError("sync", device, err)
		}
		defer f.Close()
		return ioError("sync", device, f.Sync())
	})
}

// ReadDevice reads the first 4 KiB of a block device past every cache: an
// error is what a workload would get.
func (l *Local) ReadDevice(ctx context.Context, device string) error {
	return l.guard.Do(ctx, "read "+device, quick, func() error {
		f, err := openFile(device, os.O_RDONLY|unix.O_DIRECT)
		if err != nil {
			return ioError("read", device, err)
		}
		defer f.Close()
		buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
		if err != nil {
			return fault.Wrap(fault.Internal, err)
		}
		defer func() { _ = unix.Munmap(buf) }()
		n, err := unix.Pread(int(f.Fd()), buf, 0)
		if err == nil && n == 0 {
			return fault.New(fault.Corrupt, "read %s: the device is empty", device)
		}
		return ioError("read", device, err)
	})
}

// openFile is os.OpenFile for what may hang. os.OpenFile tells Go's poller of
// the file, and a FUSE server that does not answer to that stops the poller, and
// with it this whole process.
func openFile(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// ioError gives the error of a system call its kind. nil stays nil.
func ioError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	var errno unix.Errno
	var kind fault.Kind
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		kind = fault.NotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		kind = fault.Permission
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		kind = fault.Exhausted
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY):
		kind = fault.InUse
	case errors.As(err, &errno):
		kind = fault.Unavailable
	default:
		kind = fault.Internal
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fault.New(kind, "%s %s: %w", op, path, err)
}

// Within runs f, which may hang, as Guard.Do does.
func (l *Local) Within(ctx context.Context, key string, limit time.Duration, f func() error) error {
	return l.guard.Do(ctx, key, limit, f)
}

// Unclaimed waits until no program and no mount has a device for itself: one
// that a killed predecessor had started may take a moment to end. fault.InUse:
// somebody still had it after 10 s. fault.Pending: that is a program which finishes, whoever dies.
func (l *Local) Unclaimed(ctx context.Context, device string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	patience := time.NewTimer(quick)
	defer patience.Stop()
	for {
		err := l.guard.Do(ctx, "claim "+device, quick, func() error {
			f, err := openFile(device, os.O_RDONLY|unix.O_EXCL)
			if err != nil {
				return ioError("claim", device, err)
			}
			return f.Close()
		})
		if !errors.Is(err, fault.InUse) {
			return err
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.KindOf(ctx.Err()), "claim %s: %w", device, ctx.Err())
		case <-patience.C:
			if c := finishingOn(device); c != "" {
				return fault.New(fault.Pending, "%s: an earlier agent began \"%s\", which has to end first", device, c)
			}
			return fault.New(fault.InUse, "%s is in use by another program, or mounted where this process cannot see it", device)
		case <-tick.C:
		}
	}
}
