package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Device-mapper is driven by requests on one control node. A request is a
// buffer: a header (unix.DmIoctl), then data that begins at Data_start. The
// kernel answers in the same buffer. See include/uapi/linux/dm-ioctl.h.

const (
	dmControl = "/dev/mapper/control"
	dmHeader  = unix.SizeofDmIoctl
	dmSpec    = unix.SizeofDmTargetSpec
	// The answer to a listing has no limit; a table's, in practice, a few KiB.
	dmFirstBuffer, dmLargestBuffer = 4 << 10, 16 << 20
	sector                         = 512
)

// dmUdev is what a request that makes an event says to udev, in the upper half of
// Event_nr: leave the device alone. Else its rules open devices that are about
// to go, and show a chain's inner devices as filesystems. The bits are libdevmapper's
// DM_UDEV_DISABLE_{SUBSYSTEM,DISK,OTHER}_RULES_FLAG and
// DM_UDEV_DISABLE_LIBRARY_FALLBACK; the lower half, a semaphore to wait for, stays empty.
const dmUdev = (0x2 | 0x4 | 0x8 | 0x20) << 16

// dmRequest is what a request has beside its number.
type dmRequest struct {
	Name, UUID string // lookups take one of them
	Flags      uint32
	Event      uint32
	Table      []Target
}

// dmReply is a decoded answer.
type dmReply struct {
	Name, UUID   string
	Flags        uint32
	Open         int
	Count        uint32 // of targets
	Major, Minor uint32
	Data         []byte
}

// encode lays a request out in a buffer of size bytes, or more if it needs that.
func (r dmRequest) encode(size int) ([]byte, error) {
	need := dmHeader
	for _, t := range r.Table {
		need += dmSpec + align8(len(t.Params)+1)
	}
	buf := make([]byte, max(size, need))
	h := header(buf)
	h.Version = [3]uint32{unix.DM_VERSION_MAJOR, 0, 0}
	h.Data_size, h.Data_start = uint32(len(buf)), dmHeader
	h.Flags, h.Event_nr, h.Target_count = r.Flags, r.Event, uint32(len(r.Table))
	if len(r.Name) >= len(h.Name) || strings.ContainsAny(r.Name, "/\x00") {
		return nil, fault.New(fault.Invalid, "device-mapper name %q: at most %d bytes and no \"/\" are allowed", r.Name, len(h.Name)-1)
	}
	if len(r.UUID) >= len(h.Uuid) || strings.Contains(r.UUID, "\x00") {
		return nil, fault.New(fault.Invalid, "device-mapper UUID %q: at most %d bytes are allowed", r.UUID, len(h.Uuid)-1)
	}
	copy(h.Name[:], r.Name)
	copy(h.Uuid[:], r.UUID)
	at := dmHeader
	for _, t := range r.Table {
		next := dmSpec + align8(len(t.Params)+1)
		spec := (*unix.DmTargetSpec)(unsafe.Pointer(&buf[at]))
		spec.Sector_start, spec.Length = uint64(t.Start/sector), uint64(t.Length/sector)
		spec.Next = uint32(next) // in a request from here, in an answer from the data's begin
		copy(spec.Target_type[:], t.Type)
		copy(buf[at+dmSpec:], t.Params)
		at += next
	}
	return buf, nil
}

func align8(n int) int { return (n + 7) &^ 7 }

func header(buf []byte) *unix.DmIoctl { return (*unix.DmIoctl)(unsafe.Pointer(&buf[0])) }

// decode reads the answer in a buffer.
func decode(buf []byte) (dmReply, error) {
	h := header(buf)
	r := dmReply{Name: unix.ByteSliceToString(h.Name[:]), UUID: unix.ByteSliceToString(h.Uuid[:]),
		Flags: h.Flags, Open: int(h.Open_count), Count: h.Target_count, Major: unix.Major(h.Dev), Minor: unix.Minor(h.Dev)}
	start, end := int(h.Data_start), int(h.Data_size)
	if end > start {
		if start < 0 || end > len(buf) {
			return r, fault.New(fault.Internal, "device-mapper's answer spans bytes %d to %d of a buffer of %d", start, end, len(buf))
		}
		r.Data = buf[start:end]
	}
	return r, nil
}

// table reads the targets of an answer to DM_TABLE_STATUS: tables or states.
func (r dmReply) table() ([]Target, error) {
	var out []Target
	at := 0
	for range r.Count {
		if at < 0 || at+dmSpec > len(r.Data) {
			return nil, fault.New(fault.Internal, "device-mapper's table of %s ends after %d of %d targets", r.Name, len(out), r.Count)
		}
		d := r.Data[at:]
		params := d[dmSpec:]
		if i := bytes.IndexByte(params, 0); i >= 0 {
			params = params[:i]
		}
		ne := binary.NativeEndian
		out = append(out, Target{
			Start: int64(ne.Uint64(d)) * sector, Length: int64(ne.Uint64(d[8:])) * sector,
			Type: unix.ByteSliceToString(d[24:dmSpec]), Params: strings.TrimSpace(string(params)),
		})
		at = int(ne.Uint32(d[20:]))
	}
	return out, nil
}

// names reads the answer to DM_LIST_DEVICES.
func (r dmReply) names() ([]string, error) {
	var out []string
	for d := r.Data; ; {
		const nameAt = 12 // after the number (8 bytes) and the distance of the next entry (4)
		if len(d) < nameAt {
			if len(out) == 0 {
				return nil, nil
			}
			return nil, fault.New(fault.Internal, "device-mapper's list of devices ends after %d of them", len(out))
		}
		if binary.NativeEndian.Uint64(d) == 0 { // how an empty list looks
			return out, nil
		}
		out = append(out, unix.ByteSliceToString(d[nameAt:]))
		next := int(binary.NativeEndian.Uint32(d[8:]))
		if next == 0 {
			return out, nil
		}
		d = d[min(next, len(d)):]
	}
}

// dm makes one request, in a larger buffer if the answer needs it, and names
// it in errors as "op id". Errors of the kernel stay what they are: see dmError.
func (l *Local) dm(ctx context.Context, op string, limit time.Duration, cmd uintptr, r dmRequest) (dmReply, error) {
	id := r.UUID
	if id == "" {
		id = r.Name
	}
	return guarded(ctx, &l.guard, "device-mapper: "+strings.TrimSpace(op+" "+id), limit, func() (dmReply, error) {
		control, err := l.control(ctx)
		if err != nil {
			return dmReply{}, err
		}
		return dmDo(control, cmd, r)
	})
}

func dmDo(control int, cmd uintptr, r dmRequest) (dmReply, error) {
	for size := dmFirstBuffer; ; size *= 4 {
		buf, err := r.encode(size)
		if err != nil {
			return dmReply{}, err
		}
		err = dmIoctl(control, cmd, buf)
		if r.Table != nil && r.Flags&unix.DM_SECURE_DATA_FLAG != 0 {
			clear(buf[dmHeader:])
		}
		if err != nil {
			return dmReply{}, err
		}
		if header(buf).Flags&unix.DM_BUFFER_FULL_FLAG == 0 {
			return decode(buf)
		}
		if len(buf) >= dmLargestBuffer {
			return dmReply{}, fault.New(fault.Internal, "device-mapper's answer does not fit into %d bytes", len(buf))
		}
	}
}

// dmIoctl makes a request again when a signal interrupts it: the wait for
// writes under way in a suspend can be, and the kernel has then undone it.
func dmIoctl(control int, cmd uintptr, buf []byte) error {
	first := bytes.Clone(buf[:dmHeader])
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(control), cmd, uintptr(unsafe.Pointer(&buf[0])))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
		copy(buf, first) // the kernel may have written an answer's header
	}
}

// dmError gives an error of the kernel its kind. One that has a kind keeps
// it; nil stays nil.
func dmError(op, name string, err error) error {
	var kind *fault.Error
	var errno unix.Errno
	if errors.As(err, &kind) || !errors.As(err, &errno) {
		return err
	}
	switch errno {
	case unix.ENXIO, unix.ENODEV:
		return fault.New(fault.NotFound, "%s device %s: there is no such device-mapper device", op, name)
	case unix.EBUSY:
		return fault.New(fault.InUse, "%s device %s: %w", op, name, err)
	case unix.EPERM, unix.EACCES:
		return fault.New(fault.Permission, "%s device %s: %w: device-mapper wants CAP_SYS_ADMIN", op, name, err)
	case unix.ENOMEM, unix.ENOSPC:
		return fault.New(fault.Exhausted, "%s device %s: %w", op, name, err)
	}
	return fault.New(fault.Unavailable, "%s device %s: %w: the kernel's log says more", op, name, err)
}

// control is the open control node, for all requests. It is opened at the first, and the
// node made where /dev is not the kernel's own.
func (l *Local) control(ctx context.Context) (int, error) {
	l.mu.Lock()
	f := l.mapper
	l.mu.Unlock()
	if f != nil {
		return int(f.Fd()), nil
	}
	f, err := openFile(dmControl, unix.O_RDWR)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENXIO) {
			return -1, ioError("open", dmControl, err)
		}
		if err := l.makeControl(ctx); err != nil {
			return -1, err
		}
		if f, err = openFile(dmControl, unix.O_RDWR); err != nil {
			// Not wrapped: its ENXIO would read like that of a device that is not there.
			return -1, fault.New(fault.Unsupported, "open %s: %v: the kernel has device-mapper but its control node does not work", dmControl, err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mapper == nil {
		l.mapper = f
	} else {
		_ = f.Close() // another call was faster
	}
	return int(l.mapper.Fd()), nil
}

func (l *Local) makeControl(ctx context.Context) error {
	number, err := miscNumber("device-mapper")
	if errors.Is(err, fault.NotFound) {
		if why := l.modprobe(ctx, "dm-mod"); why != nil {
			return fault.New(fault.Unsupported, "this node's kernel has no device-mapper, which layers need: load its module \"dm-mod\", or boot a kernel that has it (%w)", why)
		}
		number, err = miscNumber("device-mapper")
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll("/dev/mapper", 0o755); err != nil {
		return ioError("make", "/dev/mapper", err)
	}
	return node(dmControl, unix.S_IFCHR, 10, number) // 10: the major number of all such nodes
}

// miscNumber is the minor number of a driver in /proc/misc.
func miscNumber(driver string) (uint32, error) {
	b, err := os.ReadFile("/proc/misc")
	if err != nil {
		return 0, ioError("read", "/proc/misc", err)
	}
	for line := range strings.Lines(string(b)) {
		w := strings.Fields(line)
		if len(w) == 2 && w[1] == driver {
			n, err := strconv.ParseUint(w[0], 10, 32)
			return uint32(n), fault.Wrap(fault.Internal, err)
		}
	}
	return 0, fault.New(fault.NotFound, "/proc/misc has no %q", driver)
}

// node makes a device node; one that is there with another number, as a
// container's /dev may keep it from an earlier boot, is replaced.
func node(path string, kind, major, minor uint32) error {
	dev := unix.Mkdev(major, minor)
	err := unix.Mknod(path, kind|0o600, int(dev))
	if !errors.Is(err, unix.EEXIST) {
		return ioError("make", path, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return ioError("stat", path, err)
	}
	if st.Mode&unix.S_IFMT == kind && st.Rdev == dev {
		return nil
	}
	if err := unix.Unlink(path); err != nil {
		return ioError("replace", path, err)
	}
	return ioError("make", path, unix.Mknod(path, kind|0o600, int(dev)))
}

func (l *Local) modprobe(ctx context.Context, module string) error {
	_, err := l.run.Run(ctx, Command{Name: "modprobe", Args: []string{"--", module}, Timeout: quick / 2})
	return err
}
