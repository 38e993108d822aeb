package posix

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// onDisk is the name of a slab, a tag or a class in its folder.
func (d *Directory) onDisk(name string) string {
	if d.options.Decorate {
		return "_" + name + "_"
	}
	return name
}

// offDisk is the reverse; false: it is the name of nothing that was made here.
func (d *Directory) offDisk(name string) (string, bool) {
	if !d.options.Decorate {
		return name, true
	}
	inner, begins := strings.CutPrefix(name, "_")
	inner, ends := strings.CutSuffix(inner, "_")
	return inner, begins && ends
}

// refreshPrefix begins the names that are made and removed to refresh a folder. No slab and no tag
// begins like that.
const refreshPrefix = ".refresh."

// refresh changes a folder, so that the client of a share asks the server anew what is in it.
func (d *Directory) refresh(folder *os.File) error {
	name := refreshPrefix + rand.Text()
	err := d.roomy(func() error {
		f, err := openat(folder, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		if f != nil {
			_ = f.Close() // was only made
		}
		return nil
	})
	if errors.Is(Fault(err), fault.Exhausted) {
		// A new time stamp is a change as well, if a weaker one, and needs no room.
		now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
		return uninterrupted(func() error { return unix.UtimesNanoAt(int(folder.Fd()), ".", now, 0) })
	}
	if err != nil {
		return err
	}
	if err := unlinkat(folder, name, 0); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "unlink", Path: folder.Name() + "/" + name, Err: err}
	}
	return nil
}

// each calls do for every name in the folder dir/name.
func (d *Directory) each(ctx context.Context, dir *os.File, name string, do func(folder *os.File, name string) error) error {
	if d.options.Refresh {
		folder, err := d.openFolder(dir, name)
		if err != nil {
			return err
		}
		if err = errors.Join(d.refresh(folder), folder.Close()); err != nil {
			return err
		}
	}
	folder, err := d.openFolder(dir, name) // after that: some show what was there at their opening
	if err != nil {
		return err
	}
	defer folder.Close()
	list, err := names(folder)
	if err != nil {
		return err
	}
	for _, name := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if strings.HasPrefix(name, refreshPrefix) { // of one that stopped; or of another host, which has no more use for it
			if err := unlinkat(folder, name, 0); err == nil || err == unix.ENOENT {
				continue
			}
		}
		if err := do(folder, name); err != nil {
			return err
		}
	}
	return nil
}

// names lists a folder in the order of inode numbers, which is about that of
// creation and of the place on disk: reading many small files in that order
// from a cold disk takes a fraction of the time of the folder's own order.
func names(folder *os.File) ([]string, error) {
	type entry struct {
		inode uint64
		name  string
	}
	var entries []entry
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(int(folder.Fd()), buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "getdents", Path: folder.Name(), Err: err}
		}
		if n == 0 {
			break
		}
		// struct linux_dirent64, see getdents(2): inode, offset, record length, type, name.
		for rest := buf[:n]; len(rest) > 0; {
			size := binary.NativeEndian.Uint16(rest[16:])
			name, _, _ := bytes.Cut(rest[19:size], []byte{0})
			if s := string(name); s != "." && s != ".." {
				entries = append(entries, entry{binary.NativeEndian.Uint64(rest), s})
			}
			rest = rest[size:]
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.inode, b.inode) })
	out := make([]string, len(entries))
	for i, e := range entries {
		out[i] = e.name
	}
	return out, nil
}
