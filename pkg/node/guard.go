package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// The guard pauses layers that have not all their space before their storage is full: see
// block.Pause and layer.Reserve. It looks at storages on which such layers are written, and
// at nothing else.

const (
	// lookEvery is the pause between two looks at what a storage has free, lookSoon where that
	// is little, lookLimit how long it may take to answer.
	lookEvery, lookSoon, lookLimit = time.Second, time.Second / 4, 2 * time.Second
	// listEvery is the pause between two looks at the devices, where none is known to have
	// changed: files get their space without a word.
	listEvery = 30 * time.Second
	// keepEvery is the pause between two signs of life, without which block.SuspendLimit ends a pause.
	keepEvery = block.SuspendLimit / 5
	// breathEvery is how often what is paused goes on for breathFor, as long as more than the floor is
	// free: a process that was killed in the middle of a write ends only when that does.
	breathEvery, breathFor = 10 * time.Second, 100 * time.Millisecond
)

// pauser is what the guard needs of block.Devices.
type pauser interface {
	Changes() int64
	Thin(ctx context.Context) ([]block.Thin, error)
	Pause(ctx context.Context, list []block.Thin, why string, atOnce bool) error
	Paused() []block.Thin
	Keep(ctx context.Context) error
	Unpause(list []block.Thin) error
}

// guard is the state of that work.
type guard struct {
	devices pauser
	// usage measures the storage of some files.
	usage func(ctx context.Context, of []block.Thin) (host.Usage, error)

	mu       sync.Mutex
	storages map[uint64]*storage // by the number of the file system
	changes  int64               // of devices, as of the last list
	listed   time.Time
	kept     time.Time
	busy     map[string]bool // work that is under way
	work     sync.WaitGroup
}

// storage is a file system with thin layers that are written.
type storage struct {
	thin  []block.Thin
	due   time.Time
	usage host.Usage
	err   error // why it could not be measured, at the last try
	// low: writes wait, since then; breathed is when they last went on.
	low             bool
	since, breathed time.Time
	failed          string // what the last attempt to pause or resume said
}

func newGuard(devices pauser, usage func(context.Context, []block.Thin) (host.Usage, error)) *guard {
	return &guard{devices: devices, usage: usage, storages: map[uint64]*storage{}, changes: -1, busy: map[string]bool{}}
}

// Guard watches over layers that have not all their space, until ctx ends. Then what is paused
// goes on: nobody looks after it any more.
func (n *Node) Guard(ctx context.Context) error {
	g := n.guard
	tick := time.NewTicker(lookSoon)
	defer tick.Stop()
	for {
		g.turn(ctx, time.Now())
		select {
		case <-ctx.Done():
			err := g.devices.Unpause(g.devices.Paused())
			g.work.Wait() // which may have paused some more
			return errors.Join(err, g.devices.Unpause(g.devices.Paused()))
		case <-tick.C:
		}
	}
}

// turn begins what is due. It waits for nothing: one dead storage must not hold up another's guard.
func (g *guard) turn(ctx context.Context, now time.Time) {
	changes := g.devices.Changes()
	if g.due(func() bool {
		return now.Sub(g.listed) >= listEvery || changes != g.changes && now.Sub(g.listed) >= lookEvery
	}) {
		g.begin("list", func() { g.list(ctx, changes, now) })
	}
	if g.due(func() bool { return now.Sub(g.kept) >= keepEvery }) {
		g.begin("keep", func() { g.keep(ctx, now) })
	}
	g.mu.Lock()
	var due []uint64
	for fs, s := range g.storages {
		if !now.Before(s.due) {
			due = append(due, fs)
		}
	}
	g.mu.Unlock()
	for _, fs := range due {
		g.begin(fmt.Sprint("look ", fs), func() { g.look(ctx, fs, now) })
	}
}

func (g *guard) due(is func() bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return is()
}

// begin does work that is not under way already.
func (g *guard) begin(what string, work func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.busy[what] {
		return
	}
	g.busy[what] = true
	g.work.Go(func() {
		work()
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.busy, what)
	})
}

func (g *guard) keep(ctx context.Context, now time.Time) {
	if err := g.devices.Keep(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Keeping layers paused")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.kept = now
}

// list finds the thin layers that are written, and lets those go on that are none any more.
func (g *guard) list(ctx context.Context, changes int64, now time.Time) {
	thin, err := g.devices.Thin(ctx)
	if err != nil {
		klog.FromContext(ctx).Error(err, "Looking for layers that have not all their space")
		return
	}
	byFS := map[uint64][]block.Thin{}
	for _, t := range thin {
		byFS[t.FS] = append(byFS[t.FS], t)
	}
	left := slices.DeleteFunc(g.devices.Paused(), func(p block.Thin) bool {
		return slices.ContainsFunc(thin, func(t block.Thin) bool { return t.Name == p.Name })
	})
	if err := g.devices.Unpause(left); err != nil {
		klog.FromContext(ctx).Error(err, "Resuming layers that have all their space, or are not written any more")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changes, g.listed = changes, now
	for fs := range g.storages {
		if byFS[fs] == nil {
			delete(g.storages, fs)
		}
	}
	for fs, list := range byFS {
		if g.storages[fs] == nil {
			g.storages[fs] = &storage{}
		}
		g.storages[fs].thin, g.storages[fs].due = list, now
	}
}

// look measures a storage, and pauses what is written there, or lets it go on.
func (g *guard) look(ctx context.Context, fs uint64, now time.Time) {
	g.mu.Lock()
	s := g.storages[fs]
	if s == nil {
		g.mu.Unlock()
		return
	}
	was := *s
	g.mu.Unlock()
	u, err := g.usage(ctx, was.thin)
	if ctx.Err() != nil {
		return
	}
	next := was
	next.err = err
	r := layer.ReserveOf(u.Total)
	switch {
	case err != nil: // as before: a storage that does not answer takes no writes
		if was.err == nil {
			klog.FromContext(ctx).Error(err, "Measuring a storage whose layers have not all their space", "file", was.thin[0].File)
		}
		next.due = now.Add(lookEvery)
	default:
		next.usage = u
		next.due = now.Add(lookEvery)
		next.low = r.Scarce(u.Available, was.low)
		if u.Available < r.SoonLow() {
			next.due = now.Add(lookSoon)
		}
		err = g.act(ctx, &next, r, now)
	}
	next.failed = ""
	if err != nil {
		next.failed = err.Error()
	}
	if next.failed != "" && was.failed == "" && next.err == nil {
		klog.FromContext(ctx).Error(err, "Pausing or resuming layers, to be tried again", "file", was.thin[0].File)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.storages[fs] == s {
		next.thin = s.thin // it may be another by now
		*s = next
	}
}

// act lets a storage's layers be as they should.
func (g *guard) act(ctx context.Context, s *storage, r layer.Reserve, now time.Time) error {
	log := klog.FromContext(ctx).WithValues("file", s.thin[0].File, "layers", len(s.thin), "free", s.usage.Available, "low", r.Low, "high", r.High)
	if !s.low {
		if !s.since.IsZero() {
			log.Info("Writes to layers go on")
			s.since = time.Time{}
		}
		return g.devices.Unpause(on(g.devices.Paused(), s.thin[0].FS))
	}
	if s.since.IsZero() {
		log.Info("Writes to layers that have not all their space wait: their storage is nearly full")
		s.since, s.breathed = now, now
	}
	if s.usage.Available >= r.Floor && now.Sub(s.breathed) >= breathEvery {
		s.breathed = now
		if err := g.devices.Unpause(on(g.devices.Paused(), s.thin[0].FS)); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(breathFor):
		}
	}
	err := g.devices.Pause(ctx, s.thin, s.why(), s.usage.Available < r.Floor)
	if errors.Is(err, fault.Pending) { // the next look comes soon
		return nil
	}
	return err
}

// on are those of a list that are on a file system.
func on(list []block.Thin, fs uint64) []block.Thin {
	return slices.DeleteFunc(list, func(t block.Thin) bool { return t.FS != fs })
}

// why writes wait, for people.
func (s *storage) why() string {
	return scarce(s.usage.Available, layer.ReserveOf(s.usage.Total))
}

func scarce(free int64, r layer.Reserve) string {
	return fmt.Sprintf("its storage has %d MiB free, below the %d MiB that it keeps for layers which have not all their space; they go on when %d MiB are free: delete something, or give the storage more space",
		free>>20, r.Low>>20, r.High>>20)
}

// closed says why nothing may be written any more on a file system, not even to take a
// device down; "" where that is not so.
func (g *guard) closed(fs uint64) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.storages[fs]
	if s == nil || !s.low || s.usage.Available >= layer.ReserveOf(s.usage.Total).Floor {
		return ""
	}
	return s.why()
}

// scarce names the storages on which writes to layers wait, by a file, and says why.
func (g *guard) scarce() (out []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.storages {
		if s.low {
			out = append(out, fmt.Sprintf("writes to %d layers as %s wait: %s", len(s.thin), s.thin[0].File, s.why()))
		}
	}
	slices.Sort(out)
	return out
}

// waiting says whether writes to layers on a file system wait.
func (g *guard) waiting(fs uint64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.storages[fs]
	return s != nil && s.low
}

// Paused is how many layers wait for space.
func (n *Node) Paused() int { return len(n.devices.Paused()) }

// storageUsage measures the storage of files: by the path of one of them, by a mount of the same file
// system, or by the domain. What an earlier process attached may have a path that nobody sees any more,
// and where each mount has a number of its own (FUSE), the file system too.
func (n *Node) storageUsage(ctx context.Context, of []block.Thin) (host.Usage, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	for _, t := range of {
		if fi, err := n.host.Stat(ctx, t.File); err == nil && fi.Dev == t.FS && fi.Inode == t.Inode {
			return n.host.Usage(ctx, t.File)
		}
	}
	mounts, err := n.host.Mounts()
	if err != nil {
		return host.Usage{}, err
	}
	for _, m := range mounts {
		// Each subvolume of a btrfs has a number, which its mount does not show.
		if unix.Mkdev(m.Major, m.Minor) != of[0].FS && m.Type != "btrfs" {
			continue
		}
		if fi, err := n.host.Stat(ctx, m.Point); err == nil && fi.Dev == of[0].FS { // nothing covers it
			return n.host.Usage(ctx, m.Point)
		}
	}
	return n.domainUsage(ctx, of[0])
}

// domainUsage measures the storage of a file's domain.
func (n *Node) domainUsage(ctx context.Context, t block.Thin) (host.Usage, error) {
	lost := fault.New(fault.Unavailable, "the storage of %s cannot be found: no mount of it is seen from here, and its domain is not open or does not measure it", t.File)
	if n.cfg.Domains == nil {
		return host.Usage{}, lost
	}
	known := n.cfg.Domains.KnownDomains()
	i := slices.IndexFunc(known, func(d image.DomainInfo) bool { return t.Of(d.ID) })
	if i < 0 {
		return host.Usage{}, lost
	}
	e, err := n.cfg.Engines(known[i].ID)
	if err != nil {
		return host.Usage{}, err
	}
	meter := engine.Discover(e.Engine).Meter
	if meter == nil {
		return host.Usage{}, lost
	}
	var u engine.Usage
	err = n.host.Within(ctx, "measure domain "+known[i].ID, lookLimit, func() error {
		now, err := meter.DomainUsage(context.WithoutCancel(ctx))
		if err == nil {
			u = now
		}
		return err
	})
	if err != nil { // what still hangs may write its result late
		return host.Usage{}, err
	}
	return host.Usage{Total: u.Total, Used: u.Used, Available: u.Available}, nil
}

// roomFor refuses to stage for writing what would have to wait at once.
func (n *Node) roomFor(ctx context.Context, slabs []block.Slab) error {
	head := slabs[0]
	if head.Chunk == 0 {
		return nil
	}
	fi, err := n.host.Stat(ctx, head.Path)
	if err != nil || !fi.Mode.IsRegular() || fi.Allocated >= layer.StoreSize(head.Size, head.Chunk) {
		return err
	}
	u, err := n.host.Usage(ctx, head.Path)
	if err != nil {
		return err
	}
	if r := layer.ReserveOf(u.Total); r.Scarce(u.Available, n.guard.waiting(fi.Dev)) {
		return fault.New(fault.Exhausted, "what is written to it would wait: %s", scarce(u.Available, r))
	}
	return nil
}

// paused says why I/O to an image waits, or "".
func (s state) paused() string {
	for _, d := range s.devices {
		if d.Paused != "" {
			return d.Paused
		}
	}
	return ""
}

// wait is the error of work that has to read or write what is paused.
func (s state) wait() error {
	if why := s.paused(); why != "" {
		return fault.New(fault.Exhausted, "its reads and writes wait: %s", why)
	}
	return nil
}

// letGoOn lets what waits of an image be written until done, so that it can be taken down. fault.Unavailable:
// there is not enough space for that.
func (n *Node) letGoOn(ctx context.Context, h image.Handle, s state) (done func(), err error) {
	var all []func()
	done = func() {
		for _, f := range all {
			f()
		}
	}
	for _, d := range s.devices {
		if why := n.guard.closed(d.Dev); why != "" && d.Paused != "" {
			done()
			return nil, fault.New(fault.Unavailable, "it cannot be written out: %s", why)
		}
		f, err := n.devices.Let(d)
		all = append(all, f)
		if err != nil {
			done()
			return nil, err
		}
		if d.Paused != "" {
			klog.FromContext(ctx).Info("Writes that waited go on, to take the image down", "image", h)
		}
	}
	return done, nil
}
