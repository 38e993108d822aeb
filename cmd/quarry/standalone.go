package main

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/csi"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
	"github.com/quarry-csi/quarry/pkg/node"
)

// adminGrace is how long an operator's request may still take when we stop.
const adminGrace = 5 * time.Second

// standalone runs everything until ctx ends, and stops in this order: no new
// requests, what is being answered ends, then the Image Manager.
func standalone(ctx context.Context, o *options) (err error) {
	registry := engines.Registry(host.Exec{})
	entries, err := domain.Load(o.domains, registry)
	if err != nil {
		return err
	}
	// Sockets come before domains: a second process that was started by mistake
	// must fail on them before it takes the domains away from the first.
	metricsSocket, err := o.listen()
	if err != nil {
		return err
	}
	if metricsSocket != nil {
		defer metricsSocket.Close()
	}
	operators, err := o.listenAdmin()
	if err != nil {
		return err
	}
	defer func() { _ = operators.close() }() // those that served are closed already

	tracer, flush, err := tracing(ctx, o.nodeID)
	if err != nil {
		return err
	}
	defer flush()
	metrics := newMetrics()
	follow := &reloader{load: func() ([]domain.Entry, error) { return domain.Load(o.domains, registry) }}
	follow.watch(metrics)
	agents := &node.Agents{}
	worker := &mover.Local{Files: mover.New(mover.Options{}), Agents: agents}
	manager := image.New(image.Config{Installation: o.installation, Agents: agents, Worker: worker, Observe: metrics.observe})
	worker.Engines = manager.Engine
	agent := node.New(node.Config{NodeID: o.nodeID, Manager: manager, Engines: manager.Engine, Domains: manager, KubeletDir: o.kubeletDir})
	agents.Set(agent)
	metrics.watchDomains(manager)
	metrics.watchHost(agent)
	service, err := csi.New(csi.Config{
		DriverName: o.driverName, Version: version, NodeID: o.nodeID,
		Manager: manager, Node: agent, Metrics: metrics.registry, Tracer: tracer,
	})
	if err != nil {
		return err
	}
	agent.Start(ctx)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return agent.Guard(ctx) })
	ready := &atomic.Bool{}
	if metricsSocket != nil {
		group.Go(func() error {
			return admin.Serve(ctx, metricsSocket, metrics.handler(ready, domainsOf(manager)), adminGrace)
		})
		klog.FromContext(ctx).Info("Serving metrics and health", "address", metricsSocket.Addr().String())
	}
	if err := agent.Clean(ctx); err != nil {
		group.Go(func() error { return err }) // ends the others
		return group.Wait()
	}
	opening := &openers{manager: manager, open: here(storages{registry: registry, node: o.nodeID, watch: remote.Silence, local: host.NewLocal(host.Exec{}), started: metrics.engineStarted})}
	// The manager closes when nobody asks it any more, and nothing is being opened.
	stopped := func(err error) error {
		opening.wait()
		return errors.Join(err, manager.Close())
	}
	if err := opening.start(ctx, entries, o.nodeID); err != nil {
		group.Go(func() error { return err }) // ends the others
		return stopped(group.Wait())
	}
	var following sync.Mutex
	inForce := entries
	follow.apply = func(ctx context.Context, want []domain.Entry) (err error) {
		following.Lock()
		defer following.Unlock()
		d := compare(inForce, want)
		inForce, err = d.keep(want, manager.AttachedIn)
		for _, e := range d.removed {
			opening.remove(ctx, e.Name, func() {
				following.Lock()
				defer following.Unlock()
				if len(opening.nodesOf(e.Name)) == 0 { // else it is back already
					manager.Forget(e.Name)
				}
			})
		}
		for _, e := range append(d.changed, d.added...) {
			opening.one(ctx, e, o.nodeID, nil, nil)
		}
		return err
	}
	group.Go(func() error {
		follow.run(ctx, entries)
		return nil
	})
	group.Go(func() error { return service.Serve(ctx, o.csi.String()) })
	about := admin.Version{
		Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Node: o.nodeID, Installation: o.installation, Driver: cmp.Or(o.driverName, csi.DriverName),
	}
	group.Go(func() error { return operators.serve(ctx, admin.Handler(manager, about, nil)) })
	ready.Store(true)
	klog.FromContext(ctx).Info("Started", "version", version, "node", o.nodeID, "installation", o.installation,
		"endpoint", o.csi.String(), "adminEndpoint", o.admin, "domains", len(entries))
	err = stopped(group.Wait())
	klog.FromContext(ctx).Info("Stopped")
	return err
}
