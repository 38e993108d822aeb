package posix

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// The server of a share may do what it was asked and its reply be lost: the client asks again, and
// is told that the name is taken, or that what it renamed is not there. So whatever fails here by
// its name is looked at: what is there and is ours was done.

// unique is a name in tmp/ or trash/ that nobody else has.
func (d *Directory) unique() string { return d.host + rand.Text() }

// create makes a file that nobody else makes: of a unique name, or in a folder of such a one.
func create(in *os.File, name string) (*os.File, error) {
	f, err := openat(in, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if errors.Is(err, fs.ErrExist) { // a lost reply
		return openat(in, name, unix.O_RDWR)
	}
	return f, err
}

// mkdir makes a folder that nobody else makes: of a unique name, or in such a one.
func mkdir(in *os.File, name string, mode uint32) error {
	if err := mkdirat(in, name, mode); err != nil && err != unix.EEXIST {
		return &os.PathError{Op: "mkdir", Path: filepath.Join(in.Name(), name), Err: err}
	}
	return nil
}

// rename moves what is open as f. A folder never takes the place of one that is not empty.
func rename(f *os.File, from *os.File, old string, to *os.File, name string) error {
	err := renameat(from, old, to, name)
	var unseen error
	// One who has seen what has the name now by another one, in tmp/, finds it by the new one only outside of a rename.
	const manyTries = 10
	for tries := 0; err != nil && tries < manyTries; tries++ {
		var done bool
		if done, unseen = named(f, to, name); done {
			return nil
		}
		if err != unix.ESTALE {
			break
		}
		err = renameat(from, old, to, name)
	}
	if err == nil {
		return nil
	}
	err = &os.LinkError{Op: "rename", Old: filepath.Join(from.Name(), old), New: filepath.Join(to.Name(), name), Err: err}
	if unseen != nil {
		return unknown(fmt.Errorf("%w; %w", err, unseen))
	}
	return err
}

// lostReply is what a failure to give f the name in dir means: nil if it has the name all the same.
func lostReply(err error, f *os.File, dir *os.File, name string) error {
	switch done, unseen := named(f, dir, name); {
	case done:
		return nil
	case unseen != nil:
		return unknown(fmt.Errorf("%w; %w", err, unseen))
	}
	return err
}

// named says whether what is open as f has the name in dir. With an error, that is not known.
func named(f *os.File, dir *os.File, name string) (bool, error) {
	open, err := stat(f)
	if err != nil {
		return false, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	there, err := statat(dir, name)
	// The kernel still has a renamed folder under its old name, and finds its new one only while nobody
	// else is at work in the folders of both.
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for tries := 0; err == unix.ESTALE && tries < 200; tries++ {
		<-tick.C
		there, err = statat(dir, name)
	}
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "stat", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return open.Dev == there.Dev && open.Ino == there.Ino, nil
}

// place makes a file durable under a name in dir: complete, or not at all. The
// error is fs.ErrExist when the name is taken.
func (d *Directory) place(dir *os.File, name string, fill func(*os.File) error) error {
	err := d.tryPlace(dir, name, fill)
	// Under load an NFS client was seen not to find what it had just made, though the folders were there.
	const manyTries = 3
	for tries := 1; tries < manyTries && unmade(err); tries++ {
		err = d.tryPlace(dir, name, fill)
	}
	if errors.Is(Fault(err), fault.Exhausted) {
		// What is there already is not left undone for want of room.
		if _, err := statat(dir, name); err == nil {
			return fs.ErrExist
		}
	}
	return err
}

// unmade says whether a link failed because what was to get the name, or the folder for it, was not there.
func unmade(err error) bool {
	var link *os.LinkError
	return errors.As(err, &link) && link.Err == unix.ENOENT && !errors.Is(err, fault.Unavailable)
}

func (d *Directory) tryPlace(dir *os.File, name string, fill func(*os.File) error) error {
	tmp := d.unique()
	f, err := create(d.tmp, tmp)
	if err != nil {
		return err
	}
	release := d.hold(f)
	// Each may fail without harm: the file is synced, and what stays in tmp/ is swept.
	defer func() { release(); f.Close(); unlinkat(d.tmp, tmp, 0) }()
	if err := d.pastCache(f); err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := linkat(d.tmp, tmp, dir, name); err != nil {
		err := &os.LinkError{Op: "link", Old: filepath.Join("tmp", tmp), New: filepath.Join(dir.Name(), name), Err: err}
		if err := lostReply(err, f, dir, name); err != nil {
			return err
		}
	}
	if d.options.NoDirSync {
		// The server's journal has the file's new name and its number of names in one entry.
		return unknown(f.Sync())
	}
	return d.published(dir)
}

// published makes dir durable after a name was put into it. When that fails the
// name may or may not survive: never Exhausted, which promises that nothing remains.
func (d *Directory) published(dir *os.File) error { return unknown(d.syncFolder(dir)) }

// unknown is the error of a name that is there, and may not be durable.
func unknown(err error) error {
	if err == nil {
		return nil
	}
	return fault.New(fault.Unavailable, "whether it was done is unknown: %w", err)
}

// syncFolder makes the names in a folder durable.
func (d *Directory) syncFolder(folder *os.File) error {
	if d.options.NoDirSync {
		return d.roomy(d.commit)
	}
	return folder.Sync()
}

// commit makes durable what was done before, where only files can be made so: a journal that has
// the creation of a file on the disk has what came before it, too.
func (d *Directory) commit() error {
	name := d.unique()
	f, err := create(d.tmp, name)
	if err != nil {
		return err
	}
	defer func() { f.Close(); unlinkat(d.tmp, name, 0) }() // it is synced, and what stays in tmp/ is swept
	return f.Sync()
}
