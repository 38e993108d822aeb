package gluster_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/engines/gluster"
	"github.com/quarry-csi/quarry/pkg/host"
	server "github.com/quarry-csi/quarry/test/gluster"
)

// long says that the whole suite is run, which takes the better part of an hour on two busy processors.
func long() bool { return os.Getenv("QUARRY_GLUSTER") == "long" }

func TestReplicated(t *testing.T) { conforms(t, server.VolumeSpec{Name: "copies"}) }

func TestArbiter(t *testing.T) {
	if !long() {
		t.Skip("set QUARRY_GLUSTER=long: two copies and an arbiter, and over a socket and under Minimal")
	}
	conforms(t, server.VolumeSpec{Name: "arbiter", Bricks: 3, Replica: 3, Arbiter: true, FS: "ext4"})
}

// conforms runs the suite; each domain is a folder of one volume.
func conforms(t *testing.T, spec server.VolumeSpec) {
	v := server.Start(t).Volume(t, spec)
	var n atomic.Int64
	var last string
	enginetest.Run(t, enginetest.Harness{
		Slow:   true,
		Once:   !long(),
		Expect: []engine.Capability{engine.CapMeter, engine.CapImport},
		Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
			last = fmt.Sprintf("domains/%d", n.Add(1))
			return opener(v, last)
		},
		Foreign: func(t testing.TB, content []byte) string {
			folder := filepath.Join(mount(t, v), last, "import")
			ok(t, os.MkdirAll(folder, 0o755))
			ok(t, os.WriteFile(filepath.Join(folder, "disk.img"), content, 0o644))
			return "disk.img"
		},
	})
}

// opener opens a folder of a volume as a domain.
func opener(v *server.Volume, folder string) func(t testing.TB) engine.Engine {
	return func(t testing.TB) engine.Engine {
		t.Helper()
		e, err := gluster.Open(t.Context(), params(v, folder), host.Exec{}, host.NewLocal(host.Exec{}), mountsFolder(t))
		ok(t, err)
		return e
	}
}

// mountsFolder is a folder for mounts, of which nothing is left when the test ends, also when it has failed.
func mountsFolder(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		all, err := host.NewLocal(host.Exec{}).Mounts()
		ok(t, err)
		for _, m := range all {
			if strings.HasPrefix(m.Point, dir+"/") {
				t.Logf("%s is left mounted", m.Point)
				ok(t, unix.Unmount(m.Point, unix.MNT_DETACH))
			}
		}
	})
	return dir
}

func params(v *server.Volume, folder string) map[string]string {
	return map[string]string{"servers": v.Server.Address, "volume": v.Name, "folder": folder}
}

// mount mounts a volume as its users do, without Quarry.
func mount(t testing.TB, v *server.Volume) string {
	t.Helper()
	at, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
	_, err := (host.Exec{}).Run(t.Context(), host.Command{Name: "glusterfs", Args: []string{"--volfile-server=" + v.Server.Address, "--volfile-id=" + v.Name, "--log-file=" + log, at}})
	ok(t, err)
	t.Cleanup(func() { ok(t, unix.Unmount(at, unix.MNT_DETACH)) })
	return at
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
