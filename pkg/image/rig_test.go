package image_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/mover"
)

// clock is a clock that tests turn.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) turn(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// agents is one fake node "n1" (and "n2"), whose images are in the state that
// the test says. The real agent is tested in package node.
type agents struct {
	mu     sync.Mutex
	state  map[string]image.Frozen
	frozen int
	// freezes counts them all.
	freezes int
	broken  bool   // thaw reports a freeze that did not hold
	away    string // a node whose agent cannot be reached
}

func (a *agents) Agent(node string) (image.Agent, error) {
	if node != "n1" && node != "n2" {
		return nil, fault.New(fault.NotFound, "there is no node %s", node)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if node == a.away {
		return nil, fault.New(fault.Unavailable, "node %s does not answer", node)
	}
	return a, nil
}

func (*agents) Nodes() []string { return []string{"n1", "n2"} }

func (a *agents) Freeze(_ context.Context, h image.Handle, _ time.Duration) (image.Frozen, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.state[h.String()]
	if s == "" {
		s = image.NotStaged
	}
	if s == image.IsFrozen {
		a.frozen++
		a.freezes++
	}
	return s, nil
}

func (a *agents) Thaw(context.Context, image.Handle) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.frozen--
	if a.broken {
		return fault.New(fault.Conflict, "thawed before its time")
	}
	return nil
}

func (a *agents) Staged(_ context.Context, h image.Handle) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state[h.String()] != "" && a.state[h.String()] != image.NotStaged, nil
}

// rig is a manager over real directories.
type rig struct {
	t      testing.TB
	ctx    context.Context
	dirs   map[string]string // domain name: path
	wrap   func(engine.Engine) engine.Engine
	clock  *clock
	agents *agents
	config func(*image.DomainConfig)
	// mapAgents, if not nil, is asked in place of agents.
	mapAgents image.Agents
	// tell is image.Config's; worker, if not nil, is put before the rig's own.
	tell   func(image.Event)
	worker func(image.Worker) image.Worker
	// outOfService is image.Config's.
	outOfService func(ctx context.Context, node string) (bool, error)
	*image.Manager
}

func newRig(t testing.TB, domains ...string) *rig {
	t.Helper()
	r := &rig{t: t, ctx: t.Context(), dirs: map[string]string{}, clock: &clock{now: time.UnixMilli(1_700_000_000_000)},
		agents: &agents{state: map[string]image.Frozen{}}}
	for _, d := range domains {
		r.dirs[d] = t.TempDir()
	}
	return r
}

// start opens a new manager over the same directories.
func (r *rig) start() *rig {
	r.t.Helper()
	var asked image.Agents = r.agents
	if r.mapAgents != nil {
		asked = r.mapAgents
	}
	worker := &mover.Local{Files: mover.New(mover.Options{}), Agents: asked}
	var works image.Worker = worker
	if r.worker != nil {
		works = r.worker(worker)
	}
	r.Manager = image.New(image.Config{Installation: "test", Agents: asked, Worker: works, Now: r.clock.Now, CollectEvery: -1, OutOfService: r.outOfService, Tell: r.tell})
	worker.Engines = r.Engine
	for name, path := range r.dirs {
		e, err := dir.Open(r.ctx, map[string]string{"path": path}, host.Exec{})
		r.must(err)
		if r.wrap != nil {
			e = r.wrap(e)
		}
		cfg := image.DomainConfig{Name: name, Engine: "dir", Scope: image.ScopeShared}
		if r.config != nil {
			r.config(&cfg)
		}
		_, err = r.AddDomain(r.ctx, cfg, e)
		r.must(err)
	}
	m := r.Manager
	r.t.Cleanup(func() { _ = m.Close() }) // also after a test that closed it
	return r
}

func (r *rig) restart() *rig {
	r.t.Helper()
	r.must(r.Close())
	return r.start()
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) is(err error, kind fault.Kind) {
	r.t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		r.t.Fatalf("error %v, want %s", err, kind)
	}
}

var mount = image.Access{Mode: image.SingleNodeWriter}

func (r *rig) volume(name, domain string, size int64) image.Image {
	r.t.Helper()
	img, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: name, Domains: []string{domain}, Accesses: []image.Access{mount}, Size: size})
	r.must(err)
	return img
}

func (r *rig) snapshot(name string, of image.Image) image.Image {
	r.t.Helper()
	img, err := r.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: name, Source: of.Handle})
	r.must(err)
	return img
}

func (r *rig) from(name, domain string, src image.Image, size int64) image.Image {
	r.t.Helper()
	img, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: name, Domains: []string{domain}, Accesses: []image.Access{mount},
		Size: size, Source: src.Handle.String(), SourceMutable: src.Mutable})
	r.must(err)
	return img
}

// path of an image's slab, for looking at its bytes.
func (r *rig) path(img image.Image) string {
	r.t.Helper()
	e, err := r.Engine(img.Handle.Domain)
	r.must(err)
	a, err := e.Engine.AttachSlab(r.ctx, img.Slab, engine.AttachOptions{})
	r.must(err)
	return a.Path
}

func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

func (r *rig) write(img image.Image, seed uint64) {
	r.t.Helper()
	f, err := os.OpenFile(r.path(img), os.O_RDWR, 0)
	r.must(err)
	_, err = f.WriteAt(content(seed, 100_000), 4096)
	r.must(err)
	r.must(f.Close())
}

func (r *rig) holds(img image.Image, seed uint64) {
	r.t.Helper()
	f, err := os.Open(r.path(img))
	r.must(err)
	defer f.Close()
	got := make([]byte, 100_000)
	_, err = f.ReadAt(got, 4096)
	r.must(err)
	if !bytes.Equal(got, content(seed, 100_000)) {
		r.t.Fatalf("%s does not hold content %d", img.Handle, seed)
	}
	if st, _ := f.Stat(); st.Size() < img.Size {
		r.t.Fatalf("%s has %d bytes, want %d", img.Handle, st.Size(), img.Size)
	}
}

// collect lets everything that is due be removed, however long it takes.
func (r *rig) collect() {
	r.t.Helper()
	for range 6 {
		r.must(r.Collect(r.ctx))
		r.clock.turn(11 * time.Minute)
	}
}

// slabs and tags on disk.
func (r *rig) files(domain, kind string) []string {
	r.t.Helper()
	var out []string
	root := filepath.Join(r.dirs[domain], kind)
	r.must(filepath.Walk(root, func(p string, st os.FileInfo, err error) error {
		if err == nil && !st.IsDir() && !strings.HasPrefix(st.Name(), "e.") && !strings.HasPrefix(st.Name(), "o.") {
			out = append(out, strings.TrimPrefix(p, root+"/"))
		}
		return err
	}))
	return out
}

func (r *rig) empty(domain string) {
	r.t.Helper()
	if s, t := r.files(domain, "slabs"), r.files(domain, "tags"); len(s)+len(t) > 0 {
		r.t.Fatalf("left behind in %s: slabs %v, tags %v", domain, s, t)
	}
}

// unstaged says what a node says when it has taken an image down.
func (r *rig) unstaged(img image.Image, node string) {
	r.t.Helper()
	o, err := r.Outline(r.ctx, img.Handle, node)
	r.must(err)
	r.must(r.Unstaged(r.ctx, img.Handle, node, o.Told))
}
