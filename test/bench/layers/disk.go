package main

import (
	"context"
	"os"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

// scratch makes an ext4 and mounts it.
func scratch(ctx context.Context) (string, error) {
	dev, err := rig.Disk(ctx, "nullb0", 16<<30, 512)
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
