package main

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	// size of every image.
	size = 256 * mib
)

// phase says what is done to the part of the image that a load has to itself.
type phase string

const (
	below phase = "read"        // reads of what the layers below the top hold, and the base
	first phase = "first write" // since the top was made: each block once
	later phase = "later write" // the same again and again
	above phase = "read of top" // reads of what was written
)

// shape is how a load accesses the device.
type shape struct {
	random bool
	block  int64
	apart  int64 // from one block to the next; 0: they lie side by side
	depth  int   // requests at a time
	from   int64 // the part of the image that its writes have to themselves
	length int64
	long   bool // only measured in a long run
}

func (s shape) String() string {
	block := fmt.Sprintf("%d KiB", s.block/kib)
	if s.block >= mib {
		block = fmt.Sprintf("%d MiB", s.block/mib)
	}
	kind := "seq"
	if s.random {
		kind = "random"
	}
	if s.apart > 0 {
		kind = "apart"
	}
	return fmt.Sprintf("%s %s x%d", block, kind, s.depth)
}

// untouched is the part of the image that nothing writes to while it is measured.
const untouched = 204 * mib

func shapes(long bool) []shape {
	all := []shape{
		{random: true, block: 4 * kib, depth: 1, from: 0, length: 4 * mib},
		{random: true, block: 4 * kib, depth: 16, from: 4 * mib, length: 16 * mib},
		{block: 4 * kib, apart: 64 * kib, depth: 1, from: 20 * mib, length: 24 * mib, long: true},
		{block: 4 * kib, apart: 64 * kib, depth: 16, from: 44 * mib, length: 48 * mib},
		{block: 64 * kib, depth: 1, from: 92 * mib, length: 16 * mib, long: true},
		{block: 64 * kib, depth: 16, from: 108 * mib, length: 32 * mib},
		{block: mib, depth: 1, from: 140 * mib, length: 32 * mib, long: true},
		{block: mib, depth: 4, from: 172 * mib, length: 32 * mib},
	}
	var out []shape
	for _, s := range all {
		if long || !s.long {
			out = append(out, s)
		}
	}
	return out
}

// section is what fio does for one load on one device.
func section(p phase, s shape, runtime time.Duration, path string) string {
	rw, from, length := "write", s.from, s.length
	if p == below || p == above {
		rw = "read"
	}
	if p == below {
		from, length = untouched, size-untouched
	}
	if s.random {
		rw = "rand" + rw
	}
	more := ""
	if p != first { // the memory for requests is not there at the beginning
		more = fmt.Sprintf("time_based=1\nramp_time=20ms\nruntime=%dms\n", runtime.Milliseconds())
	}
	if s.apart > 0 {
		rw += fmt.Sprintf(":%d", s.apart-s.block) // skipped after each
		more += fmt.Sprintf("io_size=%d\n", length/s.apart*s.block)
	}
	return fmt.Sprintf("stonewall\nrw=%s\nbs=%d\niodepth=%d\noffset=%d\nsize=%d\n%sfilename=%s\n", rw, s.block, s.depth, from, length, more, path)
}

// fill writes a whole device or file once.
func fill(path string) error {
	return writes(path, mib, func(yield func(int64) bool) {
		for at := int64(0); at < size && yield(at); at += mib {
		}
	})
}

// scatter writes blocks of 4 KiB here and there in the part that is only read
// later on, as a volume has them from the time between two snapshots.
func scatter(path string, seed uint64) error {
	const blocks = 512
	random := rand.New(rand.NewPCG(seed, seed))
	return writes(path, 4*kib, func(yield func(int64) bool) {
		for range blocks {
			if !yield(untouched + random.Int64N((size-untouched)/(4*kib))*4*kib) {
				return
			}
		}
	})
}

// writes puts blocks past the page cache.
func writes(path string, block int64, at iter.Seq[int64]) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	// Memory from the kernel is aligned as direct I/O needs it.
	b, err := unix.Mmap(-1, 0, int(block), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	copy(b, bytes.Repeat([]byte("quarry's benchmark "), int(block)/19+1))
	for off := range at {
		if _, err = f.WriteAt(b, off); err != nil {
			break
		}
	}
	return errors.Join(err, unix.Munmap(b), f.Sync(), f.Close())
}
