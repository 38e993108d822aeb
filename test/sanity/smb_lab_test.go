package sanity

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

// TestLabSMB runs the suite on a share of a Samba server: volumes as images, whose snapshots and
// clones are by layers, and as directories, whose are copies.
func TestLabSMB(t *testing.T) {
	runLab(t, smbShare(t))
}

func TestLabSMBDirectories(t *testing.T) {
	s := smbShare(t)
	dir := t.TempDir()
	d := start(t, build(t), dir, s.entry)
	d.suite(t, specCase{Access: "mount", Dir: dir, Domain: d.openDomain(t), Parameters: map[string]string{"layout": "directory"}})
	d.noImages(t)
	wait(t, "the collector to give back all space", patience, s.space)
	nothingIsInUse(t, s.mark, dir+"/")
	d.stop(t)
	nothingIsInUse(t, "//127.0.0.1/")
	if t.Failed() {
		t.Logf("the end of quarry's log:\n%s", d.LastLog(100))
	}
}

// smbShare is a share on an XFS of its own.
func smbShare(t *testing.T) storage {
	t.Helper()
	lab.Need(t)
	shared := filepath.Join(hosttest.Filesystem(t, "xfs", fsSize), "shared")
	if err := os.Mkdir(shared, 0o755); err != nil {
		t.Fatal(err)
	}
	server := samba.Start(t, nil, samba.Share{Name: "k8s", Path: shared})
	secrets := filepath.Join(t.TempDir(), "secrets.yaml")
	if err := os.WriteFile(secrets, fmt.Appendf(nil, "username: %s\npassword: '%s'\n", samba.User, samba.YAMLPassword()), 0o600); err != nil {
		t.Fatal(err)
	}
	return storage{
		entry: fmt.Sprintf("- name: local\n  engine: smb\n  params: {server: %q, share: k8s}\n  secretsFile: %s\n", server.Address(), secrets),
		mark:  "/slabs/_", takes: "layer",
		space: func() error { return emptyDirectory(shared) },
		tags: func() (n int, err error) {
			for _, class := range []string{"i", "d", "a", "p"} {
				entries, err := os.ReadDir(filepath.Join(shared, "tags", "_"+class+"_"))
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					return 0, err
				}
				n += len(entries)
			}
			return n, nil
		},
	}
}
