package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

const (
	group = "bench" // the volume group
	// noArchive spares LVM a copy of all its metadata for each change.
	noArchive = "--config=backup{backup=0 archive=0}"
)

// ownSnapshots is a candidate of LVM's own: a thick volume with n thick
// snapshots, new in each round, each with room for everything. What is measured
// is the volume, or its only snapshot, as a clone would be used.
func ownSnapshots(ctx context.Context, name string, n int, clone bool) (*candidate, error) {
	volume := fmt.Sprintf("own%d%t", n, clone)
	if _, err := rig.Run(ctx, "lvcreate", noArchive, "-y", "-Wn", "-Zn", "-n", volume, "-L", fmt.Sprintf("%db", size), group); err != nil {
		return nil, err
	}
	c := &candidate{name: name, path: filepath.Join("/dev", group, volume)}
	if err := fill(c.path); err != nil {
		return nil, err
	}
	var snapshots []string
	for i := range n {
		snapshots = append(snapshots, fmt.Sprintf("%s/%s-%d", group, volume, i))
	}
	if clone {
		c.path = filepath.Join("/dev", snapshots[0])
	}
	made := false
	c.fresh = func(ctx context.Context) error {
		if made {
			if _, err := rig.Run(ctx, "lvremove", append([]string{noArchive, "-y"}, snapshots...)...); err != nil {
				return err
			}
		}
		for _, s := range snapshots {
			if _, err := rig.Run(ctx, "lvcreate", noArchive, "-y", "-s", "-l", "100%ORIGIN", "-n", filepath.Base(s), filepath.Join(group, volume)); err != nil {
				return err
			}
		}
		made = true
		return nil
	}
	return c, nil
}

// overlay is a qcow2 file over a raw one, exported by qemu-storage-daemon through
// FUSE. Of what a stock kernel has as a client that was the fastest: NBD reached
// 0.6 to 0.9 of it.
type overlay struct {
	dir    string // of its own
	name   string
	format string // options of qemu-img create
}

// candidate makes a full raw file, and over it an overlay, new in each round.
func (o *overlay) candidate(ctx context.Context) (*candidate, error) {
	if err := os.WriteFile(o.base(), nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(o.base(), size); err != nil {
		return nil, err
	}
	if err := fill(o.base()); err != nil {
		return nil, err
	}
	c := &candidate{name: o.name}
	c.fresh = func(ctx context.Context) (err error) {
		if c.path != "" {
			if err := o.stop(ctx); err != nil {
				return err
			}
		}
		args := []string{"create", "-q", "-f", "qcow2", "-b", o.base(), "-F", "raw"}
		if o.format != "" {
			args = append(args, "-o", o.format)
		}
		if _, err := rig.Run(ctx, "qemu-img", append(args, o.top())...); err != nil {
			return err
		}
		c.path, err = o.start(ctx)
		return err
	}
	return c, nil
}

func (o *overlay) base() string    { return filepath.Join(o.dir, "base") }
func (o *overlay) top() string     { return filepath.Join(o.dir, "top") }
func (o *overlay) pidfile() string { return filepath.Join(o.dir, "pid") }

// start exports the overlay. Both files are opened for direct I/O.
func (o *overlay) start(ctx context.Context) (path string, err error) {
	const file = `{"driver":"file","aio":"native","cache":{"direct":true},"filename":%q,"node-name":%q,"read-only":%t}`
	args := []string{
		"--blockdev", fmt.Sprintf(file, o.base(), "base", true),
		"--blockdev", fmt.Sprintf(file, o.top(), "file", false),
		"--blockdev", `{"driver":"raw","cache":{"direct":true},"node-name":"below","file":"base","read-only":true}`,
		"--blockdev", `{"driver":"qcow2","cache":{"direct":true},"node-name":"top","file":"file","backing":"below"}`,
	}
	path = filepath.Join(o.dir, "export")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return "", err
	}
	args = append(args, "--export", "type=fuse,id=e,node-name=top,writable=on,mountpoint="+path, "--daemonize", "--pidfile", o.pidfile())
	_, err = rig.Run(ctx, "qemu-storage-daemon", args...)
	return path, err
}

// stop ends the export, and waits until the files are free.
func (o *overlay) stop(ctx context.Context) error {
	text, err := os.ReadFile(o.pidfile())
	if err != nil {
		return err
	}
	pid := strings.TrimSpace(string(text))
	if _, err := rig.Run(ctx, "kill", pid); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat("/proc/" + pid); err != nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("qemu-storage-daemon (%s) does not end", pid)
		}
	}
}
