package kube

import (
	"context"
	"time"

	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// LeaseConfig says by which Lease the leader is found. All candidates must
// have the same, but for Identity.
type LeaseConfig struct {
	Namespace, Name string
	// Identity is this process's own: if two have the same, both lead. The name
	// of a pod is good.
	Identity string
	// LeaseDuration is how long the others wait, since they last saw the Lease
	// renewed, before one of them takes it: whole seconds, since the Lease counts
	// in them.
	LeaseDuration time.Duration
	// RenewDeadline is how long a leader tries to renew before it has lost the
	// Lease. With RetryPeriod it must be shorter than LeaseDuration.
	RenewDeadline time.Duration
	// RetryPeriod is the pause between two attempts to take or to renew it.
	RetryPeriod time.Duration
	// Leader is told who holds the Lease, as this process sees it, whenever that
	// changes; "": nobody. For logs and messages: it tells of the past. It may be
	// nil, and must not wait.
	Leader func(identity string)
}

// Check refuses what the API server, the elector or common sense would: fault.Invalid.
func (c *LeaseConfig) Check() error {
	if err := filled("Namespace", c.Namespace, "Name", c.Name, "Identity", c.Identity); err != nil {
		return err
	}
	// The elector spreads its attempts over up to 1.2 periods.
	longest := time.Duration(leaderelection.JitterFactor * float64(c.RetryPeriod))
	switch {
	case c.RetryPeriod <= 0:
		return fault.New(fault.Invalid, "RetryPeriod %s: it must be more than 0", c.RetryPeriod)
	case c.RenewDeadline <= longest:
		return fault.New(fault.Invalid, "RenewDeadline %s: it must be more than 1.2 times RetryPeriod, which is %s", c.RenewDeadline, longest)
	case c.LeaseDuration <= c.RenewDeadline+c.RetryPeriod:
		return fault.New(fault.Invalid, "LeaseDuration %s: it must be more than RenewDeadline and RetryPeriod together, which are %s: another process would lead before this one has stopped", c.LeaseDuration, c.RenewDeadline+c.RetryPeriod)
	case c.LeaseDuration%time.Second != 0:
		return fault.New(fault.Invalid, "LeaseDuration %s: it must be whole seconds", c.LeaseDuration)
	}
	return nil
}

// Lead waits until this process holds the Lease, runs lead, and gives the
// Lease back when lead has returned, whose error it returns. It returns nil if
// ctx ends while it waits.
//
// lead's context ends with ctx, or when the Lease is lost, which is before
// anybody else can take it; while lead still ends because of ctx, the Lease is
// renewed. If it is lost, Lead waits for lead to return and returns
// fault.Unavailable: the process must end, for nothing that it knows is
// certain any more. fault.Invalid: a field of cfg is wrong.
func Lead(ctx context.Context, client *Client, cfg LeaseConfig, lead func(ctx context.Context) error) error {
	if err := cfg.Check(); err != nil {
		return err
	}
	log := klog.FromContext(ctx).WithValues("lease", klog.KRef(cfg.Namespace, cfg.Name), "identity", cfg.Identity)
	hold, lose := context.WithCancel(context.Background())
	defer lose()
	l := newLock(client, cfg, log, lose)
	defer l.kept.Stop()
	elected := make(chan struct{})
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: cfg.Name, Lock: l,
		LeaseDuration: cfg.LeaseDuration, RenewDeadline: cfg.RenewDeadline, RetryPeriod: cfg.RetryPeriod,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { close(elected) },
			OnStoppedLeading: lose,
		},
		ReleaseOnCancel: false, // lock.release does it, and says why
	})
	if err != nil {
		return fault.New(fault.Internal, "the elector refuses what has been checked: %w", err)
	}
	// The elector's context is not ctx: it renews until lead has returned.
	electing, stop := context.WithCancel(klog.NewContext(context.WithoutCancel(ctx), log.V(2)))
	defer stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		elector.Run(electing)
	}()
	log.Info("Waiting to lead")
	select {
	case <-elected:
	case <-ctx.Done():
	}
	lost := false
	if ctx.Err() == nil {
		log.Info("Leading")
		err = whileHeld(ctx, hold, lead)
		lost = hold.Err() != nil
	}
	stop()
	<-ended
	if lost {
		return lostLease(cfg, err)
	}
	l.release(ctx)
	return err
}

// whileHeld runs lead with a context that ends with ctx and with hold.
func whileHeld(ctx, hold context.Context, lead func(ctx context.Context) error) error {
	leading, end := context.WithCancel(ctx)
	defer end()
	stop := context.AfterFunc(hold, func() {
		klog.FromContext(ctx).Info("The lease is lost: ending")
		end()
	})
	defer stop()
	return lead(leading)
}

func lostLease(cfg LeaseConfig, ending error) error {
	const text = "the lease %s/%s is lost: it could not be renewed in time, or another process took it: this process ends and another one leads"
	if ending == nil || fault.KindOf(ending) == fault.Canceled {
		return fault.New(fault.Unavailable, text, cfg.Namespace, cfg.Name)
	}
	return fault.New(fault.Unavailable, text+"; what was running ended with: %w", cfg.Namespace, cfg.Name, ending)
}
