package posix

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Granularity of block slabs in bytes.
const Granularity = 4096

const paramMode = "mode"

// DescribeParams says which class parameters slabs here take.
func DescribeParams(d *engine.Description) {
	d.ParamValues, d.TreeParams = map[string]string{paramMode: "[0-7]{3,4}"}, []string{paramMode}
	d.Params = map[string]string{paramMode: "the mode of a new directory volume's root, three or four octal digits (default: 0755); with 0777 containers can write whose user is not root"}
}

// CreateSlab implements engine.Engine.
func (d *Directory) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	if spec.Kind == engine.Tree {
		return d.MakeTree(ctx, spec, func(wrapper *os.File) error {
			if err := d.trees.Create(wrapper); err != nil {
				return err
			}
			if err := initData(wrapper, spec); err != nil { // before there is a limit that could be in its way
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
	size, err := check(ctx, spec)
	if err != nil {
		return err
	}
	err = d.place(d.slabs, spec.ID, func(f *os.File) error {
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

// MakeTree makes a tree slab whose data directory fill makes in its folder.
func (d *Directory) MakeTree(ctx context.Context, spec engine.SlabSpec, fill func(wrapper *os.File) error) error {
	if _, err := check(ctx, spec); err != nil {
		return err
	}
	if same, err := d.Same(spec); same || err != nil {
		return err
	}
	tmp := d.unique()
	err := unix.Mkdirat(int(d.tmp.Fd()), tmp, 0o700)
	if err == nil {
		err = d.placeTree(tmp, spec, fill)
	}
	if err != nil {
		err = errors.Join(Fault(err), d.remove("tmp", tmp))
	}
	if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTDIR) { // ErrExist is ENOTEMPTY, too
		err = d.taken(spec)
	}
	return err
}

func (d *Directory) placeTree(tmp string, spec engine.SlabSpec, fill func(wrapper *os.File) error) error {
	wrapper, err := openat(d.tmp, tmp, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer wrapper.Close()
	defer hold(wrapper)()
	if err := fill(wrapper); err != nil {
		return err
	}
	if err := writeSpec(wrapper, spec.Size); err != nil { // syncs the folder, too
		return err
	}
	// A folder that is not empty is never replaced by rename.
	if err := unix.Renameat(int(d.tmp.Fd()), tmp, int(d.slabs.Fd()), spec.ID); err != nil {
		return &os.LinkError{Op: "rename", Old: wrapper.Name(), New: filepath.Join(d.slabs.Name(), spec.ID), Err: err}
	}
	return published(d.slabs)
}

// Same says whether a slab of that spec exists, durably. The error is
// fault.Exists when the ID is taken by anything else.
func (d *Directory) Same(spec engine.SlabSpec) (bool, error) {
	size, err := check(context.Background(), spec)
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
	return true, Fault(published(d.slabs)) // whoever made it may have stopped before this
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
func check(ctx context.Context, spec engine.SlabSpec) (int64, error) {
	if err := errors.Join(engine.CheckSpec(spec), Fault(ctx.Err())); err != nil {
		return 0, err
	}
	for name := range spec.Params {
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
	w, err := openat(d.slabs, id, unix.O_RDWR)
	if err != nil {
		return Fault(err)
	}
	defer w.Close() // after Sync
	return Fault(locked(w, func() error {
		info, err := w.Stat() // under the lock: or two growths could become a cut
		if err == nil && info.Size() < size {
			err = w.Truncate(size)
		}
		return errors.Join(err, w.Sync())
	}))
}

func (d *Directory) resizeTree(id string, size int64) error {
	wrapper, err := openat(d.slabs, id, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer wrapper.Close()
	return locked(wrapper, func() error {
		if have, err := readSpec(wrapper); err != nil || have >= size {
			return errors.Join(err, wrapper.Sync())
		}
		if err := d.trees.Resize(wrapper, size); err != nil {
			return err
		}
		return writeSpec(wrapper, size)
	})
}

// locked keeps other growths of the same slab out, those of other processes too.
func locked(f *os.File, do func() error) error {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return errors.Join(do(), unix.Flock(int(f.Fd()), unix.LOCK_UN))
}

// DeleteSlab implements engine.Engine. When removing the content of a tree
// fails, the slab is deleted all the same, and Clean tries again.
func (d *Directory) DeleteSlab(ctx context.Context, id string) error {
	if err := errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err())); err != nil {
		return err
	}
	path, trash := filepath.Join(d.slabs.Name(), id), ""
	defer d.keepReserve()
	err := d.roomy(func() error {
		err := unix.Unlinkat(int(d.slabs.Fd()), id, 0)
		if err == unix.EISDIR {
			trash = d.unique()
			err = unix.Renameat(int(d.slabs.Fd()), id, int(d.trash.Fd()), trash)
		}
		return err
	})
	if err != nil && err != unix.ENOENT {
		return Fault(&os.PathError{Op: "delete", Path: path, Err: err})
	}
	if err2 := d.slabs.Sync(); err2 != nil || err != nil || trash == "" {
		return Fault(err2)
	}
	return d.remove("trash", trash)
}

// ListSlabs implements engine.Engine. A tree slab that is damaged has size 0;
// what is neither file nor folder is no slab.
func (d *Directory) ListSlabs(ctx context.Context) ([]engine.Slab, error) {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	var slabs []engine.Slab
	err := each(ctx, d.slabs, ".", func(folder *os.File, id string) error {
		if engine.CheckName("slab ID", id) != nil {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(folder.Fd()), id, &st, unix.AT_SYMLINK_NOFOLLOW); err == unix.ENOENT || err == unix.ESTALE {
			return nil // deleted meanwhile
		} else if err != nil {
			return &os.PathError{Op: "stat", Path: filepath.Join(folder.Name(), id), Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			slabs = append(slabs, engine.Slab{ID: id, Kind: engine.Block, Size: st.Size})
		case unix.S_IFDIR:
			f, slab, err := d.OpenSlab(id)
			if errors.Is(err, fault.NotFound) {
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
	return slabs, Fault(err)
}

// OpenSlab opens a slab for reading: a block slab's file, a tree slab's data
// directory. fault.NotFound: no such slab. fault.Corrupt: what is there is not
// what was made.
func (d *Directory) OpenSlab(id string) (*os.File, engine.Slab, error) {
	none := engine.Slab{}
	var st unix.Stat_t
	err := unix.Fstatat(int(d.slabs.Fd()), id, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
		return nil, none, fault.New(fault.NotFound, "slab %q does not exist", id)
	case err != nil:
		return nil, none, Fault(&os.PathError{Op: "stat", Path: filepath.Join(d.slabs.Name(), id), Err: err})
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 && st.Size%Granularity == 0:
		f, err := openat(d.slabs, id, unix.O_RDONLY)
		return f, engine.Slab{ID: id, Kind: engine.Block, Size: st.Size}, Fault(err)
	case st.Mode&unix.S_IFMT == unix.S_IFREG:
		return nil, none, fault.New(fault.Corrupt, "slab %q has %d bytes, which is no multiple of %d: its file was cut or overwritten from outside", id, st.Size, Granularity)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return nil, none, fault.New(fault.Corrupt, "slab %q was replaced by something that is neither file nor directory (mode %#o)", id, st.Mode)
	}
	wrapper, err := openat(d.slabs, id, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, none, fault.New(fault.NotFound, "slab %q does not exist", id)
	} else if err != nil {
		return nil, none, Fault(err)
	}
	defer wrapper.Close()
	data, size, err := openTree(wrapper, id)
	if err != nil && !d.still(wrapper, id) { // it was deleted, and is being emptied
		return nil, none, fault.New(fault.NotFound, "slab %q does not exist", id)
	}
	return data, engine.Slab{ID: id, Kind: engine.Tree, Size: size}, err
}

// still says whether an open tree slab is the one that has its name.
func (d *Directory) still(wrapper *os.File, id string) bool {
	var open, named unix.Stat_t
	return unix.Fstat(int(wrapper.Fd()), &open) == nil &&
		unix.Fstatat(int(d.slabs.Fd()), id, &named, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		open.Dev == named.Dev && open.Ino == named.Ino
}

// openTree opens the data directory of a tree slab and reads its size.
func openTree(wrapper *os.File, id string) (*os.File, int64, error) {
	size, err := readSpec(wrapper)
	if err != nil {
		return nil, 0, err
	}
	data, err := openat(wrapper, "data", unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, 0, fault.New(fault.Corrupt, "slab %q: its data directory is missing or was replaced", id)
	}
	return data, size, Fault(err)
}

// AttachSlab implements engine.Engine: nothing needs to be done on the host.
func (d *Directory) AttachSlab(ctx context.Context, id string, _ engine.AttachOptions) (engine.Attachment, error) {
	if err := errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err())); err != nil {
		return engine.Attachment{}, err
	}
	f, slab, err := d.OpenSlab(id)
	if err != nil {
		return engine.Attachment{}, err
	}
	defer f.Close()
	path := filepath.Join(d.path, "slabs", id)
	if slab.Kind == engine.Tree {
		path = filepath.Join(path, "data")
	}
	opened, err := f.Stat()
	if err != nil {
		return engine.Attachment{}, Fault(err)
	}
	if there, err := os.Lstat(path); err != nil || !os.SameFile(opened, there) {
		return engine.Attachment{}, fault.New(fault.Unavailable, "%s does not lead to the directory that was opened: something was mounted or unmounted there", d.path)
	}
	return engine.Attachment{Path: path}, nil
}

// DetachSlab implements engine.Engine.
func (d *Directory) DetachSlab(ctx context.Context, id string) error {
	return errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err()))
}

const specFormat = "quarry tree 1 %d "

// writeSpec makes a tree slab's size durable in its folder, in one step.
func writeSpec(wrapper *os.File, size int64) error {
	const fresh = "spec.new"
	f, err := openat(wrapper, fresh, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	line := fmt.Sprintf(specFormat, size)
	_, err = fmt.Fprintf(f, "%s%08x\n", line, crc32.ChecksumIEEE([]byte(line)))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = unix.Renameat(int(wrapper.Fd()), fresh, int(wrapper.Fd()), "spec")
	}
	if err != nil {
		return errors.Join(err, unix.Unlinkat(int(wrapper.Fd()), fresh, 0))
	}
	return wrapper.Sync()
}

func readSpec(wrapper *os.File) (int64, error) {
	corrupt := fault.New(fault.Corrupt, "%s is no tree slab: its file \"spec\" is missing or damaged", wrapper.Name())
	f, err := openat(wrapper, "spec", unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return 0, corrupt
	} else if err != nil {
		return 0, Fault(err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, 128))
	if err != nil {
		return 0, corrupt
	}
	var size int64
	if _, err := fmt.Sscanf(string(content), specFormat, &size); err != nil {
		return 0, corrupt
	}
	line := fmt.Sprintf(specFormat, size)
	if sum, ok := strings.CutPrefix(string(content), line); !ok || sum != fmt.Sprintf("%08x\n", crc32.ChecksumIEEE([]byte(line))) {
		return 0, corrupt
	}
	return size, nil
}

// plain makes tree slabs as plain directories without a limit.
type plain struct{}

func (plain) Create(wrapper *os.File) error { return MakeData(wrapper) }
func (plain) Resize(*os.File, int64) error  { return nil }
func (plain) Remove(*os.File)               {}

// MakeData makes the plain data directory of a tree slab; its mode comes after it.
func MakeData(wrapper *os.File) error {
	if err := unix.Mkdirat(int(wrapper.Fd()), "data", 0o755); err != nil {
		return &os.PathError{Op: "mkdir", Path: filepath.Join(wrapper.Name(), "data"), Err: err}
	}
	return nil
}

// initData gives a new data directory to root and its mode, whatever the umask, durably.
func initData(wrapper *os.File, spec engine.SlabSpec) error {
	mode, err := modeOf(spec)
	if err != nil {
		return err
	}
	return OpenData(wrapper, func(data *os.File) error {
		if os.Geteuid() != 0 { // an engine with a user of its own, or somebody without any privilege
			if err := data.Chown(0, 0); err != nil && !errors.Is(err, unix.EPERM) {
				return err
			}
		}
		if err := unix.Fchmod(int(data.Fd()), mode); err != nil { // os.Chmod takes its special bits elsewhere
			return &os.PathError{Op: "chmod", Path: data.Name(), Err: err}
		}
		return data.Sync()
	})
}

// modeOf is the mode that a new tree slab gets.
func modeOf(spec engine.SlabSpec) (uint32, error) {
	s, ok := spec.Params[paramMode]
	if !ok {
		return 0o755, nil
	}
	mode, err := strconv.ParseUint(s, 8, 12)
	if err != nil || len(s) < 3 || len(s) > 4 {
		return 0, fault.New(fault.Invalid, "parameter %q: %q must be three or four octal digits, as in \"0777\" or \"2770\"", paramMode, s)
	}
	return uint32(mode), nil
}

// OpenData opens the data directory in a tree slab's folder for do.
func OpenData(wrapper *os.File, do func(data *os.File) error) error {
	data, err := openat(wrapper, "data", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	return errors.Join(do(data), data.Close())
}
