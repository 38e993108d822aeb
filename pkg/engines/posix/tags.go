package posix

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// CreateTag implements engine.Engine. A name stays taken while anything at all
// is under it, also what is no tag any more.
func (d *Directory) CreateTag(ctx context.Context, tag engine.Tag) error {
	if err := errors.Join(engine.CheckTag(tag), Fault(ctx.Err())); err != nil {
		return err
	}
	var class *os.File
	err := d.roomy(func() (err error) { class, err = d.class(tag.Name, true); return err })
	if err != nil {
		return Fault(err)
	}
	defer class.Close()
	content := encodeTag(tag)
	err = d.roomy(func() error {
		return d.place(class, d.onDisk(tag.Name), func(f *os.File) error { _, err := f.Write(content); return err })
	})
	if !errors.Is(err, fs.ErrExist) {
		return Fault(err)
	}
	have, err := d.readTag(class, tag.Name, new(tagBuffer))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.Exists, "tag %q was taken, and was deleted meanwhile", tag.Name)
	case err != nil:
		return Fault(err)
	case have.Record == nil:
		return fault.New(fault.Exists, "tag %q is taken by something that cannot be read as a tag", tag.Name)
	case have.Slab != tag.Slab || !bytes.Equal(have.Record, tag.Record):
		return fault.New(fault.Exists, "tag %q is taken by another record", tag.Name)
	}
	return Fault(d.published(class)) // a lost reply; whoever made it may have stopped before this
}

// DeleteTag implements engine.Engine.
func (d *Directory) DeleteTag(ctx context.Context, name string) error {
	if err := errors.Join(engine.CheckName("tag name", name), Fault(ctx.Err())); err != nil {
		return err
	}
	class, err := d.class(name, false)
	if errors.Is(err, fs.ErrNotExist) {
		return Fault(d.gone(ctx, d.tags, ".", map[string]error{d.onDisk(classOf(name)): err}))
	} else if err != nil {
		return Fault(err)
	}
	defer class.Close()
	defer d.keepReserve()
	unlink := func() error { return d.roomy(func() error { return unlinkat(class, d.onDisk(name), 0) }) }
	if err = unlink(); err == unix.ENOENT {
		err = d.again(unlink)
	}
	switch err {
	case nil, unix.ENOENT: // gone, but perhaps by someone who stopped before it was durable
		return Fault(d.syncFolder(class))
	case unix.EISDIR:
		return fault.New(fault.Corrupt, "tag %q was replaced by a directory: look at %s and remove it by hand", name, class.Name())
	default:
		return Fault(&os.PathError{Op: "unlink", Path: class.Name() + "/" + name, Err: err})
	}
}

// ListTags implements engine.Engine. It reads only the classes that can hold
// the prefix.
func (d *Directory) ListTags(ctx context.Context, prefix string) ([]engine.Tag, error) {
	ctx, cancel := context.WithTimeout(ctx, engine.ListingLimit)
	defer cancel()
	var tags []engine.Tag
	list := func(class string) error {
		var names []string
		err := d.each(ctx, d.tags, d.onDisk(class), func(_ *os.File, name string) error {
			// What else is there is no tag, and no tag can take its name.
			if name, ours := d.offDisk(name); ours && strings.HasPrefix(name, prefix) && engine.CheckName("tag name", name) == nil && classOf(name) == class {
				names = append(names, name)
			}
			return nil
		})
		if err != nil || len(names) == 0 {
			return err
		}
		read, err := d.readTags(ctx, class, names)
		tags = append(tags, read...)
		return err
	}
	if class, _, whole := strings.Cut(prefix, "."); whole {
		if engine.CheckName("class", class) != nil {
			return nil, nil // nothing begins like that
		}
		err := list(class)
		if errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fault.Unavailable) { // the folder: there never was such a tag
			return nil, Fault(d.gone(ctx, d.tags, ".", map[string]error{d.onDisk(class): err}))
		}
		return tags, Fault(err)
	}
	return tags, Fault(d.each(ctx, d.tags, ".", func(_ *os.File, class string) error {
		class, ours := d.offDisk(class)
		if !ours || !strings.HasPrefix(class, prefix) || engine.CheckName("class", class) != nil {
			return nil
		}
		return list(class)
	}))
}

// readTags reads tags of one class, many at once when there are many; those
// deleted meanwhile are left out.
func (d *Directory) readTags(ctx context.Context, class string, names []string) ([]engine.Tag, error) {
	folder, err := openat(d.tags, d.onDisk(class), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	tags, skipped := make([]engine.Tag, len(names)), make([]error, len(names))
	readers := min(8, 1+len(names)/64)
	g, reading := errgroup.WithContext(ctx)
	for r := range readers {
		g.Go(func() error {
			var buf tagBuffer
			for i := r; i < len(names); i += readers {
				tag, err := d.readTag(folder, names[i], &buf)
				switch {
				case err == nil:
					tags[i] = tag
				case d.mayBeGone(err):
					skipped[i] = err
				default:
					return err
				}
				if reading.Err() != nil {
					return reading.Err()
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	missing := map[string]error{}
	for i, err := range skipped {
		if err != nil {
			missing[d.onDisk(names[i])] = err
		}
	}
	tags = slices.DeleteFunc(tags, func(t engine.Tag) bool { return t.Name == "" })
	return tags, d.gone(ctx, d.tags, d.onDisk(class), missing)
}

func classOf(name string) string {
	class, _, _ := strings.Cut(name, ".")
	return class
}

// class opens the folder of a tag's class. With create, it is there and durable
// afterwards: also when another process has just made it and not yet synced it.
func (d *Directory) class(name string, create bool) (*os.File, error) {
	class := classOf(name)
	if _, durable := d.classes.Load(class); create && !durable {
		if err := mkdir(d.tags, d.onDisk(class), 0o700); err != nil {
			return nil, err
		}
		if err := d.syncFolder(d.tags); err != nil {
			return nil, err
		}
		d.classes.Store(class, nil)
	}
	f, err := d.openFolder(d.tags, d.onDisk(class))
	if errors.Is(err, fs.ErrNotExist) {
		d.classes.Delete(class) // removed from outside: the next creation makes it again
	}
	return f, err
}

// tagBuffer is larger than any tag's file: a longer one is not what was written.
type tagBuffer [1024]byte

const tagHeader = "quarry tag 1 "

// encodeTag renders a tag's file: a line with slab ("-": none), length and
// checksum, then the record. The checksum covers the name too.
func encodeTag(t engine.Tag) []byte {
	slab := t.Slab
	if slab == "" {
		slab = "-"
	}
	return fmt.Appendf(nil, tagHeader+"%s %d %08x\n%s", slab, len(t.Record), tagSum(t.Name, slab, t.Record), t.Record)
}

func tagSum(name, slab string, record []byte) uint32 {
	return crc32.Update(crc32.ChecksumIEEE([]byte(name+" "+slab+" ")), crc32.IEEETable, record)
}

// readTag reads a tag's file. One that does not hold what encodeTag wrote, or
// that the disk cannot read, gives a tag with a nil Record and an empty Slab.
func (d *Directory) readTag(dir *os.File, name string, buf *tagBuffer) (engine.Tag, error) {
	bad := engine.Tag{Name: name}
	fd, err := descriptor(dir, d.onDisk(name), unix.O_RDONLY)
	if err == unix.ENOENT && d.thereAfterAll(dir, d.onDisk(name)) {
		fd, err = descriptor(dir, d.onDisk(name), unix.O_RDONLY)
	}
	if err == nil {
		defer unix.Close(fd)
		var n int
		err = uninterrupted(func() (err error) { n, err = unix.Read(fd, buf[:]); return err })
		if err == nil {
			return decodeTag(name, buf[:n]), nil
		}
	}
	switch err {
	case unix.ELOOP, unix.EISDIR, unix.ENXIO, unix.EAGAIN, unix.EINVAL, unix.EIO:
		return bad, nil // a symlink, a directory, a pipe, a bad sector
	}
	return bad, &os.PathError{Op: "read", Path: dir.Name() + "/" + name, Err: err}
}

func decodeTag(name string, content []byte) engine.Tag {
	_, rest, _ := bytes.Cut(content, []byte(tagHeader))
	word, _, _ := bytes.Cut(rest, []byte(" "))
	_, record, _ := bytes.Cut(rest, []byte("\n"))
	tag := engine.Tag{Name: name, Slab: string(word), Record: append([]byte{}, record...)}
	if tag.Slab == "-" {
		tag.Slab = ""
	}
	// The one test that nothing can slip through: it reads as it would be written.
	if !bytes.Equal(encodeTag(tag), content) {
		return engine.Tag{Name: name}
	}
	return tag
}
