package csi

import (
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

const (
	// maxName is CSI's limit for a name, in bytes.
	maxName = 128
	// maxNode is CSI's limit for a node ID, in bytes.
	maxNode = 256
	// maxPath is the kernel's limit for a path, with its final NUL.
	maxPath = 4096
	// maxMap is CSI's limit for a map or a list of mount flags, in bytes.
	maxMap = 4096
	// maxSize is 1 EiB: more than any file system that Quarry makes or lives
	// on, and far enough from 2^63 that rounding up cannot overflow.
	maxSize = int64(1) << 60
)

// required refuses an empty field. It comes before every other check: the
// specification asks for INVALID_ARGUMENT even where the object does not exist.
func required(field, value string) error {
	if value == "" {
		return fault.New(fault.Invalid, "%s is missing", field)
	}
	return nil
}

// checkName verifies a name that the CO chose.
func checkName(field, name string) error {
	if name == "" || len(name) > maxName {
		return fault.New(fault.Invalid, "%s has %d bytes: 1 to %d are allowed", field, len(name), maxName)
	}
	if !utf8.ValidString(name) {
		return fault.New(fault.Invalid, "%s %q is not UTF-8", field, name)
	}
	for i, r := range name {
		if banned(r) {
			return fault.New(fault.Invalid, "%s %q: control character %U at byte %d is not allowed", field, name, r, i)
		}
	}
	return nil
}

// banned are the characters that CSI bans from names: control characters
// other than tab, line feed and carriage return.
func banned(r rune) bool {
	return r <= 0x08 || r == 0x0b || r == 0x0c || r >= 0x0e && r <= 0x1f || r >= 0x7f && r <= 0x9f
}

// handleOf parses the ID of a volume, snapshot or group. An ID that cannot
// have come from Quarry names something that certainly does not exist.
func handleOf(field, id string) (image.Handle, error) {
	if err := required(field, id); err != nil {
		return image.Handle{}, err
	}
	h, err := image.ParseHandle(id)
	if err != nil {
		return image.Handle{}, fault.New(fault.NotFound, "%s: %w: nothing of that name can exist", field, err)
	}
	return h, nil
}

func checkNode(node string) error {
	if node == "" || len(node) > maxNode {
		return fault.New(fault.Invalid, "node_id has %d bytes: 1 to %d are allowed", len(node), maxNode)
	}
	return nil
}

// pathOf reads a path of a node: absolute and without detours. What is there is
// the node's to check.
func pathOf(field, path string) (string, error) {
	if err := required(field, path); err != nil {
		return "", err
	}
	clean := filepath.Clean(path)
	switch {
	case len(path) >= maxPath:
		return "", fault.New(fault.Invalid, "%s has %d bytes: less than %d are allowed", field, len(path), maxPath)
	case strings.ContainsRune(path, 0):
		return "", fault.New(fault.Invalid, "%s %q holds a NUL character", field, path)
	case !filepath.IsAbs(path) || clean != path && clean+"/" != path:
		return "", fault.New(fault.Invalid, "%s %q: it must be an absolute path without '.', '..' or double slashes", field, path)
	}
	return clean, nil
}

// sizes reads a capacity range; 0 stands for "not said".
func sizes(r *csi.CapacityRange) (size, limit int64, err error) {
	size, limit = r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case size < 0:
		return 0, 0, fault.New(fault.Invalid, "capacity_range.required_bytes is %d: it must not be negative", size)
	case limit < 0:
		return 0, 0, fault.New(fault.Invalid, "capacity_range.limit_bytes is %d: it must not be negative", limit)
	case limit > 0 && limit < size:
		return 0, 0, fault.New(fault.OutOfRange, "capacity_range.limit_bytes is %d, less than required_bytes %d", limit, size)
	case size > maxSize:
		return 0, 0, fault.New(fault.OutOfRange, "capacity_range.required_bytes is %d: at most %d are allowed", size, maxSize)
	}
	return size, limit, nil
}

// page reads the paging fields of a list. A token is the handle of the last
// entry that was given: what is added or deleted meanwhile moves nothing.
func page(maxEntries int32, token string) (after string, max int, err error) {
	if maxEntries < 0 {
		return "", 0, fault.New(fault.Invalid, "max_entries is %d: it must not be negative", maxEntries)
	}
	if token != "" {
		if _, err := image.ParseHandle(token); err != nil {
			return "", 0, fault.New(fault.Conflict, "starting_token %q is not one that this list gave: begin again without it", token)
		}
	}
	return token, int(maxEntries), nil
}
