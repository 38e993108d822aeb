package posix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// imports is the folder, beside slabs/, in which a file lies that is to become a slab. No other
// file of the host can be named.
const imports = "import"

func (d *Directory) checkSource(source string) error {
	if source == "" || source == "." || source == ".." || strings.ContainsAny(source, "/\x00") {
		return fault.New(fault.Invalid, "source %q: the name of a file in %s is needed, without a path", source, filepath.Join(d.path, imports))
	}
	return nil
}

// OpenImport opens a file in import/ that can become a slab. fault.NotFound: it is not
// there. fault.InUse: somebody on this host has it open. fault.Invalid: it can be no slab.
func (d *Directory) OpenImport(source string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	path := filepath.Join(d.path, imports, source)
	if err := d.checkSource(source); err != nil {
		return nil, st, err
	}
	folder, err := d.root.OpenFile(imports, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, st, fault.New(fault.NotFound, "there is no %s: put the file there (mkdir %s; mv, or cp --reflink=auto --sparse=always)", path, filepath.Dir(path))
	}
	if err != nil {
		return nil, st, Fault(err)
	}
	defer folder.Close()
	f, err := openat(folder, source, unix.O_RDWR)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, st, fault.New(fault.NotFound, "there is no %s: put the file there (mv, or cp --reflink=auto --sparse=always)", path)
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		return nil, st, fault.New(fault.Invalid, "%s is not a regular file: only an image of a disk or file system can be imported", path)
	case errors.Is(err, unix.ETXTBSY), errors.Is(err, unix.EAGAIN): // EAGAIN: another import has a lease, see checkImport
		return nil, st, fault.New(fault.InUse, "%s is in use: %w", path, err)
	case err != nil:
		return nil, st, Fault(err)
	}
	if err := d.checkImport(f, &st, path); err != nil {
		return nil, st, errors.Join(err, f.Close())
	}
	return f, st, nil
}

func (d *Directory) checkImport(f *os.File, st *unix.Stat_t, path string) error {
	var target unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), st), unix.Fstat(int(d.slabs.Fd()), &target)); err != nil {
		return Fault(err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fault.New(fault.Invalid, "%s is not a regular file: only an image of a disk or file system can be imported", path)
	case st.Dev != target.Dev:
		return fault.New(fault.Invalid, "%s is on another file system than the domain's slabs: copy it to the same one", path)
	case st.Size == 0 || st.Size%Granularity != 0:
		return fault.New(fault.Invalid, "%s has %d bytes: a multiple of %d is needed, grow it with: truncate --size=%d %s", path, st.Size, Granularity, (st.Size/Granularity+1)*Granularity, path)
	}
	if d.options.NoLeases {
		return nil
	}
	// The kernel gives a lease to write to who alone has a file open. Not all file systems have leases.
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if errors.Is(err, unix.EAGAIN) {
		return fault.New(fault.InUse, "%s is open in another program, or has a loop device: end that first (lsof, losetup -j)", path)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
		return Fault(err)
	}
	return nil
}

// ImportSlab gives a file in import/ a second name, among the slabs: what is deleted there
// before KeepSlab is still here.
func (d *Directory) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	size, err := d.check(ctx, spec)
	if err != nil {
		return err
	}
	if spec.Kind != engine.Block {
		return fault.New(fault.Unsupported, "slab %q: only block slabs can be imported, not %s slabs", spec.ID, spec.Kind)
	}
	f, st, err := d.OpenImport(source)
	if err != nil {
		return err
	}
	defer f.Close()
	switch {
	case st.Size != size:
		return fault.New(fault.Conflict, "%s has %d bytes, not %d as when it was looked at", f.Name(), st.Size, size)
	case st.Nlink > 1:
		same, err := d.isSlab(spec.ID, &st)
		switch {
		case err != nil:
			return Fault(err)
		case same:
			return Fault(d.published(d.slabs)) // it was done before
		}
		return fault.New(fault.InUse, "%s has another name, too (%d hard links): remove that first, or copy the file", f.Name(), st.Nlink)
	}
	if err := f.Sync(); err != nil {
		return Fault(err)
	}
	err = uninterrupted(func() error {
		return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), int(d.slabs.Fd()), d.onDisk(spec.ID), unix.AT_SYMLINK_FOLLOW)
	})
	if err != nil {
		err := &os.LinkError{Op: "link", Old: f.Name(), New: filepath.Join(d.slabs.Name(), d.onDisk(spec.ID)), Err: err}
		switch lost := lostReply(err, f, d.slabs, d.onDisk(spec.ID)); {
		case errors.Is(lost, unix.EEXIST) && !errors.Is(lost, fault.Unavailable):
			return fault.New(fault.Exists, "slab %q exists and is not %s", spec.ID, f.Name())
		case lost != nil:
			return Fault(lost)
		}
	}
	// Another import of the file may have come between: then both see it, and neither goes on.
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return Fault(err)
	}
	if st.Nlink != 2 {
		err := fault.New(fault.InUse, "%s has got another name meanwhile (%d hard links): is it being imported twice?", f.Name(), st.Nlink)
		return errors.Join(err, Fault(unlinkat(d.slabs, d.onDisk(spec.ID), 0)), Fault(d.syncFolder(d.slabs)))
	}
	return Fault(d.published(d.slabs))
}

// isSlab says whether a slab is that very file. With an error, that is not known.
func (d *Directory) isSlab(id string, file *unix.Stat_t) (bool, error) {
	slab, err := statat(d.slabs, d.onDisk(id))
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "stat", Path: filepath.Join(d.slabs.Name(), d.onDisk(id)), Err: err}
	}
	return slab.Dev == file.Dev && slab.Ino == file.Ino, nil
}

// KeepSlab takes an imported slab's first name away, and from all but root the right to write it.
func (d *Directory) KeepSlab(_ context.Context, source, id string) error {
	if err := errors.Join(engine.CheckName("slab ID", id), d.checkSource(source)); err != nil {
		return err
	}
	slab, about, err := d.OpenSlab(id)
	if err != nil {
		return err
	}
	defer slab.Close()
	if about.Kind != engine.Block {
		return fault.New(fault.Invalid, "slab %q was not imported: it is a %s slab", id, about.Kind)
	}
	folder, err := d.root.OpenFile(imports, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return Fault(err)
	}
	defer folder.Close()
	st, err := statat(folder, source)
	same := false
	if err == nil {
		if same, err = d.isSlab(id, &st); err != nil {
			return Fault(err)
		}
	}
	if err == unix.ENOENT || err == nil && !same { // done before; and perhaps another file has the name now
		return Fault(d.syncFolder(folder))
	}
	if err == nil {
		if !d.options.NoOwner {
			err = errors.Join(slab.Chmod(0o600), slab.Chown(os.Geteuid(), os.Getegid()))
		}
		err = errors.Join(err, slab.Sync())
	}
	if err == nil {
		err = unlinkat(folder, source, 0)
	}
	if err != nil {
		return Fault(&os.PathError{Op: "import", Path: filepath.Join(folder.Name(), source), Err: err})
	}
	return Fault(d.syncFolder(folder))
}
