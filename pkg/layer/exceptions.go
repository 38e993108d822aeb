package layer

import (
	"encoding/binary"
	"io"
	"maps"
	"math/bits"
	"slices"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Exceptions calls f with every committed exception in the order in which they
// were made: chunk old of the image is chunk new of the store. storeSize is the
// slab's size in bytes. The store may be in use: then what is written or merged
// meanwhile may or may not be there. fault.Corrupt: no store, an invalid one, or
// metadata that the kernel does not write.
func Exceptions(r io.ReaderAt, storeSize int64, f func(old, new int64) error) error {
	h, err := ReadHeader(r)
	if err != nil {
		return err
	}
	if !h.Valid {
		return invalid()
	}
	_, err = walk(r, h, storeSize, f)
	return err
}

func invalid() error {
	return fault.New(fault.Corrupt, "the kernel marked the store of this layer invalid after a failed write: what was acknowledged before is still there; \"kubectl quarry fix\" checks it and makes it valid again")
}

// end is where the list of exceptions stops.
type end struct {
	count    int64
	area     int64 // the area that is not full
	position int64 // in that area
}

func walk(r io.ReaderAt, h Header, storeSize int64, f func(old, new int64) error) (end, error) {
	perArea := h.Chunk / entrySize
	buf := aligned(min(h.Chunk, piece))
	var e end
	for ; ; e.area++ {
		meta := h.area(e.area)
		if (meta+1)*h.Chunk > storeSize {
			return e, fault.New(fault.Corrupt, "the store of this layer has %d bytes, and its metadata does not end there: it was truncated", storeSize)
		}
		for at := int64(0); at < h.Chunk; at += int64(len(buf)) {
			if err := read(r, buf, meta*h.Chunk+at); err != nil {
				return e, err
			}
			for i := 0; i < len(buf); i += entrySize {
				e.position = (at + int64(i)) / entrySize
				old := int64(binary.LittleEndian.Uint64(buf[i:]))
				new := int64(binary.LittleEndian.Uint64(buf[i+8:]))
				if new == 0 {
					return e, nil
				}
				if want := meta + 1 + e.position; new != want || (new+1)*h.Chunk > storeSize || old < 0 {
					return e, fault.New(fault.Corrupt, "the metadata of this layer is damaged: exception %d of area %d says that chunk %d is in chunk %d of the store, of %d bytes, where %d belongs", e.position, e.area, old, new, storeSize, want)
				}
				if err := f(old, new); err != nil {
					return e, err
				}
				e.count++
			}
		}
		if e.count != (e.area+1)*perArea {
			return e, fault.New(fault.Internal, "layer: %d exceptions in %d areas of %d", e.count, e.area+1, perArea)
		}
	}
}

// Changed lists the parts of the image that a layer holds, in order, without
// overlaps or touching ones, in bytes. The last may reach past the image's end,
// to the end of its chunk. Errors and use meanwhile as Exceptions says.
func Changed(r io.ReaderAt, storeSize int64) ([]engine.Extent, error) {
	h, err := ReadHeader(r)
	if err != nil {
		return nil, err
	}
	var s set
	if err := Exceptions(r, storeSize, func(old, _ int64) error { s.add(old); return nil }); err != nil {
		return nil, err
	}
	var out []engine.Extent
	s.each(func(old int64) {
		if n := len(out); n > 0 && out[n-1].Offset+out[n-1].Length == old*h.Chunk {
			out[n-1].Length += h.Chunk
			return
		}
		out = append(out, engine.Extent{Offset: old * h.Chunk, Length: h.Chunk})
	})
	return out, nil
}

// set holds chunk numbers: a bit for each, in pages that exist where they are needed.
type set struct{ pages map[int64]*[1024]uint64 }

const perPage = 1024 * 64

// add says whether n is new.
func (s *set) add(n int64) bool {
	if s.pages == nil {
		s.pages = map[int64]*[1024]uint64{}
	}
	p := s.pages[n/perPage]
	if p == nil {
		p = new([1024]uint64)
		s.pages[n/perPage] = p
	}
	word, bit := n%perPage/64, uint64(1)<<(n%64)
	if p[word]&bit != 0 {
		return false
	}
	p[word] |= bit
	return true
}

// each goes through the numbers in order.
func (s *set) each(f func(int64)) {
	for _, page := range slices.Sorted(maps.Keys(s.pages)) {
		for i, word := range s.pages[page] {
			for ; word != 0; word &= word - 1 {
				f(page*perPage + int64(i)*64 + int64(bits.TrailingZeros64(word)))
			}
		}
	}
}
