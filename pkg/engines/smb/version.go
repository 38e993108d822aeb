package smb

import (
	"fmt"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// dialect is a version of SMB as the protocol writes it; 0 is none in particular.
type dialect uint16

const (
	smb210 dialect = 0x0210
	smb300 dialect = 0x0300
	smb302 dialect = 0x0302
	smb311 dialect = 0x0311
)

// String is the version as people and the kernel's option "vers" write it.
func (d dialect) String() string {
	switch d {
	case smb210:
		return "2.1"
	case smb300:
		return "3.0"
	case smb302:
		return "3.0.2"
	case smb311:
		return "3.1.1"
	}
	return fmt.Sprintf("%#04x", uint16(d))
}

// dialects that Quarry uses, the highest first. SMB 1 has no place here, and 2.0 no large writes
// and no leases.
func dialects() []dialect { return []dialect{smb311, smb302, smb300, smb210} }

func versions() []string {
	var out []string
	for _, d := range slices.Backward(dialects()) {
		out = append(out, d.String())
	}
	return out
}

// parseVersion reads the parameter "version"; "": 0, the highest that the server has.
func parseVersion(s string) (dialect, error) {
	if s == "" {
		return 0, nil
	}
	for _, d := range dialects() {
		if d.String() == s {
			return d, nil
		}
	}
	return 0, fault.New(fault.Invalid, "parameter \"version\" is %q: allowed are %s", s, strings.Join(versions(), ", "))
}
