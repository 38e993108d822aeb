package share

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// treeMount is a mount of a tree slab's own. It shows the slab's folder and not its data alone:
// a mount with the same root as that of a workload would be taken for one of a workload's.
type treeMount struct {
	options []string
	point   string
}

func (m treeMount) data() string { return filepath.Join(m.point, "data") }

// attached is a slab that was found.
type attached struct {
	engine.Attachment
	kind   engine.Kind
	folder string // below the domain's
	inode  uint64 // of what users see, in the domain's mount
}

// AttachSlab implements engine.Engine.
func (e *Engine) AttachSlab(ctx context.Context, id string, opts engine.AttachOptions) (engine.Attachment, error) {
	none := engine.Attachment{}
	if err := errors.Join(engine.CheckName("slab ID", id), e.checkOptions(opts)); err != nil {
		return none, err
	}
	a, err := verb(ctx, e, slabWords(id), e.limits.tag, func(ctx context.Context, d *posix.Directory) (attached, error) {
		f, slab, err := d.OpenSlab(id)
		if err != nil {
			return attached{}, err
		}
		defer f.Close() // was only read
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return attached{}, posix.Fault(&os.PathError{Op: "stat", Path: f.Name(), Err: err})
		}
		a, err := d.AttachSlab(ctx, id, engine.AttachOptions{ReadOnly: opts.ReadOnly})
		return attached{a, slab.Kind, d.Inside(id), st.Ino}, err
	})
	switch {
	case err != nil:
		return none, err
	case a.kind == engine.Block && len(opts.MountOptions) > 0:
		return none, fault.New(fault.Invalid, "slab %q is a block slab: it is not mounted from the share, and takes no mount options", id)
	case a.kind == engine.Tree && (len(opts.MountOptions) > 0 || e.storage.TreesApart && e.storage.Mount != nil):
		return e.attachTree(ctx, id, a, opts.MountOptions)
	}
	return a.Attachment, nil
}

// checkOptions refuses the mount options of a class.
func (e *Engine) checkOptions(opts engine.AttachOptions) error {
	if !e.desc.MountOptions || len(opts.MountOptions) == 0 {
		return engine.NoMountOptions(opts)
	}
	return fault.Wrap(fault.Invalid, e.storage.CheckOptions(opts.MountOptions))
}

// attachTree gives a tree slab a mount of its own. Who attaches it with other options (a copy, with
// none) has another one.
func (e *Engine) attachTree(ctx context.Context, id string, found attached, options []string) (engine.Attachment, error) {
	if m, ok := e.treeMount(id, options); ok {
		_, err := bounded(ctx, e, slabWords(id), e.limits.probe, func(context.Context) (struct{}, error) {
			var st unix.Stat_t
			return struct{}{}, posix.Fault(unix.Stat(m.data(), &st))
		}, nil)
		if !stale(err) {
			return engine.Attachment{Path: m.data()}, err
		}
		if err := e.detachTree(ctx, id, m.point); err != nil {
			return engine.Attachment{}, err
		}
	}
	point, err := e.home.point("t")
	if err != nil {
		return engine.Attachment{}, err
	}
	m := treeMount{options: append([]string{}, options...), point: point} // never nil, which is the domain's own mount
	if err := e.mount(ctx, path.Join(e.storage.Folder, found.folder), point, m.options); err != nil {
		if errors.Is(err, fault.NotFound) { // it was there a moment ago
			err = fault.New(fault.Unavailable, "slab %q cannot be mounted from the share: %w", id, err)
		}
		return engine.Attachment{}, errors.Join(err, os.Remove(point))
	}
	_, err = bounded(ctx, e, slabWords(id), e.limits.tag, func(context.Context) (struct{}, error) {
		return struct{}{}, posix.Fault(e.checkTree(id, m, found))
	}, nil)
	if err != nil {
		return engine.Attachment{}, errors.Join(err, unmount(ctx, e.host, point))
	}
	e.mu.Lock()
	e.trees[id] = append(e.trees[id], m)
	e.mu.Unlock()
	return engine.Attachment{Path: m.data()}, nil
}

// checkTree says with nil that a new mount shows the slab that was found in the domain's. The server's name may lead to
// another machine by now, where a volume of the same name is an older one, or a copy.
func (e *Engine) checkTree(id string, m treeMount, found attached) error {
	var st unix.Stat_t
	err := unix.Lstat(m.data(), &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		return &os.PathError{Op: "stat", Path: m.data(), Err: err}
	}
	if st.Ino != found.inode {
		return fault.New(fault.Unavailable, "slab %q: a new mount of %s leads to another storage than the domain's mount, which is older (its directory has the inode number %d there, and %d here): "+
			"nothing is written to it; let the name lead to the server that the domain is on, or, if it has moved for good, restart this node's agent", id, e.storage.Location, st.Ino, found.inode)
	}
	return nil
}

func (e *Engine) treeMount(id string, options []string) (treeMount, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range e.trees[id] {
		if slices.Equal(m.options, options) {
			return m, true
		}
	}
	return treeMount{}, false
}

// DetachSlab implements engine.Engine. A tree that is bound elsewhere stays usable there.
func (e *Engine) DetachSlab(ctx context.Context, id string) error {
	if err := engine.CheckName("slab ID", id); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fault.Wrap(fault.KindOf(err), err)
	}
	e.mu.Lock()
	mounts := slices.Clone(e.trees[id])
	e.mu.Unlock()
	for _, m := range mounts {
		if err := e.detachTree(ctx, id, m.point); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) detachTree(ctx context.Context, id, point string) error {
	if err := unmount(ctx, e.host, point); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.trees[id] = slices.DeleteFunc(e.trees[id], func(m treeMount) bool { return m.point == point })
	if len(e.trees[id]) == 0 {
		delete(e.trees, id)
	}
	return nil
}
