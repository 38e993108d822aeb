package share

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// place is the domain's directory as it is mounted now. One that was replaced stays open until the last
// call in it has ended.
type place struct {
	dir   *posix.Directory
	point string // of the mount; "" where it is not ours

	mu      sync.Mutex
	users   int
	retired bool
}

// errRetired is of a place that was replaced before a call began in it.
var errRetired = fault.New(fault.Unavailable, "the mount was replaced meanwhile")

// using runs f in a place, which stays open as long.
func using[T any](p *place, f func() (T, error)) (T, error) {
	p.mu.Lock()
	if p.retired {
		p.mu.Unlock()
		var none T
		return none, errRetired
	}
	p.users++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.users--; p.users == 0 && p.retired {
			_ = p.dir.Close() // was used by one whom nobody waits for
		}
	}()
	return f()
}

// retire lets nobody in any more.
func (p *place) retire() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.retired {
		return nil
	}
	p.retired = true
	if p.users > 0 {
		return nil
	}
	return p.dir.Close()
}

func (e *Engine) place() (*place, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, fault.New(fault.Unavailable, "the domain was closed")
	}
	return e.now, nil
}

// open mounts the domain, and opens its directory. identity is that of the storage that it has to
// be; "": any.
func (e *Engine) open(ctx context.Context, identity string) (*place, error) {
	if e.storage.Mount == nil {
		return e.openAt(ctx, e.storage.Path, "", identity)
	}
	point, err := e.home.point("")
	if err != nil {
		return nil, err
	}
	err = e.mount(ctx, e.storage.Folder, point, nil)
	if errors.Is(err, fault.NotFound) && e.storage.Folder != "" && identity == "" {
		if err = e.makeFolder(ctx); err == nil {
			err = e.mount(ctx, e.storage.Folder, point, nil)
		}
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(point))
	}
	p, err := e.openAt(ctx, point, point, identity)
	if err != nil {
		return nil, errors.Join(err, unmount(ctx, e.host, point))
	}
	return p, nil
}

// mount is Storage.Mount with a limit. A mount that comes later is taken down by who waits for it.
func (e *Engine) mount(ctx context.Context, folder, target string, options []string) error {
	limited, cancel := context.WithTimeout(ctx, e.limits.mount)
	defer cancel()
	err := e.storage.Mount(limited, folder, target, options)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return fault.New(fault.Unavailable, "%s could not be mounted within %s: %w", e.storage.Location, e.limits.mount, err)
	}
	return err
}

// makeFolder makes the domain's folder, in the root of the share.
func (e *Engine) makeFolder(ctx context.Context) error {
	root, err := e.home.point("")
	if err != nil {
		return err
	}
	if err := e.mount(ctx, "", root, nil); err != nil {
		return errors.Join(err, os.Remove(root))
	}
	_, err = bounded(ctx, e, "the folder "+e.storage.Folder, e.limits.tag, func(context.Context) (struct{}, error) {
		return struct{}{}, makeBelow(root, e.storage.Folder)
	}, nil)
	return errors.Join(err, unmount(ctx, e.host, root))
}

// makeBelow makes a folder and those that it is in. Links in the share are not followed out of it.
func makeBelow(root, folder string) error {
	in, err := os.OpenRoot(root)
	if err != nil {
		return posix.Fault(err)
	}
	defer in.Close()
	for i, c := range folder + "/" {
		if c != '/' {
			continue
		}
		if err := in.Mkdir(folder[:i], 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return posix.Fault(err)
		}
	}
	return nil
}

// Folder checks and cleans the value of a parameter that names a folder of a share: relative to the share's root, by
// slashes. The error is fault.Invalid.
func Folder(value string) (string, error) {
	clean := strings.Trim(value, "/")
	if clean == "" {
		return "", nil
	}
	if !filepath.IsLocal(clean) || clean != filepath.Clean(clean) || strings.ContainsAny(clean, "\\\x00\n") {
		return "", fault.New(fault.Invalid, "parameter \"folder\" is %q: the path of a folder in the share is needed, such as \"k8s\" or \"teams/k8s\", without \"..\"", value)
	}
	return clean, nil
}

// openAt opens the directory at a path. Whether that is another storage is seen before anything is made there.
func (e *Engine) openAt(ctx context.Context, path, point, identity string) (*place, error) {
	d, err := bounded(ctx, e, "opening", e.limits.open, func(context.Context) (*posix.Directory, error) {
		if e.storage.CheckPath != nil {
			if err := e.storage.CheckPath(path); err != nil {
				return nil, err
			}
		}
		if identity != "" {
			switch have, err := posix.IdentityAt(path); {
			case err != nil && !errors.Is(err, fault.NotFound):
				return nil, err
			case have != identity:
				return nil, fault.New(fault.Unavailable, "%s: another storage is in its place (identity %q, and this domain is in %q): it is not touched; mount the one that was there", e.storage.Location, have, identity)
			}
		}
		d, err := posix.Open(path, e.storage.Posix)
		if err != nil {
			err = fault.New(fault.KindOf(err), "%s: %w", e.storage.Location, err)
		}
		return d, err
	}, func(late *posix.Directory) { _ = late.Close() })
	if err != nil {
		return nil, err
	}
	return &place{dir: d, point: point}, nil
}

// replace mounts the domain anew if a place is stale, as why says.
func (e *Engine) replace(ctx context.Context, old *place, why error) error {
	select {
	case <-e.replacing:
		defer func() { e.replacing <- struct{}{} }()
	case <-ctx.Done():
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
	}
	now, err := e.place()
	if err != nil || now != old {
		return err
	}
	_, dead := bounded(ctx, e, "a sign of life", e.limits.probe, func(context.Context) (struct{}, error) {
		return using(old, func() (struct{}, error) { return struct{}{}, old.dir.Alive() })
	}, nil)
	// What was unmounted lazily, and mounted again, is alive for whoever has it open.
	if !stale(dead) && !errors.Is(why, posix.ErrElsewhere) { // it is what was asked for that is stale
		return errors.Join(dead, why)
	}
	fresh, err := e.open(ctx, e.identity)
	if err != nil {
		return fault.New(fault.Unavailable, "the mount has gone stale (%w), and could not be replaced: %w", why, err)
	}
	e.mu.Lock()
	closed := e.closed
	if !closed {
		e.now = fresh
	}
	e.mu.Unlock()
	if closed {
		_ = fresh.retire() // nothing was done in it
		return fault.New(fault.Unavailable, "the domain was closed")
	}
	_ = old.retire() // it is stale
	if old.point != "" {
		_ = unmount(ctx, e.host, old.point) // else it goes with the home
	}
	return nil
}
