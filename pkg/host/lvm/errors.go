package lvm

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// errLargeEnough is what lvextend says of a volume that has the size already.
var errLargeEnough = errors.New("the volume is large enough")

// ErrPassedOver is of a volume that is there, and that a removal did not select.
var ErrPassedOver = errors.New("nothing was removed")

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
	all := complaints(string(exit.Result.Stderr))
	others := slices.DeleteFunc(slices.Clone(all), volumeNotFound) // beside those, which may be said of what need not be there
	said := strings.Join(others, "; ")
	has := func(texts ...string) bool {
		for _, text := range texts {
			if strings.Contains(said, text) {
				return true
			}
		}
		return false
	}
	program, _, _ := strings.Cut(strings.Join(exit.Command.Args, " "), " ")
	words := fmt.Sprintf("%s: %s", program, strings.Join(all, "; "))
	quoted := fmt.Sprintf("%q not found", g.name) // Volume group "vg" not found
	switch {
	case len(others) == 0:
		return fault.New(fault.NotFound, "%s", words)
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
	case has("transaction_id is ", "with transaction id "): // N, expected is M
		return fault.New(fault.Corrupt, "LVM's metadata of volume group %s and those of its thin pool in the kernel are not of the same time: one of the two was restored from a backup (vgcfgrestore, lvconvert --repair): docs/engines/lvm.md says what to do (%s)", g.name, words)
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
	}
	return fault.New(fault.Unavailable, "%s (exit status %d)", words, exit.Result.ExitCode)
}

// volumeNotFound says whether a complaint is about a logical volume that is not
// there.
func volumeNotFound(complaint string) bool {
	for _, text := range []string{"Failed to find logical volume", "not found in volume group", "not found in Volume group"} {
		if strings.Contains(complaint, text) {
			return true
		}
	}
	return false
}

// complaints are the lines of what a program said that are neither warnings nor
// follow from something said before.
func complaints(stderr string) []string {
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
		return []string{strings.TrimSpace(stderr)}
	}
	return said
}

func (g *Group) vanished(why error) error {
	return fault.New(fault.Unavailable, "volume group %s is not there: its name is wrong, or its disks cannot be seen from this node (vgs, pvs) (%w)", g.name, why)
}

func (g *Group) partial() error {
	return fault.New(fault.Unavailable, "a disk of volume group %s is missing: bring it back (pvs shows which, vgextend --restoremissing takes it in again); nothing is changed before", g.name)
}

// unselected is of volumes that are there, but that a removal did not select.
func (g *Group) unselected(groupUUID string) error {
	return fault.New(fault.Unavailable, "%w from volume group %s: a disk of it is missing (pvs shows which, vgextend --restoremissing takes it in again), or it is another group of that name, not the one with UUID %s (vgs -o vg_name,vg_uuid): bring the right disks back", ErrPassedOver, g.name, groupUUID)
}
