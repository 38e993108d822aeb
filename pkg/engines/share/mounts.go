package share

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// DefaultMounts is the folder below which the mounts of a process lie.
const DefaultMounts = "/run/quarry/mounts"

const lockSuffix = ".lock"

// home is where the mounts of one opening lie.
type home struct {
	path string
	lock *os.File
	last atomic.Int64 // number of a mount point
}

// newHome makes one, after it has taken down what dead processes left beside it.
func newHome(ctx context.Context, h *host.Local, mounts string) (*home, error) {
	if mounts == "" {
		mounts = DefaultMounts
	}
	if err := os.MkdirAll(mounts, 0o700); err != nil {
		return nil, fault.New(fault.Unavailable, "a folder for mounts: %w", err)
	}
	mounts, err := filepath.EvalSymlinks(mounts) // the kernel's list of mounts has no links
	if err != nil {
		return nil, fault.New(fault.Unavailable, "a folder for mounts: %w", err)
	}
	if err := sweep(ctx, h, mounts); err != nil {
		return nil, err
	}
	for {
		at := &home{path: filepath.Join(mounts, rand.Text())}
		lock, err := claim(at.path+lockSuffix, os.O_CREATE|os.O_EXCL)
		if err != nil {
			return nil, fault.New(fault.Unavailable, "a folder for mounts: %w", err)
		}
		if lock == nil { // swept between its making and its locking
			continue
		}
		if at.lock = lock; os.Mkdir(at.path, 0o700) == nil {
			return at, nil
		}
		return nil, errors.Join(fault.New(fault.Unavailable, "a folder for mounts: %s cannot be made", at.path), at.leave(h))
	}
}

// claim locks a lock file. nil without an error: somebody holds it, or it is there no longer.
func claim(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) && flags == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		open, errOpen := f.Stat()
		there, errThere := os.Stat(path)
		if errOpen == nil && errThere == nil && os.SameFile(open, there) {
			return f, nil
		}
	}
	if err == nil || errors.Is(err, unix.EWOULDBLOCK) {
		return nil, f.Close()
	}
	return nil, errors.Join(err, f.Close())
}

// sweep takes down the mounts of processes that have ended.
func sweep(ctx context.Context, h *host.Local, mounts string) error {
	found, err := os.ReadDir(mounts)
	if err != nil {
		return fault.New(fault.Unavailable, "look for mounts of dead processes: %w", err)
	}
	for _, entry := range found {
		name, ok := strings.CutSuffix(entry.Name(), lockSuffix)
		if !ok || len(name) != len(rand.Text()) {
			continue
		}
		lock, err := claim(filepath.Join(mounts, entry.Name()), 0)
		if err != nil {
			return fault.New(fault.Unavailable, "look for mounts of dead processes: %w", err)
		}
		if lock == nil {
			continue
		}
		dead := &home{path: filepath.Join(mounts, name), lock: lock}
		_ = dead.leave(h) // one that stays is tried again, and keeps nobody from opening
		if ctx.Err() != nil {
			return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
		}
	}
	return nil
}

// point makes a mount point that was none before.
func (at *home) point(prefix string) (string, error) {
	point := filepath.Join(at.path, fmt.Sprintf("%s%d", prefix, at.last.Add(1)))
	if err := os.Mkdir(point, 0o700); err != nil {
		return "", fault.New(fault.Unavailable, "a mount point: %w", err)
	}
	return point, nil
}

// leave takes every mount down, and removes the home. The lock goes last: until then the next
// process tries what did not work.
func (at *home) leave(h *host.Local) error {
	mounts, err := h.Mounts()
	if err != nil {
		return errors.Join(err, at.lock.Close())
	}
	ctx := context.Background()
	var errs []error
	for i := len(mounts) - 1; i >= 0; i-- { // the later ones are on the earlier ones
		if strings.HasPrefix(mounts[i].Point, at.path+"/") {
			errs = append(errs, h.UnmountLazily(ctx, mounts[i].Point))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return errors.Join(err, at.lock.Close())
	}
	points, err := os.ReadDir(at.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, p := range points {
		errs = append(errs, os.Remove(filepath.Join(at.path, p.Name()))) // never what is in it
	}
	if err == nil {
		errs = append(errs, os.Remove(at.path))
	}
	if err := errors.Join(errs...); err != nil {
		return errors.Join(fault.New(fault.Unavailable, "remove the folder for mounts: %w", err), at.lock.Close())
	}
	if err := errors.Join(os.Remove(at.path+lockSuffix), at.lock.Close()); err != nil {
		return fault.New(fault.Unavailable, "remove the folder for mounts: %w", err)
	}
	return nil
}

// unmount takes a mount down, at once for those who look and lazily for those who use it, and
// removes its point.
func unmount(ctx context.Context, h *host.Local, point string) error {
	if err := h.UnmountLazily(context.WithoutCancel(ctx), point); err != nil {
		return err
	}
	if err := os.Remove(point); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.Unavailable, "remove a mount point: %w", err)
	}
	return nil
}
