// Package block turns an image's slabs into the one block device that a node uses.
//
// # Devices
//
// Where the kernel has device-mapper, an image is built of these, and all of
// them carry a UUID or mark that says what they are, so that a restarted agent
// finds them again; nothing is written down:
//
//   - Each slab has one device, whatever the number of chains that share it: a
//     raw slab its loop device (or itself, if it is a block device); a layer a
//     "snapshot" over its parent's device and its own store. Its number stays
//     while it is in use. A merge makes it "snapshot-merge", and in the end "linear"
//     over the parent's device; a raw slab that came in its place makes it "linear"
//     over that one's. It never goes another way.
//   - A layer that is larger than its parent stands on a pad: the parent, and zeros
//     behind it. During a merge the pad is all parent, which was grown before: a
//     "zero" target never lies in a write path.
//   - The top is "linear" over the head's device. It carries the size and
//     whether the image is read-only, it is what is mounted, and it is all that
//     is switched when a layer is added or has been merged.
//   - Over the top of an encrypted image stands a "crypt" device, and that is
//     what is mounted. Everything below it holds ciphertext and a LUKS2 header.
//
// Without device-mapper an image is one raw slab and its top a loop device;
// a View is a loop device always, over a top.
//
// # Order
//
// What is built, is built from the base up, and comes down from the top. The kernel
// reads a store when a table is loaded, unless a device of the same origin and
// store hands its exceptions over; so a table with another origin is only loaded
// while the device is suspended. A flush of a layer's device goes to its store
// and not to its parent; so the old head is flushed before a layer comes over
// it, while nothing can be written. "snapshot-merge" over an invalid store would
// show the parent's content as if it were the image's; so it is only ever reached
// from a "snapshot" that is seen to be valid while it is suspended.
//
// Every function may be killed anywhere and repeated. What is suspended meanwhile
// is resumed by host.SuspendAll's watchdog, with tables that read the same.
package block

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Use is what a top is for; it is part of its name.
type Use byte

// The uses.
const (
	Filesystem Use = 'f' // a filesystem is mounted from it
	Raw        Use = 'b' // the workload gets the device
	// View is a read-only device over a Raw one, for a publish that may only read.
	View Use = 'r'
	// Private is for Quarry's own work: copies, comparisons, merges of what is
	// attached nowhere else.
	Private Use = 'p'
)

// Slab is one slab of a chain.
type Slab struct {
	ID   string // "<domain>/<slab>"
	Path string // from AttachSlab: a regular file or a block device
	// Size in bytes that users see at this level, as recorded.
	Size int64
	// Chunk in bytes, of a layer; 0 for a raw slab.
	Chunk int64
	// Replaces is the ID of a layer that holds the same, and never changes, in whose
	// place this raw slab came: a device of it here is turned to this one's. May be "".
	Replaces string
}

// Spec says what device to build.
type Spec struct {
	// Owner is the handle of the image.
	Owner string
	Use   Use
	// Slabs from head to base: layers, and last a raw slab.
	Slabs []Slab
	// Size in bytes as recorded; never taken from the slab. Of an encrypted image
	// with its header.
	Size     int64
	ReadOnly bool
	// Crypt is nil for an image that is not encrypted.
	Crypt *Crypt
}

// Device is a top that is there.
type Device struct {
	Path     string // "/dev/dm-3", "/dev/loop3"
	Use      Use
	Size     int64 // bytes
	ReadOnly bool
	// Locked: the image is encrypted and its device was not opened, or not to the
	// end. Path is the ciphertext's: for nobody but Detach and Attach.
	Locked bool
	// DirectIO: no slab is cached a second time below the device.
	DirectIO bool
	// Note says what an operator should know; may be empty.
	Note string
	// Paused says why I/O waits, somewhere below the device; empty: it does not. See Pause.
	Paused string
	// Backing is the path of the slab that takes the writes, as the kernel shows
	// it, Dev and Inode what it is.
	Backing    string
	Dev, Inode uint64

	below  []string     // UUIDs of what it stands on
	loop   *host.Loop   // one of the two
	mapped *host.Mapped // the other
	crypt  *host.Mapped // what stands over mapped, of an encrypted image
}

// Devices builds and finds devices on this host. Its methods may be called by
// many goroutines; those that change something of one domain wait for each other.
type Devices struct {
	Host *host.Local

	kernel kernel // in place of Host, in tests

	mu    sync.Mutex
	busy  map[string]chan struct{} // locked domains, by their short hash; closed when let go
	able  bool                     // Layers was nil once
	why   error                    // or this
	asked time.Time                // then
	crypt bool                     // Encrypts was nil once

	changes atomic.Int64
	paused  map[string]*paused // by UUID
	letting map[string]int     // devices whose I/O goes on although it is paused, and how many want that
}

// Layers says whether chains can be built here: nil, or fault.Unsupported with
// what is missing.
func (d *Devices) Layers(ctx context.Context) error {
	const fresh = time.Minute // asking again costs a program, and nothing changes often
	d.mu.Lock()
	able, why, asked := d.able, d.why, d.asked
	d.mu.Unlock()
	if able || why != nil && time.Since(asked) < fresh {
		return why
	}
	err := d.host().DeviceMapper(ctx)
	if err == nil || fault.KindOf(err) == fault.Unsupported {
		d.mu.Lock()
		d.able, d.why, d.asked = err == nil, err, time.Now()
		d.mu.Unlock()
	}
	return err
}

// Attach builds the device, or returns the one that is there: grown to spec.Size if
// it was smaller, and moved to the chain's present head if a Switch was missed.
//
// fault.Unsupported: a chain, and no device-mapper. fault.Corrupt: a slab is
// shorter than recorded, or a layer's store is missing, damaged or invalid.
// fault.InUse: it exists read-only and in use and should not be, or the reverse; or a
// device under our name is not what it should be. fault.Conflict: it is in
// use with a chain that this one does not continue. fault.Exhausted: a device of the
// chain is paused.
//
// Of an encrypted image also, when it was not open: fault.Permission: the passphrase is
// wrong. fault.Corrupt: its header is damaged, or Format found something else.
// fault.Unsupported: see Encrypts.
func (d *Devices) Attach(ctx context.Context, spec Spec) (Device, error) {
	if spec.Crypt != nil {
		return d.attachCrypt(ctx, spec)
	}
	plain, err := d.plain(ctx, spec)
	if err != nil {
		return Device{}, err
	}
	if plain {
		return d.attachLoop(ctx, spec)
	}
	if err := spec.check(); err != nil {
		return Device{}, err
	}
	unlock, err := d.lock(ctx, spec)
	if err != nil {
		return Device{}, err
	}
	defer unlock()
	return d.attach(ctx, spec)
}

// check refuses what cannot be a chain.
func (s Spec) check() error {
	if len(s.Slabs) == 0 {
		return fault.New(fault.Internal, "%s has no slabs", s.Owner)
	}
	seen := map[string]bool{}
	for i, slab := range s.Slabs {
		base := i == len(s.Slabs)-1
		switch {
		case seen[slab.ID]:
			return fault.New(fault.Corrupt, "the chain of %s is a cycle: slab %s is in it twice", s.Owner, slab.ID)
		case base && slab.Chunk != 0:
			return fault.New(fault.Corrupt, "the chain of %s ends with %s, which is a layer: its parent is missing", s.Owner, slab.ID)
		case !base && slab.Chunk == 0:
			return fault.New(fault.Corrupt, "the chain of %s has %s above its base, which is not a layer", s.Owner, slab.ID)
		case slab.Size <= 0 || slab.Size%sector != 0:
			return fault.New(fault.Invalid, "slab %s of %s has %d bytes: a multiple of %d above 0 is allowed", slab.ID, s.Owner, slab.Size, sector)
		}
		seen[slab.ID] = true
	}
	if s.Size <= 0 || s.Size%sector != 0 || s.Size > s.Slabs[0].Size {
		return fault.New(fault.Invalid, "%s has %d bytes on a slab of %d: a multiple of %d up to that is allowed", s.Owner, s.Size, s.Slabs[0].Size, sector)
	}
	return nil
}

// Find returns the tops of an owner, views first: the order in which to take
// them down. fault.Unavailable: none was found, but a device whose storage does
// not answer may be one.
func (d *Devices) Find(ctx context.Context, owner string) ([]Device, error) {
	all, err := d.tops(ctx, func(dev Device) bool { return dev.Owns(owner) })
	if err != nil {
		return nil, err
	}
	var out []Device
	for _, u := range []Use{View, Private, Raw, Filesystem} {
		for _, dev := range all {
			if dev.Use == u {
				out = append(out, dev)
			}
		}
	}
	return out, nil
}

// All returns every top that was built by this package, by whatever process.
func (d *Devices) All(ctx context.Context) ([]Device, error) {
	return d.tops(ctx, func(Device) bool { return true })
}

func (d *Devices) tops(ctx context.Context, match func(Device) bool) ([]Device, error) {
	var out []Device
	w, err := d.look(ctx)
	if err != nil {
		return nil, err
	}
	for i := range w.mapped {
		if dev, ok := w.top(&w.mapped[i]); ok && match(dev) {
			out = append(out, dev)
		}
	}
	for _, lp := range w.tops {
		if dev := loopDevice(lp); match(dev) {
			out = append(out, dev)
		}
	}
	// What is there is used although another device does not answer: one dead
	// server must not block another's volumes.
	if len(out) == 0 && w.dumb != nil {
		return nil, w.dumb
	}
	return out, nil
}

// Owns says whether a device belongs to an owner.
func (dev Device) Owns(owner string) bool {
	switch {
	case dev.mapped != nil:
		return dev.mapped.UUID == topUUID(dev.Use, owner)
	case dev.loop != nil:
		return dev.loop.Mark == mark(dev.Use, owner)
	}
	return false
}

// Switchable says whether layers can be put over the device's head while it is in use.
func (dev Device) Switchable() bool { return dev.mapped != nil }

// Detach writes out and takes the device down, and everything below it that
// nobody else uses; where it is paused, that goes on by itself. fault.InUse: it is in use.
// fault.Unavailable: as of Let.
func (d *Devices) Detach(ctx context.Context, dev Device) error {
	if dev.loop != nil {
		return d.host().DetachLoop(ctx, *dev.loop)
	}
	done, err := d.Let(dev)
	defer done()
	if err != nil {
		return err
	}
	return d.detach(ctx, dev)
}

// attachLoop builds the device of a single slab as a loop device.
func (d *Devices) attachLoop(ctx context.Context, spec Spec) (Device, error) {
	if len(spec.Slabs) != 1 {
		return Device{}, fault.New(fault.Unsupported, "%s is a chain of %d slabs: a loop device is of one", spec.Owner, len(spec.Slabs))
	}
	lp, err := d.host().AttachLoop(ctx, host.LoopSpec{File: spec.Slabs[0].Path, Size: spec.Size, ReadOnly: spec.ReadOnly, Mark: mark(spec.Use, spec.Owner)})
	if err != nil {
		return Device{}, err
	}
	return loopDevice(lp), nil
}

// plain says whether the top is a loop device: a view always, what an agent
// without device-mapper has made as long as it is there, and where there is none.
func (d *Devices) plain(ctx context.Context, spec Spec) (bool, error) {
	if spec.Use == View {
		return true, nil
	}
	err := d.Layers(ctx)
	switch {
	case err == nil:
	case fault.KindOf(err) != fault.Unsupported:
		return false, err
	case len(spec.Slabs) > 1:
		return false, fault.New(fault.Unsupported, "%s is a chain of %d slabs: %w", spec.Owner, len(spec.Slabs), err)
	default:
		return true, nil
	}
	old, err := d.host().Loops(ctx, func(lp host.Loop) bool { return lp.Mark == mark(spec.Use, spec.Owner) })
	if err != nil && fault.KindOf(err) != fault.Unavailable { // what does not answer fails to attach, if it matters
		return false, err
	}
	if len(old) > 0 && len(spec.Slabs) > 1 {
		return false, fault.New(fault.InUse, "%s is attached as %s, without device-mapper, and has become a chain of %d slabs: unstage it from this node and stage it again", spec.Owner, old[0].Path, len(spec.Slabs))
	}
	return len(old) > 0, nil
}

func loopDevice(lp host.Loop) Device {
	d := Device{Path: lp.Path, Size: lp.Size, ReadOnly: lp.ReadOnly, DirectIO: lp.DirectIO,
		Backing: lp.Backing, Dev: lp.Dev, Inode: lp.Inode, loop: &lp, Note: cached(lp)}
	d.Use, _ = useOf(lp.Mark)
	return d
}

func cached(lp host.Loop) string {
	if lp.DirectIO {
		return ""
	}
	return lp.Path + " works through the page cache: the storage of " + lp.Backing + " does not take direct I/O of this size"
}
