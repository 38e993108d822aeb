package layers

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// piece is what one checksum is of, so that a difference says where it is.
const piece = 256 << 10

// sums are the checksums of a device's pieces, read past the page cache.
func sums(path string, size int64) ([]uint32, error) {
	var out []uint32
	table := crc32.MakeTable(crc32.Castagnoli)
	err := pieces(path, size, func(_ int64, data []byte) error {
		out = append(out, crc32.Checksum(data, table))
		return nil
	})
	return out, err
}

// pieces reads a device piece by piece, past the page cache.
func pieces(path string, size int64, use func(offset int64, data []byte) error) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	buf := aligned(piece)
	for at := int64(0); at < size && err == nil; at += piece {
		part := buf[:min(piece, size-at)]
		if _, err = f.ReadAt(part, at); err == nil {
			err = use(at, part)
		}
	}
	return errors.Join(err, f.Close())
}

// aligned returns memory that direct I/O takes.
func aligned(n int) []byte {
	const page = 4096
	b := make([]byte, n+page)
	off := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) % page)
	return b[off : off+n : off+n]
}

// same compares two lists of sums.
func same(before, now []uint32) error {
	if len(before) != len(now) {
		return fmt.Errorf("%d pieces, before %d", len(now), len(before))
	}
	var differ []int
	for i := range before {
		if before[i] != now[i] {
			differ = append(differ, i)
		}
	}
	if len(differ) > 0 {
		return fmt.Errorf("%d of %d pieces of %d bytes are not as they were: %v", len(differ), len(now), piece, differ[:min(len(differ), 20)])
	}
	return nil
}
