package host

import (
	"os"

	"golang.org/x/sys/unix"
)

// WriteThrough is what to add to the flags that a file is opened with for writing: O_SYNC where a write has to be
// durable before it counts, else 0. It asks the file system, which may hang.
//
// That is so with SMB. A server that crashes forgets what it had not written to its disk, and unlike NFS (whose
// COMMIT answers with a verifier, RFC 1813) the protocol does not tell a client that goes on: a flush afterwards
// would make durable what is no longer there. Linux's client repeats writes when it has connected anew, and fails a
// flush with EAGAIN, which is an I/O error of a loop device, at which the filesystem on it stops.
func WriteThrough(path string) (flag int, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, ioError("statfs", path, err)
	}
	switch uint32(fs.Type) { //nolint:gosec // magic numbers are 32 bits wide
	case unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC:
		return unix.O_SYNC, nil
	}
	return 0, nil
}

// What a device says of its cache: the kernel sends flushes only to one that writes back.
const (
	writeBack    = "write back"
	writeThrough = "write through"
)

// setCache says to the kernel whether a loop device has a cache that it has to flush.
func setCache(n int, cache string) error {
	if have := sysfs(n, "queue/write_cache"); have == cache || have == "" {
		return nil
	}
	path := sysLoop(n) + "/queue/write_cache"
	return ioError("set", path, os.WriteFile(path, []byte(cache), 0))
}
