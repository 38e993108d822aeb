package host

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// normalTable checks a table and gives it the form in which the kernel shows
// it: devices by number, single blanks.
func normalTable(table []Target) ([]Target, error) {
	if len(table) == 0 {
		return nil, fault.New(fault.Invalid, "a device-mapper table needs a target")
	}
	var out []Target
	end := int64(0)
	for i, t := range table {
		switch {
		case t.Start != end:
			return nil, fault.New(fault.Invalid, "target %d of a device-mapper table starts at byte %d: it must start at %d, where the one before ends", i, t.Start, end)
		case t.Length <= 0 || t.Length%sector != 0:
			return nil, fault.New(fault.Invalid, "target %d of a device-mapper table has %d bytes: a multiple of %d above 0 is allowed", i, t.Length, sector)
		case t.Type == "" || len(t.Type) >= unix.DM_MAX_TYPE_NAME:
			return nil, fault.New(fault.Invalid, "target type %q: 1 to %d bytes are allowed", t.Type, unix.DM_MAX_TYPE_NAME-1)
		case strings.Contains(t.Params, "\x00"):
			return nil, fault.New(fault.Invalid, "parameters of target %d (%s) of a device-mapper table hold a zero byte", i, t.Type)
		}
		end += t.Length
		words := strings.Fields(t.Params)
		for j, w := range words {
			if !strings.HasPrefix(w, "/") {
				continue
			}
			var st unix.Stat_t
			if err := unix.Stat(w, &st); err != nil {
				return nil, ioError("find device", w, err)
			}
			if st.Mode&unix.S_IFMT != unix.S_IFBLK {
				return nil, fault.New(fault.Invalid, "%s, which a device-mapper table names, is not a block device", w)
			}
			words[j] = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		t.Params = strings.Join(words, " ")
		out = append(out, t)
	}
	return out, nil
}

func sameTable(a, b []Target) bool {
	return slices.EqualFunc(a, b, func(a, b Target) bool {
		a.Secret, b.Secret = false, false
		return a == b
	})
}

// hidden leaves out a key that a table shows; see the kernel's
// admin-guide/device-mapper/dm-crypt.rst. What begins with ":" is only a key's name.
func hidden(table []Target) []Target {
	out := slices.Clone(table)
	for i, t := range out {
		if w := strings.Fields(t.Params); t.Type == "crypt" && len(w) > 1 && !strings.HasPrefix(w[1], ":") {
			w[1] = "-"
			out[i].Params, out[i].Secret = strings.Join(w, " "), true
		}
	}
	return out
}

// tableText is a table for messages.
func tableText(table []Target) string {
	var lines []string
	for _, t := range hidden(table) {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%d %d %s %s", t.Start/sector, t.Length/sector, t.Type, t.Params)))
	}
	return strings.Join(lines, "; ")
}

// standsOn says whether a device's active table names another device.
func standsOn(upper, lower Mapped) bool {
	number := fmt.Sprintf("%d:%d", lower.Major, lower.Minor)
	return slices.ContainsFunc(upper.Targets, func(t Target) bool {
		return slices.Contains(strings.Fields(t.Params), number)
	})
}

// lowerFirst orders devices such that each comes after those that it stands
// on, otherwise as they were. That is the order to resume in: a filesystem
// writes when it is thawed. The reverse is the order to suspend in: it writes
// when it is frozen.
func lowerFirst(devices []Mapped) []Mapped {
	var out []Mapped
	done := make([]bool, len(devices)) // also: begun, so a cycle ends
	var visit func(i int)
	visit = func(i int) {
		if done[i] {
			return
		}
		done[i] = true
		for j := range devices {
			if standsOn(devices[i], devices[j]) {
				visit(j)
			}
		}
		out = append(out, devices[i])
	}
	for i := range devices {
		visit(i)
	}
	return out
}

// holders names the devices that stand on a device, for messages.
func holders(m Mapped) string {
	entries, err := os.ReadDir(fmt.Sprintf("/sys/dev/block/%d:%d/holders", m.Major, m.Minor))
	if err != nil || len(entries) == 0 {
		return "a mount or a process"
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return "the devices " + strings.Join(names, ", ")
}
