// Package block turns an image's slabs into the one block device that a node
// uses. In this release an image is one raw slab, and the device a loop device
// over its file: it carries the recorded size, whether it is read-only, and
// the owner's mark, by which it is found again after a restart. A slab that is
// a block device itself gets one too, until chains of layers bring
// device-mapper, which carries the same three things.
package block

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Use is what a device is for; it is part of its mark.
type Use byte

// The uses.
const (
	Filesystem Use = 'f' // a filesystem is mounted from it
	Raw        Use = 'b' // the workload gets the device
	// View is a read-only device over a Raw one, for a publish that may only read.
	View Use = 'r'
)

// Spec says what device to build.
type Spec struct {
	// Owner is the handle of the image.
	Owner string
	Use   Use
	// Slabs are the paths of the slabs from head to base: regular files or
	// block devices. One in this release.
	Slabs []string
	// Size in bytes as recorded; never taken from the slab.
	Size     int64
	ReadOnly bool
}

// Device is a block device that is there.
type Device struct {
	Path     string // "/dev/loop3"
	Use      Use
	Size     int64 // bytes
	ReadOnly bool
	// DirectIO: the slab is not cached a second time below the device.
	DirectIO bool
	// Note says what an operator should know; may be empty.
	Note string
	// Backing is the slab's path as the kernel shows it, Dev and Inode what it is.
	Backing    string
	Dev, Inode uint64
	loop       host.Loop
}

// Devices builds and finds devices on this host.
type Devices struct{ Host *host.Local }

const markPrefix = "quarry-"

// mark is at most host.MaxMark bytes: a handle may be longer, so it is hashed.
func mark(u Use, owner string) string {
	sum := sha256.Sum256([]byte(owner))
	return markPrefix + string(u) + "-" + hex.EncodeToString(sum[:24])
}

// Attach builds the device, or returns the one that is there, grown to
// spec.Size if it was smaller. Errors as of host.AttachLoop.
func (d Devices) Attach(ctx context.Context, spec Spec) (Device, error) {
	if len(spec.Slabs) != 1 {
		return Device{}, fault.New(fault.Unsupported, "%s is a chain of %d slabs: this release builds devices of one", spec.Owner, len(spec.Slabs))
	}
	lp, err := d.Host.AttachLoop(ctx, host.LoopSpec{File: spec.Slabs[0], Size: spec.Size, ReadOnly: spec.ReadOnly, Mark: mark(spec.Use, spec.Owner)})
	if err != nil {
		return Device{}, err
	}
	return device(lp), nil
}

func device(lp host.Loop) Device {
	d := Device{Path: lp.Path, Size: lp.Size, ReadOnly: lp.ReadOnly, DirectIO: lp.DirectIO,
		Backing: lp.Backing, Dev: lp.Dev, Inode: lp.Inode, loop: lp}
	if use, ok := useOf(lp.Mark); ok {
		d.Use = use
	}
	if !lp.DirectIO {
		d.Note = lp.Path + " works through the page cache: the storage of " + lp.Backing + " does not take direct I/O of this size"
	}
	return d
}

func useOf(mark string) (Use, bool) {
	rest, ok := strings.CutPrefix(mark, markPrefix)
	if !ok || len(rest) < 2 || rest[1] != '-' {
		return 0, false
	}
	return Use(rest[0]), true
}

// Find returns the devices of an owner, views first: the order in which to
// take them down. fault.Unavailable: none was found, but a device whose storage
// does not answer may be one.
func (d Devices) Find(ctx context.Context, owner string) ([]Device, error) {
	uses := []Use{View, Raw, Filesystem}
	loops, err := d.Host.Loops(ctx, func(lp host.Loop) bool {
		for _, u := range uses {
			if lp.Mark == mark(u, owner) {
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	var out []Device
	for _, u := range uses {
		for _, lp := range loops {
			if dev := device(lp); dev.Use == u {
				out = append(out, dev)
			}
		}
	}
	return out, nil
}

// All returns every device that was built by this package, by whatever process.
func (d Devices) All(ctx context.Context) ([]Device, error) {
	loops, err := d.Host.Loops(ctx, func(lp host.Loop) bool { _, ok := useOf(lp.Mark); return ok })
	if err != nil {
		return nil, err
	}
	var out []Device
	for _, lp := range loops {
		out = append(out, device(lp))
	}
	return out, nil
}

// Owns says whether a device belongs to an owner.
func (dev Device) Owns(owner string) bool { return dev.loop.Mark == mark(dev.Use, owner) }

// Grow lets a device show size bytes of slabs that were grown before.
// fault.Corrupt: the slab is shorter.
func (d Devices) Grow(ctx context.Context, dev Device, size int64) (Device, error) {
	lp, err := d.Host.GrowLoop(ctx, dev.loop, size)
	if err != nil {
		return dev, err
	}
	return device(lp), nil
}

// Detach writes out and takes the device down. fault.InUse: it is in use.
func (d Devices) Detach(ctx context.Context, dev Device) error {
	return d.Host.DetachLoop(ctx, dev.loop)
}
