package rig

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// InLab runs this program once more, with other arguments, in the kernel lab
// (docs/LAB.md): lab is hack/lab/run, which takes the options.
func InLab(ctx context.Context, lab string, options, args []string) (err error) {
	self, clean, err := visible()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, clean()) }()
	cmd := exec.CommandContext(ctx, lab, append(append(options, "--", self), args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) } // it takes its machine down
	return cmd.Run()
}

// visible copies this program to where the guest sees it: not to /dev/shm, where
// go run may have put it.
func visible() (path string, clean func() error, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", nil, err
	}
	dir := filepath.Join(cache, "quarry", "lab")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, err
	}
	to, err := os.CreateTemp(dir, "bench.")
	if err != nil {
		return "", nil, err
	}
	clean = func() error { return os.Remove(to.Name()) }
	from, err := os.Open("/proc/self/exe")
	if err == nil {
		_, err = io.Copy(to, from)
		err = errors.Join(err, to.Chmod(0o755), from.Close())
	}
	if err = errors.Join(err, to.Close()); err != nil {
		return "", nil, errors.Join(err, clean())
	}
	return to.Name(), clean, nil
}
