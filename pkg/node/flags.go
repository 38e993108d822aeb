package node

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
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

// parseGroup reads a volume mount group; -1 for none.
func parseGroup(s string) (int, error) {
	if s == "" {
		return -1, nil
	}
	g, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return -1, fault.New(fault.Invalid, "volume mount group %q: a number from 0 to %d is needed", s, 1<<31-1)
	}
	return int(g), nil
}

// giveToGroup lets a group read and write everything below root, as the kubelet
// does for fsGroup. When the root has the group already, so has the rest: the
// root is changed last.
func giveToGroup(root string, gid int) error {
	fi, err := os.Lstat(root)
	if err != nil {
		return fault.New(fault.Unavailable, "volume mount group %d: %w", gid, err)
	}
	if hasGroup(root, gid) && fi.Mode()&fs.ModeSetgid != 0 && fi.Mode().Perm()&0o070 == 0o070 {
		return nil
	}
	dir, err := os.OpenRoot(root) // what others do inside meanwhile leads nowhere else
	if err != nil {
		return fault.New(fault.Unavailable, "volume mount group %d: %w", gid, err)
	}
	defer dir.Close()
	give := func(path string, fi fs.FileInfo) error {
		if err := dir.Lchown(path, -1, gid); err != nil {
			return err
		}
		mode := fi.Mode()
		switch {
		case mode.IsDir():
			return dir.Chmod(path, mode.Perm()|0o770|fs.ModeSetgid|mode&fs.ModeSticky)
		case mode.IsRegular():
			return dir.Chmod(path, mode.Perm()|0o660|mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky))
		}
		return nil
	}
	err = fs.WalkDir(dir.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != "." {
			var fi fs.FileInfo
			if fi, err = d.Info(); err == nil {
				err = give(path, fi)
			}
		}
		if path != "." && errors.Is(err, fs.ErrNotExist) { // removed meanwhile
			return nil
		}
		return err
	})
	if err == nil {
		err = give(".", fi)
	}
	if err != nil {
		return fault.New(fault.Unavailable, "volume mount group %d: %w", gid, err)
	}
	return nil
}
