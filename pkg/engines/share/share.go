// Package share is what the engines of storages behind a server have in common: it mounts the
// share for this process alone, keeps a domain in it with package posix, waits for a dead server
// no longer than each verb's limit, and replaces a mount that has gone stale. What one type of
// share knows and no other is a Storage.
//
// A mount belongs to the process that made it. Nothing needs to be found again by a later one: what
// is in use (a loop device over a block slab, a tree that is bound to where it is staged) keeps the
// file system that it came from, and the kernel gives equal mounts of a share one file system.
//
//	<mounts>/<random>.lock    held (flock) by the process whose mounts are in
//	<mounts>/<random>/<n>     the domain
//	<mounts>/<random>/t<n>    a tree slab with a mount of its own
package share

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/posix"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Storage is what one type of share knows and no other.
type Storage struct {
	// Type is the engine's type, for messages.
	Type string
	// Location is the storage in words, for people: "nas:/export/k8s (NFS 3)".
	Location string
	// Folder of the share, slash-separated, that is the domain; "": its root. It is made where it is missing.
	Folder string
	// Mount mounts a folder of the share (slash-separated, "" is its root) on target, an empty
	// directory. options are a class's mount options, which CheckOptions has let pass: nil for the
	// domain's own mount, and never nil for that of a tree slab. It honours ctx where it waits.
	// fault.NotFound: the share has no such folder. fault.Unavailable: the server cannot be reached now.
	Mount func(ctx context.Context, folder, target string, options []string) error
	// CheckOptions refuses a class's mount options that this type cannot take, or that would lose
	// data, with fault.Invalid. nil: none can be taken.
	CheckOptions func(options []string) error
	// Ping asks whether the server answers, quickly (a TCP connection). nil: there is nobody to ask.
	Ping func(ctx context.Context) error
	// Ready is asked before every verb, and must not wait for the server: an error says that nothing may be done now.
	// nil: always.
	Ready func(ctx context.Context) error
	// Health returns a warning for operators, "" for none: copies that differ, a brick that is
	// away. nil: there is nothing to ask.
	Health func(ctx context.Context) (string, error)
	// TreesApart gives each tree slab that is attached a mount of its own straight from the server.
	// Those that are attached with mount options have one in any case.
	TreesApart bool
	// Copies says that the storage may copy files by itself: whether it does is tried.
	Copies bool
	// Path of a file system that is mounted already; then Mount is nil, and nothing is mounted.
	Path string
	// CheckPath, with Path, refuses what is there now, before anything is made in it. It may hang.
	CheckPath func(path string) error
	// Posix are the options of the directory.
	Posix posix.Options
}

// Engine is an opened domain. It implements engine.Engine, and the capabilities that its Supports names.
type Engine struct {
	storage  Storage
	host     *host.Local
	limits   limits
	home     *home // nil with Storage.Path
	identity string
	tried    posix.Tried
	desc     engine.Description
	stop     context.CancelFunc // of the cleaning in the background
	cleaned  chan struct{}      // closed when that has ended

	replacing chan struct{} // holds one: whoever replaces a stale mount has taken it

	mu      sync.Mutex
	now     *place
	closed  bool
	hanging int // calls that nobody waits for any more
	trees   map[string][]treeMount
}

// Open opens the domain in a share. mounts is the folder for this process's mounts; "": DefaultMounts.
// Secrets are the business of s.Mount; no error of this package shows an option's value.
//
// fault.Unavailable: the server cannot be reached now, or does not answer. fault.Invalid: the
// share can be no domain, for the reason given.
func Open(ctx context.Context, h *host.Local, mounts string, s Storage) (*Engine, error) {
	e := &Engine{storage: s, host: h, limits: usual(), replacing: make(chan struct{}, 1), trees: map[string][]treeMount{}, stop: func() {}, cleaned: make(chan struct{})}
	e.replacing <- struct{}{}
	if s.Mount != nil {
		e.storage.Posix.NoLeases = true
		if s.Ping != nil {
			if err := s.Ping(ctx); err != nil {
				return nil, err
			}
		}
		var err error
		if e.home, err = newHome(ctx, h, mounts); err != nil {
			return nil, err
		}
	}
	if err := e.first(ctx); err != nil {
		close(e.cleaned)
		return nil, errors.Join(err, e.Close())
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	e.stop = stop
	go e.clean(background)
	return e, nil
}

// first opens the directory for the first time, and finds out what it can do.
func (e *Engine) first(ctx context.Context) error {
	p, err := e.open(ctx, "")
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.now = p
	e.mu.Unlock()
	e.desc = engine.Description{
		SharedAccess: true,
		MountOptions: e.storage.Mount != nil && e.storage.CheckOptions != nil,
		Location:     e.storage.Location,
	}
	p.dir.Describe(&e.desc)
	tried, err := bounded(ctx, e, "the first look at", e.limits.open, func(ctx context.Context) (posix.Tried, error) {
		return using(p, func() (posix.Tried, error) {
			t, err := p.dir.Try(ctx)
			// Another opening may be at work here by the time that one fails for which nobody waits any more.
			if (errors.Is(err, fault.Invalid) || errors.Is(err, fault.Permission)) && ctx.Err() == nil {
				return t, errors.Join(err, p.dir.Unmake())
			}
			return t, err
		})
	}, nil)
	// A full storage must open, or nothing could be deleted.
	if full := errors.Is(err, fault.Exhausted); full {
		e.note("what the storage can do was not tried: %v", err)
		tried = posix.Tried{Reflink: errUntried, Copy: errUntried}
	} else if err != nil {
		return fault.New(fault.KindOf(err), "%s: %w", e.storage.Location, err)
	}
	if !e.storage.Copies {
		tried.Copy = errNoCopies
	}
	e.tried = tried
	e.describe()
	if e.identity, err = bounded(ctx, e, "the identity", e.limits.tag, func(context.Context) (string, error) {
		return using(p, p.dir.Identity)
	}, nil); err != nil {
		return err
	}
	e.note("identity: %s", e.identity)
	return nil
}

var (
	errUntried  = fault.New(fault.Exhausted, "could not be tried: the storage is full")
	errNoCopies = fault.New(fault.Unsupported, "the storage does not copy by itself")
)

// describe notes what is native, or why it is not, and what is missing beside.
func (e *Engine) describe() {
	say := func(what, how string, missing error) {
		if missing != nil {
			e.note("%s: default: %v", what, missing)
		} else {
			e.note("%s: native: %s", what, how)
		}
	}
	say("snapshot and clone of block slabs", "reflinks", e.tried.Reflink)
	say("copy of block slabs", "by the storage (copy_file_range)", e.tried.Copy)
	say("meter", "statfs", nil)
	for what, missing := range map[string]error{"locks": e.tried.Locks, "sparse files": e.tried.Sparse, "direct I/O": e.tried.DirectIO} {
		if missing != nil {
			e.note("%s: none: %v", what, missing)
		}
	}
	slices.Sort(e.desc.Notes)
}

func (e *Engine) note(format string, args ...any) {
	e.desc.Notes = append(e.desc.Notes, fmt.Sprintf(format, args...))
}

// clean removes what earlier processes left, which may take its time.
func (e *Engine) clean(ctx context.Context) {
	defer close(e.cleaned)
	e.mu.Lock()
	p := e.now
	e.mu.Unlock()
	_, _ = using(p, func() (struct{}, error) { return struct{}{}, p.dir.Clean(ctx) }) // what stays is tried again at the next opening
}

// Describe implements engine.Engine. It asks nobody.
func (e *Engine) Describe(context.Context) (engine.Description, error) {
	d := e.desc
	d.Kinds, d.Notes, d.TreeParams = slices.Clone(d.Kinds), slices.Clone(d.Notes), slices.Clone(d.TreeParams)
	d.Params, d.ParamValues = maps.Clone(d.Params), maps.Clone(d.ParamValues)
	return d, nil
}

// Supports implements engine.Narrower.
func (e *Engine) Supports(c engine.Capability) bool {
	switch c {
	case engine.CapSnapshot, engine.CapClone:
		return e.tried.Reflink == nil
	case engine.CapCopy:
		return e.tried.Copy == nil
	case engine.CapMeter, engine.CapImport:
		return true
	}
	return false
}

// closeLimit is how long Close waits for the cleaning to see that it is to stop.
const closeLimit = time.Second

// Close implements engine.Engine. It waits for no server: what still hangs keeps what it needs
// until it comes back.
func (e *Engine) Close() error {
	e.stop()
	patience := time.NewTimer(closeLimit)
	defer patience.Stop()
	select {
	case <-e.cleaned:
	case <-patience.C:
	}
	e.mu.Lock()
	p, closed := e.now, e.closed
	e.closed, e.now = true, nil
	e.mu.Unlock()
	if closed {
		return nil
	}
	var err error
	if p != nil {
		err = p.retire()
	}
	if e.home == nil {
		return err
	}
	return errors.Join(err, e.home.leave(e.host))
}

var (
	_ engine.Engine      = (*Engine)(nil)
	_ engine.Narrower    = (*Engine)(nil)
	_ engine.Snapshotter = (*Engine)(nil)
	_ engine.Cloner      = (*Engine)(nil)
	_ engine.Copier      = (*Engine)(nil)
	_ engine.Meter       = (*Engine)(nil)
	_ engine.Importer    = (*Engine)(nil)
)
