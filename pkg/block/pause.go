package block

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// A layer whose store meets a full storage is given up by the kernel. So where a file
// has not all its space, the device through which it is written is paused in time: what
// is under way ends, what comes waits. It is the layer's device that is suspended and not the
// top, so that no filesystem is frozen, which would be to write, and a merge stops as well.
//
// Work on a chain that finds a paused device is refused, but for what takes devices down:
// that goes on by itself.

const (
	// pauseWait is how long Pause waits for other work on a domain's devices.
	pauseWait = 50 * time.Millisecond
	// thinLimit is how long a storage may take to say how much space a file has.
	thinLimit = 2 * time.Second
)

// Thin is a device through which a file is written that has not all the space that it
// may come to need.
type Thin struct {
	Name string // of the device
	// File is the path of the file as the kernel shows it, FS the number of its file
	// system, and Inode its own there.
	File      string
	FS, Inode uint64

	device host.Mapped
}

// Of says whether the file is a slab of a domain.
func (t Thin) Of(domain string) bool { return domainOf(t.Name) == domainHash(domain) }

// paused is a device whose I/O waits.
type paused struct {
	Thin
	why string
	// atOnce: there is not enough space to let it go on, not even to be taken down.
	atOnce bool
	still  *host.Suspension // nil: it is only being paused
}

// Changes counts what may have changed devices: as long as it is the same, so is Thin, but
// for the space that files have got since.
func (d *Devices) Changes() int64 { return d.changes.Load() }

// Thin returns the thin devices that are written: by a workload through a head, or by a merge.
// A file that cannot be looked at is taken for one that has not all its space.
func (d *Devices) Thin(ctx context.Context) ([]Thin, error) {
	d.mu.Lock()
	able := d.able
	d.mu.Unlock()
	if !able { // as far as is known: an agent asks when it starts, and before it builds a chain
		return nil, nil
	}
	w, err := d.look(ctx)
	if err != nil {
		return nil, err
	}
	var all []Thin
	var files []host.Loop
	for _, m := range w.mapped {
		if !isSlab(m.UUID) {
			continue
		}
		if lp := w.writes(m); lp != nil {
			all = append(all, Thin{Name: m.Name, File: lp.Backing, FS: lp.Dev, Inode: lp.Inode, device: m})
			files = append(files, *lp)
		}
	}
	var out []Thin
	for i, whole := range d.whole(ctx, files) {
		if !whole {
			out = append(out, all[i])
		}
	}
	return out, nil
}

// writes is the loop device over the file that new content of a layer's device goes to;
// nil: it is not written here, or it goes to a block device, which has its space.
func (w *world) writes(m host.Mapped) *host.Loop {
	t := read(m)
	switch {
	case t.kind == "snapshot-merge": // its own store only gets smaller
		below := w.content(t.under)
		if p := w.number(below); p != nil {
			return w.loop(read(*p).store)
		}
		return w.loop(below)
	case t.kind == "snapshot" && w.writable(number(m.Major, m.Minor)):
		return w.loop(t.store)
	}
	return nil
}

// writable says whether a top that may be written shows a device.
func (w *world) writable(num string) bool {
	return slices.ContainsFunc(w.mapped, func(m host.Mapped) bool {
		_, top := useOf(m.UUID)
		return top && !m.ReadOnly && w.content(read(m).under) == num
	})
}

// whole says which loop devices' files certainly have all their space. Storages are asked at the same time,
// and one that does not answer for a file is asked for no other.
func (d *Devices) whole(ctx context.Context, files []host.Loop) []bool {
	out := make([]bool, len(files))
	on := map[uint64][]int{}
	for i, lp := range files {
		on[lp.Dev] = append(on[lp.Dev], i)
	}
	var all sync.WaitGroup
	for _, storage := range on {
		all.Go(func() {
			for _, i := range storage {
				var err error
				if out[i], err = d.isWhole(ctx, files[i]); errors.Is(err, fault.Unavailable) {
					return
				}
			}
		})
	}
	all.Wait()
	return out
}

func (d *Devices) isWhole(ctx context.Context, lp host.Loop) (bool, error) {
	var st unix.Stat_t
	err := d.host().Within(ctx, "stat "+lp.Backing, thinLimit, func() error {
		var now unix.Stat_t
		if err := unix.Stat(lp.Backing, &now); err != nil {
			return fault.New(statKind(err), "stat %s: %w", lp.Backing, err)
		}
		st = now
		return nil
	})
	return err == nil && st.Dev == lp.Dev && st.Ino == lp.Inode && st.Blocks*512 >= lp.Size, err
}

// below are the UUIDs of our devices on which one stands, however deep.
func (w *world) below(m host.Mapped) (out []string) {
	todo := []host.Mapped{m}
	for ; len(todo) > 0; todo = todo[1:] {
		for _, t := range todo[0].Targets {
			for word := range strings.FieldsSeq(t.Params) {
				if next := w.number(word); next != nil && !slices.Contains(out, next.UUID) {
					out = append(out, next.UUID)
					todo = append(todo, *next)
				}
			}
		}
	}
	return out
}

// Pause lets I/O to devices wait until Unpause; why is told to those whose work is refused
// for it. Somebody has to call Keep all the time: else it ends after SuspendLimit, or
// with this process. What is paused, or has gone, is left alone, and unless it has to be
// at once what is let, too; so is a merge that has failed: its store takes no more exceptions,
// and to resume it is not safe.
//
// fault.Pending: other work on these devices is going on; at once it is not waited for, and may fail.
func (d *Devices) Pause(ctx context.Context, list []Thin, why string, atOnce bool) error {
	d.mu.Lock()
	list = slices.DeleteFunc(slices.Clone(list), func(t Thin) bool {
		p := d.paused[t.device.UUID]
		if p != nil {
			p.why, p.atOnce = why, atOnce
		}
		return p != nil || d.letting[t.device.UUID] > 0 && !atOnce
	})
	d.mu.Unlock()
	if len(list) == 0 {
		return nil
	}
	if !atOnce {
		var names []string
		for _, t := range list {
			names = append(names, domainOf(t.device.UUID))
		}
		wait, cancel := context.WithTimeout(ctx, pauseWait)
		unlock, err := d.lockDomains(wait, names)
		cancel()
		if err != nil {
			return fault.Wrap(fault.Pending, err)
		}
		defer unlock()
	}
	errs := make([]error, len(list))
	var all sync.WaitGroup
	for i, t := range list {
		all.Go(func() { errs[i] = d.pause(ctx, &paused{Thin: t, why: why, atOnce: atOnce}) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func (d *Devices) pause(ctx context.Context, p *paused) error {
	failed, err := d.failed(ctx, p.device)
	switch {
	case errors.Is(err, fault.NotFound) || failed && p.atOnce:
		return nil
	case failed: // and if it could not go on before, it may now
		return d.wake(ctx, p.device)
	case err != nil:
		return err
	}
	// It is noted first: who finds it suspended takes it for left over otherwise.
	if !d.note(p) {
		return nil
	}
	still, err := d.host().SuspendAll(ctx, []host.Mapped{p.device}, SuspendLimit)
	if err == nil {
		// The last that was under way may have failed.
		failed, err = d.failed(ctx, p.device)
	}
	if err == nil && !failed && d.noted(p, still) {
		return nil
	}
	d.forget(p)
	if still != nil {
		err = errors.Join(err, over(d.goOn(context.WithoutCancel(ctx), still, p.device)))
	}
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// failed says whether a device has a merge that failed.
func (d *Devices) failed(ctx context.Context, m host.Mapped) (bool, error) {
	if read(m).kind != "snapshot-merge" {
		return false, nil
	}
	status, err := d.status(ctx, m)
	return status == host.MergeFailed, err
}

// note enters what is about to be paused; false: it is already, or has been let meanwhile.
func (d *Devices) note(p *paused) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused[p.device.UUID] != nil || d.letting[p.device.UUID] > 0 && !p.atOnce {
		return false
	}
	if d.paused == nil {
		d.paused = map[string]*paused{}
	}
	d.paused[p.device.UUID] = p
	return true
}

// noted says whether what was noted, and is suspended now, is to stay so.
func (d *Devices) noted(p *paused, still *host.Suspension) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused[p.device.UUID] != p {
		return false
	}
	p.still = still
	return true
}

func (d *Devices) forget(p *paused) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused[p.device.UUID] == p {
		delete(d.paused, p.device.UUID)
	}
}

// Paused returns what is paused.
func (d *Devices) Paused() []Thin {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []Thin
	for _, p := range d.paused {
		if p.still != nil {
			out = append(out, p.Thin)
		}
	}
	return out
}

// pausedFor is why a device is paused, or "".
func (d *Devices) pausedFor(uuid string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.paused[uuid]; p != nil {
		return p.why
	}
	return ""
}

// waits is the error of work on a paused device.
func waits(name, why string) error {
	return fault.New(fault.Exhausted, "writes to device %s wait: %s", name, why)
}

// Keep lets what is paused stay so, for SuspendLimit from now on. It forgets what is not so
// any more: what has gone, and what somebody has resumed, which may be paused again.
func (d *Devices) Keep(ctx context.Context) error {
	var errs []error
	for _, t := range d.Paused() {
		d.mu.Lock()
		p := d.paused[t.device.UUID]
		d.mu.Unlock()
		if p == nil || p.still == nil {
			continue
		}
		ended := p.still.Renew() != nil
		if !ended {
			m, err := d.host().MappedByUUID(ctx, t.device.UUID)
			errs = append(errs, err)
			ended = err == nil && (m == nil || !m.Suspended)
		}
		if ended {
			errs = append(errs, d.resume(t.device.UUID, p))
		}
	}
	return errors.Join(errs...)
}

// Unpause lets I/O to devices go on. What is not paused is success. After an error the
// device is resumed within SuspendLimit.
func (d *Devices) Unpause(list []Thin) error {
	var errs []error
	for _, t := range list {
		errs = append(errs, d.resume(t.device.UUID, nil))
	}
	return errors.Join(errs...)
}

// resume ends the pause of a device, if it is this one; nil: whichever. It waits for no other
// work: that may be waiting for the device.
func (d *Devices) resume(uuid string, only *paused) error {
	d.mu.Lock()
	p := d.paused[uuid]
	if p == nil || only != nil && p != only {
		d.mu.Unlock()
		return nil
	}
	delete(d.paused, uuid)
	still := p.still
	d.mu.Unlock()
	if still == nil { // who is pausing it finds out
		return nil
	}
	return over(still.Resume())
}

// over is nil where a suspension had ended before.
func over(err error) error {
	if errors.Is(err, fault.Conflict) || errors.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// Let lets I/O of a device, and of all below it, go on until done, though it is paused: what
// waits is written, so that the device can be taken down. Only what has to be paused at once is again.
//
// fault.Unavailable: something was paused at once. Nothing goes on.
func (d *Devices) Let(dev Device) (done func(), err error) { return d.let(dev.below) }

func (d *Devices) let(uuids []string) (done func(), err error) {
	d.mu.Lock()
	for _, u := range uuids {
		if p := d.paused[u]; p != nil && p.atOnce {
			d.mu.Unlock()
			return func() {}, fault.New(fault.Unavailable, "device %s cannot be written out: %s", p.Name, p.why)
		}
	}
	if d.letting == nil {
		d.letting = map[string]int{}
	}
	for _, u := range uuids {
		d.letting[u]++
	}
	d.mu.Unlock()
	var errs []error
	for _, u := range uuids {
		errs = append(errs, d.resume(u, nil))
	}
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, u := range uuids {
			if d.letting[u]--; d.letting[u] == 0 {
				delete(d.letting, u)
			}
		}
	}), errors.Join(errs...)
}
