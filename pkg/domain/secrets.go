package domain

import (
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// maxFile is the largest configuration or secrets file in bytes.
const maxFile = 1 << 20

// othersUse are the bits of a mode that let others use a file. One that belongs to
// somebody else reaches an unprivileged process through its group: so Kubernetes
// mounts secrets.
func othersUse(info os.FileInfo) os.FileMode {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() != 0 && int(st.Uid) != os.Geteuid() {
		return 0o037
	}
	return 0o077
}

// ReadSecrets reads a YAML map of strings, in a file that nobody else can read. No error shows any of its content.
func ReadSecrets(path string) (Secrets, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.New(fault.Invalid, "%w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fault.New(fault.Invalid, "%w", err)
	case !info.Mode().IsRegular():
		return nil, fault.New(fault.Invalid, "%s is not a regular file", path)
	case info.Mode().Perm()&othersUse(info) != 0:
		return nil, fault.New(fault.Invalid, "%s has mode %04o, so that others than its owner can use it: chmod 0600 %s", path, info.Mode().Perm(), path)
	case info.Size() > maxFile:
		return nil, fault.New(fault.Invalid, "%s has %d bytes: at most %d are allowed", path, info.Size(), maxFile)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fault.New(fault.Invalid, "%w", err)
	}
	// The errors below are told in our own words: YAML's quote the content.
	p, err := parse(filepath.Base(path), data)
	if err != nil || p.node == nil {
		return nil, fault.New(fault.Invalid, "%s is not one YAML map of strings (its content is not shown)", path)
	}
	values, err := p.fields(nil)
	if err != nil {
		return nil, fault.New(fault.Invalid, "%s is not a YAML map of strings with different names (its content is not shown)", path)
	}
	out := Secrets{}
	for name, value := range values {
		text, err := value.text()
		if err != nil {
			return nil, fault.New(fault.Invalid, "%s:%d: a value is not a string: write it in quotes (its content is not shown)", path, value.node.Line)
		}
		out[name] = text
	}
	return out, nil
}
