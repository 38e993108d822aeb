package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// MaxMark is the longest mark of a loop device in bytes: LO_NAME_SIZE without its end.
const MaxMark = 63

// Loop is a loop device that has a file (or a device) behind it.
type Loop struct {
	Path    string // "/dev/loop3"
	Number  int
	Backing string // as the kernel shows it; ends in " (deleted)" when it is
	// Mark is what the one who attached it wrote into the device's status.
	Mark string
	// The backing file's device and inode, and its number if it is a device itself.
	Dev, Inode, RDev uint64
	ReadOnly         bool
	// DirectIO: the backing file is read and written past the page cache.
	DirectIO bool
	Size     int64 // bytes
	sequence string
}

// Loops returns the loop devices that match. fault.Unavailable: some device could
// not be asked, because its storage does not answer; it may match as well. Then
// what is known to match is returned beside the error: it is there, and nothing
// follows from what is missing.
func (l *Local) Loops(ctx context.Context, match func(Loop) bool) ([]Loop, error) {
	all, unknown, err := l.loops(ctx)
	if err != nil {
		return nil, err
	}
	var out []Loop
	for _, lp := range all {
		if match(lp) {
			out = append(out, lp)
		}
	}
	if len(unknown) > 0 {
		return out, fault.New(fault.Unavailable, "%s over %s does not answer, so nobody knows whose it is: its storage cannot be reached", unknown[0].Path, unknown[0].Backing)
	}
	return out, nil
}

// loops lists every loop device; unknown are those that could not be asked.
func (l *Local) loops(ctx context.Context) (known, unknown []Loop, err error) {
	devices, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, nil, ioError("list", "/sys/block", err)
	}
	for _, d := range devices {
		n, err := strconv.Atoi(strings.TrimPrefix(d.Name(), "loop"))
		if err != nil || !strings.HasPrefix(d.Name(), "loop") {
			continue
		}
		backing := sysfs(n, "loop/backing_file")
		if backing == "" {
			continue // it has no file
		}
		lp, err := l.loop(ctx, n, backing)
		switch {
		case err == nil:
			known = append(known, lp)
		case errors.Is(err, fault.NotFound): // went meanwhile
		case ctx.Err() != nil:
			return nil, nil, err
		default:
			unknown = append(unknown, lp)
		}
	}
	return known, unknown, nil
}

// loop asks one device. What never changes during its life is asked once,
// because the kernel looks at the backing file for it, which may hang.
func (l *Local) loop(ctx context.Context, n int, backing string) (Loop, error) {
	lp := Loop{Number: n, Path: fmt.Sprintf("/dev/loop%d", n), Backing: backing, sequence: sequence(n)}
	l.mu.Lock()
	known, ok := l.marks[n]
	l.mu.Unlock()
	if !ok || known.sequence != lp.sequence || lp.sequence == "" {
		var err error
		if known, ok = lp.recall(); ok && !exists(lp.Path) {
			if _, err = loopNode(n); err != nil {
				return lp, err
			}
		} else if !ok {
			known, err = guarded(ctx, &l.guard, "ask "+lp.Path+" #"+lp.sequence, quick, func() (Loop, error) { return ask(lp) })
			if err != nil {
				return lp, err
			}
		}
		l.mu.Lock()
		l.marks[n] = known
		l.mu.Unlock()
	}
	lp.Mark, lp.Dev, lp.Inode, lp.RDev = known.Mark, known.Dev, known.Inode, known.RDev
	lp.ReadOnly = sysfs(n, "ro") == "1"
	lp.DirectIO = sysfs(n, "loop/dio") == "1"
	sectors, err := strconv.ParseInt(sysfs(n, "size"), 10, 64)
	if err != nil || lp.Backing == "" || sequence(n) != lp.sequence {
		return lp, fault.New(fault.NotFound, "%s went away", lp.Path)
	}
	lp.Size = sectors * 512
	return lp, nil
}

// loopOf finds the loop device over an open file by device and inode: names
// change, and may be those of another mount namespace. Where a file system has no
// device (a FUSE process of each mount's own), it is by another mount that a file has
// another device number: then inode and mark say that it is the same.
func (l *Local) loopOf(ctx context.Context, f *os.File, mark string) (*Loop, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, ioError("stat", f.Name(), err)
	}
	isDevice := st.Mode&unix.S_IFMT == unix.S_IFBLK
	before := memosNow()
	loops, unknown, err := l.loops(ctx)
	if err != nil {
		return nil, err
	}
	sweepMemos(before, append(loops, unknown...))
	for _, lp := range loops {
		if isDevice && lp.RDev == st.Rdev || !isDevice && lp.RDev == 0 && lp.Dev == st.Dev && lp.Inode == st.Ino {
			return &lp, nil
		}
	}
	for _, lp := range loops {
		if !isDevice && lp.RDev == 0 && lp.Inode == st.Ino && lp.Mark == mark && unix.Major(lp.Dev) == 0 && unix.Major(st.Dev) == 0 {
			return &lp, nil
		}
	}
	// A device whose storage does not answer cannot be asked. It is over this
	// file only if it has its name: slabs have names of their own.
	for _, lp := range unknown {
		if filepath.Base(strings.TrimSuffix(lp.Backing, " (deleted)")) == filepath.Base(f.Name()) {
			return nil, fault.New(fault.Unavailable, "%s over %s does not answer: its storage cannot be reached", lp.Path, lp.Backing)
		}
	}
	return nil, nil
}

// stillOver says whether a device that was seen has this file, and had no other since.
func (lp *Loop) stillOver(f *os.File) bool {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return err == nil && lp.RDev == 0 && lp.Dev == st.Dev && lp.Inode == st.Ino && lp.sequence != "" && sequence(lp.Number) == lp.sequence
}

// openLoop opens a device that exists. A missing node, as in a new container
// with a /dev of its own, does not mean that the device is gone: it is made.
func openLoop(lp Loop, flags int) (*os.File, error) {
	d, err := openFile(lp.Path, flags)
	if !errors.Is(err, os.ErrNotExist) {
		return d, err
	}
	if _, err := loopNode(lp.Number); err != nil {
		return nil, err
	}
	return openFile(lp.Path, flags)
}

// openSame opens a device if it is still over the same file. fault.NotFound: it is not.
func (l *Local) openSame(lp Loop, flags int) (*os.File, error) {
	d, err := openLoop(lp, flags)
	if errors.Is(err, unix.ENXIO) {
		return nil, fault.New(fault.NotFound, "%s went away", lp.Path)
	}
	if errors.Is(err, unix.EBUSY) {
		return nil, fault.New(fault.InUse, "%s over %s is mounted or claimed by another device", lp.Path, lp.Backing)
	}
	if err != nil {
		return nil, ioError("open", lp.Path, err)
	}
	info, err := unix.IoctlLoopGetStatus64(int(d.Fd()))
	if err == nil && (info.Device != lp.Dev || info.Inode != lp.Inode || mark(info) != lp.Mark) {
		err = unix.ENXIO
	}
	if errors.Is(err, unix.ENOTCONN) && lp.sequence != "" && sequence(lp.Number) == lp.sequence {
		return d, nil // its file cannot be asked any more, but it had no other since
	}
	if errors.Is(err, unix.ENXIO) {
		_ = d.Close()
		return nil, fault.New(fault.NotFound, "%s is no longer over %s", lp.Path, lp.Backing)
	}
	if err != nil {
		_ = d.Close()
		return nil, ioError("ask", lp.Path, err)
	}
	return d, nil
}

// loopNode returns the device node, and makes it where /dev is not the kernel's own.
func loopNode(n int) (string, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	const loopMajor = 7
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, uint32(n))))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return "", ioError("make", path, err)
	}
	return path, nil
}

func ask(lp Loop) (Loop, error) {
	d, err := openLoop(lp, os.O_RDONLY)
	if errors.Is(err, unix.ENXIO) {
		return lp, fault.New(fault.NotFound, "%s went away", lp.Path)
	}
	if err != nil {
		return lp, ioError("open", lp.Path, err)
	}
	defer d.Close()
	info, err := unix.IoctlLoopGetStatus64(int(d.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return lp, fault.New(fault.NotFound, "%s has no backing file", lp.Path)
	}
	if err != nil {
		return lp, ioError("ask", lp.Path, err)
	}
	lp.Mark, lp.Dev, lp.Inode, lp.RDev = mark(info), info.Device, info.Inode, info.Rdevice
	return lp, nil
}

func mark(info *unix.LoopInfo64) string { return unix.ByteSliceToString(info.File_name[:]) }

func sysLoop(n int) string { return fmt.Sprintf("/sys/block/loop%d", n) }

// sysfs reads an attribute of a loop device; "" when it has none.
func sysfs(n int, name string) string {
	// Many are read for every listing, and sysfs never waits: three system calls
	// each, where os.ReadFile makes eight.
	fd, err := unix.Open(sysLoop(n)+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var b [4096]byte // an attribute is at most a page
	got, err := unix.Read(fd, b[:])
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b[:got]), "\n")
}

// sequence is a number that is new whenever a device gets another file.
func sequence(n int) string { return sysfs(n, "diskseq") }

func loopError(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Unsupported, "this node has no loop devices (/dev/loop-control): load the kernel module \"loop\", and in a container mount the host's /dev")
	}
	return ioError("use", "/dev/loop-control", err)
}
