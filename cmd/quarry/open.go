package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

const (
	// openLimit is how long a start waits for a domain that does not answer.
	openLimit = 20 * time.Second
	// stopLimit is how long a stop waits for one.
	stopLimit = 5 * time.Second
	// closeLimit is how long a domain is waited for that is closed while others stay open: for
	// what is at work in it.
	closeLimit = 30 * time.Second
	// retryFirst and retryLast are the pauses before a domain is tried again.
	retryFirst, retryLast = time.Second, time.Minute
)

// openers open domains, each by itself: one that does not answer keeps none of
// the others from opening.
type openers struct {
	manager domainManager
	// open opens the entry's storage for a node. opened, if not nil, is called when the
	// Image Manager has it.
	open    func(ctx context.Context, e domain.Entry, node string) (storage engine.Engine, opened func(ctx context.Context, id string) error, err error)
	running sync.WaitGroup

	mu  sync.Mutex
	all map[entryOn]*opened // the last of each; those before have ended when it begins
}

// entryOn is an entry of the domains file on a node, or on all ("").
type entryOn struct{ name, node string }

// opened is an entry that is open, or is being opened.
type opened struct {
	entry domain.Entry
	stop  context.CancelFunc
	ended chan struct{} // closed when it is open, or nobody tries any more
	adopt func(ctx context.Context, id string) error
	// closing: the entry was removed, and ended is closed when its domain is. What comes in its
	// place waits for that.
	closing bool
}

type domainManager interface {
	AddDomain(ctx context.Context, cfg image.DomainConfig, e engine.Engine) (string, error)
	Unopened(cfg image.DomainConfig, reason error)
	Reconfigure(cfg image.DomainConfig) (string, error)
	CloseDomain(ctx context.Context, cfg image.DomainConfig, reason error) error
}

// here opens storage from this process.
func here(s storages) func(context.Context, domain.Entry, string) (engine.Engine, func(context.Context, string) error, error) {
	return func(ctx context.Context, e domain.Entry, _ string) (engine.Engine, func(context.Context, string) error, error) {
		opened, err := s.open(ctx, e)
		return opened, nil, err
	}
}

// start opens the entries for a node. It returns when each was opened, or cannot be
// reached and is tried again in the background, or openLimit is over. The
// error is the first that will not go away by itself.
func (o *openers) start(ctx context.Context, entries []domain.Entry, node string) error {
	results := make(chan error, len(entries))
	for _, e := range entries {
		o.one(ctx, e, node, nil, results)
	}
	limit := time.NewTimer(openLimit)
	defer limit.Stop()
	for range entries {
		select {
		case err := <-results:
			if err != nil {
				return err
			}
		case <-limit.C:
			klog.FromContext(ctx).Info("Starting without the domains that do not answer", "limit", openLimit)
			return nil
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// one opens one entry, in the background. What is open of that name there is changed to be as the
// entry says: while it is open, where that can be. now ends a pause; see keepOpening for first.
func (o *openers) one(ctx context.Context, e domain.Entry, node string, now <-chan struct{}, first chan<- error) {
	at := entryOn{e.Name, node}
	ctx, stop := context.WithCancel(ctx)
	p := &opened{entry: e, stop: stop, ended: make(chan struct{})}
	o.mu.Lock()
	before := o.all[at]
	if o.all == nil {
		o.all = map[entryOn]*opened{}
	}
	o.all[at] = p
	o.mu.Unlock()
	if before == nil || before.closing {
		o.manager.Unopened(e.Config(node), fault.New(fault.Unavailable, "it is being opened"))
	}
	o.running.Go(func() {
		defer close(p.ended)
		if before != nil {
			before.stop()
			<-before.ended
			if !before.closing && o.change(ctx, before, p, node) {
				return
			}
		}
		o.keepOpening(ctx, p, node, now, first)
	})
}

// change makes of one that was open what its entry says now. It tries until that is so, or ctx
// ends: an alias may be another domain's for now. false: it has to be opened.
func (o *openers) change(ctx context.Context, before, p *opened, node string) bool {
	log, cfg := klog.FromContext(ctx).WithValues("domain", p.entry.Name, "node", node), p.entry.Config(node)
	for pause := retryFirst; before.entry.SameStorage(p.entry); pause = min(2*pause, retryLast) {
		p.adopt = before.adopt
		id, err := o.manager.Reconfigure(cfg)
		if err == nil && p.adopt != nil {
			err = p.adopt(ctx, id)
		}
		if err == nil {
			log.Info("The settings of a domain have changed")
			return true
		}
		if errors.Is(err, fault.Unavailable) {
			break
		}
		log.Error(err, "The settings of a domain have not changed: it stays as it was", "again", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return true
		}
	}
	o.closeDomain(ctx, before.entry.Config(node), fault.New(fault.Unavailable, "it is being opened again, since its entry in the domains file has changed"))
	log.Info("The storage of a domain has changed: opening it")
	return false
}

// closeDomain closes one, if it is open.
func (o *openers) closeDomain(ctx context.Context, cfg image.DomainConfig, reason error) {
	limited, cancel := context.WithTimeout(ctx, closeLimit)
	defer cancel()
	if err := o.manager.CloseDomain(limited, cfg, reason); err != nil {
		klog.FromContext(ctx).Error(err, "Closing a domain", "domain", cfg.Name, "node", cfg.Node)
	}
}

// nodesOf are those on which an entry is, or is being opened; "": all nodes at once.
func (o *openers) nodesOf(name string) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []string
	for at := range o.all {
		if at.name == name && !o.all[at].closing {
			out = append(out, at.node)
		}
	}
	return out
}

// remove closes an entry wherever it is, and calls done, in the background. What is begun of that
// name meanwhile waits for it.
func (o *openers) remove(ctx context.Context, name string, done func()) {
	var all sync.WaitGroup
	o.mu.Lock()
	for at, p := range o.all {
		if at.name != name || p.closing {
			continue
		}
		p.stop()
		end := &opened{entry: p.entry, stop: func() {}, ended: make(chan struct{}), closing: true}
		o.all[at] = end
		all.Go(func() {
			<-p.ended
			o.closeDomain(ctx, p.entry.Config(at.node), nil)
			o.mu.Lock()
			if o.all[at] == end {
				delete(o.all, at)
			}
			o.mu.Unlock()
			close(end.ended)
		})
	}
	o.mu.Unlock()
	o.running.Go(func() {
		all.Wait()
		done()
	})
}

// keepOpening tries until the domain is open. first, if not nil, is told the outcome of the
// first try; only there is an error that will not go away by itself the end.
func (o *openers) keepOpening(ctx context.Context, p *opened, node string, now <-chan struct{}, first chan<- error) {
	cfg, log := p.entry.Config(node), klog.FromContext(ctx)
	tell := func(err error) {
		if first != nil {
			first <- err
			first = nil
		}
	}
	for pause, try := retryFirst, 1; ; pause, try = min(2*pause, retryLast), try+1 {
		err := o.add(ctx, p, node, cfg)
		if ctx.Err() != nil || err == nil {
			tell(nil)
			return
		}
		temporary := errors.Is(err, fault.Unavailable) || errors.Is(err, fault.Deadline)
		if first != nil && !temporary {
			tell(err)
			return
		}
		o.manager.Unopened(cfg, err)
		log.Error(err, "Domain is not open", "domain", cfg.Name, "node", cfg.Node, "try", try, "again", pause)
		tell(nil)
		select {
		case <-time.After(pause):
		case <-now:
			pause = retryFirst
		case <-ctx.Done():
			return
		}
	}
}

func (o *openers) add(ctx context.Context, p *opened, node string, cfg image.DomainConfig) error {
	storage, opened, err := o.open(ctx, p.entry, node)
	if err != nil {
		return err
	}
	id, err := o.manager.AddDomain(ctx, cfg, storage)
	if err != nil {
		return errors.Join(err, storage.Close())
	}
	if p.adopt = opened; opened != nil {
		return opened(ctx, id)
	}
	return nil
}

// wait waits for the openers after their context has ended, but not for
// storage that does not answer.
func (o *openers) wait() {
	done := make(chan struct{})
	go func() { o.running.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(stopLimit):
	}
}
