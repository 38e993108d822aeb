package image

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// The scopes of a domain.
const (
	ScopeShared = "shared"
	ScopeNode   = "node"
)

// Config of a Manager.
type Config struct {
	// Installation is the identity that owns domains. Required.
	Installation string
	// Agents reach the nodes. Required.
	Agents Agents
	// Worker does by default what the storage does not do natively. Required.
	Worker Worker
	// Observe is told of every operation that ended; may be nil. path is
	// "native" or "default".
	Observe func(op, domain, path string, took time.Duration, err error)
	// Tell is told what the users of images should hear of; may be nil. It must not wait.
	Tell func(Event)
	// OutOfService says whether somebody has promised that a node, which cannot be
	// reached, is off and will write nothing any more: its attachments may end without
	// its word. nil: nobody ever does.
	OutOfService func(ctx context.Context, node string) (bool, error)
	// WaitFor says whether the domain that a node has for itself, and that is not open, is
	// waited for: until then lists, and the creation of volumes that it may hold, are
	// fault.Unavailable. nil: always.
	WaitFor func(node string) bool
	// BindNodes: the domain of a node belongs to the node that opened it first.
	BindNodes bool
	// Now is the clock; nil: the real one.
	Now func() time.Time
	// LookEvery is the pause between two looks at a running merge; 0: 50 ms at
	// first, 2 s in the end.
	LookEvery time.Duration
	// CollectEvery is the pause between rounds of the collector; 0: 30 s;
	// negative: never by itself.
	CollectEvery time.Duration
}

// Place is where a slab is.
type Place struct {
	Domain string // its ID
	Slab   string
}

// Content is what an image holds, to be read, while nobody changes it.
type Content struct {
	// Place of the slab, where that is all of the image.
	Place
	// Chain is what a device has to be made of, on Node; nil: the slab is all.
	Chain *Staging
	Node  string
	// Size in bytes: what counts. Behind it the image reads as zero, whatever is there.
	Size int64
}

// Worker works on the content of slabs, wherever these can be reached: in this
// process (mover.Local), or on nodes. It attaches what it needs, and gives it back.
type Worker interface {
	Reader
	// CopyBlock copies a block slab. It keeps holes, and dst is durable when it
	// returns. fault.InUse: somebody else is still writing dst. fault.Corrupt: src is
	// smaller than its size.
	CopyBlock(ctx context.Context, src Content, dst Place, opts BlockCopy) error
	// CopyTree makes the tree dst equal to src, content and metadata; dst
	// may hold an earlier, incomplete copy. It is durable when it returns.
	CopyTree(ctx context.Context, src Content, dst Place, progress func(done, total int64)) error
	// Zero makes bytes from to to of a block slab read as zero, durably.
	Zero(ctx context.Context, p Place, from, to int64) error
	// FormatLayer makes a slab an empty layer, durably, whatever it held
	// before. It takes the space of its first size bytes, as Allocate does. All in bytes.
	FormatLayer(ctx context.Context, p Place, size, chunk int64) error
	// Allocate takes the space of the first size bytes of a slab, where the storage
	// can, so that no write to it finds the storage full. It changes nothing that
	// can be read, and the slab may be in use. fault.Exhausted: there is not so much; or
	// the slab has not all its space, and the storage not its layer.Reserve.
	Allocate(ctx context.Context, p Place, size int64) error
	// TrimLayer gives back the space of a layer of size bytes that nobody
	// writes to, behind what it holds. It may be read meanwhile. fault.InUse: somebody
	// writes to it after all; nothing was changed.
	TrimLayer(ctx context.Context, p Place, size int64) error
	// CheckLayer looks at a layer, which may be in use: fault.Corrupt says that it is
	// none, or that the kernel has given it up after a failed write. looked is false
	// where it could not even be attached.
	CheckLayer(ctx context.Context, p Place) (looked bool, err error)
	// RepairLayer makes a layer of size bytes, which must not be in use, usable
	// again if all that it says of itself fits together, and returns how many
	// chunks it holds. fault.Corrupt: it does not; nothing was changed.
	RepairLayer(ctx context.Context, p Place, size int64) (chunks int64, err error)
}

// BlockCopy are the options of Worker.CopyBlock.
type BlockCopy struct {
	// Size of src to copy, in bytes.
	Size int64
	// From is where to resume: everything before it is already durable in dst.
	From int64
	// DstZeroed says that dst reads as zero from From on, where it was not written.
	DstZeroed bool
	// Rate limits the copy to so many bytes per second; 0: no limit but the Worker's own.
	Rate int64
	// Progress is told bytes done of total; may be nil.
	Progress func(done, total int64)
	// Checkpoint is told from time to time an offset up to which dst is durable;
	// its error ends the copy. nil: no checkpoints.
	Checkpoint func(offset int64) error
}

// Manager does all image work. Its methods may be called by many goroutines.
type Manager struct {
	cfg    Config
	ctx    context.Context // of everything that outlives a call
	cancel context.CancelFunc
	ops    operations
	loops  sync.WaitGroup
	// tellings numbers the chains that nodes are told, differently in each process.
	tellings atomic.Int64

	holding sync.Mutex // while several nodes hold a switch

	mu       sync.Mutex
	domains  map[string]*domain // by ID and by alias
	unopened map[entry]unopened
	listed   map[string]struct{} // entries of which it is known which nodes have one
}

// entry is a configured domain, or that of one node where each node has its own.
type entry struct{ name, node string }

func (c *DomainConfig) entry() entry { return entry{c.Name, c.Node} }

type unopened struct {
	cfg    DomainConfig
	reason error
}

// New makes a Manager without domains.
func New(cfg Config) *Manager {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.CollectEvery == 0 {
		cfg.CollectEvery = 30 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	m := &Manager{cfg: cfg, ctx: ctx, cancel: cancel, ops: operations{byKey: map[string]*operation{}},
		domains: map[string]*domain{}, unopened: map[entry]unopened{}, listed: map[string]struct{}{}}
	m.tellings.Store(rand.Int64N(1 << 62))
	return m
}

// AddDomain opens a domain: it claims a new epoch, indexes the domain and
// starts to recover what was left over. It returns the domain's ID. The engine
// is closed by Close. fault.Permission: it belongs to another installation.
func (m *Manager) AddDomain(ctx context.Context, cfg DomainConfig, e engine.Engine) (string, error) {
	if err := checkDomainConfig(&cfg); err != nil {
		return "", err
	}
	desc, err := e.Describe(ctx)
	if err != nil {
		return "", fault.In(err, "describe", cfg.Name, "")
	}
	d := &domain{m: m, cfg: cfg, engine: e, users: engine.NewUsers(e), caps: engine.Discover(e), desc: desc, images: map[string]*image{},
		names: map[string]string{}, children: map[string]map[*image]struct{}{}, pins: map[string]pinRecord{}, oldTags: map[string]time.Time{},
		known: map[string]struct{}{}, underWay: newUnderWay(), strays: map[string]time.Time{}, scanned: m.cfg.Now(), kick: make(chan struct{}, 1), stopped: make(chan struct{})}
	d.settings.Store(&cfg)
	if err := d.open(ctx); err != nil {
		return "", err
	}
	keys := d.ids()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range keys {
		if other := m.domains[k]; other != nil {
			return "", d.double(k, other)
		}
	}
	for _, k := range keys {
		m.domains[k] = d
	}
	delete(m.unopened, cfg.entry())
	m.dropUnlisted(cfg.Name)
	klog.FromContext(ctx).Info("Domain opened", "domain", d.id, "engine", cfg.Engine, "location", desc.Location,
		"epoch", d.epoch, "images", len(d.images), "capabilities", d.caps.List())
	collecting, stop := context.WithCancel(klog.NewContext(m.ctx, klog.FromContext(ctx)))
	d.stop = stop
	if m.cfg.CollectEvery > 0 {
		m.loops.Add(1)
		go d.collectLoop(collecting)
	} else {
		close(d.stopped)
	}
	return d.id, nil
}

// maxDomainName leaves room in a handle for the node suffix and an image ID of
// 20+1+16 characters.
const maxDomainName = 63

func checkDomainConfig(cfg *DomainConfig) error {
	if err := engine.CheckName("domain name", cfg.Name); err != nil {
		return err
	}
	if len(cfg.Name) > maxDomainName {
		return fault.New(fault.Invalid, "domain name %q has %d characters: at most %d are allowed", cfg.Name, len(cfg.Name), maxDomainName)
	}
	cfg.Scope = cmp.Or(cfg.Scope, ScopeShared)
	if cfg.Scope != ScopeShared && cfg.Scope != ScopeNode {
		return fault.New(fault.Invalid, "domain %s: scope %q is unknown: %q or %q", cfg.Name, cfg.Scope, ScopeShared, ScopeNode)
	}
	if cfg.Scope == ScopeNode && cfg.Node == "" {
		return fault.New(fault.Invalid, "domain %s: scope %q needs a node", cfg.Name, ScopeNode)
	}
	if cfg.Overcommit == 0 {
		cfg.Overcommit = 1
	}
	if cfg.Overcommit < 0 || cfg.CapacityLimit < 0 || cfg.BackgroundRate < 0 {
		return fault.New(fault.Invalid, "domain %s: overcommit %g, capacityLimit %d and backgroundRate %d must not be negative", cfg.Name, cfg.Overcommit, cfg.CapacityLimit, cfg.BackgroundRate)
	}
	return nil
}

// Unopened records a configured domain that could not be opened, so that its
// objects are unavailable rather than absent.
func (m *Manager) Unopened(cfg DomainConfig, reason error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unopened[cfg.entry()] = unopened{cfg, reason}
	m.dropUnlisted(cfg.Name)
}

// Listed says that of all nodes that may have a domain of an entry Unopened or AddDomain was
// told. Until then the entry itself, that of no node, stands for those that are not known.
func (m *Manager) Listed(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.listed[name] = struct{}{}
	m.dropUnlisted(name)
}

// Gone is told of a node that there is not any more, and whose own domain was not open.
func (m *Manager) Gone(cfg DomainConfig) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.unopened, cfg.entry())
}

// dropUnlisted takes an entry of no node away when there are some of nodes. The caller
// holds m.mu.
func (m *Manager) dropUnlisted(name string) {
	if _, ok := m.listed[name]; !ok {
		return
	}
	some := false
	for e := range m.unopened {
		some = some || e.name == name && e.node != ""
	}
	for _, d := range m.domains {
		some = some || d.cfg.Name == name
	}
	if some {
		delete(m.unopened, entry{name: name})
	}
}

// Close stops background work, waits for it, and closes the engines. Running
// operations are abandoned where they are, to be recovered at the next opening.
func (m *Manager) Close() error {
	m.ops.mu.Lock()
	m.ops.closed = true
	m.ops.mu.Unlock()
	m.cancel()
	m.ops.wg.Wait()
	m.loops.Wait()
	var errs []error
	for _, d := range m.open() {
		errs = append(errs, d.engine.Close())
	}
	return errors.Join(errs...)
}

// open lists the open domains, each once, ordered as their handles are.
func (m *Manager) open() []*domain {
	m.mu.Lock()
	defer m.mu.Unlock()
	set := map[*domain]struct{}{}
	for _, d := range m.domains {
		set[d] = struct{}{}
	}
	return slices.SortedFunc(maps.Keys(set), func(a, b *domain) int { return cmp.Compare(a.id+"/", b.id+"/") })
}

// domain finds an open domain by ID or alias. fault.Unavailable: it is not
// open; that never means that its objects are gone.
func (m *Manager) domain(id string) (*domain, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.domains[id]; d != nil {
		return d, nil
	}
	for e, u := range m.unopened {
		if id == e.name || strings.HasPrefix(id, e.name+".") {
			return nil, fault.New(fault.Unavailable, "domain %s is not open: %w", id, u.reason)
		}
	}
	return nil, fault.New(fault.Unavailable, "domain %s is not configured; its images are out of reach until it is", id)
}

// allOpen fails until every configured domain was indexed: of these entries, or with none
// of all. A node's own is waited for only as long as cfg.WaitFor says.
func (m *Manager) allOpen(names ...string) error {
	m.mu.Lock()
	all := maps.Clone(m.unopened)
	m.mu.Unlock()
	for e, u := range all { // without the lock, which WaitFor's owner may be waiting for
		switch {
		case len(names) > 0 && !slices.Contains(names, e.name) && !slices.ContainsFunc(u.cfg.Aliases, func(a string) bool { return slices.Contains(names, a) }):
		case e.node != "" && m.cfg.WaitFor != nil && !m.cfg.WaitFor(e.node):
		case e.node != "":
			return fault.New(fault.Unavailable, "domain %s of node %s is not open: %w", e.name, e.node, u.reason)
		default:
			return fault.New(fault.Unavailable, "domain %s is not open: %w", e.name, u.reason)
		}
	}
	return nil
}

// find finds a visible image by handle.
func (m *Manager) find(h Handle) (*image, error) {
	d, err := m.domain(h.Domain)
	if err != nil {
		return nil, err
	}
	return d.get(h.Image)
}

// canonical is a handle under its domain's present name.
func (m *Manager) canonical(h Handle) Handle {
	if d, err := m.domain(h.Domain); err == nil {
		h.Domain = d.id
	}
	return h
}

// same says whether two handles as text, or "", are of one image.
func (m *Manager) same(a, b string) bool {
	x, errX := ParseHandle(a)
	y, errY := ParseHandle(b)
	return a == b || errX == nil && errY == nil && m.canonical(x) == m.canonical(y)
}

// byName finds the one undeleted incarnation of a CSI name in any domain.
func (m *Manager) byName(space, name string) *image {
	for _, d := range m.open() {
		d.mu.Lock()
		img := d.images[d.names[space+"/"+name]]
		d.mu.Unlock()
		if img != nil {
			return img
		}
	}
	return nil
}

// Engine of an open domain, for attaching slabs. fault.Unavailable: not open.
func (m *Manager) Engine(domain string) (*engine.Users, error) {
	d, err := m.domain(domain)
	if err != nil {
		return nil, err
	}
	return d.users, nil
}

// IDs are those of an open domain, under which nodes may have staged its images: its own
// first, then its aliases'. epoch is the one at which it was opened here. fault.Unavailable:
// not open.
func (m *Manager) IDs(domain string) (ids []string, epoch int64, err error) {
	d, err := m.domain(domain)
	if err != nil {
		return nil, 0, err
	}
	return d.ids(), int64(d.epoch), nil
}

// Topology says from which node a domain's images can be reached; "": from all.
func (m *Manager) Topology(domain string) (node string, err error) {
	d, err := m.domain(domain)
	if err != nil {
		return "", err
	}
	if d.cfg.Scope == ScopeNode {
		return d.cfg.Node, nil
	}
	return "", nil
}
