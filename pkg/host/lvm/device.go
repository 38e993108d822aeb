package lvm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// DeviceName is the name that device-mapper knows a logical volume by: hyphens
// are doubled, one joins the two names.
func DeviceName(group, lv string) string {
	return Escape(group) + "-" + Escape(lv)
}

// Escape doubles the hyphens of a name.
func Escape(name string) string { return strings.ReplaceAll(name, "-", "--") }

// Device is the active device of a volume; nil: it is not active. The group's
// UUID, as in Info, tells it from another group of the same name.
func (g *Group) Device(ctx context.Context, groupUUID, lv string) (*host.Mapped, error) {
	return g.named(ctx, groupUUID, DeviceName(g.name, lv))
}

func (g *Group) named(ctx context.Context, groupUUID, name string) (*host.Mapped, error) {
	all, err := g.mapped(ctx)
	if errors.Is(err, fault.Unsupported) {
		return nil, nil // without device-mapper nothing is active
	} else if err != nil {
		return nil, err
	}
	uuid := devicePrefix(groupUUID)
	for _, m := range all {
		if m.Name == name && strings.HasPrefix(m.UUID, uuid) {
			return &m, nil
		}
	}
	return nil, nil
}

// Suspended says whether a device of the group is suspended at this moment. It
// may be one that a running program works on.
func (g *Group) Suspended(ctx context.Context, groupUUID string) (bool, error) {
	all, err := g.mapped(ctx)
	if errors.Is(err, fault.Unsupported) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	for _, m := range all {
		if m.Suspended && strings.HasPrefix(m.UUID, devicePrefix(groupUUID)) {
			return true, nil
		}
	}
	return false, nil
}

// ActivePool reads the state of a thin pool from the kernel, without starting a
// program. Of its settings it knows none: Zero and ErrorWhenFull are false. ok is
// false where it is not active, or says something unheard of: see Pool then.
func (g *Group) ActivePool(ctx context.Context, groupUUID, pool string) (p Pool, ok bool) {
	dev, err := g.named(ctx, groupUUID, DeviceName(g.name, pool)+"-tpool") // beneath the volume that an administrator sees
	if err != nil || dev == nil || len(dev.Targets) != 1 || dev.Targets[0].Type != "thin-pool" {
		return Pool{}, false
	}
	lines, err := g.kernel.StatusMapped(ctx, *dev)
	if err != nil || len(lines) != 1 {
		return Pool{}, false
	}
	p, ok = parseThinPool(lines[0])
	p.Size = dev.Size
	return p, ok
}

// thinMetadataBlock is the unit in which the kernel counts a pool's metadata, in bytes.
const thinMetadataBlock = 4096

// parseThinPool reads "TRANSACTION USED/TOTAL USED/TOTAL HELD MODE ...": metadata,
// then data (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
func parseThinPool(status string) (p Pool, ok bool) {
	words := strings.Fields(status)
	if len(words) < 5 { // "Fail", too
		return Pool{}, false
	}
	percent := func(word string) (float64, int64) {
		var used, total int64
		if _, err := fmt.Sscanf(word, "%d/%d", &used, &total); err != nil || total <= 0 {
			return -1, 0
		}
		return 100 * float64(used) / float64(total), total
	}
	var blocks int64
	var err error
	p.Transaction, err = strconv.ParseInt(words[0], 10, 64)
	p.MetadataPercent, blocks = percent(words[1])
	p.DataPercent, _ = percent(words[2])
	p.MetadataSize = blocks * thinMetadataBlock
	switch { // as LVM calls it
	case words[4] == "out_of_data_space":
		p.Health = "out_of_data"
	case words[4] == "ro":
		p.Health = "metadata_read_only"
	case slices.Contains(words[5:], "needs_check"):
		p.Health = "needs_check"
	}
	return p, err == nil && p.DataPercent >= 0 && p.MetadataPercent >= 0
}

const lvmDevices = "LVM-"

func devicePrefix(groupUUID string) string {
	return lvmDevices + strings.ReplaceAll(groupUUID, "-", "")
}

func (g *Group) mapped(ctx context.Context) ([]host.Mapped, error) {
	return g.kernel.Mapped(ctx, lvmDevices)
}
