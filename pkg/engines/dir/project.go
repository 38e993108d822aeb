package dir

import (
	"errors"
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls for project quotas, from linux/fs.h, linux/quota.h and
// linux/dqblk_xfs.h. The XFS-style commands work on ext4, too.
const (
	fsGetXattr = 0x801c581f // _IOR('X', 31, struct fsxattr)
	fsSetXattr = 0x401c5820 // _IOW('X', 32, struct fsxattr)
	// xflagProjInherit: what is made in the directory joins its project.
	xflagProjInherit = 0x200

	prjQuota   = 2
	xGetQuota  = ('X'<<8+3)<<8 | prjQuota
	xSetLimit  = ('X'<<8+4)<<8 | prjQuota
	xGetStateV = ('X'<<8+8)<<8 | prjQuota

	// stateEnforced is FS_QUOTA_PDQ_ENFD.
	stateEnforced = 1 << 5
	// fieldBlockHard and fieldBlockSoft are FS_DQ_BHARD and FS_DQ_BSOFT.
	fieldBlockHard, fieldBlockSoft = 1 << 3, 1 << 2
	// basicBlock is the unit of block counts in bytes.
	basicBlock = 512
	// ourProjects marks our project IDs: /etc/projects rarely goes that high.
	ourProjects = 1 << 31
)

// fsxattr is struct fsxattr.
type fsxattr struct {
	xflags, extsize, nextents, project, cowextsize uint32
	_                                              [8]byte
}

// diskQuota is struct fs_disk_quota.
type diskQuota struct {
	version, flags                         int8
	fields                                 uint16
	id                                     uint32
	blockHard, blockSoft, inoHard, inoSoft uint64
	blocks, inodes                         uint64
	itimer, btimer                         int32
	iwarns, bwarns                         uint16
	timersHigh                             [4]int8
	rtbHard, rtbSoft, rtbCount             uint64
	rtbTimer                               int32
	rtbWarns                               uint16
	_                                      int16
	_                                      [8]byte
}

// quotaState is struct fs_quota_statv.
type quotaState struct {
	version int8
	_       uint8
	flags   uint16
	_       [156]byte
}

// projects is the project quota of ext4 and XFS. A slab's project ID is made
// from the inode number of its data directory: unique while the slab lives, and
// nothing needs to be recorded.
type projects struct{}

func (projects) String() string { return "project quotas" }

func (projects) enabled(f *os.File) error {
	state := &quotaState{version: 1}
	if err := quotactl(f, xGetStateV, 0, state); err != nil {
		return fmt.Errorf("the file system has no project quotas: %w", err)
	}
	if state.flags&stateEnforced == 0 {
		return errors.New("project quotas are not enforced: mount with \"prjquota\"")
	}
	return nil
}

func (projects) limit(data *os.File, size int64) error {
	var attr fsxattr
	if err := ioctl(data, "get the project of", fsGetXattr, &attr); err != nil {
		return err
	}
	id := attr.project
	if attr.xflags&xflagProjInherit == 0 || id&ourProjects == 0 {
		var err error
		if id, err = freeProject(data); err != nil {
			return err
		}
	}
	// Round up: a limit of 0 blocks would be none.
	blocks := (uint64(size) + basicBlock - 1) / basicBlock
	q := &diskQuota{version: 1, flags: prjQuota, fields: fieldBlockHard | fieldBlockSoft, id: id, blockHard: blocks, blockSoft: blocks}
	if err := quotactl(data, xSetLimit, id, q); err != nil {
		return err
	}
	if id == attr.project {
		return nil
	}
	attr.project, attr.xflags = id, attr.xflags|xflagProjInherit
	return ioctl(data, "set the project of", fsSetXattr, &attr)
}

// freeProject folds the inode number into the range of our project IDs, and goes
// on from there to one that nothing uses: inode numbers of XFS have 64 bits.
func freeProject(data *os.File) (uint32, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(data.Fd()), &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: data.Name(), Err: err}
	}
	const tries = 1000
	for i := range uint64(tries) {
		id := uint32((st.Ino^st.Ino>>31)+i) | ourProjects
		if id == math.MaxUint32 { // means "none"
			continue
		}
		var q diskQuota
		if err := quotactl(data, xGetQuota, id, &q); errors.Is(err, unix.ENOENT) || err == nil && q.inodes == 0 {
			return id, nil
		} else if err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("no free project ID near %d for %s", st.Ino, data.Name())
}

func (projects) usage(data *os.File) (used, limit int64, err error) {
	var attr fsxattr
	if err := ioctl(data, "get the project of", fsGetXattr, &attr); err != nil {
		return 0, 0, err
	}
	var q diskQuota
	if err := quotactl(data, xGetQuota, attr.project, &q); err != nil {
		return 0, 0, err
	}
	return int64(q.blocks) * basicBlock, int64(q.blockHard) * basicBlock, nil
}

func quotactl[T any](f *os.File, cmd uintptr, id uint32, arg *T) error {
	if _, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), cmd, uintptr(id), uintptr(unsafe.Pointer(arg)), 0, 0); errno != 0 {
		return &os.PathError{Op: "quotactl", Path: f.Name(), Err: errno}
	}
	return nil
}
