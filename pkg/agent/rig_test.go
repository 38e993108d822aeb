package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
	"github.com/quarry-csi/quarry/pkg/node"
)

// patience is how long a state is waited for: far beyond what it takes.
const patience = time.Minute

// rig is a controller: an Image Manager whose engines and work are on nodes.
type rig struct {
	t       *testing.T
	ctx     context.Context
	tls     *tls.Config // for agents
	address string
	hub     *agent.Hub
	manager *image.Manager
	dirs    map[string]string // domain: directory
	stop    func()

	lost   time.Duration    // agent.HubConfig.Lost
	copies *copies          // on all nodes, of whatever controller
	rates  map[string]int64 // node: backgroundRate of its own domain

	mu     sync.Mutex
	tokens map[string]string // token: node
	admits int
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, ctx: t.Context(), dirs: map[string]string{"a": t.TempDir(), "b": t.TempDir()}, tokens: map[string]string{}, copies: &copies{now: map[string]int{}}}
	serverTLS, clientTLS := certificate(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", serverTLS)
	r.must(err)
	r.tls, r.address = clientTLS, l.Addr().String()
	r.control(l)
	t.Cleanup(func() { r.stop() })
	return r
}

// restart is a controller in place of one that has not begun, with another Lost.
func (r *rig) restart(lost time.Duration) {
	r.t.Helper()
	r.stop()
	serverTLS, clientTLS := certificate(r.t)
	l, err := tls.Listen("tcp", r.address, serverTLS)
	r.must(err)
	r.tls, r.lost = clientTLS, lost
	r.control(l)
}

// control begins a controller's life on a listener.
func (r *rig) control(l net.Listener) {
	r.hub = agent.NewHub(agent.HubConfig{Release: "test", Admit: r.admit, Lost: r.lost})
	r.manager = image.New(image.Config{Installation: "test", Agents: r.hub, Worker: r.hub, BindNodes: true, CollectEvery: -1})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	hub, manager := r.hub, r.manager
	go func() { ended <- hub.Serve(ctx, l, manager) }()
	r.stop = sync.OnceFunc(func() {
		err := manager.Close()
		cancel()
		if err := errors.Join(err, <-ended, hub.Close()); err != nil {
			r.t.Error(err)
		}
	})
}

func (r *rig) admit(_ context.Context, token, node string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.admits++
	if r.tokens[token] != node {
		return fault.New(fault.Permission, "the token is not that of node %s", node)
	}
	return nil
}

func (r *rig) asked() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.admits
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) is(err error, kind fault.Kind) {
	r.t.Helper()
	if !errors.Is(err, kind) {
		r.t.Fatalf("%v, want %v", err, kind)
	}
}

func (r *rig) wait(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("waited for %s", what)
		}
	}
}

// copies counts the work on slabs that runs.
type copies struct {
	mu    sync.Mutex
	now   map[string]int // by path
	most  int            // at the same time on one
	stuck atomic.Int32
}

func (c *copies) begin(path string) (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now[path]++
	c.most = max(c.most, c.now[path])
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.now[path]--; c.now[path] == 0 {
			delete(c.now, path)
		}
	}
}

func (c *copies) running() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.now)
}

func (c *copies) atOnce() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.most
}

// wait is what hangs, and hears of nothing.
func (p pausing) wait() {
	p.w.copies.stuck.Add(1)
	defer p.w.copies.stuck.Add(-1)
	<-p.w.stuck
}

func (p pausing) Zero(ctx context.Context, path string, from, to int64) error {
	defer p.w.copies.begin(path)()
	if p.w.stuck != nil {
		p.wait()
	}
	return p.Files.Zero(ctx, path, from, to)
}

// worker is an agent.
type worker struct {
	r    *rig // its controller
	name string
	link *agent.Link
	node *node.Node
	mu   sync.Mutex
	conn net.Conn
	lost bool // it cannot connect any more
	stop func()
	// slow, if not nil, is waited for before each piece of a copy; stuck also where nobody
	// waits for the copy any more.
	slow, stuck chan struct{}
	copies      *copies
	full        bool    // copies find no space after their first checkpoint
	began       []int64 // where copies from other nodes began
	rates       []int64 // of copies to other nodes, in bytes per second
}

// agent starts one, with a token of its node.
func (r *rig) agent(name string) *worker {
	r.t.Helper()
	return r.agentKnowing(name, "dir")
}

// agentKnowing starts one that knows some types of storage, which are all directories.
func (r *rig) agentKnowing(name string, engines ...string) *worker {
	r.t.Helper()
	token := rand.Text()
	r.mu.Lock()
	r.tokens[token] = name
	r.mu.Unlock()
	w := r.agentOf(name, token, engines...)
	r.wait(name+" to connect", func() bool { _, err := r.hub.Agent(name); return err == nil && w.link.Connected() })
	return w
}

func (r *rig) agentWith(name, token string) *worker {
	r.t.Helper()
	return r.agentOf(name, token, "dir")
}

func (r *rig) agentOf(name, token string, engines ...string) *worker {
	r.t.Helper()
	w := &worker{r: r, name: name, copies: r.copies}
	var err error
	w.link, err = agent.NewLink(agent.LinkConfig{Node: name, Release: "test", Engines: engines, Dial: w.dial, Drain: time.Millisecond,
		Token: func() (string, error) { return token, nil },
		Open: func(ctx context.Context, _ string, params, _ map[string]string) (engine.Engine, error) {
			return dir.Open(ctx, params, host.Exec{})
		}})
	r.must(err)
	agents := &node.Agents{}
	w.node = node.New(node.Config{NodeID: name, Manager: w.link, Engines: w.link.Engine})
	agents.Set(w.node)
	work := &mover.Local{Files: pausing{mover.New(mover.Options{Workers: 1, Buffer: 64 << 10, CheckpointEvery: 256 << 10}), w}, Agents: agents, Engines: w.link.Engine}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.link.Run(ctx, w.node, work) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Error(err)
		}
	})
	r.t.Cleanup(w.stop)
	return w
}

func (w *worker) dial(ctx context.Context) (net.Conn, error) {
	w.mu.Lock()
	lost, tlsConfig, address := w.lost, w.r.tls, w.r.address
	w.mu.Unlock()
	if lost {
		return nil, errors.New("no route")
	}
	conn, err := (&tls.Dialer{Config: tlsConfig}).DialContext(ctx, "tcp", address)
	if !w.link.Connected() { // else it is for data
		w.mu.Lock()
		w.conn = conn
		w.mu.Unlock()
	}
	return conn, err
}

// lose keeps the agent from connecting, from now on or not any more.
func (w *worker) lose(lost bool) {
	w.mu.Lock()
	w.lost = lost
	w.mu.Unlock()
	if lost {
		w.cut()
	}
}

// cut ends the agent's connection, as a network does.
func (w *worker) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.conn.Close()
}

// pausing is a mover whose copies wait at each checkpoint.
type pausing struct {
	mover.Files
	w *worker
}

func (p pausing) CopyBlock(ctx context.Context, src, dst string, o image.BlockCopy) error {
	return p.block(ctx, dst, o, func(o image.BlockCopy) error { return p.Files.CopyBlock(ctx, src, dst, o) })
}

func (p pausing) ReceiveBlock(ctx context.Context, dst string, o image.BlockCopy, from io.Reader) error {
	p.w.mu.Lock()
	p.w.began = append(p.w.began, o.From)
	p.w.mu.Unlock()
	return p.block(ctx, dst, o, func(o image.BlockCopy) error { return p.Files.ReceiveBlock(ctx, dst, o, from) })
}

func (p pausing) SendBlock(ctx context.Context, src string, o image.BlockCopy, to io.Writer) error {
	p.w.mu.Lock()
	p.w.rates = append(p.w.rates, o.Rate)
	p.w.mu.Unlock()
	return p.Files.SendBlock(ctx, src, o, to)
}

func (p pausing) block(ctx context.Context, dst string, o image.BlockCopy, copies func(image.BlockCopy) error) error {
	defer p.w.copies.begin(dst)()
	if seal := o.Checkpoint; seal != nil && (p.w.slow != nil || p.w.stuck != nil) {
		o.Checkpoint = func(offset int64) error {
			if err := seal(offset); err != nil {
				return err
			}
			if p.w.stuck != nil {
				p.wait()
				return ctx.Err()
			}
			select {
			case <-p.w.slow:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	if p.w.full {
		o.Checkpoint = func(int64) error { return fault.New(fault.Exhausted, "no space") }
	}
	return copies(o)
}

// open opens a domain on the nodes.
func (r *rig) open(name, on string) string {
	r.t.Helper()
	return r.openOf(name, on, "dir")
}

// openOf opens a domain of a type of storage.
func (r *rig) openOf(name, on, kind string) string {
	r.t.Helper()
	d, err := r.hub.OpenDomain(r.ctx, agent.DomainSpec{Name: name, Engine: kind, Params: map[string]string{"path": r.dirs[name]}, Node: on})
	r.must(err)
	scope := image.ScopeShared
	if on != "" {
		scope = image.ScopeNode
	}
	id, err := r.manager.AddDomain(r.ctx, image.DomainConfig{Name: name, Engine: kind, Scope: scope, Node: on, Overcommit: 1000}, d)
	r.must(err)
	ids, epoch, err := r.manager.IDs(id)
	r.must(err)
	d.Adopt(r.ctx, epoch, ids...)
	return id
}

func writer() image.Access {
	return image.Access{Block: true, Mode: image.SingleNodeWriter}
}

func (r *rig) volume(name, domain string, size int64) image.Image {
	r.t.Helper()
	img, err := r.manager.CreateVolume(r.ctx, image.CreateRequest{Name: name, Domains: []string{domain}, Accesses: []image.Access{writer()}, Size: size})
	r.must(err)
	return img
}

func (r *rig) slab(domain string, img image.Image) string {
	return filepath.Join(r.dirs[domain], "slabs", img.Slab)
}

// fill writes something everywhere.
func (r *rig) fill(domain string, img image.Image) []byte {
	r.t.Helper()
	b := make([]byte, img.Size)
	_, _ = rand.Read(b)
	f, err := os.OpenFile(r.slab(domain, img), os.O_WRONLY, 0)
	r.must(err)
	_, err = f.WriteAt(b, 0)
	r.must(errors.Join(err, f.Close()))
	return b
}

// certificate makes the controller's, and what agents need to know of it.
func certificate(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "quarry"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, &tls.Config{RootCAs: pool}
}
