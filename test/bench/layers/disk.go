package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

// latency of every request to a disk, about that of a good flash disk.
const latency = 80 * time.Microsecond

const nullb = "/sys/kernel/config/nullb"

// disk makes a disk in memory that takes as long as a real one: of the kernel's
// null_blk driver, which the lab's virtual time makes exact. It has no write
// cache, so flushes cost nothing.
func disk(ctx context.Context, name string, bytes int64) (string, error) {
	if _, err := os.Stat(nullb); err != nil {
		if _, err := rig.Run(ctx, "modprobe", "null_blk", "nr_devices=0"); err != nil {
			return "", err
		}
		if err := unix.Mount("config", "/sys/kernel/config", "configfs", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return "", fmt.Errorf("mount configfs: %w", err)
		}
	}
	dir := filepath.Join(nullb, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	const timer = 2 // of irqmode: requests end completion_nsec later
	for _, set := range []struct {
		attribute string
		value     int64
	}{
		{"size", bytes / mib}, {"memory_backed", 1}, {"irqmode", timer}, {"completion_nsec", latency.Nanoseconds()},
		{"hw_queue_depth", 256}, {"blocksize", 512}, {"power", 1},
	} {
		if err := os.WriteFile(filepath.Join(dir, set.attribute), fmt.Append(nil, set.value), 0); err != nil {
			return "", fmt.Errorf("make disk %s: %w", name, err)
		}
	}
	return "/dev/" + name, nil
}

// scratch makes an ext4 and mounts it.
func scratch(ctx context.Context) (string, error) {
	dev, err := disk(ctx, "nullb0", 16<<30)
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "layers-")
	if err != nil {
		return "", err
	}
	if _, err := rig.Run(ctx, "mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", dev); err != nil {
		return "", err
	}
	_, err = rig.Run(ctx, "mount", "-o", "noatime,noinit_itable", dev, dir)
	return dir, err
}
