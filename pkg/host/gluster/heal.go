package gluster

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Pending is how many files and folders wait to be healed, as those bricks say that answer for these paths: at
// least so many, since no client is told by all of them.
func (c *Client) Pending(ctx context.Context, paths ...string) (int, error) {
	most := 0
	err := c.local.Within(ctx, "ask for pending heals: "+paths[0], quick, func() error {
		found := 0
		for _, p := range paths {
			value, err := xattr(p, "glusterfs.xattrop_index_count")
			if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
				continue // a volume without copies
			}
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(value)
			if err != nil {
				return err
			}
			found = max(found, n)
		}
		most = found
		return nil
	})
	if err != nil {
		return 0, fault.New(fault.Unavailable, "ask for pending heals: %w", err)
	}
	return most, nil
}

// SplitBrain says of which of these paths there are two versions, neither of which Gluster holds for the right one.
// While bricks are away nobody knows.
func (c *Client) SplitBrain(ctx context.Context, paths []string) ([]string, error) {
	var out []string
	for _, p := range paths {
		split := false
		err := c.local.Within(ctx, "ask for split brain: "+p, quick, func() error {
			value, err := xattr(p, "replica.split-brain-status")
			if errors.Is(err, unix.EIO) { // the first time the client may only find out
				value, err = xattr(p, "replica.split-brain-status")
			}
			split = errors.Is(err, unix.EIO) || strings.Contains(value, "split-brain:yes")
			return nil
		})
		if err != nil {
			return nil, err
		}
		if split {
			out = append(out, p)
		}
	}
	return out, nil
}

func xattr(path, name string) (string, error) {
	var b [4096]byte
	n, err := unix.Getxattr(path, name, b[:])
	if err != nil {
		return "", err
	}
	return strings.TrimRight(string(b[:n]), "\x00"), nil
}
