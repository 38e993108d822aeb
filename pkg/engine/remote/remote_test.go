package remote_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/engine/serve"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// fake is an engine that does what the test says. That real ones work over a socket
// is what enginetest checks, on each.
type fake struct {
	engine.Engine // what a test does not need
	mu            sync.Mutex
	tags          []engine.Tag
	closed        int
	create        func(ctx context.Context, spec engine.SlabSpec) error
}

func (f *fake) CreateSlab(ctx context.Context, spec engine.SlabSpec) error {
	return f.create(ctx, spec)
}

func (f *fake) ListTags(context.Context, string) ([]engine.Tag, error) { return f.tags, nil }

func (f *fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed++
	return nil
}

// process is a served engine that can be ended and started again.
type process struct {
	t      *testing.T
	path   string
	open   func(params map[string]string) (engine.Engine, error)
	cancel context.CancelFunc
	ended  chan error
}

func newProcess(t *testing.T, open func(params map[string]string) (engine.Engine, error)) *process {
	p := &process{t: t, path: filepath.Join(t.TempDir(), "s"), open: open}
	p.start()
	t.Cleanup(p.end)
	return p
}

func (p *process) start() {
	l, err := net.Listen("unix", p.path)
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel, p.ended = cancel, make(chan error, 1)
	s := serve.New(serve.Config{Engine: "fake", Release: "7", Open: func(_ context.Context, params, _ map[string]string) (engine.Engine, error) { return p.open(params) }})
	go func() { p.ended <- s.Serve(ctx, l) }()
}

func (p *process) end() {
	if p.cancel == nil {
		return
	}
	p.cancel()
	if err := <-p.ended; err != nil {
		p.t.Error(err)
	}
	p.cancel = nil
}

func (p *process) client(name string, params map[string]string) *remote.Engine {
	p.t.Helper()
	e, err := remote.Open(p.t.Context(), remote.Config{Dial: remote.Socket(p.path), Client: name, Params: params, Secrets: map[string]string{"s": "x"}})
	if err != nil {
		p.t.Fatal(err)
	}
	return e
}

func slab() engine.SlabSpec { return engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 4096} }

func TestARestartedProcessIsOpenedAgain(t *testing.T) {
	opened := 0
	p := newProcess(t, func(map[string]string) (engine.Engine, error) {
		opened++
		return &fake{create: func(context.Context, engine.SlabSpec) error { return nil }}, nil
	})
	e := p.client("c", nil)
	if e.About() != "fake 7" {
		t.Errorf("about %q", e.About())
	}
	for range 3 {
		if err := e.CreateSlab(t.Context(), slab()); err != nil {
			t.Fatal(err)
		}
	}
	p.end()
	if err := e.CreateSlab(t.Context(), slab()); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("while it is away: %v", err)
	}
	p.start()
	var wg sync.WaitGroup // many callers find it gone
	for range 20 {
		wg.Go(func() {
			for {
				err := e.CreateSlab(t.Context(), slab())
				if err == nil {
					return
				}
				if !errors.Is(err, fault.Unavailable) {
					t.Errorf("after the restart: %v", err)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	if opened != 2 {
		t.Errorf("opened %d times, want once in each life", opened)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpeningAgainIsTheSameUnlessTheParametersAreOthers(t *testing.T) {
	var all []*fake
	p := newProcess(t, func(map[string]string) (engine.Engine, error) {
		all = append(all, &fake{})
		return all[len(all)-1], nil
	})
	a := p.client("a", map[string]string{"k": "1"})
	p.client("a", map[string]string{"k": "1"}) // a restarted client
	if len(all) != 1 {
		t.Fatalf("%d engines for one client", len(all))
	}
	p.client("b", map[string]string{"k": "1"})
	p.client("a", map[string]string{"k": "2"})
	if len(all) != 3 || all[0].closed != 1 || all[1].closed+all[2].closed != 0 {
		t.Errorf("%d engines, closed %d times", len(all), all[0].closed)
	}
	if _, err := a.ListTags(t.Context(), ""); !errors.Is(err, fault.Unavailable) {
		t.Errorf("the first one, closed: %v", err)
	}
	p.end()
	for i, f := range all {
		if f.closed != 1 {
			t.Errorf("engine %d was closed %d times", i, f.closed)
		}
	}
}

func TestErrorsKeepTheirKindAndText(t *testing.T) {
	var next error
	p := newProcess(t, func(map[string]string) (engine.Engine, error) {
		return &fake{create: func(context.Context, engine.SlabSpec) error { return next }}, nil
	})
	e := p.client("c", nil)
	for _, kind := range []fault.Kind{fault.Invalid, fault.NotFound, fault.Exists, fault.InUse, fault.Pending, fault.Conflict, fault.Exhausted, fault.OutOfRange,
		fault.Unsupported, fault.Unavailable, fault.Permission, fault.Corrupt, fault.Internal} {
		next = fault.New(kind, "it is so \xff")
		err := e.CreateSlab(t.Context(), slab())
		if !errors.Is(err, kind) || !strings.Contains(err.Error(), "it is so") {
			t.Errorf("%v became %v: %v", kind, fault.KindOf(err), err)
		}
	}
	next = nil
	if err := e.CreateSlab(t.Context(), slab()); err != nil {
		t.Error(err)
	}
}

func TestADeadlineAndACancellationReachTheEngine(t *testing.T) {
	seen := make(chan error, 1)
	p := newProcess(t, func(map[string]string) (engine.Engine, error) {
		return &fake{create: func(ctx context.Context, _ engine.SlabSpec) error {
			<-ctx.Done()
			seen <- ctx.Err()
			return ctx.Err()
		}}, nil
	})
	e := p.client("c", nil)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := e.CreateSlab(ctx, slab()); !errors.Is(err, fault.Deadline) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	if err := <-seen; err == nil {
		t.Error("the engine saw no end")
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if err := e.CreateSlab(ctx, slab()); !errors.Is(err, fault.Canceled) {
		t.Errorf("cancellation: %v", err)
	}
	if err := <-seen; !errors.Is(err, context.Canceled) {
		t.Errorf("the engine saw %v", err)
	}
}

func TestALongListingComesWhole(t *testing.T) {
	f := &fake{}
	for i := range 20_000 { // 20 MB, in messages of 1 MB
		f.tags = append(f.tags, engine.Tag{Name: fmt.Sprintf("t.%d", i), Slab: strings.Repeat("s", engine.MaxName), Record: slices.Repeat([]byte{byte(i)}, engine.MaxRecord)})
	}
	f.tags[7].Record = []byte{}
	f.tags[8].Slab, f.tags[8].Record = "", nil
	p := newProcess(t, func(map[string]string) (engine.Engine, error) { return f, nil })
	tags, err := p.client("c", nil).ListTags(t.Context(), "")
	if err != nil || !reflect.DeepEqual(tags, f.tags) {
		t.Errorf("%d of %d tags, %v", len(tags), len(f.tags), err)
	}
}

// liar breaks the protocol as the test says.
type liar struct {
	enginepb.UnimplementedEngineServer
	open     *enginepb.OpenResponse
	describe *enginepb.DescribeResponse
	slabs    []*enginepb.Slab
	tags     []*enginepb.Tag
	path     string
	attached *enginepb.AttachSlabRequest
}

func (l *liar) Open(context.Context, *enginepb.OpenRequest) (*enginepb.OpenResponse, error) {
	return l.open, nil
}

func (l *liar) Describe(context.Context, *enginepb.DescribeRequest) (*enginepb.DescribeResponse, error) {
	return l.describe, nil
}

func (l *liar) ListSlabs(_ *enginepb.ListSlabsRequest, s grpc.ServerStreamingServer[enginepb.ListSlabsResponse]) error {
	return s.Send(&enginepb.ListSlabsResponse{Slabs: l.slabs})
}

func (l *liar) ListTags(_ *enginepb.ListTagsRequest, s grpc.ServerStreamingServer[enginepb.ListTagsResponse]) error {
	return s.Send(&enginepb.ListTagsResponse{Tags: l.tags})
}

func (l *liar) AttachSlab(_ context.Context, r *enginepb.AttachSlabRequest) (*enginepb.AttachSlabResponse, error) {
	l.attached = r
	return &enginepb.AttachSlabResponse{Path: l.path}, nil
}

func TestWhatAnEngineAnswersIsChecked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	lie := &liar{open: &enginepb.OpenResponse{}, describe: &enginepb.DescribeResponse{Kinds: []enginepb.Kind{enginepb.Kind_KIND_BLOCK}, Granularity: 1000}}
	g := grpc.NewServer()
	enginepb.RegisterEngineServer(g, lie)
	go func() { _ = g.Serve(l) }()
	defer g.Stop()
	open := func() (*remote.Engine, error) {
		return remote.Open(t.Context(), remote.Config{Dial: remote.Socket(path), Client: "c"})
	}
	if _, err := open(); !errors.Is(err, fault.Internal) || !strings.Contains(err.Error(), `answered Open with version 0 and domain ""`) {
		t.Errorf("open: %v", err)
	}
	lie.open = &enginepb.OpenResponse{Version: 1, Domain: "d", Capabilities: []string{"meter", "telepathy"}}
	e, err := open()
	if err != nil {
		t.Fatal(err)
	}
	if have := engine.Discover(e).List(); !slices.Equal(have, []engine.Capability{engine.CapMeter}) {
		t.Errorf("capabilities %v", have)
	}
	ctx := t.Context()
	check := func(what, want string, err error) {
		t.Helper()
		if !errors.Is(err, fault.Internal) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	_, err = e.Describe(ctx)
	check("describe", "granularity 1000", err)
	for _, s := range []*enginepb.Slab{{Id: "../x", Kind: enginepb.Kind_KIND_BLOCK}, {Id: "x"}, {Id: "x", Kind: enginepb.Kind_KIND_TREE, Size: -1}} {
		lie.slabs = []*enginepb.Slab{s}
		_, err = e.ListSlabs(ctx)
		check("slabs", "answered ListSlabs with a slab", err)
	}
	for _, tag := range []*enginepb.Tag{{Name: "A"}, {Name: "a", Slab: "/"}, {Name: "a", Record: make([]byte, engine.MaxRecord+1)}} {
		lie.tags = []*enginepb.Tag{tag}
		_, err = e.ListTags(ctx, "")
		check("tags", "answered ListTags with a tag that cannot be", err)
	}
	lie.path = "tmp/x"
	_, err = e.AttachSlab(ctx, "a", engine.AttachOptions{})
	check("path", `path "tmp/x", which is not absolute`, err)

	// Mount options are not sent to one that does not say that it knows of them.
	lie.path, lie.attached, lie.describe.Granularity = "/x", nil, 4096
	with := engine.AttachOptions{MountOptions: []string{"password=geheim"}}
	if _, err = e.AttachSlab(ctx, "a", with); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), `"password"`) || strings.Contains(err.Error(), "geheim") || lie.attached != nil {
		t.Errorf("mount options that are not known: %v, sent %v", err, lie.attached)
	}
	lie.describe.MountOptions = true
	if _, err = e.AttachSlab(ctx, "a", with); err != nil || !slices.Equal(lie.attached.GetMountOptions(), with.MountOptions) {
		t.Errorf("mount options: %v, sent %v", err, lie.attached)
	}

	// A message that is too large is gRPC's own limit, and not a full storage.
	for i := range 5000 {
		lie.tags = append(lie.tags, &enginepb.Tag{Name: fmt.Sprintf("a%d", i), Record: make([]byte, 1024)})
	}
	if _, err = e.ListTags(ctx, ""); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "larger than max") {
		t.Errorf("a huge message: %v", err)
	}
	if err := e.DeleteSlab(ctx, "a"); !errors.Is(err, fault.Unsupported) {
		t.Errorf("a missing method: %v", err)
	}
	if _, err := e.DomainUsage(ctx); !errors.Is(err, fault.Unsupported) {
		t.Errorf("a missing service: %v", err)
	}
}

func TestABadRequestIsRefusedWithoutAsking(t *testing.T) {
	p := newProcess(t, func(map[string]string) (engine.Engine, error) { return &fake{}, nil })
	e := p.client("c", nil)
	p.end()
	ctx, bad := t.Context(), "x\xff"
	for what, err := range map[string]error{
		"create": e.CreateSlab(ctx, engine.SlabSpec{ID: bad, Kind: engine.Block, Size: 1}),
		"kind":   e.CreateSlab(ctx, engine.SlabSpec{ID: "x", Kind: "x", Size: 1}),
		"delete": e.DeleteSlab(ctx, bad),
		"tag":    e.CreateTag(ctx, engine.Tag{Name: bad}),
		"resize": e.ResizeSlab(ctx, bad, 1),
		"group":  e.SnapshotSlabs(ctx, []string{bad}, []engine.SlabSpec{slab()}),
	} {
		if !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
