package posix

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// TestTheKernelsFileSystemsAreRefused for good: trying again would never help.
func TestTheKernelsFileSystemsAreRefused(t *testing.T) {
	for path, name := range map[string]string{"/proc": "proc", "/proc/self/task": "proc", "/sys": "sysfs"} {
		_, err := Open(path, Options{})
		fails(t, err, fault.Invalid)
		for _, say := range []string{"params.path", path + " ", name} {
			if !strings.Contains(err.Error(), say) {
				t.Errorf("%q does not say %q", err, say)
			}
		}
	}
}

// TestControlGroupsAreNotMade by the attempt to open a domain among them.
func TestControlGroupsAreNotMade(t *testing.T) {
	path := t.TempDir()
	if err := unix.Mount("quarry-test", path, "cgroup2", 0, ""); err != nil {
		t.Skipf("control groups cannot be mounted: %v", err)
	}
	t.Cleanup(func() { ok(t, unix.Unmount(path, unix.MNT_DETACH)) })
	_, err := Open(path, Options{})
	fails(t, err, fault.Invalid)
	for _, name := range []string{"slabs", "tags", "tmp", "trash"} {
		if _, err := os.Lstat(filepath.Join(path, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
			ok(t, os.Remove(filepath.Join(path, name)))
		}
	}
}

// TestADirectoryThatIsGoneForNowIsTriedAgain: one that waits for its share, and
// one whose storage took it away, which answers mkdir as /proc does.
func TestADirectoryThatIsGoneForNowIsTriedAgain(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(filepath.Join(dir, "not-mounted"), Options{})
	fails(t, err, fault.Unavailable)

	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	removed, path := filepath.Join(dir, "removed"), filepath.Join(dir, "path")
	ok(t, os.Mkdir(removed, 0o755))
	ok(t, os.Mkdir(path, 0o755))
	ok(t, unix.Mount(removed, path, "", unix.MS_BIND, ""))
	t.Cleanup(func() { ok(t, unix.Unmount(path, unix.MNT_DETACH)) })
	ok(t, os.Remove(removed))
	_, err = Open(path, Options{})
	fails(t, err, fault.Unavailable)
}
