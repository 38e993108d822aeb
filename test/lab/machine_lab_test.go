package lab_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/test/lab"
)

// run runs a program and returns its output; the test ends if it fails.
func run(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// create makes a device-mapper device that is removed when the test ends.
func create(t *testing.T, name, table string) string {
	t.Helper()
	run(t, table, "dmsetup", "create", name)
	t.Cleanup(func() { run(t, "", "dmsetup", "remove", "--retry", name) })
	return "/dev/mapper/" + name
}

func write(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string, n int) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, n)
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	return string(buf)
}

func TestALinearDeviceReadsAndWritesItsDisk(t *testing.T) {
	disk := lab.Disk(t)
	device := create(t, "lab-linear", fmt.Sprintf("0 2048 linear %s 2048", disk))
	write(t, device, "over there")
	run(t, "", "blockdev", "--flushbufs", disk)
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 10)
	if _, err := f.ReadAt(buf, 2048*512); err != nil {
		t.Fatal(err)
	}
	if string(buf) != "over there" {
		t.Errorf("the disk has %q where the device's first bytes are", buf)
	}
}

func TestASnapshotDeviceKeepsItsOriginAsItWas(t *testing.T) {
	origin, store := lab.Disk(t), lab.Disk(t)
	if origin == store {
		t.Fatalf("two disks are one: %s", origin)
	}
	write(t, origin, "before")
	layer := create(t, "lab-layer", fmt.Sprintf("0 2048 snapshot %s %s P 16", origin, store))
	if got := read(t, layer, 6); got != "before" {
		t.Errorf("a fresh layer reads %q, not its origin's %q", got, "before")
	}
	write(t, layer, "after!")
	if got := read(t, layer, 6); got != "after!" {
		t.Errorf("the layer reads %q after a write of %q", got, "after!")
	}
	run(t, "", "blockdev", "--flushbufs", origin)
	if got := read(t, origin, 6); got != "before" {
		t.Errorf("a write to the layer changed its origin to %q", got)
	}
	if status := run(t, "", "dmsetup", "status", "lab-layer"); !strings.Contains(status, "snapshot 48/") {
		t.Errorf("status %q does not show one exception of 16 sectors beside 32 of header and area", status)
	}
}

func TestEveryModuleThatWorkNeedsLoads(t *testing.T) {
	lab.Need(t)
	for _, name := range []string{
		"dm-snapshot", "dm-thin-pool", "dm-crypt", "dm-flakey", "dm-delay", "dm-zero", "dm-log-writes", "dm-mod",
		"loop", "nbd", "ext4", "xfs", "btrfs", "fuse", "nfs", "nfsv4", "nfsd", "cifs", "dummy", "quota_v2",
	} {
		run(t, "", "modprobe", name)
	}
	targets := run(t, "", "dmsetup", "targets")
	for _, name := range []string{"linear", "snapshot", "snapshot-merge", "thin-pool", "thin", "crypt", "flakey", "delay", "zero", "log-writes", "error"} {
		if !strings.Contains(targets, "\n"+name+" ") && !strings.HasPrefix(targets, name+" ") {
			t.Errorf("there is no device-mapper target %q; there are:\n%s", name, targets)
		}
	}
}

func TestFileSystemsMount(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			disk := lab.Disk(t)
			run(t, "", "mkfs."+kind, disk)
			at := t.TempDir()
			run(t, "", "mount", disk, at)
			t.Cleanup(func() { run(t, "", "umount", at) })
			if err := os.WriteFile(at+"/file", []byte("kept"), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestADiskComesBackEmpty(t *testing.T) {
	var first string
	t.Run("write", func(t *testing.T) {
		first = lab.Disk(t)
		write(t, first, "left over")
	})
	t.Run("read", func(t *testing.T) {
		disk := lab.Disk(t)
		if disk != first {
			t.Fatalf("disk %s was given, not %s, which was free again", disk, first)
		}
		if got := read(t, disk, 9); got != strings.Repeat("\x00", 9) {
			t.Errorf("a disk that another test had reads %q, not zeros", got)
		}
	})
}

func TestALoopDeviceStandsInForADisk(t *testing.T) {
	t.Setenv("LAB_DISKS", "")
	disk := lab.Disk(t)
	if !strings.HasPrefix(disk, "/dev/loop") {
		t.Fatalf("disk %s is no loop device", disk)
	}
	write(t, disk, "hello")
	if got := run(t, "", "blockdev", "--getsize64", disk); strings.TrimSpace(got) != fmt.Sprint(lab.LoopSize) {
		t.Errorf("the loop device has %s bytes, not %d", strings.TrimSpace(got), lab.LoopSize)
	}
}
