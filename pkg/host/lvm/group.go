// Package lvm runs the programs of lvm2 on one volume group, reads their JSON
// reports and finds the devices of logical volumes in the kernel.
//
// Every verb is one program. The metadata of a volume group is changed by one
// commit under its lock, so each of them has happened or has not.
package lvm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// Options of a Group.
type Options struct {
	// Devices are the paths of the group's physical volumes: LVM then looks at
	// no other device. Empty: LVM looks as the host's configuration says.
	Devices []string
	// Discard lets LVM discard what a removed volume had, on the physical volumes.
	Discard bool
}

// Group is a volume group. Its methods may be called by many goroutines at
// once, also in several processes: LVM locks.
//
// Errors have these kinds: Exists, NotFound and InUse speak of a logical
// volume. Exhausted: no free extents, metadata area or thin pool full.
// OutOfRange: a size that the group can never have. Unavailable: the group, or
// one of its disks, is not there, or the cause is not known. Permission: the
// group belongs to another host, or is read-only. Unsupported: no lvm2 here.
type Group struct {
	run     host.Runner
	kernel  *host.Local
	name    string
	options Options
}

// New returns the volume group of a name, which need not exist.
func New(run host.Runner, name string, o Options) *Group {
	return &Group{run: run, kernel: host.NewLocal(run), name: name, options: o}
}

// Full is how full a thin pool may be, in percent of its data, while LVM still
// makes volumes in it; see also MetadataFull.
const Full = 95

// MetadataFull is the same for metadata of size bytes. Whatever is configured,
// LVM wants a quarter of them to be free, or 4 MiB (lib/metadata/thin_manip.c:
// pool_metadata_min_threshold).
func MetadataFull(size int64) float64 {
	if size <= 0 {
		return Full
	}
	return min(Full, 100-min(25, 100*float64(4<<20)/float64(size)))
}

// config is laid over the host's lvm.conf.
func (g *Group) config() string {
	return "backup{backup=0 archive=0} " + // a copy of all metadata for each tag; vgcfgbackup makes one when asked
		// Nodes are the kernel's /dev/dm-*: nothing waits for udev, which may run
		// in another container. Monitoring would start a daemon as our child.
		fmt.Sprintf("activation{udev_sync=0 udev_rules=0 monitoring=0 thin_pool_autoextend_threshold=%d} ", Full) +
		fmt.Sprintf("devices{scan_lvs=0 issue_discards=%d} ", bit(g.options.Discard)) + // volumes hold users' data, not our groups
		"global{notify_dbus=0}"
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// access says what a program may do beside reading metadata.
type access int

const (
	reads     access = iota // metadata only, never device-mapper
	writes                  // changes metadata only, never device-mapper
	kernel                  // asks device-mapper
	devices                 // changes metadata and devices
	unchecked               // as devices, and a thin pool's metadata are not checked
)

const (
	timeout = 2 * time.Minute
	// slow is for programs whose work grows with the data: a removal discards all
	// that the volume had before it commits, and a thin pool's metadata, up to 16 GiB,
	// are checked before it is active. Ended early they would begin anew each time.
	slow = 30 * time.Minute
)

func (g *Group) lvm(ctx context.Context, a access, program string, args ...string) (host.Result, error) {
	return g.within(ctx, timeout, a, program, args...)
}

// within runs a program of lvm2, and ends it when the limit is over.
func (g *Group) within(ctx context.Context, limit time.Duration, a access, program string, args ...string) (host.Result, error) {
	if err := ctx.Err(); err != nil {
		return host.Result{}, fault.Wrap(fault.KindOf(err), err)
	}
	config := g.config()
	if a == unchecked {
		config += ` global/thin_check_executable=""`
		a = devices
	}
	all := []string{program, "--config", config}
	if len(g.options.Devices) > 0 {
		all = append(all, "--devices", strings.Join(g.options.Devices, ","))
	}
	if a == reads || a == writes {
		all = append(all, "--driverloaded", "n")
	}
	if a == writes || a == devices {
		// Killed half-way it could leave a device suspended, and its users waiting.
		ctx = context.WithoutCancel(ctx)
	}
	command := host.Command{Name: "lvm", Args: append(all, args...), Timeout: limit}
	res, err := g.run.Run(ctx, command)
	if pool, id := g.interrupted(res, err); pool != "" && a == devices {
		if _, err := g.run.Run(ctx, host.Command{Name: "dmsetup", Args: []string{"message", pool, "0", "delete " + id}, Timeout: timeout}); err != nil {
			return res, fault.New(fault.Unavailable, "thin pool %s holds what an interrupted program began, device %s, which cannot be removed: %w", pool, id, err)
		}
		res, err = g.run.Run(ctx, command)
	}
	return res, g.explain(err)
}

// interrupted finds out that a program cannot go on because an earlier one was
// killed after the kernel had made a thin device and before LVM had noted that:
// LVM would make it again under the same number. It returns the pool's device
// and that number. The device never had a volume, since the pool's transaction
// counter, which LVM compares first, says that its creation has not ended.
func (g *Group) interrupted(res host.Result, err error) (pool, id string) {
	if err == nil {
		return "", ""
	}
	for line := range strings.Lines(string(res.Stderr)) {
		var device string
		var number int
		_, serr := fmt.Sscanf(strings.TrimSpace(line), "Thin pool %s %s already contain thin device with device_id %d.", &pool, &device, &number)
		if serr == nil && strings.HasPrefix(pool, Escape(g.name)+"-") && strings.HasSuffix(pool, "-tpool") {
			return pool, fmt.Sprint(number)
		}
	}
	return "", ""
}

// CreateRecord makes a volume that takes no space: one extent of target
// "error", never active, that lives for its LVM tags. fault.Exists: the name is
// taken, by whatever.
func (g *Group) CreateRecord(ctx context.Context, lv string, tags ...string) error {
	_, err := g.lvm(ctx, writes, "lvcreate", g.fresh(lv, tags, "--setautoactivation", "n", "--type", "error", "-l", "1", g.name)...)
	return err
}

// RemoveRecord removes a volume of CreateRecord from the group of that UUID, as
// in Info. fault.NotFound: no such volume, or another group of the name has none.
func (g *Group) RemoveRecord(ctx context.Context, groupUUID, lv string) error {
	return g.remove(ctx, writes, whole(groupUUID), groupUUID, lv)
}

// CreateLinear makes a volume of size bytes, a multiple of the extent size,
// inactive. What the disks held there is not wiped.
func (g *Group) CreateLinear(ctx context.Context, lv string, size int64, tags ...string) error {
	_, err := g.lvm(ctx, writes, "lvcreate", g.fresh(lv, tags, "--setautoactivation", "n", "--type", "linear", "-Wn", "-Zn", "-L", inBytes(size), g.name)...)
	return err
}

// CreateThin makes a volume of size bytes in a thin pool, inactive.
// fault.NotFound: no such pool.
func (g *Group) CreateThin(ctx context.Context, pool, lv string, size int64, tags ...string) error {
	// For the first volume of a pool that is active LVM makes the pool's devices
	// anew. One that somebody activated with udev has links there, which udev may
	// remove late: the check of the pool's metadata, which goes by name, would miss it
	// and ask for a repair. The pool was checked when it was activated.
	_, err := g.lvm(ctx, unchecked, "lvcreate", g.fresh(lv, tags, "--type", "thin", "-V", inBytes(size), "--thinpool", pool, g.name)...)
	return err
}

// Snapshot makes a snapshot of a thin volume, inactive, of the same size. An
// active origin is suspended for it. fault.NotFound: no such origin.
func (g *Group) Snapshot(ctx context.Context, origin, lv string, tags ...string) error {
	_, err := g.lvm(ctx, devices, "lvcreate", g.fresh(lv, tags, "-s", g.path(origin))...)
	return err
}

// fresh are the arguments that all new volumes have: nothing makes them active
// but Activate.
func (g *Group) fresh(lv string, tags []string, args ...string) []string {
	out := []string{"-y", "-an", "--setactivationskip", "y", "-n", lv}
	for _, tag := range tags {
		out = append(out, "--addtag", tag)
	}
	return append(out, args...)
}

// Extend grows a volume, active or not, to at least size bytes, a multiple of the
// extent size. One that has as much is left alone.
func (g *Group) Extend(ctx context.Context, lv string, size int64) error {
	_, err := g.lvm(ctx, g.either(ctx), "lvextend", "-L", inBytes(size), g.path(lv))
	if errors.Is(err, errLargeEnough) {
		return nil
	}
	return err
}

// Rename gives a volume another name. fault.Exists: that is taken.
func (g *Group) Rename(ctx context.Context, from, to string) error {
	_, err := g.lvm(ctx, g.either(ctx), "lvrename", "-y", g.name, from, to)
	return err
}

// AddTag gives a volume one more LVM tag, if it has that UUID. fault.Conflict: it has
// another, or the group has.
func (g *Group) AddTag(ctx context.Context, groupUUID, lv, uuid, tag string) error {
	return g.change(ctx, groupUUID, lv, fmt.Sprintf(`lv_uuid="%s"`, uuid), "--addtag", tag)
}

// RemoveTag takes an LVM tag away. fault.Conflict: the volume does not have it.
func (g *Group) RemoveTag(ctx context.Context, groupUUID, lv, tag string) error {
	return g.change(ctx, groupUUID, lv, hasTag(tag), "--deltag", tag)
}

// Adopt makes a volume one that nothing makes active but Activate, and gives it an LVM tag
// in place of others, in one commit. fault.Conflict: it does not have the first of those.
func (g *Group) Adopt(ctx context.Context, groupUUID, lv, tag string, instead ...string) error {
	args := []string{"--setactivationskip", "y", "--setautoactivation", "n", "--addtag", tag}
	for _, t := range instead {
		args = append(args, "--deltag", t)
	}
	return g.change(ctx, groupUUID, lv, hasTag(instead[0]), args...)
}

func hasTag(tag string) string { return fmt.Sprintf(`lv_tags="%s"`, tag) }

// whole selects volumes of the group of that UUID, with all of its disks.
func whole(groupUUID string) string {
	return fmt.Sprintf(`vg_missing_pv_count=0&&vg_uuid="%s"`, groupUUID)
}

// change changes the metadata of a volume that is selected, in one commit.
func (g *Group) change(ctx context.Context, groupUUID, lv, where string, args ...string) error {
	args = append([]string{"-y", "-S", whole(groupUUID) + "&&" + where}, args...)
	res, err := g.lvm(ctx, writes, "lvchange", append(args, g.path(lv))...)
	if err == nil && !strings.Contains(string(res.Stdout), " changed.") { // LVM passed over it without a word
		return fault.New(fault.Conflict, "logical volume %s is not what it was a moment ago: another has changed it", g.path(lv))
	}
	return err
}

// Remove removes volumes and their devices from the group of that UUID.
// fault.NotFound: none of them was there, or another group of the name has none of
// them. fault.InUse: something has one open.
func (g *Group) Remove(ctx context.Context, groupUUID string, lvs ...string) error {
	return g.remove(ctx, g.either(ctx), whole(groupUUID), groupUUID, lvs...)
}

// RemoveTagged removes those of them that have an LVM tag. ErrPassedOver: one is there
// and was not removed.
func (g *Group) RemoveTagged(ctx context.Context, groupUUID, tag string, lvs ...string) error {
	return g.remove(ctx, g.either(ctx), whole(groupUUID)+"&&"+hasTag(tag), groupUUID, lvs...)
}

func (g *Group) remove(ctx context.Context, a access, where, groupUUID string, lvs ...string) error {
	// LVM would remove from a group with a disk missing, and for that expel the
	// disk for good, even if it comes back; and from any group of the name.
	args := []string{"-y", "-S", where}
	for _, lv := range lvs {
		args = append(args, g.path(lv))
	}
	limit := timeout
	if g.options.Discard {
		limit = slow
	}
	res, err := g.within(ctx, limit, a, "lvremove", args...)
	missing := errors.Is(err, fault.NotFound)
	switch {
	case err != nil && !missing:
		return err
	case strings.Contains(string(res.Stdout), "successfully removed"):
		return nil // what was not there need not be removed
	case !missing, len(complaints(string(res.Stderr))) < len(lvs): // one is there, and LVM passed over it without a word
		return g.unselected(groupUUID)
	}
	return err
}

// either is metadata only where the kernel has no device-mapper, and nothing can
// be active.
func (g *Group) either(ctx context.Context) access {
	if _, err := g.mapped(ctx); errors.Is(err, fault.Unsupported) {
		return writes
	}
	return devices
}

// Activate makes the device of a volume, and resumes one that was left suspended.
func (g *Group) Activate(ctx context.Context, lv string) error {
	_, err := g.within(ctx, slow, devices, "lvchange", "-ay", "-K", g.path(lv))
	return err
}

// Deactivate removes the device of a volume. fault.InUse: something has it open.
func (g *Group) Deactivate(ctx context.Context, lv string) error {
	_, err := g.lvm(ctx, devices, "lvchange", "-an", g.path(lv))
	return err
}

// Refresh brings every active device of the group to what the metadata says:
// what a killed program left suspended runs again.
func (g *Group) Refresh(ctx context.Context) error {
	_, err := g.lvm(ctx, devices, "vgchange", "--refresh", g.name)
	return err
}

func (g *Group) path(lv string) string { return g.name + "/" + lv }

func inBytes(n int64) string { return fmt.Sprintf("%db", n) }
