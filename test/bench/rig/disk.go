package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Latency of every request to a Disk, about that of a good flash disk.
const Latency = 80 * time.Microsecond

const nullb = "/sys/kernel/config/nullb"

// Disk makes a disk in memory that takes as long as a real one: of the kernel's
// null_blk driver, which the lab's virtual time makes exact. It has no write
// cache, so flushes cost nothing. block is its sectors' size in bytes.
func Disk(ctx context.Context, name string, bytes, block int64) (string, error) {
	if _, err := os.Stat(nullb); err != nil {
		if _, err := Run(ctx, "modprobe", "null_blk", "nr_devices=0"); err != nil {
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
		{"size", bytes >> 20}, {"memory_backed", 1}, {"discard", 1}, {"irqmode", timer}, {"completion_nsec", Latency.Nanoseconds()},
		{"hw_queue_depth", 256}, {"blocksize", block}, {"power", 1},
	} {
		if err := os.WriteFile(filepath.Join(dir, set.attribute), fmt.Append(nil, set.value), 0); err != nil {
			return "", fmt.Errorf("make disk %s: %w", name, err)
		}
	}
	return "/dev/" + name, nil
}
