package enginetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginepb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
)

// Protocol is what RunProtocol needs to know of an engine behind a socket.
type Protocol struct {
	// Dial connects to the engine's process.
	Dial func(ctx context.Context) (net.Conn, error)
	// Params of a new, empty domain, for each call.
	Params  func(t testing.TB) map[string]string
	Secrets map[string]string
}

// RunProtocol checks what Quarry's own client never asks, or relies on behind the contract's back:
// versions, who has a domain open, requests that break the rules, long listings. Run checks the rest.
func RunProtocol(t *testing.T, p Protocol) {
	v := reflect.ValueOf(p)
	for i := range v.NumMethod() {
		if name, ok := strings.CutPrefix(v.Type().Method(i).Name, "Test"); ok {
			t.Run(name, v.Method(i).Interface().(func(*testing.T)))
		}
	}
}

// client speaks the protocol as it stands.
type client struct {
	enginepb.EngineClient
	conn    *grpc.ClientConn
	request *enginepb.OpenRequest
	opened  *enginepb.OpenResponse
}

// connect makes a connection, and the request that opens a new domain.
func (p Protocol) connect(t *testing.T) *client {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///engine", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.Dial(ctx) }))
	ok(t, err)
	t.Cleanup(func() { ok(t, conn.Close()) })
	return &client{EngineClient: enginepb.NewEngineClient(conn), conn: conn,
		request: &enginepb.OpenRequest{Versions: []uint32{enginepb.Version}, Client: "protocol", Params: p.Params(t), Secrets: p.Secrets}}
}

// open opens a new domain, which is closed when the test ends.
func (p Protocol) open(t *testing.T) *client {
	t.Helper()
	c := p.connect(t)
	c.opened = c.again(t, c.request)
	return c
}

func (c *client) again(t *testing.T, r *enginepb.OpenRequest) *enginepb.OpenResponse {
	t.Helper()
	opened, err := c.Open(t.Context(), r)
	ok(t, rpcfault.FromStatus(err))
	t.Cleanup(func() {
		_, err := c.Close(context.WithoutCancel(t.Context()), &enginepb.CloseRequest{Domain: opened.GetDomain()})
		ok(t, rpcfault.FromStatus(err))
	})
	return opened
}

func (c *client) tag(ctx context.Context, domain, name string) error {
	_, err := c.CreateTag(ctx, &enginepb.CreateTagRequest{Domain: domain, Tag: &enginepb.Tag{Name: name}})
	return rpcfault.FromStatus(err)
}

// tags lists names.
func (c *client) tags(ctx context.Context, domain string) ([]string, error) {
	stream, err := c.ListTags(ctx, &enginepb.ListTagsRequest{Domain: domain})
	names := []string{}
	for err == nil {
		var r *enginepb.ListTagsResponse
		r, err = stream.Recv()
		for _, tag := range r.GetTags() {
			names = append(names, tag.GetName())
		}
	}
	slices.Sort(names)
	if errors.Is(err, io.EOF) {
		return names, nil
	}
	return nil, rpcfault.FromStatus(err)
}

// verbs are all calls of the must-have part, about one domain and one name.
func (c *client) verbs(ctx context.Context, domain, name string) map[string]error {
	spec := &enginepb.SlabSpec{Id: name, Kind: enginepb.Kind_KIND_BLOCK, Size: mib}
	errs := map[string]error{}
	for verb, do := range map[string]func() error{
		"CreateSlab": func() error {
			_, err := c.CreateSlab(ctx, &enginepb.CreateSlabRequest{Domain: domain, Spec: spec})
			return err
		},
		"ResizeSlab": func() error {
			_, err := c.ResizeSlab(ctx, &enginepb.ResizeSlabRequest{Domain: domain, Id: name, Size: mib})
			return err
		},
		"DeleteSlab": func() error {
			_, err := c.DeleteSlab(ctx, &enginepb.DeleteSlabRequest{Domain: domain, Id: name})
			return err
		},
		"AttachSlab": func() error {
			_, err := c.AttachSlab(ctx, &enginepb.AttachSlabRequest{Domain: domain, Id: name})
			return err
		},
		"DetachSlab": func() error {
			_, err := c.DetachSlab(ctx, &enginepb.DetachSlabRequest{Domain: domain, Id: name})
			return err
		},
		"CreateTag": func() error {
			_, err := c.CreateTag(ctx, &enginepb.CreateTagRequest{Domain: domain, Tag: &enginepb.Tag{Name: name}})
			return err
		},
		"DeleteTag": func() error {
			_, err := c.DeleteTag(ctx, &enginepb.DeleteTagRequest{Domain: domain, Name: name})
			return err
		},
	} {
		errs[verb] = rpcfault.FromStatus(do())
	}
	return errs
}

// TestVersionsAreAgreedOn checks that the engine takes one that it speaks, and no other.
func (p Protocol) TestVersionsAreAgreedOn(t *testing.T) {
	c := p.connect(t)
	for _, versions := range [][]uint32{nil, {enginepb.Version + 98}} {
		_, err := c.Open(t.Context(), &enginepb.OpenRequest{Versions: versions, Client: "protocol", Params: c.request.Params, Secrets: p.Secrets})
		fails(t, rpcfault.FromStatus(err), fault.Unsupported)
	}
	c.request.Versions = []uint32{enginepb.Version + 98, enginepb.Version}
	r := c.again(t, c.request)
	if r.GetVersion() != enginepb.Version || r.GetDomain() == "" || r.GetEngine() == "" {
		t.Errorf("opened as version %d, domain %q, engine %q: version %d, a name for the domain and the type of storage were expected", r.GetVersion(), r.GetDomain(), r.GetEngine(), enginepb.Version)
	}
}

// TestOpeningIsRefusedWithAReason checks that an engine does not guess what was meant.
func (p Protocol) TestOpeningIsRefusedWithAReason(t *testing.T) {
	c := p.connect(t)
	_, err := c.Open(t.Context(), &enginepb.OpenRequest{Versions: []uint32{enginepb.Version}, Params: c.request.Params, Secrets: p.Secrets})
	fails(t, rpcfault.FromStatus(err), fault.Invalid) // no client
	params := map[string]string{"no-engine-has-this": "1"}
	for name, value := range c.request.Params {
		params[name] = value
	}
	_, err = c.Open(t.Context(), &enginepb.OpenRequest{Versions: []uint32{enginepb.Version}, Client: "protocol", Params: params, Secrets: p.Secrets})
	err = rpcfault.FromStatus(err)
	fails(t, err, fault.Invalid)
	if !strings.Contains(err.Error(), "no-engine-has-this") {
		t.Errorf("it does not say which parameter is unknown: %v", err)
	}
}

// TestADomainIsOpenForEachClient checks that the same client finds it open, and that one's closing is not another's.
func (p Protocol) TestADomainIsOpenForEachClient(t *testing.T) {
	c := p.open(t)
	ctx := t.Context()
	ok(t, c.tag(ctx, c.opened.GetDomain(), "one"))
	same := c.again(t, c.request)
	ok(t, c.tag(ctx, same.GetDomain(), "two"))
	c.request.Client = "another"
	other := c.again(t, c.request)
	ok(t, c.tag(ctx, other.GetDomain(), "three"))
	for range 2 {
		_, err := c.Close(ctx, &enginepb.CloseRequest{Domain: same.GetDomain()})
		ok(t, rpcfault.FromStatus(err))
	}
	fails(t, c.tag(ctx, same.GetDomain(), "four"), fault.Unavailable)
	have, err := c.tags(ctx, other.GetDomain())
	ok(t, err)
	if want := []string{"one", "three", "two"}; !slices.Equal(have, want) {
		t.Errorf("tags %v, want %v", have, want)
	}
}

// TestADomainThatIsNotOpenIsUnavailable checks what makes Quarry open it again.
func (p Protocol) TestADomainThatIsNotOpenIsUnavailable(t *testing.T) {
	c := p.open(t)
	for _, domain := range []string{"", "no-such-domain", c.opened.GetDomain() + "x"} {
		errs := c.verbs(t.Context(), domain, "a")
		_, errs["Describe"] = c.Describe(t.Context(), &enginepb.DescribeRequest{Domain: domain})
		_, errs["ListTags"] = c.tags(t.Context(), domain)
		for verb, err := range errs {
			if err = rpcfault.FromStatus(err); fault.KindOf(err) != fault.Unavailable {
				t.Errorf("%s in domain %q, which is not open: %v (%v), want %v", verb, domain, err, fault.KindOf(err), fault.Unavailable)
			}
		}
	}
}

// TestBadRequestsAreRefused checks that an engine does not trust who asks.
func (p Protocol) TestBadRequestsAreRefused(t *testing.T) {
	c := p.open(t)
	ctx, domain := t.Context(), c.opened.GetDomain()
	refused := func(what string, err error) {
		t.Helper()
		if fault.KindOf(err) != fault.Invalid || err == nil {
			t.Errorf("%s: %v (%v), want %v", what, err, fault.KindOf(err), fault.Invalid)
		}
	}
	for _, name := range []string{"", ".", "..", ".a", "-a", "A", "a/b", "/", "../a", "a/../b", "a b", "a\x00", "a\n", "ä", "a*", strings.Repeat("x", engine.MaxName+1)} {
		for verb, err := range c.verbs(ctx, domain, name) {
			refused(fmt.Sprintf("%s of %.40q", verb, name), err)
		}
		if name != "" {
			_, err := c.CreateTag(ctx, &enginepb.CreateTagRequest{Domain: domain, Tag: &enginepb.Tag{Name: "good", Slab: name}})
			refused(fmt.Sprintf("a tag of slab %.40q", name), rpcfault.FromStatus(err))
		}
	}
	slab := func(kind enginepb.Kind, size int64, params map[string]string) error {
		_, err := c.CreateSlab(ctx, &enginepb.CreateSlabRequest{Domain: domain, Spec: &enginepb.SlabSpec{Id: "a", Kind: kind, Size: size, Params: params}})
		return rpcfault.FromStatus(err)
	}
	refused("no kind", slab(enginepb.Kind_KIND_UNSPECIFIED, mib, nil))
	refused("a kind of tomorrow", slab(99, mib, nil))
	d, err := c.Describe(ctx, &enginepb.DescribeRequest{Domain: domain})
	ok(t, rpcfault.FromStatus(err))
	for _, kind := range d.GetKinds() {
		for _, size := range []int64{0, -1, -1 << 63} {
			refused(fmt.Sprintf("a %v of size %d", kind, size), slab(kind, size, nil))
		}
		refused("an unknown parameter", slab(kind, mib, map[string]string{"no-engine-has-this": "1"}))
	}
	_, err = c.CreateSlab(ctx, &enginepb.CreateSlabRequest{Domain: domain})
	refused("no spec", rpcfault.FromStatus(err))
	_, err = c.CreateTag(ctx, &enginepb.CreateTagRequest{Domain: domain})
	refused("no tag", rpcfault.FromStatus(err))
	_, err = c.CreateTag(ctx, &enginepb.CreateTagRequest{Domain: domain, Tag: &enginepb.Tag{Name: "a", Record: make([]byte, engine.MaxRecord+1)}})
	refused("a record that is too long", rpcfault.FromStatus(err))
	have, err := c.tags(ctx, domain)
	ok(t, err)
	same(t, "tags", have, nil)
	stream, err := c.ListSlabs(ctx, &enginepb.ListSlabsRequest{Domain: domain})
	ok(t, rpcfault.FromStatus(err))
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		ok(t, rpcfault.FromStatus(err))
		if len(r.GetSlabs()) > 0 {
			t.Errorf("slabs were made: %v", r.GetSlabs())
		}
	}
}

// TestWhatIsNotDeclaredIsUnimplemented checks just that: a capability's service may be there all the same, as
// one process has domains that differ.
func (p Protocol) TestWhatIsNotDeclaredIsUnimplemented(t *testing.T) {
	c := p.open(t)
	ctx, domain := t.Context(), c.opened.GetDomain()
	spec := &enginepb.SlabSpec{Id: "b", Kind: enginepb.Kind_KIND_BLOCK, Size: mib}
	for capability, call := range map[engine.Capability]func() error{
		engine.CapSnapshot: func() error {
			_, err := enginepb.NewSnapshotterClient(c.conn).SnapshotSlab(ctx, &enginepb.SnapshotSlabRequest{Domain: domain, Source: "a", Spec: spec})
			return err
		},
		engine.CapClone: func() error {
			_, err := enginepb.NewClonerClient(c.conn).CloneSlab(ctx, &enginepb.CloneSlabRequest{Domain: domain, Source: "a", Spec: spec})
			return err
		},
		engine.CapMeter: func() error {
			_, err := enginepb.NewMeterClient(c.conn).DomainUsage(ctx, &enginepb.DomainUsageRequest{Domain: domain})
			return err
		},
		engine.CapQuota: func() error {
			_, err := enginepb.NewQuotaClient(c.conn).SetQuota(ctx, &enginepb.SetQuotaRequest{Domain: domain, Id: "a", Size: mib})
			return err
		},
		engine.CapFence: func() error {
			_, err := enginepb.NewFencerClient(c.conn).Fence(ctx, &enginepb.FenceRequest{Domain: domain, Node: "n", Slab: "a"})
			return err
		},
		engine.CapImport: func() error {
			_, err := enginepb.NewImporterClient(c.conn).Importable(ctx, &enginepb.ImportableRequest{Domain: domain, Source: "a"})
			return err
		},
	} {
		if slices.Contains(c.opened.GetCapabilities(), string(capability)) {
			continue
		}
		if err := rpcfault.FromStatus(call()); fault.KindOf(err) != fault.Unsupported || err == nil {
			t.Errorf("%s, which is not declared: %v (%v), want %v", capability, err, fault.KindOf(err), fault.Unsupported)
		}
	}
}

// TestALongListingComesInSeveralMessages checks that none of them is larger than 4 MiB, gRPC's own limit.
func (p Protocol) TestALongListingComesInSeveralMessages(t *testing.T) {
	c := p.open(t)
	const tags = 4100 // of more than 1 KiB each
	slab, record := strings.Repeat("s", engine.MaxName), make([]byte, engine.MaxRecord)
	var g errgroup.Group
	g.SetLimit(16)
	for i := range tags {
		g.Go(func() error {
			name := fmt.Sprintf("t.%04d.", i)
			name += strings.Repeat("n", engine.MaxName-len(name))
			_, err := c.CreateTag(t.Context(), &enginepb.CreateTagRequest{Domain: c.opened.GetDomain(), Tag: &enginepb.Tag{Name: name, Slab: slab, Record: record}})
			return rpcfault.FromStatus(err)
		})
	}
	ok(t, g.Wait())
	have, err := c.tags(t.Context(), c.opened.GetDomain())
	ok(t, err)
	if len(have) != tags {
		t.Errorf("%d of %d tags", len(have), tags)
	}
}

// TestHealthIsAnswered checks that it is, or is not known: silence is what Quarry takes for a process that hangs.
func (p Protocol) TestHealthIsAnswered(t *testing.T) {
	c := p.open(t)
	r, err := grpc_health_v1.NewHealthClient(c.conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err = rpcfault.FromStatus(err); errors.Is(err, fault.Unsupported) {
		return
	}
	ok(t, err)
	if r.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("status %v", r.GetStatus())
	}
}
