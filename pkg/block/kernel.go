package block

import (
	"cmp"
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// kernel is what this package needs of *host.Local.
type kernel interface {
	DeviceMapper(ctx context.Context) error
	Mapped(ctx context.Context, uuidPrefix string) ([]host.Mapped, error)
	MappedByUUID(ctx context.Context, uuid string) (*host.Mapped, error)
	CreateMapped(ctx context.Context, name, uuid string, readOnly bool, table []host.Target) (host.Mapped, error)
	LoadMapped(ctx context.Context, m host.Mapped, readOnly bool, table []host.Target) error
	ClearMapped(ctx context.Context, m host.Mapped) error
	ResumeMapped(ctx context.Context, m host.Mapped) error
	RemoveMapped(ctx context.Context, m host.Mapped) error
	StatusMapped(ctx context.Context, m host.Mapped) ([]string, error)
	SuspendAll(ctx context.Context, devices []host.Mapped, limit time.Duration) (*host.Suspension, error)
	ResumeLeft(ctx context.Context, uuidPrefix string) ([]host.Mapped, error)
	FlushDevice(ctx context.Context, path string) error
	Loops(ctx context.Context, match func(host.Loop) bool) ([]host.Loop, error)
	AttachLoop(ctx context.Context, spec host.LoopSpec) (host.Loop, error)
	GrowLoop(ctx context.Context, lp host.Loop, size int64) (host.Loop, error)
	DetachLoop(ctx context.Context, lp host.Loop) error
	Within(ctx context.Context, key string, limit time.Duration, f func() error) error
}

func (d *Devices) host() kernel {
	if d.kernel != nil {
		return d.kernel
	}
	return d.Host
}

// world is what the kernel knows, at one moment.
type world struct {
	mapped []host.Mapped // ours
	loops  []host.Loop   // of slabs
	tops   []host.Loop   // tops without device-mapper
	// dumb is fault.Unavailable when some loop device does not answer. It is not
	// seen, and so not touched.
	dumb error
	// paused are the UUIDs of devices whose I/O waits, and why.
	paused map[string]string
	// made are the UUIDs of the layers' devices that were made since.
	made []string
}

// fresh is look, when what an earlier use of some domains left behind has gone: a
// layer's device knows of its store what was there when it was made. They are locked.
func (d *Devices) fresh(ctx context.Context, specs ...Spec) (*world, error) {
	w, err := d.look(ctx)
	if err != nil || !w.idle(domainsOf(specs...)) {
		return w, err
	}
	if err := d.collect(ctx, domainsOf(specs...)); err != nil {
		return nil, err
	}
	return d.look(ctx)
}

// look asks the kernel. Without device-mapper there are only tops to see.
func (d *Devices) look(ctx context.Context) (*world, error) {
	w := &world{paused: map[string]string{}}
	d.mu.Lock()
	for uuid, p := range d.paused {
		w.paused[uuid] = p.why
	}
	d.mu.Unlock()
	switch err := d.Layers(ctx); {
	case err == nil:
		if w.mapped, err = d.host().Mapped(ctx, uuidPrefix); err != nil {
			return nil, err
		}
	case fault.KindOf(err) != fault.Unsupported:
		return nil, err
	}
	loops, err := d.host().Loops(ctx, func(lp host.Loop) bool { return strings.HasPrefix(lp.Mark, markPrefix) })
	if err != nil && fault.KindOf(err) == fault.Unavailable {
		w.dumb, err = err, nil
	}
	for _, lp := range loops {
		if _, top := useOf(lp.Mark); top {
			w.tops = append(w.tops, lp)
		} else if domainOf(lp.Mark) != "" {
			w.loops = append(w.loops, lp)
		}
	}
	return w, err
}

func (w *world) uuid(uuid string) *host.Mapped {
	for i := range w.mapped {
		if w.mapped[i].UUID == uuid {
			return &w.mapped[i]
		}
	}
	return nil
}

func (w *world) number(num string) *host.Mapped {
	for i := range w.mapped {
		if num == number(w.mapped[i].Major, w.mapped[i].Minor) && w.mapped[i].Targets != nil {
			return &w.mapped[i]
		}
	}
	return nil
}

const loopMajor = 7

func (w *world) loop(num string) *host.Loop {
	for i := range w.loops {
		if num == number(loopMajor, uint32(w.loops[i].Number)) {
			return &w.loops[i]
		}
	}
	return nil
}

// put notes a device that was made or changed.
func (w *world) put(m host.Mapped) {
	w.forget(m.UUID)
	w.mapped = append(w.mapped, m)
}

func (w *world) forget(uuid string) {
	w.mapped = slices.DeleteFunc(slices.Clone(w.mapped), func(m host.Mapped) bool { return m.UUID == uuid })
}

func (w *world) putLoop(lp host.Loop) {
	w.loops = append(slices.DeleteFunc(slices.Clone(w.loops), func(o host.Loop) bool { return o.Number == lp.Number }), lp)
}

// table is what a table of ours says.
type table struct {
	kind   string // "linear", "snapshot", "snapshot-merge", "pad", "" for none, "?" for what is not ours
	under  string // the number of the device below; of a layer its origin
	length int64  // bytes; of a pad those of the part that is not zeros
	store  string // of a layer: the number of its slab's device
	chunk  int64  // of a layer, bytes
}

func read(m host.Mapped) table {
	if len(m.Targets) == 0 {
		return table{}
	}
	first := m.Targets[0]
	f := strings.Fields(first.Params)
	switch {
	case len(m.Targets) > 2 || len(m.Targets) == 2 && (!isPad(m.UUID) || first.Type != "linear" || m.Targets[1].Type != "zero"):
	case first.Type == "linear" && len(f) == 2 && f[1] == "0":
		kind := "linear"
		if isPad(m.UUID) {
			kind = "pad"
		}
		return table{kind: kind, under: f[0], length: first.Length}
	case (first.Type == "snapshot" || first.Type == "snapshot-merge") && len(f) == 4 && strings.HasPrefix(f[2], "P"):
		sectors, err := strconv.ParseInt(f[3], 10, 64)
		if err != nil {
			break
		}
		return table{kind: first.Type, under: f[0], store: f[1], length: first.Length, chunk: sectors * sector}
	}
	return table{kind: "?"}
}

func linear(under string, length int64) []host.Target {
	return []host.Target{{Length: length, Type: "linear", Params: under + " 0"}}
}

func padded(under string, length, size int64) []host.Target {
	t := linear(under, min(length, size))
	if length < size {
		t = append(t, host.Target{Start: length, Length: size - length, Type: "zero"})
	}
	return t
}

// layered is a layer's table. "O": a store that is full is not given up.
func layered(kind, origin, store string, chunk, length int64) []host.Target {
	return []host.Target{{Length: length, Type: kind, Params: origin + " " + store + " PO " + strconv.FormatInt(chunk/sector, 10)}}
}

// content follows devices that only pass on what is below them, pads and
// layers that were merged, to the one that has the content.
func (w *world) content(num string) string {
	for range len(w.mapped) + 1 {
		m := w.number(num)
		if m == nil || !isSlab(m.UUID) && !isPad(m.UUID) {
			return num
		}
		t := read(*m)
		if t.kind != "linear" && t.kind != "pad" {
			return num
		}
		num = t.under
	}
	return num
}

// above returns our devices that stand on a device.
func (w *world) above(num string) []host.Mapped {
	var out []host.Mapped
	for _, m := range w.mapped {
		if slices.ContainsFunc(m.Targets, func(t host.Target) bool { return slices.Contains(strings.Fields(t.Params), num) }) {
			out = append(out, m)
		}
	}
	return out
}

// top describes a device-mapper device if it is a top.
func (w *world) top(m *host.Mapped) (Device, bool) {
	use, ok := useOf(m.UUID)
	if !ok {
		return Device{}, false
	}
	dev := Device{Path: m.Path, Use: use, Size: m.Size, ReadOnly: m.ReadOnly, DirectIO: true, mapped: m, Locked: sealed(*m), below: w.below(*m)}
	for _, uuid := range dev.below {
		dev.Paused = cmp.Or(dev.Paused, w.paused[uuid])
	}
	if c := w.uuid(cryptOf(m.UUID)); dev.Locked && c != nil {
		dev.opened(c)
	}
	for num, first := w.content(read(*m).under), true; num != ""; first = false {
		next, slab := "", num
		if layer := w.number(num); layer != nil {
			t := read(*layer)
			next, slab = w.content(t.under), t.store
		}
		if lp := w.loop(slab); lp != nil {
			if first {
				dev.Backing, dev.Dev, dev.Inode = lp.Backing, lp.Dev, lp.Inode
			}
			if !lp.DirectIO && dev.DirectIO {
				dev.DirectIO, dev.Note = false, cached(*lp)
			}
		} else if first {
			dev.Backing, dev.Dev, dev.Inode = nodeOf(slab)
		}
		if next == num {
			break
		}
		num = next
	}
	return dev, true
}

// nodeOf finds the node of a device by its number, as sysfs names it.
func nodeOf(num string) (path string, dev, inode uint64) {
	link, err := os.Readlink("/sys/dev/block/" + num)
	if err != nil {
		return "", 0, 0
	}
	path = "/dev/" + link[strings.LastIndexByte(link, '/')+1:]
	var st unix.Stat_t
	if unix.Lstat(path, &st) == nil {
		dev, inode = st.Dev, st.Ino
	}
	return path, dev, inode
}

// lock waits for the domains of some chains.
func (d *Devices) lock(ctx context.Context, specs ...Spec) (unlock func(), err error) {
	var names []string
	for _, s := range specs {
		for _, slab := range s.Slabs {
			domain, _, _ := strings.Cut(slab.ID, "/")
			names = append(names, domainHash(domain))
		}
	}
	return d.lockDomains(ctx, names)
}

// lockDomains waits for domains, given by their hashes, in an order in which
// nobody waits for a circle.
func (d *Devices) lockDomains(ctx context.Context, names []string) (unlock func(), err error) {
	slices.Sort(names)
	names = slices.Compact(names)
	var held []string
	unlock = func() {
		d.changes.Add(1)
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, n := range held {
			close(d.busy[n])
			delete(d.busy, n)
		}
	}
	for _, n := range names {
		for {
			d.mu.Lock()
			busy := d.busy[n]
			if busy == nil {
				if d.busy == nil {
					d.busy = map[string]chan struct{}{}
				}
				d.busy[n] = make(chan struct{})
				held = append(held, n)
			}
			d.mu.Unlock()
			if busy == nil {
				break
			}
			select {
			case <-busy:
			case <-ctx.Done():
				unlock()
				return nil, fault.New(fault.KindOf(ctx.Err()), "wait for other work on the domain's devices: %w", ctx.Err())
			}
		}
	}
	return unlock, nil
}
