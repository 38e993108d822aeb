package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// floor is the least that anybody must do who keeps a volume as a file and its
// record as files beside it, and loses neither in a crash. Every file is made
// in tmp/, written, synced, linked under its name, and the folder synced; then
// the name in tmp/ is removed. An operation makes the same files in the same
// order as Quarry:
//
//	CreateVolume    intent (tag); slab and, meanwhile, description (tag); seal (tag)
//	CreateSnapshot  intent, slab with the source's content, seal
//	clone           intent; slab with the snapshot's content and description; seal
//	DeleteVolume    the tag that says so; the slab goes later, which is not measured
//
// Content comes by FICLONE on XFS, else by copy_file_range of the data alone.
// What Quarry does beyond that (checks, the index, reading the epoch after every
// tag, gRPC) is its own cost and counts against it.
type floor struct {
	slabs, tags, described, tmp *os.File
	reflink                     bool
	sources                     []string
}

// record is as large as a volume's.
const record = 330

func newFloor(dir string, reflink bool, workers int) (*floor, error) {
	f := &floor{reflink: reflink}
	for name, to := range map[string]**os.File{"slabs": &f.slabs, "tags": &f.tags, "described": &f.described, "tmp": &f.tmp} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
		var err error
		if *to, err = os.Open(path); err != nil {
			return nil, err
		}
	}
	for w := range workers {
		path := filepath.Join(f.slabs.Name(), "source-"+string(rune('A'+w)))
		if err := os.WriteFile(path, bytes.Repeat([]byte("x"), data), 0o600); err != nil {
			return nil, err
		}
		if err := os.Truncate(path, size); err != nil {
			return nil, err
		}
		f.sources = append(f.sources, path)
	}
	unix.Sync()
	return f, nil
}

func (f *floor) folders() []string {
	return []string{f.slabs.Name(), f.tags.Name(), f.described.Name()}
}

func (f *floor) close() error {
	return errors.Join(f.slabs.Close(), f.tags.Close(), f.described.Close(), f.tmp.Close())
}

func (f *floor) tag(dir *os.File, name string) error {
	return f.place(dir, name, func(file *os.File) error {
		_, err := file.Write(make([]byte, record))
		return err
	})
}

// place makes a durable file.
func (f *floor) place(dir *os.File, name string, fill func(*os.File) error) error {
	tmp := rand.Text()
	fd, err := unix.Openat(int(f.tmp.Fd()), tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), tmp)
	defer file.Close()
	if err := fill(file); err != nil {
		return err
	}
	return errors.Join(file.Sync(), unix.Linkat(int(f.tmp.Fd()), tmp, int(dir.Fd()), name, 0), dir.Sync(), unix.Unlinkat(int(f.tmp.Fd()), tmp, 0))
}

func (f *floor) image(name string, describe bool, fill func(*os.File) error) error {
	if err := f.tag(f.tags, name+".1"); err != nil {
		return err
	}
	described := make(chan error, 1)
	if describe {
		go func() { described <- f.tag(f.described, name) }()
	} else {
		described <- nil
	}
	if err := errors.Join(f.place(f.slabs, name, fill), <-described); err != nil {
		return err
	}
	return f.tag(f.tags, name+".2")
}

func (f *floor) createVolume(_ context.Context, _ int, name string) error {
	return f.image("volume-"+name, true, func(file *os.File) error { return file.Truncate(size) })
}

func (f *floor) createSnapshot(_ context.Context, worker int, name string) error {
	return f.image("snapshot-"+name, false, f.content(worker))
}

func (f *floor) clone(_ context.Context, worker int, name string) error {
	return f.image("clone-"+name, true, f.content(worker))
}

func (f *floor) content(worker int) func(*os.File) error {
	return func(file *os.File) error {
		src, err := os.Open(f.sources[worker])
		if err != nil {
			return err
		}
		defer src.Close()
		if f.reflink {
			return unix.IoctlFileClone(int(file.Fd()), int(src.Fd()))
		}
		n, err := io.CopyN(file, src, data)
		if err != nil || n != data {
			return errors.Join(err, io.ErrShortWrite)
		}
		return file.Truncate(size)
	}
}

func (f *floor) deleteVolume(_ context.Context, _ int, name string) error {
	return f.tag(f.tags, "volume-"+name+".3")
}

func (f *floor) settle(context.Context) error {
	unix.Sync()
	return nil
}
