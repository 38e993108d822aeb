package posix

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// Options are what a storage has of its own. The zero value is for a local file system.
type Options struct {
	// Trees makes the data directories of tree slabs; nil: plain directories.
	Trees Trees
	// Refresh makes and removes a unique name in a folder before it is listed: a storage whose
	// client caches folders by their time stamps (NFSv3) shows what others have made only then.
	Refresh bool
	// Decorate puts "_" before and after the names of slabs, tags and classes: a storage may
	// reserve some names (con, nul, ...) and drop dots at the end (SMB).
	Decorate bool
	// NoDirSync says that fsync of a folder does nothing, whether it fails or not (SMB, Gluster). Files are made
	// durable instead, and with them the names that the server has given before.
	NoDirSync bool
	// NoOwner says that owner and mode of what is made cannot be chosen (SMB): then the parameter
	// "mode" is not known.
	NoOwner bool
	// NoLocks says that the locks of the storage are in the way of those who read and write (SMB,
	// where they are mandatory): none are taken.
	NoLocks bool
	// DeletePending says that what was deleted while another host has it open is listed until that one closes it, and
	// is EBUSY or ENOENT for everybody else who opens it or looks at it (SMB: which of them, the kernel's version says).
	DeletePending bool
	// LateNames says that a client which has not found a name trusts for a while that it is not there, when it opens
	// it, but not when it only looks at it (SMB: for a second).
	LateNames bool
	// NoLeases says that a lease on a file (fcntl) does not tell whether somebody on this host has it
	// open: the client of a share gives one only where its server gave it the file.
	NoLeases bool
	// PastCache writes past the page cache, where the storage takes direct I/O of any length and place (NFS). A
	// file that is open for writing and has dirty pages is written out by every close of it, also by that which
	// starting a program implies; with a dead server, no program at all could be started while a verb hangs.
	PastCache bool
}

// pastCache opens what is written to f a way past the page cache, where that is an option.
func (d *Directory) pastCache(f *os.File) error {
	if !d.options.PastCache {
		return nil
	}
	err := uninterrupted(func() error { _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); return err })
	if err != nil {
		return &os.PathError{Op: "open for direct I/O", Path: f.Name(), Err: err}
	}
	return nil
}

// Describe says of a domain what holds for every directory: kinds, granularity, and the class
// parameters that slabs here take.
func (d *Directory) Describe(to *engine.Description) {
	to.Kinds = []engine.Kind{engine.Block, engine.Tree}
	to.Granularity = Granularity
	to.ZeroedSpace = true
	if d.options.NoOwner {
		return
	}
	to.ParamValues, to.TreeParams = map[string]string{paramMode: "[0-7]{3,4}"}, []string{paramMode}
	to.Params = map[string]string{paramMode: "the mode of a new directory volume's root, three or four octal digits (default: 0755); with 0777 containers can write whose user is not root"}
}
