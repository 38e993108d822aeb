package lvm

import (
	"context"
	"errors"
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
	all, err := g.mapped(ctx)
	if errors.Is(err, fault.Unsupported) {
		return nil, nil // without device-mapper nothing is active
	} else if err != nil {
		return nil, err
	}
	name, uuid := DeviceName(g.name, lv), devicePrefix(groupUUID)
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

const lvmDevices = "LVM-"

func devicePrefix(groupUUID string) string {
	return lvmDevices + strings.ReplaceAll(groupUUID, "-", "")
}

func (g *Group) mapped(ctx context.Context) ([]host.Mapped, error) {
	return g.kernel.Mapped(ctx, lvmDevices)
}
