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
	manager  domainManager
	registry domain.Registry
	node     string
	running  sync.WaitGroup
}

type domainManager interface {
	AddDomain(ctx context.Context, cfg image.DomainConfig, e engine.Engine) (string, error)
	Unopened(cfg image.DomainConfig, reason error)
}

// start opens the entries. It returns when each was opened, or cannot be
// reached and is tried again in the background, or openLimit is over. The
// error is the first that will not go away by itself.
func (o *openers) start(ctx context.Context, entries []domain.Entry) error {
	results := make(chan error, len(entries))
	for _, e := range entries {
		o.manager.Unopened(e.Config(o.node), fault.New(fault.Unavailable, "it is being opened"))
		o.running.Add(1)
		go func() {
			defer o.running.Done()
			o.keepOpening(ctx, e, results)
		}()
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

// keepOpening tries until the domain is open. first is told the outcome of the
// first try; only there is an error that will not go away by itself the end.
func (o *openers) keepOpening(ctx context.Context, e domain.Entry, first chan<- error) {
	cfg, log := e.Config(o.node), klog.FromContext(ctx)
	for pause, try := retryFirst, 1; ; pause, try = min(2*pause, retryLast), try+1 {
		err := o.open(ctx, e, cfg)
		if ctx.Err() != nil || err == nil {
			first <- nil
			return
		}
		temporary := errors.Is(err, fault.Unavailable) || errors.Is(err, fault.Deadline)
		if try == 1 && !temporary {
			first <- err
			return
		}
		o.manager.Unopened(cfg, err)
		log.Error(err, "Domain is not open", "domain", cfg.Name, "try", try, "again", pause)
		if try == 1 {
			first <- nil
			first = make(chan error, 1) // nobody listens any more
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

func (o *openers) open(ctx context.Context, e domain.Entry, cfg image.DomainConfig) error {
	opened, err := o.registry.Open(ctx, e)
	if err != nil {
		return err
	}
	if _, err := o.manager.AddDomain(ctx, cfg, opened); err != nil {
		return errors.Join(err, opened.Close())
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
