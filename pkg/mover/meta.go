package mover

import (
	"bytes"
	"strings"

	"golang.org/x/sys/unix"
)

// meta is what is kept of a file beside its content and its names.
type meta struct {
	st     unix.Stat_t
	xattrs map[string][]byte
	path   string // for messages
}

// readMeta reads the metadata of an open file of any kind; O_PATH suffices.
func readMeta(fd int, path string) (meta, error) {
	st, err := statFD(fd)
	if err != nil {
		return meta{}, sysErr(err, "stat", path)
	}
	x, err := readXattrs(fd, path)
	return meta{st, x, path}, err
}

// apply gives the metadata to an open file of the same kind; O_PATH suffices.
// The order matters: a new owner clears set-id bits and capabilities, an ACL
// carries a part of the mode, and times come last.
func (m *meta) apply(fd int) error {
	if err := unix.Fchownat(fd, "", int(m.st.Uid), int(m.st.Gid), unix.AT_EMPTY_PATH); err != nil {
		return sysErr(err, "set owner of", m.path)
	}
	path := procPath(fd)
	if m.st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(path, m.st.Mode&0o7777); err != nil {
			return sysErr(err, "set mode of", m.path)
		}
	}
	for name, value := range m.xattrs {
		err := retry(func() error { return unix.Setxattr(path, name, value, 0) })
		if err != nil && (err != unix.EOPNOTSUPP || !optional(name)) {
			return sysErr(err, "set extended attribute "+name+" on", m.path)
		}
	}
	times := []unix.Timespec{m.st.Atim, m.st.Mtim}
	return sysErr(unix.UtimesNanoAt(unix.AT_FDCWD, path, times, 0), "set times of", m.path)
}

// strip removes the extended attributes that others gave to a file that is
// going to be overwritten, an inheritable ACL above all.
func strip(fd int, path string) error {
	have, err := readXattrs(fd, path)
	if err != nil {
		return err
	}
	for name := range have {
		err := unix.Removexattr(procPath(fd), name)
		if err != nil && err != unix.ENODATA && !optional(name) {
			return sysErr(err, "remove extended attribute "+name+" of", path)
		}
	}
	return nil
}

// optional says whether an attribute belongs to its storage rather than to the
// data, so that another storage may refuse it: btrfs.compression, an NFSv4
// ACL, the SELinux label that the kubelet sets anew. Users' attributes, POSIX
// ACLs and capabilities are never optional.
func optional(name string) bool {
	switch {
	case strings.HasPrefix(name, "user."), strings.HasPrefix(name, "trusted."), strings.HasPrefix(name, "system.posix_acl_"):
		return false
	case strings.HasPrefix(name, "security."):
		return name == "security.selinux"
	}
	return true
}

// readXattrs reads all extended attributes that this process may see.
func readXattrs(fd int, path string) (map[string][]byte, error) {
	proc := procPath(fd)
	list, err := readSized(func(buf []byte) (int, error) { return unix.Listxattr(proc, buf) })
	if err == unix.EOPNOTSUPP || len(list) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, sysErr(err, "list extended attributes of", path)
	}
	all := map[string][]byte{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list, []byte{0}), []byte{0}) {
		if bytes.HasPrefix(name, []byte("trusted.SGI_ACL_")) {
			continue // how XFS keeps an ACL that is listed by its own name as well
		}
		value, err := readSized(func(buf []byte) (int, error) { return unix.Getxattr(proc, string(name), buf) })
		if err == unix.ENODATA || err == unix.EOPNOTSUPP && optional(string(name)) {
			continue // gone meanwhile, or a name without a value
		}
		if err != nil {
			return nil, sysErr(err, "get extended attribute "+string(name)+" of", path)
		}
		all[string(name)] = value
	}
	return all, nil
}

// readSized calls f with a buffer that is large enough.
func readSized(f func([]byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 512)
	for {
		n, err := retryN(func() (int, error) { return f(buf) })
		if err == nil {
			return buf[:n], nil
		}
		if err != unix.ERANGE {
			return nil, err
		}
		if n, err = f(nil); err != nil {
			return nil, err
		}
		buf = make([]byte, n+64)
	}
}
