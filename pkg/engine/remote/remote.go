// Package remote is an engine that lives in another process and speaks the engine
// protocol (package enginepb). Package serve is the other side for engines in Go.
//
// The other process may be restarted at any time: the domain is opened again when
// there is a new connection. Meanwhile calls fail with fault.Unavailable. What it
// answers is checked, since it may be anybody's code.
package remote

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
)

// Config of an Engine.
type Config struct {
	// Dial connects to the other process. See Socket.
	Dial func(ctx context.Context) (net.Conn, error)
	// Client names whoever opens the domain; it stays the same over restarts, and is
	// another one for whatever else opens domains there.
	Client string
	// Params and Secrets of the domain.
	Params, Secrets map[string]string
	// Engine is the type that the process must be of; "": any, but the same after it was restarted.
	Engine string
	// Watch is how long the process may leave a question about its health unanswered: then the
	// connection is given up, and the next one made. Calls that take no time on any storage get a
	// limit as well. 0: whoever dials sees to all that.
	Watch time.Duration
	// Why, if not nil, is asked after fault.Unavailable what is known of the process; it
	// answers "" or what to add to the error.
	Why func() string
}

// Socket dials a Unix socket.
func Socket(path string) func(ctx context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
}

// Engine is the opened domain. It implements engine.Engine, every capability, and
// engine.Narrower, which says what is really there.
type Engine struct {
	cfg  Config
	conn *grpc.ClientConn
	caps []engine.Capability // as at the first opening

	engine     enginepb.EngineClient
	modifyText map[string]string

	unwatch func() // ends the watch, and waits for that

	mu     sync.Mutex
	last   net.Conn      // the connection made last
	sick   error         // not nil while the process says that it does not serve
	dials  int           // connections made
	opened int           // the one at which the domain was opened last
	id     string        // what Open answered
	busy   chan struct{} // not nil while it is opened again; closed afterwards
	about  string        // the engine's type and version
	kind   string        // the engine's type
}

var (
	_ engine.Engine           = (*Engine)(nil)
	_ engine.Narrower         = (*Engine)(nil)
	_ engine.Snapshotter      = (*Engine)(nil)
	_ engine.Cloner           = (*Engine)(nil)
	_ engine.Copier           = (*Engine)(nil)
	_ engine.Meter            = (*Engine)(nil)
	_ engine.Quota            = (*Engine)(nil)
	_ engine.Differ           = (*Engine)(nil)
	_ engine.Fencer           = (*Engine)(nil)
	_ engine.GroupSnapshotter = (*Engine)(nil)
	_ engine.Modifier         = (*Engine)(nil)
	_ engine.Importer         = (*Engine)(nil)
)

// reconnect is how soon a lost connection is tried again: a process that was
// restarted is there within a second or so.
const reconnectFirst, reconnectLast = 100 * time.Millisecond, 5 * time.Second

// Open opens a domain. The errors are those of the engine; fault.Unavailable: the
// process cannot be reached.
func Open(ctx context.Context, cfg Config) (*Engine, error) {
	e := &Engine{cfg: cfg, unwatch: func() {}}
	patience := reconnectLast
	if cfg.Watch > 0 {
		patience = startLimit
	}
	conn, err := grpc.NewClient("passthrough:///engine", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := cfg.Dial(ctx)
			if err == nil {
				e.mu.Lock()
				e.dials, e.last, e.sick = e.dials+1, c, nil
				e.mu.Unlock()
			}
			return c, err
		}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: reconnectFirst, Multiplier: 2, Jitter: 0.2, MaxDelay: reconnectLast}, MinConnectTimeout: patience}),
		grpc.WithChainUnaryInterceptor(e.limited), grpc.WithIdleTimeout(0), // a domain stays open
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err)
	}
	e.conn, e.engine = conn, enginepb.NewEngineClient(conn)
	r, err := e.again(ctx)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	for _, c := range r.GetCapabilities() {
		e.caps = append(e.caps, engine.Capability(c))
	}
	e.modifyText = r.GetModifyParams()
	if cfg.Watch > 0 {
		e.watch()
	}
	return e, nil
}

// open opens the domain on the connection that there is, or the next one.
func (e *Engine) open(ctx context.Context) (*enginepb.OpenResponse, error) {
	r, err := e.engine.Open(ctx, &enginepb.OpenRequest{Versions: []uint32{enginepb.Version}, Client: e.cfg.Client, Params: e.cfg.Params, Secrets: e.cfg.Secrets})
	if err != nil {
		return nil, e.failed(err)
	}
	if r.GetVersion() != enginepb.Version || r.GetDomain() == "" {
		return nil, garbage("Open", "version %d and domain %q; version %d and a name for the domain were expected", r.GetVersion(), r.GetDomain(), enginepb.Version)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	want := cmp.Or(e.kind, e.cfg.Engine)
	if want != "" && r.GetEngine() != want {
		return nil, fault.New(fault.Invalid, "the engine says that it is %q: %q was expected", r.GetEngine(), want)
	}
	e.id, e.kind, e.about = r.GetDomain(), r.GetEngine(), strings.TrimSpace(r.GetEngine()+" "+r.GetRelease())
	return r, nil
}

// About is the type of the engine and its version, for people.
func (e *Engine) About() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.about
}

// domain is what requests have to name. Where the connection is another one than
// before, the domain is opened again.
func (e *Engine) domain(ctx context.Context) (string, error) {
	for {
		e.mu.Lock()
		if err := e.sick; err != nil {
			e.mu.Unlock()
			return "", err
		}
		// Without a connection the next one is made first: it may be to a process that was
		// restarted, and has nothing open.
		if e.id != "" && e.dials == e.opened && e.conn.GetState() == connectivity.Ready {
			defer e.mu.Unlock()
			return e.id, nil
		}
		if other := e.busy; other != nil {
			e.mu.Unlock()
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return "", fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err())
			}
		}
		mine := make(chan struct{})
		e.busy = mine
		e.mu.Unlock()
		_, err := e.again(ctx)
		e.mu.Lock()
		e.busy = nil
		e.mu.Unlock()
		close(mine)
		if err != nil {
			// Not the kind that Open has: a caller would take it for the call's own, and
			// believe that an earlier attempt, whose reply was lost, had done nothing.
			return "", fault.New(fault.Unavailable, "the domain cannot be opened again: %w", err)
		}
	}
}

// Reconnect lets the next call try the connection at once, since the other side is known
// to be there again.
func (e *Engine) Reconnect() { e.conn.ResetConnectBackoff() }

// Leave ends the connection and leaves the domain open on the other side, for the next
// one who opens it as the same client.
func (e *Engine) Leave() error {
	e.unwatch()
	return e.conn.Close()
}

// again opens the domain until a connection has lasted from before to after it.
func (e *Engine) again(ctx context.Context) (*enginepb.OpenResponse, error) {
	for {
		e.mu.Lock()
		before := e.dials
		e.mu.Unlock()
		r, err := e.open(ctx)
		if err != nil {
			return nil, err
		}
		e.mu.Lock()
		now := e.dials
		e.opened = now
		e.mu.Unlock()
		if now == before || now == 1 { // else it was perhaps opened on the connection before
			return r, nil
		}
	}
}

// failed translates an error of a call. After fault.Unavailable the domain is
// opened again: the process may have lost it.
func (e *Engine) failed(err error) error {
	if err == nil {
		return nil
	}
	err = rpcfault.FromStatus(err)
	if errors.Is(err, fault.Unavailable) {
		e.mu.Lock()
		e.opened = -1
		e.mu.Unlock()
		if e.cfg.Why != nil {
			if why := e.cfg.Why(); why != "" {
				err = fault.New(fault.Unavailable, "%s: %w", why, err)
			}
		}
	}
	return err
}

// garbage is an answer that breaks the protocol. What was done is not known.
func garbage(call, format string, args ...any) error {
	return fault.New(fault.Internal, "the engine answered %s with "+format, append([]any{call}, args...)...)
}

// Supports implements engine.Narrower.
func (e *Engine) Supports(c engine.Capability) bool { return slices.Contains(e.caps, c) }

// closeLimit is how long a process may take to close a domain: it is left alone then.
const closeLimit = 10 * time.Second

// Close implements engine.Engine. A process that has gone needs no goodbye.
func (e *Engine) Close() error {
	e.unwatch()
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	e.mu.Lock()
	id := e.id
	e.mu.Unlock()
	_, err := e.engine.Close(ctx, &enginepb.CloseRequest{Domain: id})
	if err = rpcfault.FromStatus(err); errors.Is(err, fault.Unavailable) {
		err = nil
	}
	return errors.Join(err, e.conn.Close())
}

// Describe implements engine.Engine.
func (e *Engine) Describe(ctx context.Context) (engine.Description, error) {
	id, err := e.domain(ctx)
	if err != nil {
		return engine.Description{}, err
	}
	r, err := e.engine.Describe(ctx, &enginepb.DescribeRequest{Domain: id})
	if err != nil {
		return engine.Description{}, e.failed(err)
	}
	d := r.Go()
	if len(d.Kinds) == 0 || slices.Contains(d.Kinds, "") || d.Granularity < 512 || d.Granularity&(d.Granularity-1) != 0 || d.MaxSlabSize < 0 || d.MaxTags < 0 {
		return engine.Description{}, garbage("Describe", "kinds %q, granularity %d, max_slab_size %d, max_tags %d", d.Kinds, d.Granularity, d.MaxSlabSize, d.MaxTags)
	}
	return d, nil
}

// CreateSlab implements engine.Engine.
func (e *Engine) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	if err := engine.CheckSpec(spec); err != nil {
		return err
	}
	id, err := e.domain(ctx)
	if err != nil {
		return err
	}
	_, err = e.engine.CreateSlab(ctx, &enginepb.CreateSlabRequest{Domain: id, Spec: enginepb.SpecOf(spec)})
	return e.failed(err)
}

// ResizeSlab implements engine.Engine.
func (e *Engine) ResizeSlab(ctx context.Context, slab string, size int64) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	_, err = e.engine.ResizeSlab(ctx, &enginepb.ResizeSlabRequest{Domain: id, Id: slab, Size: size})
	return e.failed(err)
}

// DeleteSlab implements engine.Engine.
func (e *Engine) DeleteSlab(ctx context.Context, slab string) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	_, err = e.engine.DeleteSlab(ctx, &enginepb.DeleteSlabRequest{Domain: id, Id: slab})
	return e.failed(err)
}

// on is domain for a call about a slab, whose ID is checked.
func (e *Engine) on(ctx context.Context, slab string) (string, error) {
	if err := engine.CheckName("slab ID", slab); err != nil {
		return "", err
	}
	return e.domain(ctx)
}

// ListSlabs implements engine.Engine.
func (e *Engine) ListSlabs(ctx context.Context) ([]engine.Slab, error) {
	id, err := e.domain(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := e.limit(ctx, verbLimit)
	defer cancel()
	stream, err := e.engine.ListSlabs(ctx, &enginepb.ListSlabsRequest{Domain: id})
	var out []engine.Slab
	err = drain(e, stream, err, func(r *enginepb.ListSlabsResponse) error {
		for _, s := range r.GetSlabs() {
			slab := engine.Slab{ID: s.GetId(), Kind: s.GetKind().Go(), Size: s.GetSize()}
			if err := engine.CheckName("slab ID", slab.ID); err != nil || slab.Kind == "" || slab.Size < 0 {
				return garbage("ListSlabs", "a slab %q of kind %v and size %d", slab.ID, s.GetKind(), slab.Size)
			}
			out = append(out, slab)
		}
		return nil
	})
	return out, err
}

// CreateTag implements engine.Engine.
func (e *Engine) CreateTag(ctx context.Context, t engine.Tag) error {
	if err := engine.CheckTag(t); err != nil {
		return err
	}
	id, err := e.domain(ctx)
	if err != nil {
		return err
	}
	_, err = e.engine.CreateTag(ctx, &enginepb.CreateTagRequest{Domain: id, Tag: &enginepb.Tag{Name: t.Name, Slab: t.Slab, Record: t.Record}})
	return e.failed(err)
}

// DeleteTag implements engine.Engine.
func (e *Engine) DeleteTag(ctx context.Context, name string) error {
	if err := engine.CheckName("tag name", name); err != nil {
		return err
	}
	id, err := e.domain(ctx)
	if err != nil {
		return err
	}
	_, err = e.engine.DeleteTag(ctx, &enginepb.DeleteTagRequest{Domain: id, Name: name})
	return e.failed(err)
}

// ListTags implements engine.Engine.
func (e *Engine) ListTags(ctx context.Context, prefix string) ([]engine.Tag, error) {
	id, err := e.domain(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := e.limit(ctx, verbLimit)
	defer cancel()
	stream, err := e.engine.ListTags(ctx, &enginepb.ListTagsRequest{Domain: id, Prefix: prefix})
	var out []engine.Tag
	err = drain(e, stream, err, func(r *enginepb.ListTagsResponse) error {
		for _, t := range r.GetTags() {
			tag := engine.Tag{Name: t.GetName(), Slab: t.GetSlab(), Record: t.GetRecord()}
			if tag.Record == nil {
				tag.Record = []byte{}
			}
			if t.GetUnreadable() {
				tag.Slab, tag.Record = "", nil
			}
			if err := engine.CheckTag(tag); err != nil {
				return garbage("ListTags", "a tag that cannot be: %w", err)
			}
			out = append(out, tag)
		}
		return nil
	})
	return out, err
}

// AttachSlab implements engine.Engine.
func (e *Engine) AttachSlab(ctx context.Context, slab string, opts engine.AttachOptions) (engine.Attachment, error) {
	id, err := e.on(ctx, slab)
	if err != nil {
		return engine.Attachment{}, err
	}
	if len(opts.MountOptions) > 0 { // one that does not know the field would take no notice of it
		d, err := e.Describe(ctx)
		if err == nil && !d.MountOptions {
			err = engine.NoMountOptions(opts)
		}
		if err != nil {
			return engine.Attachment{}, err
		}
	}
	r, err := e.engine.AttachSlab(ctx, &enginepb.AttachSlabRequest{Domain: id, Id: slab, ReadOnly: opts.ReadOnly, MountOptions: opts.MountOptions})
	if err != nil {
		return engine.Attachment{}, e.failed(err)
	}
	if !filepath.IsAbs(r.GetPath()) {
		return engine.Attachment{}, garbage("AttachSlab", "path %q, which is not absolute", r.GetPath())
	}
	return engine.Attachment{Path: r.GetPath()}, nil
}

// DetachSlab implements engine.Engine.
func (e *Engine) DetachSlab(ctx context.Context, slab string) error {
	id, err := e.on(ctx, slab)
	if err != nil {
		return err
	}
	_, err = e.engine.DetachSlab(ctx, &enginepb.DetachSlabRequest{Domain: id, Id: slab})
	return e.failed(err)
}

// receiver is a stream of messages.
type receiver[M any] interface{ Recv() (*M, error) }

// drain gives each message of a stream to take; began is the error of beginning it.
func drain[M any](e *Engine, stream receiver[M], began error, take func(*M) error) error {
	if began != nil {
		return e.failed(began)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return e.failed(err)
		}
		if err := take(m); err != nil {
			return err
		}
	}
}
