package posix

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// identityFile, in the directory, holds a random ID by which a storage is known again, whatever
// its path, server or mount.
const identityFile = "identity"

const identityHeader = "quarry domain 1 "

// Identity is the storage's ID; one that has none gets it. fault.Corrupt: its file holds something else.
func (d *Directory) Identity() (string, error) {
	id, err := readIdentity(d.folder)
	if !errors.Is(err, fs.ErrNotExist) {
		return id, Fault(err)
	}
	err = d.roomy(func() error {
		return d.place(d.folder, identityFile, func(f *os.File) error {
			_, err := fmt.Fprintf(f, "%s%s\n", identityHeader, strings.ToLower(rand.Text()))
			return err
		})
	})
	if err != nil && !errors.Is(err, fs.ErrExist) { // another host may have made it just now
		return "", Fault(err)
	}
	id, err = readIdentity(d.folder)
	return id, Fault(err)
}

// IdentityAt is that of the storage at a path; nothing is made there. fault.NotFound: it has none.
func IdentityAt(path string) (string, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return "", Fault(err)
	}
	defer root.Close()
	folder, err := root.OpenFile(".", os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", Fault(err)
	}
	defer folder.Close()
	id, err := readIdentity(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fault.New(fault.NotFound, "there is no %s", filepath.Join(path, identityFile))
	}
	return id, Fault(err)
}

func readIdentity(folder *os.File) (string, error) {
	path := filepath.Join(folder.Name(), identityFile)
	f, err := openat(folder, identityFile, unix.O_RDONLY)
	var content []byte
	if err == nil {
		defer f.Close()
		content, err = io.ReadAll(io.LimitReader(f, 128))
	}
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EISDIR) {
		return "", fault.New(fault.Corrupt, "%s is not a file", path)
	}
	if err != nil {
		return "", err
	}
	id, begins := strings.CutPrefix(string(content), identityHeader)
	id, ends := strings.CutSuffix(id, "\n")
	if len(id) != len(rand.Text()) || !begins || !ends {
		return "", fault.New(fault.Corrupt, "%s does not hold the ID of a storage: if this is Quarry's, and nothing else uses it, remove the file, and a new one is made", path)
	}
	return id, nil
}
