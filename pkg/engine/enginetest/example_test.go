package enginetest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// simple is a whole engine in the fewest lines: block slabs and tags as files
// of a directory that exists. It keeps every rule, and shows where to begin with
// a new storage. (Engine dir stands on package posix, which also has trees, finds
// damage, and sweeps.)
type simple struct{ path string }

func (s simple) Describe(context.Context) (engine.Description, error) {
	return engine.Description{Kinds: []engine.Kind{engine.Block}, Granularity: 4096, ZeroedSpace: true, Location: s.path}, nil
}

func (s simple) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	if err := errors.Join(engine.CheckSpec(spec), fault.Wrap(fault.Canceled, ctx.Err())); err != nil {
		return err
	}
	if spec.Kind != engine.Block || len(spec.Params) > 0 || spec.Size > 1<<60 {
		return fault.New(fault.Invalid, "slab %q: only block slabs of up to 1 EiB, without parameters", spec.ID)
	}
	size := (spec.Size + 4095) &^ 4095
	path, err := s.place("slab-"+spec.ID, func(f *os.File) error { return f.Truncate(size) })
	if !errors.Is(err, os.ErrExist) {
		return kind(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Size() != size {
		return fault.New(fault.Exists, "slab %q exists with another size", spec.ID)
	}
	return kind(s.sync())
}

func (s simple) ResizeSlab(ctx context.Context, id string, size int64) error {
	if err := engine.CheckName("slab ID", id); err != nil {
		return err
	}
	f, err := os.OpenFile(s.file("slab-"+id), os.O_RDWR, 0)
	if err != nil {
		return kind(err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil { // grow only, whoever else grows it
		return kind(err)
	}
	info, err := f.Stat()
	if err == nil && info.Size() < size {
		err = f.Truncate((size + 4095) &^ 4095)
	}
	return kind(errors.Join(err, f.Sync()))
}

func (s simple) DeleteSlab(ctx context.Context, id string) error {
	return s.remove(ctx, "slab ID", "slab-", id)
}

func (s simple) ListSlabs(ctx context.Context) (slabs []engine.Slab, err error) {
	err = s.each(ctx, "slab-", func(id, path string) error {
		info, err := os.Lstat(path)
		if err == nil {
			slabs = append(slabs, engine.Slab{ID: id, Kind: engine.Block, Size: info.Size()})
		}
		return err
	})
	return slabs, err
}

func (s simple) CreateTag(ctx context.Context, tag engine.Tag) error {
	if err := errors.Join(engine.CheckTag(tag), fault.Wrap(fault.Canceled, ctx.Err())); err != nil {
		return err
	}
	if tag.Record == nil {
		tag.Record = []byte{} // nil is for tags that cannot be read
	}
	content, err := json.Marshal(tag)
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	path, err := s.place("tag-"+tag.Name, func(f *os.File) error { _, err := f.Write(content); return err })
	if !errors.Is(err, os.ErrExist) {
		return kind(err)
	}
	if have, err := os.ReadFile(path); err != nil || !bytes.Equal(have, content) {
		return fault.New(fault.Exists, "tag %q is taken by another record", tag.Name)
	}
	return kind(s.sync()) // a lost reply
}

func (s simple) DeleteTag(ctx context.Context, name string) error {
	return s.remove(ctx, "tag name", "tag-", name)
}

func (s simple) ListTags(ctx context.Context, prefix string) (tags []engine.Tag, err error) {
	if strings.Contains(prefix, "/") {
		return nil, nil
	}
	err = s.each(ctx, "tag-"+prefix, func(rest, path string) error {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var tag engine.Tag
		if json.Unmarshal(content, &tag) != nil || tag.Name != prefix+rest {
			tag = engine.Tag{Name: prefix + rest} // never hidden
		}
		tags = append(tags, tag)
		return nil
	})
	return tags, err
}

func (s simple) AttachSlab(ctx context.Context, id string, _ engine.AttachOptions) (engine.Attachment, error) {
	if err := engine.CheckName("slab ID", id); err != nil {
		return engine.Attachment{}, err
	}
	_, err := os.Lstat(s.file("slab-" + id))
	return engine.Attachment{Path: s.file("slab-" + id)}, kind(err)
}

func (s simple) DetachSlab(ctx context.Context, id string) error {
	return engine.CheckName("slab ID", id)
}

func (s simple) Close() error { return nil }

func (s simple) file(name string) string { return filepath.Join(s.path, name) }

// place makes a file durable before it has its name, and its name before it
// returns. link(2) is what makes it exclusive.
func (s simple) place(name string, fill func(*os.File) error) (path string, err error) {
	f, err := os.OpenFile(s.file("tmp-"+rand.Text()), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	path = s.file(name)
	if err := errors.Join(fill(f), f.Sync(), f.Close()); err != nil {
		return path, err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return path, err
	}
	return path, s.sync()
}

func (s simple) remove(ctx context.Context, what, prefix, name string) error {
	if err := errors.Join(engine.CheckName(what, name), fault.Wrap(fault.Canceled, ctx.Err())); err != nil {
		return err
	}
	if err := os.Remove(s.file(prefix + name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return kind(err)
	}
	return kind(s.sync())
}

func (s simple) each(ctx context.Context, prefix string, do func(rest, path string) error) error {
	entries, err := os.ReadDir(s.path)
	for _, entry := range entries {
		rest, ours := strings.CutPrefix(entry.Name(), prefix)
		if err = errors.Join(err, ctx.Err()); err != nil {
			break
		} else if ours {
			if err = do(rest, s.file(entry.Name())); errors.Is(err, os.ErrNotExist) {
				err = nil // deleted meanwhile
			}
		}
	}
	return kind(err)
}

func (s simple) sync() error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func kind(err error) error {
	switch {
	case err == nil, fault.KindOf(err) != fault.Internal:
		return fault.In(err, "", "", "")
	case errors.Is(err, os.ErrNotExist):
		return fault.Wrap(fault.NotFound, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.Wrap(fault.Exhausted, err)
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EROFS):
		return fault.Wrap(fault.Permission, err)
	}
	return fault.Wrap(fault.Unavailable, err)
}

// TestAnEngineIn200Lines: the suite asks for nothing that a simple engine cannot give.
func TestAnEngineIn200Lines(t *testing.T) {
	enginetest.Run(t, enginetest.Harness{Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
		s := simple{t.TempDir()}
		return func(testing.TB) engine.Engine { return s }
	}})
}
