// Package hosttest makes real file systems for tests.
package hosttest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host"
)

// The smallest file systems that the mkfs programs of Debian 12 make without
// special options.
const (
	MinExt4  = 1 << 20
	MinXFS   = 300 << 20
	MinBtrfs = 128 << 20
)

// Filesystem makes a file system of type "ext4", "xfs" (with reflink) or
// "btrfs" of size bytes in a sparse file, mounts it and returns where. All of
// it is gone when the test ends. A size below the least that the type needs is
// raised to it. The test is skipped when it does not run as root, and fails
// when the file system cannot be made.
func Filesystem(t testing.TB, fstype string, size int64) (mountpoint string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("making a file system of type %s needs root", fstype)
	}
	var mkfs []string
	switch fstype {
	case "ext4":
		mkfs, size = []string{"mkfs.ext4", "-q", "-F", "-m", "0"}, max(size, MinExt4)
	case "xfs":
		mkfs, size = []string{"mkfs.xfs", "-q", "-f", "-m", "reflink=1"}, max(size, MinXFS)
	case "btrfs":
		mkfs, size = []string{"mkfs.btrfs", "-q", "-f"}, max(size, MinBtrfs)
	default:
		t.Fatalf("file system type %q: known are ext4, xfs and btrfs", fstype)
	}
	dir := t.TempDir() // its removal is registered first, so it runs last
	image, mountpoint := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mountpoint, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	run(t, append(mkfs, image)...)
	// "loop" makes a device that frees itself when it is unmounted.
	run(t, "mount", "-t", fstype, "-o", "loop", image, mountpoint)
	t.Cleanup(func() { unmount(t, mountpoint) })
	return mountpoint
}

func run(t testing.TB, args ...string) {
	t.Helper()
	if _, err := (host.Exec{}).Run(t.Context(), host.Command{Name: args[0], Args: args[1:]}); err != nil {
		t.Fatal(err)
	}
}

// unmount waits a while for users on their way out, such as a process that was
// just killed; one that stays is the test's mistake.
func unmount(t testing.TB, mountpoint string) {
	var err error
	for range 50 {
		if err = unix.Unmount(mountpoint, 0); err != unix.EBUSY {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("unmount %s: %v", mountpoint, err)
		if err := unix.Unmount(mountpoint, unix.MNT_DETACH); err != nil {
			t.Errorf("detach %s: %v", mountpoint, err)
		}
	}
}
