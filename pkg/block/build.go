package block

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
)

const (
	// SuspendLimit is how long I/O waits at most for a change of tables.
	SuspendLimit = 10 * time.Second
	// storeLimit bounds the reading of a store's metadata, up to 256 MiB.
	storeLimit = 5 * time.Minute
	statLimit  = 10 * time.Second
)

// level is the device of one slab of a chain.
type level struct {
	slab  Slab
	num   string // its number, "7:3"
	store string // of a layer that is not merged: the path of its slab's device
}

// attach builds what is missing of an image's devices. The domain is locked.
func (d *Devices) attach(ctx context.Context, spec Spec) (Device, error) {
	w, err := d.fresh(ctx, spec)
	if err != nil {
		return Device{}, err
	}
	m, err := d.attachTop(ctx, w, spec)
	if err != nil {
		// What was built and has no top now is in nobody's way but the engine's.
		return Device{}, errors.Join(err, d.collect(context.WithoutCancel(ctx), domainsOf(spec)))
	}
	dev, _ := w.top(&m)
	return dev, nil
}

func domainsOf(specs ...Spec) []string {
	var out []string
	for _, s := range specs {
		for _, slab := range s.Slabs {
			out = append(out, domainOf(slabUUID(slab.ID)))
		}
	}
	return out
}

func (d *Devices) attachTop(ctx context.Context, w *world, spec Spec) (host.Mapped, error) {
	levels, err := d.build(ctx, w, spec.Slabs)
	if err != nil {
		return host.Mapped{}, err
	}
	head := levels[0].num
	uuid := topUUID(spec.Use, spec.Owner)
	old := w.uuid(uuid)
	if old == nil || old.Targets == nil {
		m, err := d.host().CreateMapped(ctx, spec.topName(), uuid, spec.ReadOnly, linear(head, spec.Size))
		if err == nil {
			w.put(m)
		}
		return m, err
	}
	m, err := d.awake(ctx, w, *old)
	if err != nil {
		return m, err
	}
	t := read(m)
	if t.kind != "linear" || sealed(m) != (spec.Crypt != nil) {
		return m, strange(m, "a linear device over the image's head, with the name "+spec.topName())
	}
	if t.under != head {
		if err := d.move(ctx, w, []step{{top: m, levels: levels}}); err != nil {
			return m, err
		}
		m = *w.uuid(uuid)
	}
	if m.ReadOnly != spec.ReadOnly && m.Open > 0 {
		return m, fault.New(fault.InUse, "%s is in use with read-only=%t, and read-only=%t was asked for: unstage it first", m.Path, m.ReadOnly, spec.ReadOnly)
	}
	if m.ReadOnly != spec.ReadOnly || m.Size < spec.Size {
		return d.change(ctx, w, m, spec.ReadOnly, linear(head, max(m.Size, spec.Size)))
	}
	return m, nil
}

// strange is about a device with our name that we did not make like this.
func strange(m host.Mapped, want string) error {
	var lines []string
	for _, t := range m.Targets {
		lines = append(lines, strings.TrimSpace(t.Type+" "+t.Params))
	}
	return fault.New(fault.InUse, "device %s (%s) has the table %q, where %s belongs: find out who changed it; if nobody uses it, \"dmsetup remove %s\" and try again", m.Name, m.Path, strings.Join(lines, "; "), want, m.Name)
}

// awake takes over a device as a killed predecessor may have left it. What it
// suspended is resumed, with the table that it loaded then: it reads the same. A
// table that was loaded into a live device is dropped. fault.Exhausted: it is paused.
func (d *Devices) awake(ctx context.Context, w *world, m host.Mapped) (host.Mapped, error) {
	switch {
	case m.Suspended && d.pausedFor(m.UUID) != "":
		return m, waits(m.Name, d.pausedFor(m.UUID))
	case m.Suspended:
		if err := d.endFailed(ctx, w, m); err != nil {
			return m, err
		}
		if err := d.host().ResumeMapped(ctx, m); err != nil {
			return m, err
		}
	case m.Inactive:
		if err := d.host().ClearMapped(ctx, m); err != nil {
			return m, err
		}
	default:
		return m, nil
	}
	return d.again(ctx, w, m)
}

// again asks the kernel for a device once more.
func (d *Devices) again(ctx context.Context, w *world, m host.Mapped) (host.Mapped, error) {
	now, err := d.host().MappedByUUID(ctx, m.UUID)
	if err == nil && now == nil {
		w.forget(m.UUID)
		err = fault.New(fault.Conflict, "device %s went away: another process removed it", m.Name)
	}
	if err != nil {
		return m, err
	}
	w.put(*now)
	return *now, nil
}

// change gives a live device another table that reads the same, in one step:
// the kernel holds I/O back for a moment by itself.
func (d *Devices) change(ctx context.Context, w *world, m host.Mapped, readOnly bool, table []host.Target) (host.Mapped, error) {
	if err := d.host().LoadMapped(ctx, m, readOnly, table); err != nil {
		return m, err
	}
	if err := d.host().ResumeMapped(ctx, m); err != nil {
		// The kernel has suspended the device, and refused the table: the old one goes on.
		after := context.WithoutCancel(ctx)
		return m, errors.Join(err, d.host().ClearMapped(after, m), d.host().ResumeMapped(after, m))
	}
	return d.again(ctx, w, m)
}

// reload gives a device another table while it is suspended; ready may refuse,
// when nothing is under way any more.
func (d *Devices) reload(ctx context.Context, w *world, m host.Mapped, ready func() error, table []host.Target) (host.Mapped, error) {
	s, err := d.host().SuspendAll(ctx, []host.Mapped{m}, SuspendLimit)
	if err != nil {
		return m, err
	}
	after := context.WithoutCancel(ctx)
	if err = ready(); err == nil {
		err = d.host().LoadMapped(ctx, m, m.ReadOnly, table)
	}
	if err != nil {
		return m, errors.Join(err, d.host().ClearMapped(after, m), d.goOn(after, s, m))
	}
	if err := s.Resume(); err != nil {
		// It had been resumed, and what was loaded then may read otherwise by now.
		return m, errors.Join(err, d.host().ClearMapped(after, m))
	}
	return d.again(after, w, m)
}

// build makes the devices of a chain that are missing, from the base up, and
// returns them all, head first.
func (d *Devices) build(ctx context.Context, w *world, slabs []Slab) ([]level, error) {
	levels := make([]level, len(slabs))
	base := len(slabs) - 1
	for i := base; i >= 0; i-- {
		var err error
		if i == base {
			if levels[i].num, _, err = d.slab(ctx, w, slabs[i], slabs[i].Size); err == nil {
				err = d.replace(ctx, w, slabs[i], levels[i].num)
			}
		} else {
			levels[i], err = d.layer(ctx, w, slabs[i], levels[i+1])
		}
		if err != nil {
			return nil, fault.New(fault.KindOf(err), "slab %s: %w", slabs[i].ID, err)
		}
		levels[i].slab = slabs[i]
	}
	return levels, nil
}

// slab returns the number and node of a slab's own device: a loop device over a
// file, or the block device that it is.
func (d *Devices) slab(ctx context.Context, w *world, slab Slab, size int64) (num, path string, _ error) {
	var st unix.Stat_t
	err := d.host().Within(ctx, "stat "+slab.Path, statLimit, func() error {
		var now unix.Stat_t
		if err := unix.Stat(slab.Path, &now); err != nil {
			return fault.New(statKind(err), "stat %s: %w", slab.Path, err)
		}
		st = now
		if now.Mode&unix.S_IFMT == unix.S_IFBLK {
			return nil
		}
		return layer.Harmless(slab.Path, slab.Chunk)
	})
	if err != nil {
		return "", "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		spec := host.LoopSpec{File: slab.Path, Size: size, Mark: slabMark(slab.ID)}
		for _, lp := range w.loops {
			if lp.Dev == st.Dev && lp.Inode == st.Ino && lp.RDev == 0 {
				spec.Known = &lp
			}
		}
		lp, err := d.host().AttachLoop(ctx, spec)
		if err != nil {
			return "", "", err
		}
		w.putLoop(lp)
		return number(loopMajor, uint32(lp.Number)), lp.Path, nil
	}
	num = number(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	have, err := sizeOf(num)
	if err != nil {
		return "", "", err
	}
	if have < size {
		return "", "", fault.New(fault.Corrupt, "%s is truncated: it has %d bytes and %d were recorded", slab.Path, have, size)
	}
	return num, slab.Path, nil
}

func statKind(err error) fault.Kind {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fault.NotFound
	}
	return fault.Unavailable
}

// sizeOf is a block device's size in bytes.
func sizeOf(num string) (int64, error) {
	b, err := os.ReadFile("/sys/dev/block/" + num + "/size")
	if err != nil {
		return 0, fault.New(fault.Unavailable, "measure device %s: %w", num, err)
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return sectors * sector, fault.Wrap(fault.Internal, err)
}

// layer returns the device of a layer over its parent's.
func (d *Devices) layer(ctx context.Context, w *world, slab Slab, parent level) (level, error) {
	uuid := slabUUID(slab.ID)
	var m host.Mapped
	if old := w.uuid(uuid); old != nil && old.Targets != nil {
		var err error
		if m, err = d.awake(ctx, w, *old); err != nil {
			return level{}, err
		}
		if t := read(m); t.kind == "linear" && w.content(t.under) == w.content(parent.num) { // it was merged
			return d.longEnough(ctx, w, m, slab.Size, level{})
		}
	}
	num, path, err := d.slab(ctx, w, slab, layer.StoreSize(slab.Size, slab.Chunk))
	if err != nil {
		return level{}, err
	}
	if m.UUID != "" {
		t := read(m)
		if t.kind != "snapshot" && t.kind != "snapshot-merge" || t.store != num || t.chunk != slab.Chunk || w.content(t.under) != w.content(parent.num) {
			return level{}, strange(m, "a layer with the store "+num+" over "+parent.num)
		}
		if len(w.above(number(m.Major, m.Minor))) == 0 && !slices.Contains(w.made, uuid) {
			return level{}, fault.New(fault.InUse, "device %s (%s) is left from an earlier use of this layer, and may not know what was written on another node since; it could not be removed, because something has it open: find out what (\"lsof %s\", \"dmsetup ls --tree\") and end that", m.Name, m.Path, m.Path)
		}
		if err := d.usable(ctx, m); err != nil {
			return level{}, err
		}
		return d.longEnough(ctx, w, m, slab.Size, level{store: path})
	}
	if err := d.checkStore(ctx, slab, path); err != nil {
		return level{}, err
	}
	origin := parent.num
	if parent.slab.Size < slab.Size {
		if origin, err = d.pad(ctx, w, uuid, parent.num, parent.slab.Size, slab.Size); err != nil {
			return level{}, err
		}
	}
	m, err = d.host().CreateMapped(ctx, nameOf(uuid), uuid, false, layered("snapshot", origin, num, slab.Chunk, slab.Size))
	if err != nil {
		return level{}, err
	}
	w.put(m)
	w.made = append(w.made, uuid)
	return level{num: number(m.Major, m.Minor), store: path}, d.usable(ctx, m)
}

// replace turns the device of the layer in whose place a raw slab came, if
// there is one here, to that slab's device. Nothing is written to either.
func (d *Devices) replace(ctx context.Context, w *world, slab Slab, num string) error {
	if slab.Replaces == "" {
		return nil
	}
	old := w.uuid(slabUUID(slab.Replaces))
	if old == nil || old.Targets == nil {
		return nil
	}
	m, err := d.awake(ctx, w, *old)
	if err != nil {
		return err
	}
	switch t := read(m); {
	case t.kind == "linear" && w.content(t.under) == w.content(num):
		return nil
	case t.kind != "snapshot" || m.Size > slab.Size:
		return strange(m, fmt.Sprintf("a layer of at most %d bytes, in whose place slab %s came,", slab.Size, slab.ID))
	}
	_, err = d.reload(ctx, w, m, func() error { return nil }, linear(num, m.Size))
	return err
}

func (d *Devices) longEnough(ctx context.Context, w *world, m host.Mapped, size int64, l level) (level, error) {
	if m.Size < size {
		var err error
		if m, err = d.growLayer(ctx, w, m, size); err != nil {
			return level{}, err
		}
	}
	l.num = number(m.Major, m.Minor)
	return l, nil
}

// usable refuses a layer that the kernel has given up.
func (d *Devices) usable(ctx context.Context, m host.Mapped) error {
	status, err := d.status(ctx, m)
	if err == nil && status == "Invalid" {
		err = invalidStore(m)
	}
	return err
}

func invalidStore(m host.Mapped) error {
	return fault.New(fault.Corrupt, "the layer %s is invalid: the kernel gave its store up after a failed write; what was acknowledged before is still there: unstage the volume, mend the storage, then \"kubectl quarry fix\" makes it readable again", m.Name)
}

func (d *Devices) status(ctx context.Context, m host.Mapped) (string, error) {
	lines, err := d.host().StatusMapped(ctx, m)
	if err != nil || len(lines) == 0 {
		return "", err
	}
	return strings.TrimSpace(lines[0]), nil
}

// pad makes the device under a layer that is larger than its parent, and
// returns its number.
func (d *Devices) pad(ctx context.Context, w *world, layerUUID, under string, length, size int64) (string, error) {
	uuid := padOf(layerUUID)
	want := padded(under, length, size)
	if old := w.uuid(uuid); old != nil && !slices.Equal(old.Targets, want) {
		if err := d.host().RemoveMapped(ctx, *old); err != nil { // a leftover: its layer has no device
			return "", err
		}
		w.forget(uuid)
	}
	m, err := d.host().CreateMapped(ctx, nameOf(uuid), uuid, false, want)
	if err != nil {
		return "", err
	}
	w.put(m)
	return number(m.Major, m.Minor), nil
}

// checkStore looks at a store before the kernel does: that would take one
// without a header for new, and show the parent's content. It is settled, also where
// nothing writes to it now: a merge into it would begin with what the kernel read.
func (d *Devices) checkStore(ctx context.Context, slab Slab, path string) error {
	return d.withStore(ctx, path, true, func(f *os.File) error {
		h, err := layer.ReadHeader(f)
		switch {
		case err != nil:
			return err
		case h.Chunk != slab.Chunk:
			return fault.New(fault.Corrupt, "the store has chunks of %d bytes, and %d were recorded", h.Chunk, slab.Chunk)
		case !h.Valid:
			return fault.New(fault.Corrupt, "the kernel gave the store up after a failed write; what was acknowledged before is still there: \"kubectl quarry fix\" makes it readable again")
		}
		_, err = layer.Settle(f, layer.StoreSize(slab.Size, slab.Chunk))
		return err
	})
}

// withStore opens a store past every cache.
func (d *Devices) withStore(ctx context.Context, path string, write bool, use func(*os.File) error) error {
	flags := os.O_RDONLY | unix.O_DIRECT
	if write {
		flags = os.O_RDWR | unix.O_DIRECT
	}
	return d.host().Within(ctx, "examine the store "+path, storeLimit, func() error {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			return fault.New(fault.Unavailable, "open %s: %w", path, err)
		}
		defer f.Close()
		return use(f)
	})
}

// empty says whether a store has no exceptions on disk.
func (d *Devices) empty(ctx context.Context, path string) (bool, error) {
	found := errors.New("one")
	err := d.withStore(ctx, path, false, func(f *os.File) error {
		size, err := f.Seek(0, 2)
		if err != nil {
			return fault.New(fault.Unavailable, "measure %s: %w", path, err)
		}
		return layer.Exceptions(f, size, func(int64, int64) error { return found })
	})
	if errors.Is(err, found) {
		return false, nil
	}
	return err == nil, err
}
