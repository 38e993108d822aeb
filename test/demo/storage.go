package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// run runs a program; its error holds what the program said.
func run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		said := ""
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			said = ": " + strings.TrimSpace(string(exit.Stderr))
		}
		return string(out), fmt.Errorf("%s %s: %w%s", name, strings.Join(args, " "), err, said)
	}
	return string(out), nil
}

// disk makes a sparse file of the given size below dir, puts a filesystem on it
// and mounts it through a loop device: a stand-in for a real disk.
func disk(ctx context.Context, dir, filesystem string, bytes int64) (mounted string, err error) {
	image := filepath.Join(dir, filesystem+".disk")
	f, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	err = errors.Join(f.Truncate(bytes), f.Close())
	if err != nil {
		return "", err
	}
	if _, err := run(ctx, "mkfs."+filesystem, "-q", image); err != nil {
		return "", err
	}
	mounted = filepath.Join(dir, filesystem)
	if err := os.Mkdir(mounted, 0o755); err != nil {
		return "", err
	}
	_, err = run(ctx, "mount", "-o", "loop", image, mounted)
	return mounted, err
}

// mayGrowExt4 says whether this process may grow a mounted ext4. Root in some
// containers may not.
func mayGrowExt4() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData // of 32 capabilities each
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return false, err
	}
	return sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0, nil
}

// mounts returns the mount points below dir, deepest first.
func mounts(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var found []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			if at := unescape.Replace(fields[4]); strings.HasPrefix(at, dir+"/") {
				found = append(found, at)
			}
		}
	}
	slices.Reverse(found) // mountinfo is in the order of mounting
	return found, nil
}

// loops returns the loop devices whose backing file is below dir, as
// "/dev/loopN" by backing file.
func loops(dir string) (map[string]string, error) {
	attributes, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, a := range attributes {
		data, err := os.ReadFile(a)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, err
		}
		backing := strings.TrimSuffix(string(data), "\n")
		if strings.HasPrefix(backing, dir+"/") {
			found[backing] = "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(a)))
		}
	}
	return found, nil
}

// tearDown takes down whatever stands below dir, whoever left it, and removes
// dir. It removes nothing while something is still mounted there.
func tearDown(ctx context.Context, dir string) error {
	var failed []error
	// Quarry's own loop devices hold files of the disks open: they go between
	// the mounts above them and the disks below.
	for round := 0; round < 3; round++ {
		failed = nil
		points, err := mounts(dir)
		if err != nil {
			return err
		}
		for _, at := range points {
			if err := unix.Unmount(at, 0); err != nil {
				failed = append(failed, fmt.Errorf("unmount %s: %w", at, err))
			}
		}
		devices, err := loops(dir)
		if err != nil {
			return err
		}
		for backing, device := range devices {
			if _, err := run(ctx, "losetup", "--detach", device); err != nil {
				failed = append(failed, fmt.Errorf("detach %s of %s: %w", device, backing, err))
			}
		}
		if len(failed) == 0 {
			break
		}
	}
	if points, err := mounts(dir); err != nil || len(points) > 0 {
		return errors.Join(append(failed, err, fmt.Errorf("%s is kept: still mounted: %s", dir, strings.Join(points, ", ")))...)
	}
	return errors.Join(append(failed, os.RemoveAll(dir))...)
}
