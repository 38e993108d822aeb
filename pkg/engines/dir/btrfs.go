package dir

import (
	"encoding/binary"
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// The btrfs calls and keys that are used, from linux/btrfs.h and linux/btrfs_tree.h.
const (
	btrfsSubvolCreate = 0x5000940e // _IOW(0x94, 14, struct btrfs_ioctl_vol_args)
	btrfsSnapDestroy  = 0x5000940f // _IOW(0x94, 15, struct btrfs_ioctl_vol_args)
	btrfsSnapCreateV2 = 0x50009417 // _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2)
	btrfsTreeSearch   = 0xd0009411 // _IOWR(0x94, 17, struct btrfs_ioctl_search_args)
	btrfsInoLookup    = 0xd0009412 // _IOWR(0x94, 18, struct btrfs_ioctl_ino_lookup_args)
	btrfsQgroupLimit  = 0x8030942b // _IOR(0x94, 43, struct btrfs_ioctl_qgroup_limit_args)

	btrfsRootTree  = 1
	btrfsQuotaTree = 8
	// btrfsTopInode is the inode number of every subvolume's top directory.
	btrfsTopInode     = 256
	btrfsRootRefKey   = 156
	btrfsQgroupStatus = 240
	btrfsQgroupInfo   = 242
	btrfsQgroupLimits = 244
	btrfsLimitRfer    = 1 << 0
)

// volArgs is struct btrfs_ioctl_vol_args.
type volArgs struct {
	fd   int64
	name [4088]byte
}

// volArgsV2 is struct btrfs_ioctl_vol_args_v2.
type volArgsV2 struct {
	fd, transid, flags uint64
	unused             [4]uint64
	name               [4040]byte
}

// qgroupLimitArgs is struct btrfs_ioctl_qgroup_limit_args; group 0 is the
// subvolume of the open file.
type qgroupLimitArgs struct {
	group, flags, maxRfer, maxExcl, rsvRfer, rsvExcl uint64
}

// searchArgs is struct btrfs_ioctl_search_args.
type searchArgs struct {
	tree                     uint64
	minObject, maxObject     uint64
	minOffset, maxOffset     uint64
	minTransid, maxTransid   uint64
	minType, maxType, nItems uint32
	_                        uint32
	_                        [4]uint64
	buf                      [3992]byte
}

// lookupArgs is struct btrfs_ioctl_ino_lookup_args.
type lookupArgs struct {
	tree, object uint64
	name         [4080]byte
}

func ioctl[T any](f *os.File, op string, request uintptr, args *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(args))); errno != 0 {
		return &os.PathError{Op: op, Path: f.Name(), Err: errno}
	}
	return nil
}

// createSubvolume makes an empty subvolume, durably: the kernel commits the
// transaction before it returns.
func createSubvolume(parent *os.File, name string) error {
	args := new(volArgs)
	copy(args.name[:], name)
	return ioctl(parent, "create subvolume in", btrfsSubvolCreate, args)
}

// destroySubvolume deletes a subvolume with all its files at once.
func destroySubvolume(parent *os.File, name string) error {
	args := new(volArgs)
	copy(args.name[:], name)
	return ioctl(parent, "delete subvolume in", btrfsSnapDestroy, args)
}

// snapshotSubvolume makes parent/name a writable snapshot of src: a point in
// time with all that was written before, durable on return. It is declined
// when src is no subvolume's top, or when other subvolumes lie in it: a
// snapshot would leave them empty.
func snapshotSubvolume(src, parent *os.File, name string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: src.Name(), Err: err}
	}
	if st.Ino != btrfsTopInode {
		return engine.ErrDeclined
	}
	id, err := subvolumeID(src)
	if err != nil {
		return err
	}
	if _, err := search(src, btrfsRootTree, id, btrfsRootRefKey, 0, ^uint64(0)); err == nil {
		return engine.ErrDeclined
	} else if !errors.Is(err, errNoItem) {
		return err
	}
	args := &volArgsV2{fd: uint64(src.Fd())}
	copy(args.name[:], name)
	return ioctl(parent, "snapshot into", btrfsSnapCreateV2, args)
}

func subvolumeID(f *os.File) (uint64, error) {
	args := &lookupArgs{object: btrfsTopInode}
	err := ioctl(f, "look up subvolume of", btrfsInoLookup, args)
	return args.tree, err
}

var errNoItem = errors.New("no such item in the tree of btrfs")

// search returns the first item of a tree with the given object and type and an
// offset in a range.
func search(f *os.File, tree, object uint64, keyType uint32, minOffset, maxOffset uint64) ([]byte, error) {
	args := &searchArgs{tree: tree, minObject: object, maxObject: object, minType: keyType, maxType: keyType,
		minOffset: minOffset, maxOffset: maxOffset, maxTransid: ^uint64(0), nItems: 1}
	if err := ioctl(f, "search a tree of", btrfsTreeSearch, args); err != nil {
		return nil, err
	}
	if args.nItems == 0 {
		return nil, errNoItem
	}
	// struct btrfs_ioctl_search_header: transid, objectid, offset, type, len.
	const header = 32
	length := binary.NativeEndian.Uint32(args.buf[28:])
	return args.buf[header:min(header+int(length), len(args.buf))], nil
}

// qgroups is the quota of btrfs: each subvolume has a group that counts what it
// refers to, also what it shares with snapshots.
type qgroups struct{}

func (qgroups) limit(data *os.File, size int64) error {
	return ioctl(data, "set the quota of", btrfsQgroupLimit, &qgroupLimitArgs{flags: btrfsLimitRfer, maxRfer: uint64(size)})
}

func (qgroups) usage(data *os.File) (used, limit int64, err error) {
	id, err := subvolumeID(data)
	if err != nil {
		return 0, 0, err
	}
	info, err := search(data, btrfsQuotaTree, 0, btrfsQgroupInfo, id, id)
	if err != nil {
		return 0, 0, err
	}
	limits, err := search(data, btrfsQuotaTree, 0, btrfsQgroupLimits, id, id)
	if err != nil {
		return 0, 0, err
	}
	if len(info) < 16 || len(limits) < 16 {
		return 0, 0, errNoItem
	}
	// struct btrfs_qgroup_info_item: generation, rfer; btrfs_qgroup_limit_item: flags, max_rfer.
	return int64(binary.LittleEndian.Uint64(info[8:])), int64(binary.LittleEndian.Uint64(limits[8:])), nil
}

func (qgroups) String() string { return "btrfs quota groups" }

// enabled says with nil that quotas are on in the file system of f.
func (qgroups) enabled(f *os.File) error {
	_, err := search(f, btrfsQuotaTree, 0, btrfsQgroupStatus, 0, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, errNoItem) {
		return errors.New("quotas are off: \"btrfs quota enable\" turns them on")
	}
	return err
}
