package engine

import (
	"context"
	"errors"
	"sync"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Users keeps those who use a domain's slabs in one process out of one
// another's way. An engine leaves a slab attached that somebody has open, but it
// cannot know of one who has just been told a path and is about to open it: what
// is attached through Attach stays until that is over.
type Users struct {
	Engine Engine

	mu    sync.Mutex
	slabs map[string]*use
}

// use is of one slab.
type use struct {
	n       int           // attached, and not yet released
	unused  bool          // somebody detached it meanwhile
	leaving chan struct{} // not nil while the engine detaches it; closed afterwards
}

// NewUsers of the slabs of an opened domain; all of a process share one.
func NewUsers(e Engine) *Users { return &Users{Engine: e, slabs: map[string]*use{}} }

// Attach attaches a slab. Until release is called nobody's Detach takes the slab
// away; release(ctx, true) detaches it, release(ctx, false) is for a caller who
// has it open by then, or mounted, and calls Detach some time. Release takes
// effect once, also where ctx is canceled.
func (u *Users) Attach(ctx context.Context, id string, opts AttachOptions) (a Attachment, release func(ctx context.Context, detach bool) error, err error) {
	s, err := u.enter(ctx, id)
	if err != nil {
		return Attachment{}, nil, err
	}
	s.n++
	u.mu.Unlock()
	var once sync.Once
	release = func(ctx context.Context, detach bool) (err error) {
		once.Do(func() { err = u.release(ctx, id, s, detach) })
		return err
	}
	if a, err = u.Engine.AttachSlab(ctx, id, opts); err != nil {
		return Attachment{}, nil, errors.Join(err, release(ctx, false))
	}
	return a, release, nil
}

// Detach detaches a slab; one that others are about to open stays until they
// have released it, and until they have closed it again.
func (u *Users) Detach(ctx context.Context, id string) error {
	s, err := u.enter(ctx, id)
	if err != nil {
		return err
	}
	s.n++
	u.mu.Unlock()
	return u.release(ctx, id, s, true)
}

// enter returns with u.mu held, and the slab not on its way out.
func (u *Users) enter(ctx context.Context, id string) (*use, error) {
	for {
		u.mu.Lock()
		s := u.slabs[id]
		if s == nil {
			s = &use{}
			u.slabs[id] = s
		}
		if s.leaving == nil {
			return s, nil
		}
		u.mu.Unlock()
		select {
		case <-s.leaving:
		case <-ctx.Done():
			return nil, fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
		}
	}
}

func (u *Users) release(ctx context.Context, id string, s *use, detach bool) error {
	u.mu.Lock()
	s.n--
	s.unused = s.unused || detach
	if s.n > 0 || !s.unused {
		if s.n == 0 {
			delete(u.slabs, id)
		}
		u.mu.Unlock()
		return nil
	}
	s.leaving = make(chan struct{})
	u.mu.Unlock()
	err := u.Engine.DetachSlab(context.WithoutCancel(ctx), id)
	u.mu.Lock()
	delete(u.slabs, id)
	u.mu.Unlock()
	close(s.leaving)
	return err
}
