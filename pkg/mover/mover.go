// Package mover copies the content of slabs: block slabs byte for byte with
// their holes, tree slabs with everything a file system knows about its files.
//
// # What it promises
//
//   - When a copy returns without an error, the target holds exactly the source
//     and is durable: a power cut does not undo it.
//   - A copy that ends with an error or is cancelled leaves the target half done,
//     all files closed and no goroutine behind.
//   - The target is locked (flock) for as long as it is written; a copy into a
//     locked target fails with fault.InUse.
//
// # What it leaves to its caller
//
//   - The target must be invisible to users until the copy has returned: that is
//     the Image Manager's seal. Nothing here renames or hides anything.
//   - The source must be quiescent. A file under a loop device qualifies once the
//     device's file system is frozen or unmounted, because both flush the device:
//     then the file's page cache and the device agree. A block device that was
//     written through another path (its backing file, another host) must be
//     opened or flushed anew by whoever attached it.
//   - A system call that hangs in the kernel, on a dead server, cannot be
//     cancelled. The caller decides in which process that may happen.
package mover

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/image"
)

// Options of a Mover. The zero value is a good choice.
type Options struct {
	// Workers is how many system calls of one copy are in flight at once.
	// 0: 8, however few processors there are: workers mostly wait.
	Workers int
	// Buffer is the size of one read or write in bytes, rounded up to a multiple
	// of 4096. 0: 2 MiB. A copy uses Workers times as much memory.
	Buffer int
	// CheckpointEvery is how many bytes of data are copied between two
	// checkpoints. 0: 256 MiB.
	CheckpointEvery int64
	// Rate is how many bytes per second all copies of this Mover may move
	// together. 0: no limit. Data that is shared by reflink does not count.
	Rate int64
}

// Mover copies slabs. Its methods may be called by many goroutines at once.
type Mover struct {
	workers  int
	buffer   int
	every    int64
	throttle *throttle
}

var _ Files = (*Mover)(nil)

// New makes a Mover.
func New(o Options) *Mover {
	if o.Workers <= 0 {
		o.Workers = 8
	}
	if o.Buffer <= 0 {
		o.Buffer = 2 << 20
	}
	if o.CheckpointEvery <= 0 {
		o.CheckpointEvery = 256 << 20
	}
	return &Mover{
		workers:  o.Workers,
		buffer:   int(alignUp(int64(o.Buffer), align)),
		every:    o.CheckpointEvery,
		throttle: newThrottle(o.Rate),
	}
}

// Way says how data got to its target.
type Way string

// The ways, best first.
const (
	Reflink   Way = "reflink"         // extents are shared, no data moved
	CopyRange Way = "copy_file_range" // the kernel or the server copied
	ReadWrite Way = "read-write"      // through this process
)

// CopyBlock implements Files: see Block.
func (m *Mover) CopyBlock(ctx context.Context, src, dst string, opts image.BlockCopy) error {
	_, err := m.Block(ctx, src, dst, opts)
	return err
}

// CopyTree implements Files: see Tree.
func (m *Mover) CopyTree(ctx context.Context, src, dst string, progress func(done, total int64)) error {
	_, err := m.Tree(ctx, src, dst, progress)
	return err
}
