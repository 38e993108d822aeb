package mover

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// unshared takes out of the ranges what lies at the same place of the storage in
// both files, as it does in reflink copies until one is written: that is equal,
// and need not be read.
func unshared(a, b *side, ranges []engine.Extent) []engine.Extent {
	if len(ranges) == 0 || !mayShare(a.store) || !mayShare(b.store) || a.st.Dev != b.st.Dev {
		return ranges
	}
	last := ranges[len(ranges)-1]
	from, to := ranges[0].Offset, min(last.Offset+last.Length, a.size, b.size)
	// Without maps everything is read: slower, and as right.
	inA, err := fiemap(a.fd, from, to)
	if err != nil {
		return ranges
	}
	inB, err := fiemap(b.fd, from, to)
	if err != nil {
		return ranges
	}
	return without(ranges, clipped(common(inA, inB), to))
}

// mayShare says whether a file lies where a place on the storage says what is
// there, and files may share it: on btrfs, or in the data section of XFS. (The
// places in its realtime section are counted anew.)
func mayShare(s *store) bool {
	var st unix.Statfs_t
	if s.device || retry(func() error { return unix.Fstatfs(s.fd, &st) }) != nil {
		return false
	}
	switch uint32(st.Type) { //nolint:gosec // magic numbers are 32 bits wide
	case unix.BTRFS_SUPER_MAGIC:
		return true
	case unix.XFS_SUPER_MAGIC:
		var attr struct { // struct fsxattr of linux/fs.h
			flags uint32
			_     [6]uint32
		}
		const get, realtime = 0x801c581f, 1 // FS_IOC_FSGETXATTR, FS_XFLAG_REALTIME
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), get, uintptr(unsafe.Pointer(&attr)))
		return errno == 0 && attr.flags&realtime == 0
	}
	return false
}

// mapping says where a part of a file lies on the storage, all in bytes.
type mapping struct {
	logical, physical, length int64
	flags                     uint32
}

// What linux/fiemap.h defines.
const (
	fiemapIoctl     = 0xc020660b // FS_IOC_FIEMAP
	fiemapSync      = 1          // FIEMAP_FLAG_SYNC
	extentLast      = 0x1
	extentUnwritten = 0x800
	extentShared    = 0x2000
	// extentUnclear is every flag but LAST, UNWRITTEN, MERGED and SHARED: the
	// place is not known, or what is there is compressed, encrypted or inline.
	extentUnclear = ^uint32(extentLast | extentUnwritten | 0x1000 | extentShared)
)

// fiemap asks where the bytes [from, to) of a file lie.
func fiemap(fd int, from, to int64) ([]mapping, error) {
	const batch = 512
	var request struct {
		start, length                   uint64
		flags, mapped, room, reserved32 uint32
		extents                         [batch]struct {
			logical, physical, length uint64
			_                         [2]uint64
			flags                     uint32
			_                         [3]uint32
		}
	}
	var out []mapping
	for from < to {
		request.start, request.length = uint64(from), uint64(to-from)
		request.flags, request.mapped, request.room = fiemapSync, 0, batch
		err := retry(func() error {
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fiemapIoctl, uintptr(unsafe.Pointer(&request)))
			if errno != 0 {
				return errno
			}
			return nil
		})
		runtime.KeepAlive(&request)
		if err != nil {
			return nil, err
		}
		next := to
		for _, e := range request.extents[:request.mapped] {
			out = append(out, mapping{logical: int64(e.logical), physical: int64(e.physical), length: int64(e.length), flags: e.flags})
			if next = int64(e.logical + e.length); e.flags&extentLast != 0 {
				return out, nil
			}
		}
		if request.mapped == 0 || next <= from {
			return out, nil
		}
		from = next
	}
	return out, nil
}

// common is where both maps show the same place.
func common(a, b []mapping) []engine.Extent {
	var out []engine.Extent
	for len(a) > 0 && len(b) > 0 {
		x, y := a[0], b[0]
		start, end := max(x.logical, y.logical), min(x.logical+x.length, y.logical+y.length)
		same := x.physical-x.logical == y.physical-y.logical && x.flags&extentUnwritten == y.flags&extentUnwritten
		if start < end && same && x.flags&y.flags&extentShared != 0 && (x.flags|y.flags)&extentUnclear == 0 {
			out = extend(out, engine.Extent{Offset: start, Length: end - start})
		}
		if x.logical+x.length < y.logical+y.length {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}

// clipped is the part of an ordered list before byte end.
func clipped(list []engine.Extent, end int64) []engine.Extent {
	for i, e := range list {
		if e.Offset+e.Length > end {
			list = list[:i]
			if e.Offset < end {
				list = append(list, engine.Extent{Offset: e.Offset, Length: end - e.Offset})
			}
			break
		}
	}
	return list
}

// without is what of one ordered list is not in another.
func without(ranges, same []engine.Extent) []engine.Extent {
	var out []engine.Extent
	for _, r := range ranges {
		off, end := r.Offset, r.Offset+r.Length
		for len(same) > 0 && same[0].Offset+same[0].Length <= off {
			same = same[1:]
		}
		for i := 0; i < len(same) && same[i].Offset < end; i++ {
			if same[i].Offset > off {
				out = append(out, engine.Extent{Offset: off, Length: same[i].Offset - off})
			}
			off = max(off, same[i].Offset+same[i].Length)
		}
		if off < end {
			out = append(out, engine.Extent{Offset: off, Length: end - off})
		}
	}
	return out
}
