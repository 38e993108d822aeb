package posix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// A share that is away for a moment may say of everything that it is not there: an NFS server that is back before
// its exports (ESTALE), an SMB server whose share is not (ENOENT). Whatever follows from it that something is not
// there (a tag that is left out of a listing, a deletion that finds nothing to do) is asked twice, and a storage that
// has what must be there has to answer.

// gone says with nil that none of the names that could not be found in the folder dir/name is in it any more.
// missing has their errors.
func (d *Directory) gone(ctx context.Context, dir *os.File, name string, missing map[string]error) error {
	if len(missing) == 0 {
		return nil
	}
	err := d.each(ctx, dir, name, func(folder *os.File, name string) error {
		why := missing[name]
		if why == nil || d.deletePending(folder, name) {
			return nil
		}
		return fault.New(fault.Unavailable, "%s is listed, and cannot be found: %w", filepath.Join(folder.Name(), name), why)
	})
	if err != nil {
		return err
	}
	return d.answers()
}

// mayBeGone says whether a failure to find, open or look at something may mean that it is deleted.
func (d *Directory) mayBeGone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) || errors.Is(err, unix.EBUSY) && d.options.DeletePending
}

// deletePending says whether a name that is listed is of a deleted file that somebody still has open. To look at one that is there
// succeeds, also while somebody keeps others from opening it.
func (d *Directory) deletePending(folder *os.File, name string) bool {
	return d.options.DeletePending && unix.ENOENT == d.again(func() error {
		_, err := statat(folder, name)
		if err == unix.EBUSY {
			return unix.ENOENT
		}
		return err
	})
}

// again does once more what has found nothing to do (unix.ENOENT), while the storage answers.
func (d *Directory) again(do func() error) error {
	if err := d.answers(); err != nil {
		return err
	}
	if err := do(); err != unix.ENOENT {
		return err
	}
	if err := d.answers(); err != nil {
		return err
	}
	return unix.ENOENT
}

// answers says with nil that the storage finds what must be there, and that it is what was opened.
func (d *Directory) answers() error {
	for name, open := range map[string]*os.File{"slabs": d.slabs, "tags": d.tags} {
		var there os.FileInfo
		opened, err := open.Stat()
		if err == nil {
			there, err = d.root.Stat(name)
		}
		if err == nil && !os.SameFile(opened, there) {
			err = fmt.Errorf("%s is another folder than the one that was opened", open.Name())
		}
		if err != nil {
			return fault.New(fault.Unavailable, "the storage does not answer as it should: %w", err)
		}
	}
	return nil
}
