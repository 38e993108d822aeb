package remote

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
)

const (
	// startLimit is how long a process that was just started may take to answer a connection.
	startLimit = 15 * time.Second
	// openLimit is how long a process that is watched may take to open a domain: it is tried again.
	openLimit = time.Minute
	// verbLimit is for what moves no data. A listing that takes longer has failed by the contract.
	verbLimit = 5 * time.Minute
)

// limit is ctx with a limit, if the process is watched.
func (e *Engine) limit(ctx context.Context, most time.Duration) (context.Context, context.CancelFunc) {
	if e.cfg.Watch == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, most)
}

// slow are the calls that may take as long as it takes to write, copy or free a slab.
func slow() []string {
	return []string{
		enginepb.Engine_CreateSlab_FullMethodName, enginepb.Engine_ResizeSlab_FullMethodName, enginepb.Engine_DeleteSlab_FullMethodName,
		enginepb.Snapshotter_SnapshotSlab_FullMethodName, enginepb.GroupSnapshotter_SnapshotSlabs_FullMethodName, enginepb.Cloner_CloneSlab_FullMethodName,
		enginepb.Importer_ImportSlab_FullMethodName, enginepb.Importer_KeepSlab_FullMethodName,
	}
}

// limited is a grpc.UnaryClientInterceptor.
func (e *Engine) limited(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if !slices.Contains(slow(), method) {
		most := verbLimit
		if method == enginepb.Engine_Open_FullMethodName {
			most = openLimit
		}
		var cancel context.CancelFunc
		ctx, cancel = e.limit(ctx, most)
		defer cancel()
	}
	return call(ctx, method, req, reply, conn, opts...)
}

// watch asks for the process's health until unwatch is called, and opens the domain again
// when there is a new connection, so that a process that has ended is missed before it
// is needed.
func (e *Engine) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	e.unwatch = func() {
		cancel()
		<-ended
	}
	go func() {
		defer close(ended)
		tick := time.NewTicker(e.cfg.Watch / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			e.look(ctx)
		}
	}()
}

// look asks once. A process without the health service is as well as its answer.
func (e *Engine) look(ctx context.Context) {
	limited, cancel := context.WithTimeout(ctx, e.cfg.Watch)
	defer cancel()
	e.mu.Lock()
	asked, dial := e.last, e.dials
	e.mu.Unlock()
	r, err := grpc_health_v1.NewHealthClient(e.conn).Check(limited, &grpc_health_v1.HealthCheckRequest{})
	err = rpcfault.FromStatus(err)
	switch {
	case ctx.Err() != nil:
		return
	case errors.Is(err, fault.Deadline):
		_ = asked.Close() // what waits for its answers fails as fault.Unavailable
		return
	}
	var sick error
	if err == nil && r.GetStatus() == grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		sick = fault.New(fault.Unavailable, "the engine's process says of its health: %s", r.GetStatus())
	}
	e.mu.Lock()
	if dial == e.dials {
		e.sick = sick
	}
	e.mu.Unlock()
	if sick == nil {
		_, _ = e.domain(limited) // whoever needs it next is told why not
	}
}
