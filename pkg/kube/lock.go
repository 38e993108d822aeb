package kube

import (
	"context"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// lock is the Lease as the elector uses it, and three things more: a request
// without an answer leaves time for another one, it is known who holds the
// Lease, and a leader whose last renewal was begun too long ago has lost it,
// whatever its elector is still waiting for. One goroutine uses it at a time.
type lock struct {
	*resourcelock.LeaseLock
	cfg    LeaseConfig
	log    klog.Logger
	kept   *time.Timer // loses the Lease when it fires
	holder string      // as last seen
	wrote  bool        // it may be ours, even if the answer was lost
}

var _ resourcelock.Interface = (*lock)(nil)

func newLock(client *Client, cfg LeaseConfig, log klog.Logger, lose func()) *lock {
	l := &lock{cfg: cfg, log: log, LeaseLock: &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: cfg.Namespace, Name: cfg.Name},
		Client:     client.api.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: cfg.Identity},
	}}
	l.kept = time.AfterFunc(time.Hour, lose)
	l.kept.Stop() // until there is something to lose
	return l
}

// Get implements resourcelock.Interface.
func (l *lock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.RenewDeadline/2)
	defer cancel()
	r, raw, err := l.LeaseLock.Get(ctx)
	if err == nil {
		l.saw(r.HolderIdentity)
	}
	return r, raw, err
}

// Create implements resourcelock.Interface.
func (l *lock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return l.write(ctx, r, l.LeaseLock.Create)
}

// Update implements resourcelock.Interface.
func (l *lock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return l.write(ctx, r, l.LeaseLock.Update)
}

// write takes the Lease or renews it.
func (l *lock) write(ctx context.Context, r resourcelock.LeaderElectionRecord, send func(context.Context, resourcelock.LeaderElectionRecord) error) error {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.RenewDeadline/2)
	defer cancel()
	began := time.Now() // others may have seen the renewal at any time since
	l.wrote = true
	if err := send(ctx, r); err != nil {
		return err
	}
	l.kept.Reset(time.Until(began.Add(l.cfg.RenewDeadline + l.cfg.RetryPeriod)))
	l.saw(r.HolderIdentity)
	return nil
}

func (l *lock) saw(holder string) {
	if holder == l.holder {
		return
	}
	l.holder = holder
	l.log.Info("The lease has another holder", "holder", holder)
	if l.cfg.Leader != nil {
		l.cfg.Leader(holder)
	}
}

// release gives the Lease back if it is ours, so that the next leader need not
// wait for its end. The elector, and what the Lease protects, have ended: the
// elector's own ReleaseOnCancel does this also when renewing has failed, before
// it tells anybody, and so lets another process lead beside this one.
func (l *lock) release(ctx context.Context) {
	if !l.wrote {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cfg.RenewDeadline)
	defer cancel()
	var err error
	for range 3 { // a renewal whose answer was not waited for may come between
		if err = l.free(ctx); !apierrors.IsConflict(err) {
			break
		}
	}
	if err != nil && !apierrors.IsNotFound(err) {
		l.log.Error(fault.Wrap(kindOf(err), err), "The lease could not be given back: the next leader waits for its end", "after", l.cfg.LeaseDuration)
	}
}

func (l *lock) free(ctx context.Context) error {
	r, _, err := l.LeaseLock.Get(ctx)
	if err != nil || r.HolderIdentity != l.cfg.Identity {
		return err
	}
	now := metav1.Now()
	// As client-go's elector writes it: a duration of 0 is not allowed.
	if err := l.LeaseLock.Update(ctx, resourcelock.LeaderElectionRecord{
		LeaderTransitions: r.LeaderTransitions, LeaseDurationSeconds: 1, RenewTime: now, AcquireTime: now,
	}); err != nil {
		return err
	}
	l.saw("")
	return nil
}
