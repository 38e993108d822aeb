package posix

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// From opens the slab of which another is to be made. done: that was made before, and nothing is open.
func (d *Directory) From(source string, spec engine.SlabSpec) (f *os.File, done bool, err error) {
	if err := engine.CheckName("source slab ID", source); err != nil {
		return nil, false, err
	}
	if same, err := d.Same(spec); same || err != nil {
		return nil, same, err
	}
	f, slab, err := d.OpenSlab(source)
	if err != nil {
		return nil, false, err
	}
	if slab.Kind != spec.Kind {
		f.Close() // was only read
		return nil, false, fault.New(fault.Invalid, "slab %q is a %s slab: a copy of it cannot be of kind %s", source, slab.Kind, spec.Kind)
	}
	return f, false, nil
}

// Reflink makes a block slab that shares its blocks with another: FICLONE locks
// the source's inode and writes its dirty pages first, so it sees every write whole and in
// order. It is engine.Snapshotter and engine.Cloner for block slabs, and declined for trees.
func (d *Directory) Reflink(ctx context.Context, source string, spec engine.SlabSpec) error {
	from, done, err := d.From(source, spec)
	if done || err != nil {
		return err
	}
	defer from.Close()
	if spec.Kind != engine.Block {
		return engine.ErrDeclined
	}
	return d.MakeBlock(ctx, spec, func(to *os.File) error { return reflink(to, from) })
}

func reflink(to, from *os.File) error {
	err := uninterrupted(func() error { return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) })
	switch err {
	case unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ETXTBSY:
		return engine.ErrDeclined // this pair cannot: a no-copy-on-write file, a swap file
	case nil:
		return nil
	default:
		return &os.LinkError{Op: "reflink", Old: from.Name(), New: to.Name(), Err: err}
	}
}

// copyStep is how many bytes are asked for at once: few enough that progress is seen, and
// enough that round trips do not count.
const copyStep = 64 << 20

// Copy lets the storage copy a block slab that nobody writes; holes stay holes. It is engine.Copier,
// and declined for trees. Between two steps it looks at ctx.
func (d *Directory) Copy(ctx context.Context, source string, spec engine.SlabSpec, progress func(done int64)) error {
	from, done, err := d.From(source, spec)
	if done || err != nil {
		return err
	}
	defer from.Close()
	if spec.Kind != engine.Block {
		return engine.ErrDeclined
	}
	return d.MakeBlock(ctx, spec, func(to *os.File) error {
		st, err := stat(from)
		if err != nil {
			return err
		}
		end := min(st.Size, spec.Size)
		for at := int64(0); at < end; {
			data, hole, err := extent(from, at, end)
			if err != nil {
				return err
			}
			for at = data; at < hole; {
				if err := ctx.Err(); err != nil {
					return err
				}
				n, err := copyRange(to, from, at, min(copyStep, hole-at))
				if err != nil {
					return err
				}
				if at += n; progress != nil {
					progress(at)
				}
			}
		}
		if progress != nil {
			progress(end)
		}
		return nil
	})
}

// copyRange copies up to n bytes at the same offset, and returns how many.
func copyRange(to, from *os.File, at, n int64) (copied int64, err error) {
	in, out := at, at
	err = uninterrupted(func() error {
		k, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, int(n), 0)
		copied = int64(k)
		return err
	})
	switch err {
	case unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOSYS, unix.ETXTBSY, unix.EPERM:
		return 0, engine.ErrDeclined // nothing has its name yet
	case nil:
	default:
		return 0, &os.LinkError{Op: "copy", Old: from.Name(), New: to.Name(), Err: err}
	}
	if copied == 0 {
		return 0, fault.New(fault.Corrupt, "%s ends at %d, before its size: it was cut while it was copied", from.Name(), at)
	}
	return copied, nil
}

// DomainUsage implements engine.Meter.
func (d *Directory) DomainUsage(context.Context) (engine.Usage, error) {
	st, err := statfs(d.slabs)
	if err != nil {
		return engine.Usage{}, Fault(&os.PathError{Op: "statfs", Path: d.path, Err: err})
	}
	u := host.UsageOf(&st)
	return engine.Usage{Total: u.Total, Used: u.Used, Available: u.Available, InodesTotal: u.Inodes, InodesFree: u.InodesFree}, nil
}

// SlabUsage implements engine.Meter. Block: what the file has allocated; blocks
// shared by reflinks count in every file. It is declined for trees, since walking a large one takes too long.
func (d *Directory) SlabUsage(ctx context.Context, id string) (engine.Usage, error) {
	if err := errors.Join(engine.CheckName("slab ID", id), Fault(ctx.Err())); err != nil {
		return engine.Usage{}, err
	}
	f, slab, err := d.OpenSlab(id)
	if err != nil {
		return engine.Usage{}, err
	}
	defer f.Close()
	if slab.Kind != engine.Block {
		return engine.Usage{}, engine.ErrDeclined
	}
	st, err := stat(f)
	if err != nil {
		return engine.Usage{}, Fault(&os.PathError{Op: "stat", Path: f.Name(), Err: err})
	}
	used := st.Blocks * 512
	return engine.Usage{Total: slab.Size, Used: used, Available: max(0, slab.Size-used)}, nil
}

// Importable looks at a file in import/, as engine.Importer does.
func (d *Directory) Importable(ctx context.Context, h *host.Local, source string) (engine.Importable, error) {
	f, st, err := d.OpenImport(source)
	if err != nil {
		return engine.Importable{}, err
	}
	path := f.Name()
	if err := f.Close(); err != nil {
		return engine.Importable{}, err
	}
	loops, err := h.Loops(ctx, func(l host.Loop) bool { return l.Dev == st.Dev && l.Inode == st.Ino })
	if err != nil {
		return engine.Importable{}, err
	}
	if len(loops) > 0 { // one that only reads is not seen by a lease
		return engine.Importable{}, fault.New(fault.InUse, "%s has the loop device %s: end its use first (losetup --detach)", path, loops[0].Path)
	}
	sig, err := h.Probe(ctx, path)
	if err != nil {
		return engine.Importable{}, err
	}
	return engine.Importable{Size: st.Size, Allocated: st.Blocks * 512, Holds: sig.String()}, nil
}
