package lvm

import (
	"errors"
	"fmt"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// errLargeEnough is what lvextend says of a volume that has the size already.
var errLargeEnough = errors.New("the volume is large enough")

// explain gives a failure of a program its kind. LVM has one exit status for
// all that can go wrong, so its words are read: they are those of lvm2 2.03,
// recorded in testdata, which speaks English under LC_ALL=C.
func (g *Group) explain(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, fault.Unsupported) {
		return fault.New(fault.Unsupported, "lvm2 is not installed on this node: install the Debian package \"lvm2\" (or its like)")
	}
	var exit *host.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	said := complaints(string(exit.Result.Stderr))
	has := func(texts ...string) bool {
		for _, text := range texts {
			if strings.Contains(said, text) {
				return true
			}
		}
		return false
	}
	program, _, _ := strings.Cut(strings.Join(exit.Command.Args, " "), " ")
	words := fmt.Sprintf("%s: %s", program, said)
	quoted := fmt.Sprintf("%q not found", g.name) // Volume group "vg" not found
	switch {
	case has("Volume group " + quoted):
		return g.vanished(errors.New(words))
	case has("Cannot access VG"):
		return fault.New(fault.Permission, "volume group %s belongs to another host: change its system ID there (vgchange --systemid), or use another group (%s)", g.name, words)
	case has("Multiple VGs found with the same name"):
		return fault.New(fault.Invalid, "there are several volume groups named %s: rename the others (vgrename takes the UUID), or name the disks of the right one in parameter \"devices\" (%s)", g.name, words)
	case has("while PVs are missing", "Refusing activation of partial LV"):
		return g.partial()
	case has(" is exported"):
		return fault.New(fault.Permission, "volume group %s is exported, so it is about to move to another host: vgimport it here, if it is to stay (%s)", g.name, words)
	case has("is read-only", "Permission denied", "Run as root"):
		return fault.New(fault.Permission, "volume group %s cannot be written: %s", g.name, words)
	case has("matches existing size", "not larger than existing size"):
		return errLargeEnough
	case has(" in use.", "is used by another device", "contains a filesystem in use", "Unable to suspend"):
		return fault.New(fault.InUse, "%s", words)
	case has("insufficient free space", "Insufficient free space", "Insufficient suitable"):
		return fault.New(fault.Exhausted, "volume group %s has too little free space: delete something, or add a disk (vgextend) (%s)", g.name, words)
	case has("exceeds maximum metadata size", "too large for circular buffer"):
		return fault.New(fault.Exhausted, "the metadata area of volume group %s is full, which holds a record for every image: delete something, or make a group with a larger one (vgcreate --metadatasize) (%s)", g.name, words)
	case has("reached threshold", "free space in thin pool"):
		return fault.New(fault.Exhausted, "the thin pool is full, %d%% of its data or all but 4 MiB or a quarter of its metadata: delete something, or extend it (lvextend -L, lvextend --poolmetadatasize) (%s)", Full, words)
	case has("Volume too large", "Upper limit", "greater than the maximum"):
		return fault.New(fault.OutOfRange, "%s", words)
	case has("already exists in volume group"):
		return fault.New(fault.Exists, "%s", words)
	case has("Failed to find logical volume", "not found in volume group", "not found in Volume group"):
		return fault.New(fault.NotFound, "%s", words)
	}
	return fault.New(fault.Unavailable, "%s (exit status %d)", words, exit.Result.ExitCode)
}

// complaints is what a program said that is neither a warning nor follows from
// something said before.
func complaints(stderr string) string {
	var said []string
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "WARNING:") || strings.HasPrefix(line, "File descriptor ") ||
			strings.HasPrefix(line, "Cannot process volume group") || strings.HasPrefix(line, "Run `") || len(said) > 0 && said[len(said)-1] == line {
			continue
		}
		said = append(said, line)
	}
	if len(said) == 0 {
		return strings.TrimSpace(stderr)
	}
	return strings.Join(said, "; ")
}

func (g *Group) vanished(why error) error {
	return fault.New(fault.Unavailable, "volume group %s is not there: its name is wrong, or its disks cannot be seen from this node (vgs, pvs) (%w)", g.name, why)
}

func (g *Group) partial() error {
	return fault.New(fault.Unavailable, "a disk of volume group %s is missing: bring it back (pvs shows which, vgextend --restoremissing takes it in again); nothing is changed before", g.name)
}
