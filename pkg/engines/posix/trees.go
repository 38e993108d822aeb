package posix

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// MakeTree makes a tree slab whose data directory fill makes in its folder.
func (d *Directory) MakeTree(ctx context.Context, spec engine.SlabSpec, fill func(wrapper *os.File) error) error {
	if _, err := d.check(ctx, spec); err != nil {
		return err
	}
	if same, err := d.Same(spec); same || err != nil {
		return err
	}
	tmp := d.unique()
	err := mkdir(d.tmp, tmp, 0o700)
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
	defer d.hold(wrapper)()
	if err := fill(wrapper); err != nil {
		return err
	}
	if err := d.makeSpec(wrapper, spec.Size); err != nil { // syncs the folder, too
		return err
	}
	if err := rename(wrapper, d.tmp, tmp, d.slabs, d.onDisk(spec.ID)); err != nil {
		return err
	}
	return d.published(d.slabs)
}

// resizeTree adds a size to those that a tree has had. Of several at once, on any number of hosts, each takes
// the place of the size that it has seen, or looks again; one that comes late finds that place taken.
func (d *Directory) resizeTree(id string, size int64) error {
	wrapper, err := openat(d.slabs, d.onDisk(id), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer wrapper.Close()
	return d.locked(wrapper, func() error { // of this host, for the limit
		for {
			have, err := readSize(wrapper)
			if err != nil || have >= size {
				return errors.Join(err, d.syncFolder(wrapper))
			}
			if err := d.trees.Resize(wrapper, size); err != nil {
				return err
			}
			err = d.place(wrapper, specAfter(have), func(f *os.File) error { return writeSpec(f, size) })
			if !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
	})
}

// openTree opens the data directory of a tree slab and reads its size.
func openTree(wrapper *os.File, id string) (*os.File, int64, error) {
	size, err := readSize(wrapper)
	if err != nil {
		return nil, 0, err
	}
	data, err := openat(wrapper, "data", unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, 0, fault.New(fault.Corrupt, "slab %q: its data directory is missing or was replaced", id)
	}
	return data, size, Fault(err)
}

// A tree slab's size is what its file "spec" says, until a file says that another has taken the place of that one, and so
// on. Each is made once, complete or not at all, and never changed.
const (
	firstSpec  = "spec"
	specFormat = "quarry tree 1 %d "
)

// specAfter is the file with the size that took the place of another.
func specAfter(size int64) string { return fmt.Sprintf("%s.%d", firstSpec, size) }

func writeSpec(f *os.File, size int64) error {
	line := fmt.Sprintf(specFormat, size)
	_, err := fmt.Fprintf(f, "%s%08x\n", line, crc32.ChecksumIEEE([]byte(line)))
	return err
}

// makeSpec makes the first size of a tree slab durable, in a folder that nobody sees yet.
func (d *Directory) makeSpec(wrapper *os.File, size int64) error {
	f, err := openat(wrapper, firstSpec, unix.O_WRONLY|unix.O_CREAT)
	if err != nil {
		return err
	}
	if err = d.pastCache(f); err == nil {
		err = writeSpec(f, size)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return d.syncFolder(wrapper)
}

// readSize is the size of a tree slab.
func readSize(wrapper *os.File) (int64, error) {
	size, err := readSpec(wrapper, firstSpec)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, notATree(wrapper, firstSpec)
	}
	for err == nil {
		var larger int64
		larger, err = readSpec(wrapper, specAfter(size))
		if errors.Is(err, fs.ErrNotExist) {
			return size, nil
		}
		if err == nil && larger <= size {
			return 0, notATree(wrapper, specAfter(size))
		}
		size = larger
	}
	return 0, err
}

func notATree(wrapper *os.File, name string) error {
	return fault.New(fault.Corrupt, "%s is no tree slab: its file %q is missing or damaged", wrapper.Name(), name)
}

// readSpec reads one size. The error is fs.ErrNotExist where there is no such file.
func readSpec(wrapper *os.File, name string) (int64, error) {
	f, err := openat(wrapper, name, unix.O_RDONLY)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, err
	case errors.Is(err, unix.ELOOP):
		return 0, notATree(wrapper, name)
	case err != nil:
		return 0, Fault(err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, 128))
	switch {
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EISDIR): // a bad sector; a folder
		return 0, notATree(wrapper, name)
	case err != nil:
		return 0, Fault(err)
	}
	var size int64
	if _, err := fmt.Sscanf(string(content), specFormat, &size); err != nil {
		return 0, notATree(wrapper, name)
	}
	line := fmt.Sprintf(specFormat, size)
	if sum, ok := strings.CutPrefix(string(content), line); !ok || sum != fmt.Sprintf("%08x\n", crc32.ChecksumIEEE([]byte(line))) {
		return 0, notATree(wrapper, name)
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
	return mkdir(wrapper, "data", 0o755)
}

// initData gives a new data directory to root and its mode, whatever the umask, durably.
func (d *Directory) initData(wrapper *os.File, spec engine.SlabSpec) error {
	mode, err := modeOf(spec)
	if err != nil {
		return err
	}
	return OpenData(wrapper, func(data *os.File) error {
		if d.options.NoOwner {
			return d.syncFolder(data)
		}
		if os.Geteuid() != 0 { // an engine with a user of its own, or somebody without any privilege
			if err := data.Chown(0, 0); err != nil && !errors.Is(err, unix.EPERM) {
				return err
			}
		}
		if err := unix.Fchmod(int(data.Fd()), mode); err != nil { // os.Chmod takes its special bits elsewhere
			return &os.PathError{Op: "chmod", Path: data.Name(), Err: err}
		}
		return d.syncFolder(data)
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
