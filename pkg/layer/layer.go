// Package layer reads and makes what lies in a layer's slab: the store in
// which the kernel's device-mapper keeps the chunks of an image that were
// written since its parent (target "snapshot", persistent exception store,
// drivers/md/dm-snap-persistent.c). It knows the format and nothing of hosts:
// everything here works on any file or block device that is handed in.
//
// # The format
//
// All numbers are little endian. The store is cut into chunks of one size, a
// power of two. Chunk 0 is the header: the magic "SnAp", whether the store is
// valid, the version 1 and the chunk size in sectors of 512 bytes, 32 bits each.
// Then areas follow, each one chunk of metadata and the chunks of data that it
// describes. A metadata chunk is an array of exceptions, pairs of 64 bit chunk
// numbers: old is the chunk of the image, new the chunk of the store that has
// its content. With e = chunk size / 16 exceptions in an area, the metadata of
// area n is chunk 1+n*(e+1). An exception whose new is 0 ends the list; an area
// that is full is followed by the next.
//
// The kernel hands out chunks and commits exceptions in the same order (since
// Linux 3.14), so exception i of area n always is about chunk 1+n*(e+1)+1+i.
// What is not in that place is damage, and this package says so.
//
// An exception is on disk, behind a flush of the data that it points to, before
// the write that made it is acknowledged. Before an area is written full, the
// next one is zeroed: hence the room for one more area in StoreSize, and hence
// leftovers in recycled space are never read. A merge takes exceptions away from
// the end.
//
// One failed write to a store makes the kernel clear the header's valid field:
// from then on the layer cannot be read. What was committed is still right, so
// Repair can bring it back.
//
// # Figures
//
// ChunkSize keeps the number of exceptions at or below 16 Mi, which bounds the
// memory that the kernel needs for a layer. It takes 32 bytes for an exception,
// one for a run of up to 256 chunks that were written in order; and a hash table
// of up to 2.25 MiB. When a layer's device is made, its metadata is read.
//
//	image     chunk     exceptions  metadata on disk   kernel memory, random / in order
//	  1 GiB    32 KiB       32 Ki   512 KiB  0.049 %     1 MiB /   4 KiB
//	 64 GiB    32 KiB        2 Mi    32 MiB  0.049 %    64 MiB / 256 KiB
//	  1 TiB    64 KiB       16 Mi   256 MiB  0.024 %   512 MiB /   2 MiB
//	 16 TiB     1 MiB       16 Mi   256 MiB  0.0015 %  512 MiB /   2 MiB
//
// The first write to a chunk copies the whole chunk unless it covers it, and takes
// the space of a whole chunk: small writes, far from each other, need up to eight times
// their size with 32 KiB. Smaller chunks save that, but each is a request of its own:
// with 4 KiB sequential reads had 0.34 to 0.48 of the bare device's throughput,
// with 32 KiB 0.90, and first writes were faster, too (docs/BENCHMARKS.md).
//
// The kernel copies what there is of a chunk over the end of an image, and leaves
// the rest of it in the store as it was. Growth would show that. So a chunk divides the
// size of its image, and sizes are rounded up (Unit).
//
// # Shares
//
// The kernel reads a store's metadata into pieces of memory as large as a chunk, whose
// pages after the first are not counted by themselves. The clients of NFS, SMB, FUSE and their
// like take such pages for pages of their own, count them up and down, and free them at zero: the
// node's memory is destroyed. So a layer on a share has chunks of ShareChunk, one page,
// and takes an image of up to ShareLimit, with 64 Mi chunks.
package layer

import (
	"encoding/binary"
	"errors"
	"io"
	"unsafe"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const (
	magic     = 0x70416e53 // "SnAp"
	version   = 1
	sector    = 512
	entrySize = 16
	headerLen = 16

	// MinChunk is the smallest chunk of a layer in bytes, the page size of most
	// machines and the largest block of common disks.
	MinChunk = 4096
	// ShareChunk is the chunk of a layer on a share, in bytes, and ShareLimit the largest image that can have one.
	ShareChunk = MinChunk
	ShareLimit = 256 << 30
	// usualChunk is the smallest of an image whose size allows it, see above.
	usualChunk = 32 << 10
	// maxChunk is the largest that is believed: the kernel holds four in memory.
	maxChunk = 128 << 20
	// maxExceptions bounds the memory of a layer, see above.
	maxExceptions = 16 << 20
	// piece is how much metadata is read at once.
	piece = 1 << 20
)

// File is an open slab. Every read and write is aligned to MinChunk in file and
// memory, so it may be open for direct I/O, as it should be if a device is in
// use: the kernel's target goes past the page cache.
type File interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Header is the first chunk of a store.
type Header struct {
	Chunk int64 // bytes, a power of two
	// Valid: the kernel has not given up on the store.
	Valid bool
}

// ChunkSize is the chunk size in bytes for an image of size bytes: 32 KiB, or the
// smallest power of two with which it has at most 16 Mi chunks; and for a size
// that this does not divide, the largest that does, or MinChunk.
func ChunkSize(size int64) int64 {
	chunk := wanted(size)
	for size%chunk != 0 && chunk > MinChunk {
		chunk /= 2
	}
	return chunk
}

func wanted(size int64) int64 {
	chunk := int64(usualChunk)
	for chunks(size, chunk) > maxExceptions && chunk < maxChunk {
		chunk *= 2
	}
	return chunk
}

// Unit is what the size of an image of about size bytes should be a multiple of, on
// storage of that granularity: then its layers have the chunks that it should have.
// All in bytes.
func Unit(size, granularity int64) int64 {
	unit, chunk := granularity, wanted(size)
	for unit%chunk != 0 { // at most log2(chunk) times: that is a power of two
		unit *= 2
	}
	return unit
}

// StoreSize is how many bytes a slab needs to take every chunk of an image of
// size bytes, with all metadata. It is a multiple of chunk.
func StoreSize(size, chunk int64) int64 {
	n := chunks(size, chunk)
	areas := n/(chunk/entrySize) + 1 // the one that the kernel zeroes ahead included
	return chunk * (1 + areas + n)
}

// Used is how many bytes at the beginning of a store with n exceptions hold
// something: the last area's metadata and as many chunks as it has exceptions. What
// lies behind may be given back while nobody writes to the layer.
func Used(n, chunk int64) int64 {
	h, per := Header{Chunk: chunk}, chunk/entrySize
	return (h.area(n/per) + 1 + n%per) * chunk
}

// chunks is how many chunks cover size bytes.
func chunks(size, chunk int64) int64 { return (size + chunk - 1) / chunk }

// Format makes an empty store over whatever the slab holds. Until it has returned the slab
// may hold anything, also an older store that lay in the same space: nobody may take it for a
// layer before. It may be repeated. fault.Invalid: a chunk size that the kernel would not take.
func Format(f File, chunk int64) error {
	if !allowed(chunk) {
		return fault.New(fault.Invalid, "chunk size %d: powers of two from %d to %d are allowed", chunk, MinChunk, maxChunk)
	}
	if err := zero(f, 0, 2*chunk); err != nil { // the header and area 0
		return failed("format", err)
	}
	return writeHeader(f, Header{Chunk: chunk, Valid: true})
}

func writeHeader(f File, h Header) error {
	b := aligned(MinChunk)
	le := binary.LittleEndian
	le.PutUint32(b[0:], magic)
	if h.Valid {
		le.PutUint32(b[4:], 1)
	}
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], uint32(h.Chunk/sector))
	if _, err := f.WriteAt(b, 0); err != nil {
		return failed("write the header", err)
	}
	return failed("write the header", f.Sync())
}

// ReadHeader reads the first chunk. fault.Corrupt: this is no store, or one that
// this package does not know.
func ReadHeader(r io.ReaderAt) (Header, error) {
	b := aligned(MinChunk)
	if err := read(r, b, 0); err != nil {
		return Header{}, err
	}
	le := binary.LittleEndian
	h := Header{Chunk: int64(le.Uint32(b[12:])) * sector, Valid: le.Uint32(b[4:]) != 0}
	switch m, v := le.Uint32(b[0:]), le.Uint32(b[8:]); {
	case m != magic:
		return Header{}, fault.New(fault.Corrupt, "the slab of this layer does not begin with the header of a store: it has %#x where %#x belongs", m, magic)
	case v != version:
		return Header{}, fault.New(fault.Corrupt, "the store of this layer has version %d: %d is known", v, version)
	case !allowed(h.Chunk):
		return Header{}, fault.New(fault.Corrupt, "the store of this layer has chunks of %d bytes: powers of two from %d to %d are allowed", h.Chunk, MinChunk, maxChunk)
	}
	return h, nil
}

func allowed(chunk int64) bool {
	return chunk >= MinChunk && chunk <= maxChunk && chunk&(chunk-1) == 0
}

// area is where the metadata of area n begins, in chunks.
func (h Header) area(n int64) int64 { return 1 + n*(h.Chunk/entrySize+1) }

func zero(f File, off, length int64) error {
	b := aligned(min(length, piece))
	for ; length > 0; length -= int64(len(b)) {
		b = b[:min(length, int64(len(b)))]
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return nil
}

// read fills b. A store that ends before is fault.Corrupt.
func read(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	switch {
	case n == len(b):
		return nil
	case errors.Is(err, io.EOF):
		return fault.New(fault.Corrupt, "the store of this layer is truncated: it ends before byte %d", off+int64(len(b)))
	}
	return failed("read", err)
}

func failed(op string, err error) error {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fault.New(fault.Unavailable, "%s the store of a layer: %w", op, err)
}

// aligned returns n bytes of zeros that direct I/O takes.
func aligned(n int64) []byte {
	b := make([]byte, n+MinChunk)
	off := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % MinChunk
	return b[off : int64(off)+n : int64(off)+n]
}
