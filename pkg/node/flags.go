package node

import (
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// refusedFlags are options of mount(8) that would make it do something else
// than mount this image's device here, or that Quarry decides.
var refusedFlags = [...]string{
	"bind", "rbind", "move", "remount", "loop", "offset", "sizelimit", "encryption", "helper", "uhelper",
	"shared", "rshared", "private", "rprivate", "slave", "rslave", "unbindable", "runbindable",
	"user", "users", "owner", "group", "auto", "noauto", "_netdev", "nofail", "fstab",
	"subvol", "subvolid", "device", "logdev", "rtdev", "journal_dev", "journal_path",
}

// checkFlags refuses mount flags that are nonsense for a volume. Its errors do
// not tell their values, which may be secret.
func checkFlags(flags []string, block bool) error {
	if block && len(flags) > 0 {
		first, _, _ := strings.Cut(flags[0], "=")
		return fault.New(fault.Invalid, "mount flag %q: a raw block volume is not mounted", first)
	}
	for _, f := range flags {
		shown, _, _ := strings.Cut(f, "=")
		name := strings.ToLower(shown)
		switch {
		case name == "" || strings.ContainsAny(f, ", \t\n\\\"'") || strings.HasPrefix(f, "-"):
			return fault.New(fault.Invalid, "mount flag %q: each must be one option of mount(8), as in \"noatime\" or \"commit=30\"", shown)
		case slices.Contains(refusedFlags[:], name) || strings.HasPrefix(name, "x-"):
			return fault.New(fault.Invalid, "mount flag %q is not allowed for a volume: Quarry decides what is mounted where", shown)
		}
	}
	return nil
}
