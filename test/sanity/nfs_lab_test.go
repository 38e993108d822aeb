package sanity

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/test/lab"
)

// The suite on exports of the kernel's NFS server, with images and with directories: by layers on NFS 3, and on NFS 4
// natively where the server's file system has reflinks.

func TestLabNFS3(t *testing.T)       { runNFS(t, "nfs3", "xfs", "layer") }
func TestLabNFS4(t *testing.T)       { runNFS(t, "nfs4", "xfs", "snapshot") }
func TestLabNFS4OnExt4(t *testing.T) { runNFS(t, "nfs4", "ext4", "layer") }

func runNFS(t *testing.T, engine, kind, takes string) {
	x := lab.StartNFS(t).Export(t, kind)
	export := x.Dir
	if engine == "nfs4" {
		export = x.V4
	}
	domain := filepath.Join(x.Dir, "domain")
	runLab(t, storage{
		entry: fmt.Sprintf("- name: local\n  engine: %s\n  scope: node\n  params: {server: 127.0.0.1, export: %s, folder: domain}\n", engine, export),
		size:  256 << 20, mark: "/slabs/", takes: takes, trees: true,
		space: func() error { return emptyDirectory(domain) },
		tags:  func() (int, error) { return tagsIn(domain) },
	})
}

// tagsIn counts the tags of images in a domain that is a directory.
func tagsIn(domain string) (n int, err error) {
	for _, class := range []string{"i", "d", "a", "p"} {
		entries, err := os.ReadDir(filepath.Join(domain, "tags", class))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, err
		}
		n += len(entries)
	}
	return n, nil
}
