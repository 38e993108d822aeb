package host

import (
	"context"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Target is one line of a device-mapper table.
type Target struct {
	Start, Length int64  // bytes, multiples of 512
	Type          string // "linear", "snapshot", "snapshot-merge", "zero", ...
	// Params as in dmsetup(8), with lengths in sectors. Devices may be paths;
	// what is read back has "major:minor".
	Params string
	// Secret: Params hold a key. The kernel and this process wipe their copies,
	// and it is never told in an error.
	Secret bool
}

// Mapped is a device-mapper device.
type Mapped struct {
	Name, UUID   string
	Path         string // "/dev/dm-3"
	Major, Minor uint32
	ReadOnly     bool
	Suspended    bool
	Inactive     bool // an inactive table waits for a resume
	Open         int  // how many have it open: mounts, processes, devices above
	Targets      []Target
	Size         int64 // bytes
}

// Suspension is a set of suspended devices and the child that watches over it.
type Suspension struct{}

func (l *Local) DeviceMapper(ctx context.Context) error {
	return fault.New(fault.Unsupported, "device-mapper is not built yet")
}

func (l *Local) Mapped(ctx context.Context, uuidPrefix string) ([]Mapped, error) {
	return nil, l.DeviceMapper(ctx)
}

func (l *Local) MappedByUUID(ctx context.Context, uuid string) (*Mapped, error) {
	return nil, l.DeviceMapper(ctx)
}

func (l *Local) CreateMapped(ctx context.Context, name, uuid string, readOnly bool, table []Target) (Mapped, error) {
	return Mapped{}, l.DeviceMapper(ctx)
}

func (l *Local) LoadMapped(ctx context.Context, m Mapped, readOnly bool, table []Target) error {
	return l.DeviceMapper(ctx)
}

func (l *Local) ClearMapped(ctx context.Context, m Mapped) error { return l.DeviceMapper(ctx) }

func (l *Local) SuspendMapped(ctx context.Context, m Mapped, freeze bool) error {
	return l.DeviceMapper(ctx)
}

func (l *Local) ResumeMapped(ctx context.Context, m Mapped) error { return l.DeviceMapper(ctx) }

func (l *Local) RemoveMapped(ctx context.Context, m Mapped) error { return l.DeviceMapper(ctx) }

func (l *Local) StatusMapped(ctx context.Context, m Mapped) ([]string, error) {
	return nil, l.DeviceMapper(ctx)
}

func (l *Local) FlushDevice(ctx context.Context, path string) error { return l.SyncDevice(ctx, path) }

// SuspendAll suspends several devices with a freeze of their filesystems, all or none.
func (l *Local) SuspendAll(ctx context.Context, devices []Mapped, limit time.Duration) (*Suspension, error) {
	return nil, l.DeviceMapper(ctx)
}

// ResumeLeft resumes what an agent that died left suspended, and returns it.
func (l *Local) ResumeLeft(ctx context.Context, uuidPrefix string) ([]Mapped, error) {
	return nil, l.DeviceMapper(ctx)
}

// Holds says whether the suspension has held without a break so far.
func (s *Suspension) Holds() bool { return false }

// Resume ends the suspension. fault.Conflict: it did not hold.
func (s *Suspension) Resume() error { return fault.New(fault.Unsupported, "device-mapper is not built yet") }
