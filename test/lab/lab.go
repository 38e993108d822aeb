// Package lab is what tests of the kernel lab (docs/LAB.md) start with. Such tests
// live in files named *_lab_test.go; hack/lab/gotest runs them in a virtual machine.
package lab

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// locks has one file for every virtual disk that a test ever took.
const locks = "/run/lab-disks"

// Inside reports whether this process runs in the kernel lab.
func Inside() bool { return os.Getenv("QUARRY_LAB") == "1" }

// Need skips a test that is not running in the kernel lab. In it, it never skips.
func Need(t testing.TB) {
	t.Helper()
	if !Inside() {
		t.Skip("needs the kernel lab: hack/lab/gotest (docs/LAB.md)")
	}
}

// Disk returns the path of a block device that belongs to this test until it ends
// and reads as zeros: a virtual disk (the machine's --disk) that no other test
// has, or, when there is none, a loop device over a sparse file of LoopSize bytes.
// A test that ends while its disk is still in use by the kernel fails.
func Disk(t testing.TB) string {
	t.Helper()
	Need(t)
	if err := os.MkdirAll(locks, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range strings.Fields(os.Getenv("LAB_DISKS")) {
		unlock, err := take(path)
		if err != nil {
			t.Fatal(err)
		}
		if unlock == nil {
			continue
		}
		t.Cleanup(unlock)
		if err := wipe(path); err != nil {
			t.Fatalf("disk %s: %v", path, err)
		}
		t.Cleanup(func() {
			if err := free(path); err != nil {
				t.Errorf("disk %s: %v", path, err)
			}
		})
		return path
	}
	return Loop(t, LoopSize)
}

// LoopSize is the size in bytes of the sparse file behind a loop device that stands
// in for a virtual disk.
const LoopSize = 10 << 30

// Loop returns the path of a new loop device over an empty sparse file of so many
// bytes on the scratch disk. It is detached when the test ends; a test that ends
// while it is in use fails.
func Loop(t testing.TB, size int64) string {
	t.Helper()
	Need(t)
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	path, err := attach(file)
	if err != nil {
		t.Fatalf("loop device over %s: %v", file.Name(), err)
	}
	t.Cleanup(func() {
		if err := errors.Join(free(path), detach(path)); err != nil {
			t.Errorf("loop device %s: %v", path, err)
		}
	})
	return path
}

// take locks a disk against other tests, in other processes too. It returns nil if
// another has it.
func take(path string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(locks, filepath.Base(path)), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, f.Close()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("flock %s: %w", f.Name(), err), f.Close())
	}
	return func() { _ = f.Close() }, nil // the lock goes with it, whatever it says
}

// wipe makes a disk that nobody uses read as zeros: a virtual disk is a sparse file
// outside, and discarding makes holes in it.
func wipe(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if err := discard(f, uint64(size)); err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	buf := make([]byte, 1<<20)
	for _, at := range []int64{0, max(0, size-int64(len(buf)))} {
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for i, b := range buf[:n] {
			if b != 0 {
				return fmt.Errorf("byte %d is %#x after a discard, not 0", at+int64(i), b)
			}
		}
	}
	return nil
}

// free fails if something holds the disk: a mount, a device-mapper table, a volume
// group, an exclusive opener.
func free(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		holders, _ := filepath.Glob("/sys/class/block/" + filepath.Base(path) + "/holders/*")
		return fmt.Errorf("still in use when the test ended (holders %q)", holders)
	}
	if err != nil {
		return err
	}
	return f.Close()
}
