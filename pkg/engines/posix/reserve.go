package posix

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host"
)

// Deleting begins with a new tag, which takes an inode and a block: on a full
// disk nothing could ever be deleted. So a domain keeps some of both aside:
//
//	reserve/<n>  a file of reserveUnit bytes that hold nothing
//
// One after the other is given up when a tag or a deletion finds no room, and
// they are made again after deletions, when there is room for all of them
// several times over.
const (
	reserveFiles = 16
	reserveUnit  = 64 << 10
	// reserveLeast is the smallest file system with a reserve: its 1 MiB must
	// be a small part of it.
	reserveLeast = 32 << 20
)

type reserve struct {
	mu      sync.Mutex  // one at a time gives up or makes
	missing atomic.Bool // some files are not there
}

// roomy runs do, and gives up the reserve, bit by bit, while it finds no room.
func (d *Directory) roomy(do func() error) error {
	for {
		err := do()
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return err
		}
		if !d.giveUp() {
			return err
		}
	}
}

// giveUp removes one file of the reserve. It returns false when there is none.
func (d *Directory) giveUp() bool {
	d.reserve.mu.Lock()
	defer d.reserve.mu.Unlock()
	folder, err := d.root.Open("reserve")
	if err != nil {
		return false
	}
	defer folder.Close() // was only read
	names, err := folder.Readdirnames(1)
	if err != nil || len(names) == 0 {
		return false
	}
	d.reserve.missing.Store(true)
	if err := unlinkat(folder, names[0], 0); err != nil && err != unix.ENOENT {
		return false
	}
	_ = folder.Sync() // ext4 frees blocks when its journal commits; else the next try finds out
	return true
}

// keepReserve makes what is missing of the reserve where there is room for it.
// Without it everything but deleting on a full disk works, so it reports nothing.
func (d *Directory) keepReserve() {
	if !d.reserve.missing.Load() || !d.reserve.mu.TryLock() {
		return
	}
	defer d.reserve.mu.Unlock()
	st, err := statfs(d.slabs)
	if err != nil {
		return
	}
	if u := host.UsageOf(&st); u.Total < reserveLeast || u.Available < 4*reserveFiles*reserveUnit {
		return
	}
	if err := d.root.Mkdir("reserve", 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return
	}
	folder, err := d.root.OpenFile("reserve", os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return
	}
	defer folder.Close()
	for i := range reserveFiles {
		if !d.makeReserve(folder, strconv.Itoa(i)) {
			return
		}
	}
	d.reserve.missing.Store(false)
}

// makeReserve makes one file whose blocks are allocated, and says whether it is there.
func (d *Directory) makeReserve(folder *os.File, name string) bool {
	f, err := openat(folder, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if errors.Is(err, fs.ErrExist) {
		return true
	} else if err != nil {
		return false
	}
	err = uninterrupted(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, reserveUnit) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		if err = d.pastCache(f); err == nil {
			_, err = f.Write(make([]byte, reserveUnit))
		}
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = unlinkat(folder, name, 0) // half of one is as good as none
		return false
	}
	return true
}
