// Package hangfs is storage that stops answering when a test says so: a
// filesystem of one file, served by the test itself (package farfs). What
// waits for it sleeps in the kernel and cannot be killed, as with a dead server.
package hangfs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

// Op is a request of the kernel.
type Op = farfs.Op

// The requests that a test may want to hold.
const (
	Lookup  = farfs.Lookup
	Getattr = farfs.Getattr
	Open    = farfs.Open
	Read    = farfs.Read
	Write   = farfs.Write
	Fsync   = farfs.Fsync
	Flush   = farfs.Flush
)

// FS is the filesystem. Nothing hangs until its Hang is called.
type FS struct {
	*farfs.Server
	// File is the path of its one file.
	File string
}

// New makes a filesystem whose file has size bytes and mounts it for the time
// of the test, which fails if something still uses it at the end. Every read and write of the file is a request.
func New(t testing.TB, size int64) *FS {
	t.Helper()
	dir := t.TempDir()
	shown, point := filepath.Join(dir, "shown"), filepath.Join(dir, "mnt")
	f := &FS{Server: farfs.New(t, shown), File: filepath.Join(point, "slab")}
	if err := errors.Join(os.Mkdir(shown, 0o755), os.Mkdir(point, 0o755), os.WriteFile(filepath.Join(shown, "slab"), nil, 0o600),
		os.Truncate(filepath.Join(shown, "slab"), size)); err != nil {
		t.Fatal(err)
	}
	f.Uncached()
	if err := f.Mount("", point); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Release()
		err := unix.Unmount(point, 0)
		for i := 0; errors.Is(err, unix.EBUSY) && i < 500; i++ { // what was held is on its way out
			time.Sleep(10 * time.Millisecond)
			err = unix.Unmount(point, 0)
		}
		if err != nil {
			t.Errorf("unmount %s: %v", point, err)
		}
	})
	return f
}
