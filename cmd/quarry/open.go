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
}

type domainManager interface {
	AddDomain(ctx context.Context, cfg image.DomainConfig, e engine.Engine) (string, error)
	Unopened(cfg image.DomainConfig, reason error)
}

// here opens storage in this process.
func here(r domain.Registry) func(context.Context, domain.Entry, string) (engine.Engine, func(context.Context, string) error, error) {
	return func(ctx context.Context, e domain.Entry, _ string) (engine.Engine, func(context.Context, string) error, error) {
		opened, err := r.Open(ctx, e)
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

// one opens one entry, in the background. now ends a pause; see keepOpening for first.
func (o *openers) one(ctx context.Context, e domain.Entry, node string, now <-chan struct{}, first chan<- error) {
	o.manager.Unopened(e.Config(node), fault.New(fault.Unavailable, "it is being opened"))
	o.running.Go(func() { o.keepOpening(ctx, e, node, now, first) })
}

// keepOpening tries until the domain is open. first, if not nil, is told the outcome of the
// first try; only there is an error that will not go away by itself the end.
func (o *openers) keepOpening(ctx context.Context, e domain.Entry, node string, now <-chan struct{}, first chan<- error) {
	cfg, log := e.Config(node), klog.FromContext(ctx)
	tell := func(err error) {
		if first != nil {
			first <- err
			first = nil
		}
	}
	for pause, try := retryFirst, 1; ; pause, try = min(2*pause, retryLast), try+1 {
		err := o.add(ctx, e, node, cfg)
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

func (o *openers) add(ctx context.Context, e domain.Entry, node string, cfg image.DomainConfig) error {
	storage, opened, err := o.open(ctx, e, node)
	if err != nil {
		return err
	}
	id, err := o.manager.AddDomain(ctx, cfg, storage)
	if err != nil {
		return errors.Join(err, storage.Close())
	}
	if opened != nil {
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
