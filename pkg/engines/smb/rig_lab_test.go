package smb

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

// rig is a Samba server with a share on a file system of its own.
type rig struct {
	*samba.Server
	disk   string // the file system, at the server
	folder string // what is shared of it as "k8s"
	mounts string // of the engines, here
}

func newRig(t testing.TB, fstype string, global []string, lines ...string) *rig {
	t.Helper()
	lab.Need(t)
	r := &rig{disk: hosttest.Filesystem(t, fstype, 2<<30), mounts: t.TempDir()}
	r.folder = filepath.Join(r.disk, "shared")
	must(t, os.Mkdir(r.folder, 0o755))
	r.Server = samba.Start(t, global, samba.Share{Name: "k8s", Path: r.folder, Lines: lines})
	return r
}

// apart makes an opening the only user of its connection: to kernel and server it is another host.
const apart = "nosharesock"

func (r *rig) params(more map[string]string) map[string]string {
	p := map[string]string{"server": r.Address(), "share": "k8s"}
	maps.Copy(p, more)
	return p
}

func secrets() map[string]string {
	return map[string]string{"username": samba.User, "password": samba.Password}
}

// open opens a folder of the share as a domain, until the test ends.
func (r *rig) open(t testing.TB, folder, options string) engine.Engine {
	t.Helper()
	e := r.opened(t, folder, options)
	t.Cleanup(func() { must(t, e.Close()) })
	return e
}

// opened is open for whoever closes it. Like Quarry it tries again what cannot be reached now: a kernel whose
// processor is emulated, and waits for a real one, may take its server for dead.
func (r *rig) opened(t testing.TB, folder, options string) engine.Engine {
	t.Helper()
	for tries := 1; ; tries++ {
		e, err := Open(t.Context(), r.params(map[string]string{"folder": folder, "options": options}), secrets(), host.NewLocal(host.Exec{}), r.mounts)
		if err == nil {
			return e
		}
		if !errors.Is(err, fault.Unavailable) || tries == 3 {
			t.Fatal(err)
		}
		t.Logf("try %d: %v", tries, err)
	}
}

// give makes a folder of the share, at the server.
func (r *rig) give(t testing.TB, folder string) {
	t.Helper()
	for i, c := range folder + "/" {
		if c != '/' {
			continue
		}
		path := filepath.Join(r.folder, folder[:i])
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
		samba.Give(t, path)
	}
}

// domains gives each caller a folder that no other has.
func (r *rig) domains() func() string {
	n := 0
	return func() string { n++; return fmt.Sprintf("domains/%d", n) }
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
