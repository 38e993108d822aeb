package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Target is one line of a device-mapper table.
type Target struct {
	Start, Length int64  // bytes, multiples of 512; the first starts at 0, the next where one ends
	Type          string // "linear", "snapshot", "snapshot-merge", "zero", ...
	// Params as in dmsetup(8), with lengths in sectors of 512 bytes. Devices may
	// be paths; what is read back has their numbers, "7:3".
	Params string
	// Secret: Params hold a key. The kernel and this package wipe their buffers
	// of it. A key that is read back is replaced by "-".
	Secret bool
}

// Mapped is a device-mapper device as it was when the kernel was asked. Its
// UUID says which one it is; the methods that take one use nothing else.
type Mapped struct {
	Name, UUID   string
	Path         string // "/dev/dm-3"; "" for one that never had a table
	Major, Minor uint32
	ReadOnly     bool
	Suspended    bool
	Inactive     bool     // a table is loaded that the next resume puts in force
	Open         int      // how many have it open: mounts, processes, devices above
	Targets      []Target // the active table; none in one that has only been created
	Size         int64    // bytes, by the active table
}

// Limits of device-mapper, without the zero byte at the end.
const (
	MaxMappedName = unix.DM_NAME_LEN - 1
	MaxMappedUUID = unix.DM_UUID_LEN - 1
)

// DeviceMapper says whether this node can build layers: nil, or
// fault.Unsupported that names what is missing. Modules are loaded if need be.
func (l *Local) DeviceMapper(ctx context.Context) error {
	if _, err := l.dm(ctx, "ask for the version", quick, unix.DM_VERSION, dmRequest{}); err != nil {
		if errors.Is(err, unix.EINVAL) {
			return fault.New(fault.Unsupported, "the kernel's device-mapper has another interface than version %d: %w", unix.DM_VERSION_MAJOR, err)
		}
		return dmError("use", dmControl, err)
	}
	for _, need := range []struct{ target, module string }{
		{"linear", "dm-mod"}, {"zero", "dm-zero"}, {"snapshot", "dm-snapshot"}, {"snapshot-merge", "dm-snapshot"},
	} {
		err := l.hasTarget(ctx, need.target)
		if errors.Is(err, fault.Unsupported) {
			if why := l.modprobe(ctx, need.module); why != nil {
				return fault.New(fault.Unsupported, "this node's kernel has no device-mapper target %q, which layers need: load its module %q, or boot a kernel that has it (%w)", need.target, need.module, why)
			}
			err = l.hasTarget(ctx, need.target)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hasTarget also makes the kernel look for the target's module.
func (l *Local) hasTarget(ctx context.Context, target string) error {
	_, err := l.dm(ctx, "look for target "+target, flush, unix.DM_GET_TARGET_VERSION, dmRequest{Name: target})
	if errors.Is(err, unix.EINVAL) {
		return fault.New(fault.Unsupported, "this node's kernel has no device-mapper target %q", target)
	}
	if errors.Is(err, unix.ENOTTY) {
		return fault.New(fault.Unsupported, "this node's kernel is too old for layers: device-mapper 4.41 (Linux 5.4) is needed")
	}
	return dmError("look for target", target, err)
}

// Mapped lists the devices whose UUID begins with a prefix, in the kernel's order.
func (l *Local) Mapped(ctx context.Context, uuidPrefix string) ([]Mapped, error) {
	reply, err := l.dm(ctx, "list devices", quick, unix.DM_LIST_DEVICES, dmRequest{})
	if err != nil {
		return nil, dmError("list", dmControl, err)
	}
	names, err := reply.names()
	if err != nil {
		return nil, err
	}
	var out []Mapped
	for _, name := range names {
		m, err := l.mapped(ctx, dmRequest{Name: name}, uuidPrefix)
		if err != nil {
			return nil, err
		}
		if m != nil {
			m.Targets = hidden(m.Targets)
			out = append(out, *m)
		}
	}
	return out, nil
}

// MappedByUUID describes one device; nil if there is none.
func (l *Local) MappedByUUID(ctx context.Context, uuid string) (*Mapped, error) {
	m, err := l.mapped(ctx, dmRequest{UUID: uuid}, "")
	if m != nil {
		m.Targets = hidden(m.Targets)
	}
	return m, err
}

// mapped asks for a device by name or UUID, keys and all. nil: there is none,
// or its UUID has not the prefix.
func (l *Local) mapped(ctx context.Context, r dmRequest, prefix string) (*Mapped, error) {
	r.Flags = unix.DM_STATUS_TABLE_FLAG | unix.DM_NOFLUSH_FLAG | unix.DM_SECURE_DATA_FLAG
	reply, err := l.dm(ctx, "ask", quick, unix.DM_TABLE_STATUS, r)
	if errors.Is(err, unix.ENXIO) {
		return nil, nil
	}
	if err != nil {
		return nil, dmError("ask", r.Name+r.UUID, err)
	}
	if !strings.HasPrefix(reply.UUID, prefix) {
		return nil, nil
	}
	m := &Mapped{Name: reply.Name, UUID: reply.UUID, Major: reply.Major, Minor: reply.Minor, Open: reply.Open,
		ReadOnly:  reply.Flags&unix.DM_READONLY_FLAG != 0,
		Suspended: reply.Flags&unix.DM_SUSPEND_FLAG != 0,
		Inactive:  reply.Flags&unix.DM_INACTIVE_PRESENT_FLAG != 0,
	}
	if reply.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0 {
		if m.Targets, err = reply.table(); err != nil {
			return nil, err
		}
		for _, t := range m.Targets {
			m.Size += t.Length
		}
	}
	if m.Inactive || m.Targets != nil { // before its first table it is no block device
		m.Path = fmt.Sprintf("/dev/dm-%d", m.Minor)
		if err := node(m.Path, unix.S_IFBLK, m.Major, m.Minor); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// CreateMapped makes a device with a table, or returns the one with this UUID
// if it has this table already: it is then resumed, if it is suspended, and an
// inactive table is dropped. What a killed predecessor left without a table
// gets this one.
//
// fault.Conflict: the device has another table, or is read-only and should not
// be, or the reverse. fault.InUse: somebody else has a device of this name, or
// has what the table names for itself. fault.NotFound: a device that the table names.
func (l *Local) CreateMapped(ctx context.Context, name, uuid string, readOnly bool, table []Target) (Mapped, error) {
	if name == "" || uuid == "" {
		return Mapped{}, fault.New(fault.Internal, "device-mapper device with name %q and UUID %q: it needs both", name, uuid)
	}
	table, err := normalTable(table)
	if err != nil {
		return Mapped{}, err
	}
	const races = 3 // with another process that makes or removes it at the same time
	for range races {
		m, err := l.mapped(ctx, dmRequest{UUID: uuid}, "")
		if err != nil {
			return Mapped{}, err
		}
		if m != nil && m.Targets != nil {
			return l.reuseMapped(ctx, *m, readOnly, table)
		}
		if m == nil {
			_, err := l.dm(ctx, "create", quick, unix.DM_DEV_CREATE, dmRequest{Name: name, UUID: uuid, Event: dmUdev})
			if errors.Is(err, unix.EBUSY) {
				if err := l.nameTaken(ctx, name, uuid); err != nil {
					return Mapped{}, err
				}
				continue
			}
			if err != nil {
				return Mapped{}, dmError("create", name, err)
			}
			m = &Mapped{Name: name, UUID: uuid}
		}
		return l.startMapped(ctx, *m, readOnly, table)
	}
	return Mapped{}, fault.New(fault.Conflict, "create device %s: another process makes and removes it at the same time: try again", name)
}

// nameTaken says who has a name, unless it is ours by now.
func (l *Local) nameTaken(ctx context.Context, name, uuid string) error {
	m, err := l.mapped(ctx, dmRequest{Name: name}, "")
	if err != nil || m == nil || m.UUID == uuid {
		return err
	}
	who := "without a UUID, as dmsetup makes them"
	if m.UUID != "" {
		who = fmt.Sprintf("with UUID %q", m.UUID)
	}
	return fault.New(fault.InUse, "create device %s: another program made a device-mapper device of this name, %s (%d:%d, table %q): find out whose it is, then remove it with \"dmsetup remove %s\"", name, who, m.Major, m.Minor, tableText(m.Targets), name)
}

// startMapped gives a device without a table its first one.
func (l *Local) startMapped(ctx context.Context, m Mapped, readOnly bool, table []Target) (Mapped, error) {
	err := l.load(ctx, m, readOnly, table)
	if err == nil {
		err = l.ResumeMapped(ctx, m)
	}
	if err != nil { // a device that never worked is in nobody's way
		return Mapped{}, errors.Join(err, l.RemoveMapped(context.WithoutCancel(ctx), m))
	}
	made, err := l.MappedByUUID(ctx, m.UUID)
	if err == nil && made == nil {
		err = fault.New(fault.Conflict, "device %s went away while it was made: another process removed it", m.Name)
	}
	if err != nil {
		return Mapped{}, err
	}
	return *made, nil
}

// reuseMapped takes over a device that has a table.
func (l *Local) reuseMapped(ctx context.Context, m Mapped, readOnly bool, table []Target) (Mapped, error) {
	if !sameTable(m.Targets, table) || m.ReadOnly != readOnly {
		return Mapped{}, fault.New(fault.Conflict, "device %s (%s) exists with the table %q (read-only: %t), wanted is %q (read-only: %t)", m.Name, m.Path, tableText(m.Targets), m.ReadOnly, tableText(table), readOnly)
	}
	if m.Inactive {
		if err := l.ClearMapped(ctx, m); err != nil {
			return Mapped{}, err
		}
	}
	if m.Suspended {
		if err := l.ResumeMapped(ctx, m); err != nil {
			return Mapped{}, err
		}
	}
	m.Inactive, m.Suspended, m.Targets = false, false, hidden(m.Targets)
	return m, nil
}

// LoadMapped gives a device an inactive table, in place of one that it may have. The
// active one stays in force until ResumeMapped. A target reads what it needs
// now: a snapshot its whole store. fault.NotFound: the device, or one that the
// table names. fault.InUse: somebody has one of those for himself.
func (l *Local) LoadMapped(ctx context.Context, m Mapped, readOnly bool, table []Target) error {
	table, err := normalTable(table)
	if err != nil {
		return err
	}
	return l.load(ctx, m, readOnly, table)
}

func (l *Local) load(ctx context.Context, m Mapped, readOnly bool, table []Target) error {
	r := dmRequest{UUID: m.UUID, Table: table}
	if readOnly {
		r.Flags |= unix.DM_READONLY_FLAG
	}
	if slices.ContainsFunc(table, func(t Target) bool { return t.Secret }) {
		r.Flags |= unix.DM_SECURE_DATA_FLAG
	}
	_, err := l.dm(ctx, "load a table into", flush, unix.DM_TABLE_LOAD, r)
	if errors.Is(err, unix.ENXIO) { // also what targets say of the devices below them, and of their content
		if there, askErr := l.MappedByUUID(ctx, m.UUID); askErr != nil || there == nil {
			return errors.Join(dmError("load a table into", m.Name, err), askErr)
		}
	} else if err == nil || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EIO) {
		return dmError(fmt.Sprintf("load the table %q into", tableText(table)), m.Name, err)
	}
	return fault.New(fault.Unavailable, "device %s: the kernel refuses the table %q: %w: a device that it names is missing or too small, or a store's content is not valid; the kernel's log says which", m.Name, tableText(table), err)
}

// ClearMapped drops the inactive table. None is success. fault.NotFound: the device is gone.
func (l *Local) ClearMapped(ctx context.Context, m Mapped) error {
	_, err := l.dm(ctx, "drop the inactive table of", flush, unix.DM_TABLE_CLEAR, dmRequest{UUID: m.UUID})
	return dmError("drop the inactive table of", m.Name, err)
}

// SuspendMapped lets what is under way end and holds new I/O back until
// ResumeMapped; one that is suspended already is success. With freeze, a
// filesystem on the device is written out and frozen before. Nobody watches
// over it: SuspendAll does that.
//
// fault.InUse: somebody froze the filesystem. A call that nobody waits for any
// more resumes the device when it comes to its end.
func (l *Local) SuspendMapped(ctx context.Context, m Mapped, freeze bool) error {
	_, err := l.suspend(ctx, m, freeze, flush)
	return err
}

// suspend returns beside an error a channel if the kernel has not answered yet:
// it is closed when the device, should it get suspended, has been resumed.
func (l *Local) suspend(ctx context.Context, m Mapped, freeze bool, limit time.Duration) (underWay <-chan struct{}, _ error) {
	r := dmRequest{UUID: m.UUID, Flags: unix.DM_SUSPEND_FLAG, Event: dmUdev}
	if !freeze {
		r.Flags |= unix.DM_SKIP_LOCKFS_FLAG
	}
	var mu sync.Mutex
	var begun, done, left bool // left: nobody waits any more
	ended := make(chan struct{})
	err := l.guard.Do(ctx, "device-mapper: suspend "+m.UUID, limit, func() error {
		defer close(ended)
		mu.Lock()
		begun = true
		mu.Unlock()
		control, err := l.control(ctx)
		if err != nil {
			return err
		}
		mu.Lock()
		stop := left
		mu.Unlock()
		if stop {
			return nil
		}
		if _, err = dmDo(control, unix.DM_DEV_SUSPEND, r); err != nil {
			return err
		}
		mu.Lock()
		done, stop = true, left
		mu.Unlock()
		if stop {
			err = dmResume(control, m.UUID)
		}
		return err
	})
	if err == nil {
		return nil, nil
	}
	mu.Lock()
	defer mu.Unlock()
	left = true
	switch {
	case done: // in the moment in which the wait ended
		err = errors.Join(err, l.ResumeMapped(context.WithoutCancel(ctx), m))
	case begun:
		select {
		case <-ended:
		default:
			underWay = ended
		}
	}
	if errors.Is(err, unix.EBUSY) {
		return underWay, fault.New(fault.InUse, "suspend device %s: the filesystem on it is frozen by somebody else", m.Name)
	}
	return underWay, dmError("suspend", m.Name, err)
}

// ResumeMapped puts the inactive table in force, if there is one, and lets
// I/O go on. A device that is not suspended is, for the moment of the change.
//
// fault.Corrupt: a merge on it has failed, and there is no other table: it stays suspended.
func (l *Local) ResumeMapped(ctx context.Context, m Mapped) error {
	_, err := guarded(ctx, &l.guard, "device-mapper: resume "+m.UUID, flush, func() (struct{}, error) {
		control, err := l.control(ctx)
		if err == nil {
			err = dmResume(control, m.UUID)
		}
		return struct{}{}, err
	})
	return dmError("resume", m.Name, err)
}

// MergeFailed is the state of a snapshot-merge target whose merge met an error.
const MergeFailed = "Merge failed"

// dmResume refuses to resume a merge that has failed: the kernel begins it again then, with what
// it remembers of the store. That may differ from the disk, and the store's header be taken
// for the image's first chunk.
func dmResume(control int, uuid string) error {
	now, err := dmDo(control, unix.DM_TABLE_STATUS, dmRequest{UUID: uuid, Flags: unix.DM_NOFLUSH_FLAG})
	if err != nil {
		return err
	}
	if now.Flags&(unix.DM_SUSPEND_FLAG|unix.DM_INACTIVE_PRESENT_FLAG) == unix.DM_SUSPEND_FLAG {
		targets, err := now.table()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(targets, func(t Target) bool { return t.Type == "snapshot-merge" && t.Params == MergeFailed }) {
			return fault.New(fault.Corrupt, "resume device %s: a merge on it has failed, and would go on wrongly: it stays suspended until it has another table", now.Name)
		}
	}
	_, err = dmDo(control, unix.DM_DEV_SUSPEND, dmRequest{UUID: uuid, Event: dmUdev})
	return err
}

// RemoveMapped takes a device down; one that is gone already is success.
// fault.InUse: it is mounted, open, or another device stands on it.
func (l *Local) RemoveMapped(ctx context.Context, m Mapped) error {
	tick := time.NewTicker(10 * time.Millisecond) // the kernel tells nobody when a device comes free
	defer tick.Stop()
	for tries := 0; ; tries++ {
		_, err := l.dm(ctx, "remove", flush, unix.DM_DEV_REMOVE, dmRequest{UUID: m.UUID, Event: dmUdev})
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil
		case !errors.Is(err, unix.EBUSY):
			return dmError("remove", m.Name, err)
		case tries == 100: // longer than a program that looks at new devices has them open
			return fault.New(fault.InUse, "remove device %s (%s): %s still has it open", m.Name, m.Path, holders(m))
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.KindOf(ctx.Err()), "remove device %s: %w", m.Name, ctx.Err())
		case <-tick.C:
		}
	}
}

// StatusMapped returns what each target of the active table says of itself, as
// dmsetup status shows it after start, length and type: "2064/4096 16" or
// "Invalid" or "Merge failed" for a snapshot, "" for a linear target.
func (l *Local) StatusMapped(ctx context.Context, m Mapped) ([]string, error) {
	reply, err := l.dm(ctx, "ask the state of", quick, unix.DM_TABLE_STATUS, dmRequest{UUID: m.UUID, Flags: unix.DM_NOFLUSH_FLAG})
	if err != nil {
		return nil, dmError("ask the state of", m.Name, err)
	}
	targets, err := reply.table()
	if err != nil {
		return nil, err
	}
	out := make([]string, 0, len(targets))
	for _, t := range targets {
		out = append(out, t.Params)
	}
	return out, nil
}

// FlushDevice writes out a block device's cache and that of what is below.
func (l *Local) FlushDevice(ctx context.Context, path string) error { return l.SyncDevice(ctx, path) }
