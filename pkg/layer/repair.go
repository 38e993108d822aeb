package layer

import (
	"github.com/quarry-csi/quarry/pkg/fault"
)

// Settle prepares a store for being written by a new device: it checks the
// metadata and clears what lies behind the last committed exception. A power cut
// in the middle of writing an area can leave exceptions behind a gap; they count
// for nobody until the gap is filled, and would be believed then. A store that
// needs nothing is not written. It must not be in use. It returns how many
// exceptions there are.
//
// fault.Corrupt: no store, an invalid one, or metadata that the kernel does not write.
func Settle(f File, storeSize int64) (exceptions int64, err error) {
	h, err := ReadHeader(f)
	if err != nil {
		return 0, err
	}
	if !h.Valid {
		return 0, invalid()
	}
	return settle(f, h, storeSize)
}

// Repair makes a store valid again that the kernel gave up after a failed
// write: it checks that every committed exception can be what the kernel wrote, and
// that no chunk has two, clears what lies behind them, and then sets the header's valid
// field. It must not be in use. It may be repeated, and does no harm to a valid store.
//
// fault.Corrupt: the metadata contradicts itself; nothing was written.
func Repair(f File, storeSize int64) (exceptions int64, err error) {
	h, err := ReadHeader(f)
	if err != nil {
		return 0, err
	}
	n, err := settle(f, h, storeSize)
	if err != nil || h.Valid {
		return n, err
	}
	h.Valid = true
	return n, writeHeader(f, h)
}

func settle(f File, h Header, storeSize int64) (int64, error) {
	var seen set
	e, err := walk(f, h, storeSize, func(old, new int64) error {
		if !seen.add(old) {
			return fault.New(fault.Corrupt, "the metadata of this layer is damaged: chunk %d of the image is in two places, the second is chunk %d of the store", old, new)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return e.count, clearBehind(f, h, e)
}

// clearBehind zeroes the rest of the last area, in blocks of MinChunk, and only
// where it is not zero.
func clearBehind(f File, h Header, e end) error {
	const block = MinChunk
	wrote := false
	first := e.position * entrySize
	buf := aligned(min(h.Chunk-first/block*block, piece))
	for at := first / block * block; at < h.Chunk; at += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), h.Chunk-at)]
		off := h.area(e.area)*h.Chunk + at
		if err := read(f, buf, off); err != nil {
			return err
		}
		for i := int64(0); i < int64(len(buf)); i += block {
			b := buf[i : i+block]
			rest := b[max(first-at-i, 0):]
			if allZero(rest) {
				continue
			}
			clear(rest)
			if _, err := f.WriteAt(b, off+i); err != nil {
				return failed("write", err)
			}
			wrote = true
		}
	}
	if !wrote {
		return nil
	}
	return failed("write", f.Sync())
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
