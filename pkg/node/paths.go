package node

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// realPath returns a staging or target path as the kernel will show it, and
// refuses one that no kubelet would give. The path itself and, inside the
// kubelet's folder, its parents must not be symbolic links; the folder may be.
func (n *Node) realPath(ctx context.Context, what, path string) (string, error) {
	if err := n.checkPath(ctx, what, path); err != nil {
		return "", err
	}
	// What does not exist yet hangs on the deepest parent that does.
	dir, rest := filepath.Dir(path), filepath.Base(path)
	for {
		real, err := filepath.EvalSymlinks(dir)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		if errors.Is(err, syscall.ENOTDIR) {
			return "", fault.New(fault.Invalid, "%s %q: %w", what, path, err)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fault.New(fault.Unavailable, "%s %q: %w", what, path, err)
		}
		dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest)
	}
}

func (n *Node) checkPath(ctx context.Context, what, path string) error {
	switch {
	case path == "":
		return fault.New(fault.Invalid, "%s is empty: an absolute path is needed", what)
	case !filepath.IsAbs(path):
		return fault.New(fault.Invalid, "%s %q is not absolute", what, path)
	case filepath.Clean(path) != path:
		return fault.New(fault.Invalid, "%s %q is not clean: it should be %q", what, path, filepath.Clean(path))
	case path == "/":
		return fault.New(fault.Invalid, "%s %q is the root of this host", what, path)
	}
	if dir := n.cfg.KubeletDir; dir != "" && !strings.HasPrefix(path, filepath.Clean(dir)+"/") {
		return fault.New(fault.Invalid, "%s %q is not inside the kubelet's folder %q", what, path, dir)
	}
	// Neither the path nor, inside the kubelet's folder, one of its parents may
	// lead elsewhere.
	for p := path; p != "/" && p != filepath.Clean(n.cfg.KubeletDir); p = filepath.Dir(p) {
		fi, err := n.host.Stat(ctx, p)
		if errors.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			if n.mountPoint(p) { // what is mounted there may be dead: then it is no link
				return nil
			}
			return err
		}
		if fi.Mode&fs.ModeSymlink != 0 {
			return fault.New(fault.Invalid, "%s %q: %q is a symbolic link", what, path, p)
		}
		if n.cfg.KubeletDir == "" {
			break
		}
	}
	return nil
}

func (n *Node) mountPoint(path string) bool {
	at, err := n.host.MountsAt(path)
	return err == nil && len(at) > 0
}

// makeStaging creates the directory to stage on.
func makeStaging(path string) error {
	err := os.MkdirAll(path, 0o750)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOTDIR):
		return fault.New(fault.Invalid, "staging path %q: %w: a directory or nothing is needed there", path, err)
	}
	return fault.New(fault.Unavailable, "staging path %q: %w", path, err)
}

// makeTarget creates the directory, or for raw block the file, to mount on.
func makeTarget(target string, file bool) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return fault.New(fault.Unavailable, "target path %q: %w", target, err)
	}
	fi, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fault.New(fault.Unavailable, "target path %q: %w", target, err)
	case file && !fi.Mode().IsRegular():
		return fault.New(fault.Invalid, "target path %q is %s: a raw block volume needs a file or nothing there", target, fi.Mode())
	case !file && !fi.IsDir():
		return fault.New(fault.Invalid, "target path %q is %s: a directory or nothing is needed there", target, fi.Mode())
	default:
		return nil
	}
	if !file {
		err = os.Mkdir(target, 0o750)
	} else {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640); err == nil {
			err = f.Close()
		}
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fault.New(fault.Unavailable, "target path %q: %w", target, err)
	}
	return nil
}

// removeTarget removes what makeTarget made. What holds data stays.
func removeTarget(target string) error {
	fi, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fault.New(fault.Unavailable, "target path %q: %w", target, err)
	case fi.IsDir(): // rmdir fails if it is not empty
	case fi.Mode().IsRegular() && fi.Size() == 0:
	default:
		return fault.New(fault.Invalid, "target path %q is %s of %d bytes: it was not made by Quarry, so it stays", target, fi.Mode(), fi.Size())
	}
	err = os.Remove(target)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fault.New(fault.InUse, "target path %q holds files that are not the volume's, so it stays: %w", target, err)
}
