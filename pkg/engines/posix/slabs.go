package posix

import (
	"context"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Granularity of block slabs in bytes.
const Granularity = 4096

const paramMode = "mode"

// CreateSlab implements engine.Engine.
func (d *Directory) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	if spec.Kind == engine.Tree {
		return d.MakeTree(ctx, spec, func(wrapper *os.File) error {
			if err := d.trees.Create(wrapper); err != nil {
				return err
			}
			if err := d.initData(wrapper, spec); err != nil { // before there is a limit that could be in its way
				return err
			}
			return d.trees.Resize(wrapper, spec.Size)
		})
	}
	return d.MakeBlock(ctx, spec, func(*os.File) error { return nil })
}

// MakeBlock makes a block slab whose first content fill writes into an empty
// file; then it gets its size.
func (d *Directory) MakeBlock(ctx context.Context, spec engine.SlabSpec, fill func(*os.File) error) error {
	size, err := d.check(ctx, spec)
	if err != nil {
		return err
	}
	err = d.place(d.slabs, d.onDisk(spec.ID), func(f *os.File) error {
		if err := fill(f); err != nil {
			return err
		}
		return f.Truncate(size)
	})
	if errors.Is(err, fs.ErrExist) {
		err = d.taken(spec)
	}
	return Fault(err)
}

// Same says whether a slab of that spec exists, durably. The error is
// fault.Exists when the ID is taken by anything else.
func (d *Directory) Same(spec engine.SlabSpec) (bool, error) {
	size, err := d.check(context.Background(), spec)
	if err != nil {
		return false, err
	}
	f, have, err := d.OpenSlab(spec.ID)
	switch {
	case errors.Is(err, fault.NotFound):
		return false, nil
	case errors.Is(err, fault.Corrupt):
		return false, fault.New(fault.Exists, "the ID is taken: %w", err)
	case err != nil:
		return false, err
	}
	f.Close() // was only read
	if have.Kind != spec.Kind || have.Size != size {
		return false, fault.New(fault.Exists, "slab %q exists as %s of %d bytes, not as %s of %d", spec.ID, have.Kind, have.Size, spec.Kind, size)
	}
	return true, Fault(d.published(d.slabs)) // whoever made it may have stopped before this
}

// taken says what it means that a slab's ID was taken a moment ago.
func (d *Directory) taken(spec engine.SlabSpec) error {
	same, err := d.Same(spec)
	if err == nil && !same {
		return fault.New(fault.Conflict, "slab %q was deleted by another while it was made", spec.ID)
	}
	return err
}

// check verifies a spec and returns the size that its slab is going to have.
func (d *Directory) check(ctx context.Context, spec engine.SlabSpec) (int64, error) {
	if err := errors.Join(engine.CheckSpec(spec), Fault(ctx.Err())); err != nil {
		return 0, err
	}
	for name := range spec.Params {
		if d.options.NoOwner {
			return 0, fault.New(fault.Invalid, "slab %q: parameter %q is unknown: this storage takes none", spec.ID, name)
		}
		if name != paramMode {
			return 0, fault.New(fault.Invalid, "slab %q: parameter %q is unknown: only %q is allowed", spec.ID, name, paramMode)
		}
	}
	_, modeErr := modeOf(spec)
	if spec.Kind == engine.Tree {
		return spec.Size, modeErr
	}
	if _, ok := spec.Params[paramMode]; ok {
		return 0, fault.New(fault.Invalid, "slab %q: parameter %q: only a directory has one, and this is a slab of kind %s", spec.ID, paramMode, spec.Kind)
	}
	return round(spec.Size)
}

func round(size int64) (int64, error) {
	if size > math.MaxInt64-Granularity+1 {
		return 0, fault.New(fault.OutOfRange, "size %d is too large to be rounded up to %d bytes", size, Granularity)
	}
	return (size + Granularity - 1) / Granularity * Granularity, nil
}

// ResizeSlab implements engine.Engine.
func (d *Directory) ResizeSlab(ctx context.Context, id string, size int64) error {
	if err := errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err())); err != nil {
		return err
	}
	f, slab, err := d.OpenSlab(id)
	if err != nil {
		return err
	}
	defer f.Close()
	if slab.Kind == engine.Tree {
		return Fault(d.resizeTree(id, size))
	}
	if size, err = round(size); err != nil {
		return err
	}
	w, err := openat(d.slabs, d.onDisk(id), unix.O_RDWR)
	if err != nil {
		return Fault(err)
	}
	defer w.Close() // after Sync
	return Fault(d.locked(w, func() error {
		info, err := w.Stat() // under the lock: or two growths could become a cut
		if err == nil && info.Size() < size {
			err = extend(w, size)
		}
		return errors.Join(err, w.Sync())
	}))
}

// extend makes a file larger. It allocates the last block, which never makes a file smaller, whenever it
// happens: a server may do what it was asked long after nobody waits for it any more, when the file has grown further and
// is full of data. Only where a storage allocates nothing, or has no room for a block, the size is set.
func extend(f *os.File, size int64) error {
	if uninterrupted(func() error { return unix.Fallocate(int(f.Fd()), 0, size-Granularity, Granularity) }) == nil {
		return nil
	}
	return f.Truncate(size)
}

// locked keeps other growths of the same slab out, those of other processes too.
// Where the storage has no locks, there is one for this process: no other opens the domain to
// change it at the same time.
func (d *Directory) locked(f *os.File, do func() error) error {
	err := error(unix.ENOLCK)
	if !d.options.NoLocks {
		err = flock(f, unix.LOCK_EX)
	}
	switch err {
	case nil:
		return errors.Join(do(), flock(f, unix.LOCK_UN))
	case unix.ENOSYS, unix.EOPNOTSUPP, unix.ENOLCK, unix.EINVAL:
		d.growing.Lock()
		defer d.growing.Unlock()
		return do()
	default:
		return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
}

// DeleteSlab implements engine.Engine. When removing the content of a tree
// fails, the slab is deleted all the same, and Clean tries again.
func (d *Directory) DeleteSlab(ctx context.Context, id string) error {
	if err := errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err())); err != nil {
		return err
	}
	name, trash := d.onDisk(id), ""
	defer d.keepReserve()
	remove := func() error {
		return d.roomy(func() error {
			err := unlinkat(d.slabs, name, 0)
			if err == unix.EISDIR {
				trash = d.unique()
				err = renameat(d.slabs, name, d.trash, trash)
			}
			return err
		})
	}
	err := remove()
	if err == unix.ENOENT {
		err = d.again(remove)
	}
	if err != nil && err != unix.ENOENT {
		return Fault(&os.PathError{Op: "delete", Path: filepath.Join(d.slabs.Name(), name), Err: err})
	}
	if err := d.syncFolder(d.slabs); err != nil || trash == "" {
		return Fault(err)
	}
	return d.remove("trash", trash) // also after ENOENT: the reply to the rename may have been lost
}

// ListSlabs implements engine.Engine. A tree slab that is damaged has size 0;
// what is neither file nor folder is no slab.
func (d *Directory) ListSlabs(ctx context.Context) ([]engine.Slab, error) {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	var slabs []engine.Slab
	missing := map[string]error{}
	err := d.each(ctx, d.slabs, ".", func(folder *os.File, name string) error {
		id, ours := d.offDisk(name)
		if !ours || engine.CheckName("slab ID", id) != nil {
			return nil
		}
		st, err := d.statNow(folder, name)
		if d.mayBeGone(err) {
			missing[name] = err // deleted meanwhile
			return nil
		} else if err != nil {
			return &os.PathError{Op: "stat", Path: filepath.Join(folder.Name(), name), Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			slabs = append(slabs, engine.Slab{ID: id, Kind: engine.Block, Size: st.Size})
		case unix.S_IFDIR:
			f, slab, err := d.OpenSlab(id)
			if errors.Is(err, fault.NotFound) {
				missing[name] = unix.ENOENT
				return nil
			} else if err != nil && !errors.Is(err, fault.Corrupt) {
				return err
			} else if err == nil {
				f.Close() // was only read
			}
			slabs = append(slabs, engine.Slab{ID: id, Kind: engine.Tree, Size: slab.Size})
		}
		return nil
	})
	if err == nil {
		err = d.gone(ctx, d.slabs, ".", missing)
	}
	return slabs, Fault(err)
}

// OpenSlab opens a slab for reading: a block slab's file, a tree slab's data
// directory. fault.NotFound: no such slab. fault.Corrupt: what is there is not
// what was made.
func (d *Directory) OpenSlab(id string) (*os.File, engine.Slab, error) {
	none := engine.Slab{}
	st, err := statat(d.slabs, d.onDisk(id))
	switch {
	case err == unix.ENOENT:
		return nil, none, fault.New(fault.NotFound, "slab %q does not exist", id)
	case err != nil:
		return nil, none, Fault(&os.PathError{Op: "stat", Path: filepath.Join(d.slabs.Name(), d.onDisk(id)), Err: err})
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 && st.Size%Granularity == 0:
		f, err := openat(d.slabs, d.onDisk(id), unix.O_RDONLY)
		return f, engine.Slab{ID: id, Kind: engine.Block, Size: st.Size}, Fault(err)
	case st.Mode&unix.S_IFMT == unix.S_IFREG:
		return nil, none, fault.New(fault.Corrupt, "slab %q has %d bytes, which is no multiple of %d: its file was cut or overwritten from outside", id, st.Size, Granularity)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return nil, none, fault.New(fault.Corrupt, "slab %q was replaced by something that is neither file nor directory (mode %#o)", id, st.Mode)
	}
	wrapper, err := openat(d.slabs, d.onDisk(id), unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, none, fault.New(fault.NotFound, "slab %q does not exist", id)
	} else if err != nil {
		return nil, none, Fault(err)
	}
	defer wrapper.Close()
	data, size, err := openTree(wrapper, id)
	if err != nil {
		there, unseen := named(wrapper, d.slabs, d.onDisk(id))
		switch {
		case unseen != nil:
			return nil, none, Fault(unseen)
		case !there: // it was deleted, and is being emptied
			return nil, none, fault.New(fault.NotFound, "slab %q does not exist", id)
		}
	}
	return data, engine.Slab{ID: id, Kind: engine.Tree, Size: size}, err
}

// Inside is where a slab is, below the directory.
func (d *Directory) Inside(id string) string { return "slabs/" + d.onDisk(id) }

// InsideTree is where the data of a tree slab is, below the directory.
func (d *Directory) InsideTree(id string) string { return d.Inside(id) + "/data" }

// ErrElsewhere is of a path that leads to something else than what was opened there, and is still open.
var ErrElsewhere = errors.New("does not lead to the directory that was opened: something was mounted or unmounted there")

// AttachSlab implements engine.Engine: nothing needs to be done on the host.
func (d *Directory) AttachSlab(ctx context.Context, id string, opts engine.AttachOptions) (engine.Attachment, error) {
	if err := errors.Join(engine.CheckName("slab ID", id), engine.NoMountOptions(opts), Fault(ctx.Err())); err != nil {
		return engine.Attachment{}, err
	}
	f, slab, err := d.OpenSlab(id)
	if err != nil {
		return engine.Attachment{}, err
	}
	defer f.Close()
	path := filepath.Join(d.path, d.Inside(id))
	if slab.Kind == engine.Tree {
		path = filepath.Join(d.path, d.InsideTree(id))
	}
	opened, err := f.Stat()
	if err != nil {
		return engine.Attachment{}, Fault(err)
	}
	there, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return engine.Attachment{}, Fault(err)
	}
	if err != nil || !os.SameFile(opened, there) {
		return engine.Attachment{}, fault.New(fault.Unavailable, "%s %w", d.path, ErrElsewhere)
	}
	return engine.Attachment{Path: path}, nil
}

// DetachSlab implements engine.Engine.
func (d *Directory) DetachSlab(ctx context.Context, id string) error {
	return errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err()))
}
