package sharedfs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

func TestExt4(t *testing.T) { conforms(t, "ext4", engine.CapMeter, engine.CapImport) }

func TestXFS(t *testing.T) {
	conforms(t, "xfs", engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapImport)
}

func TestBtrfs(t *testing.T) {
	conforms(t, "btrfs", engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapImport)
}

func conforms(t *testing.T, fstype string, expect ...engine.Capability) {
	t.Parallel() // they wait for disks, not for processors
	filesystem := hosttest.Filesystem(t, fstype, 1<<30)
	var last string
	enginetest.Run(t, enginetest.Harness{Expect: expect, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
		last = newDirectory(t, filesystem)
		return opener(last)
	}, Foreign: func(t testing.TB, content []byte) string {
		folder := filepath.Join(last, "import")
		ok(t, os.Mkdir(folder, 0o755))
		ok(t, os.WriteFile(filepath.Join(folder, "disk.img"), content, 0o644))
		return "disk.img"
	}})
}

func newDirectory(t testing.TB, in string) string {
	t.Helper()
	dir, err := os.MkdirTemp(in, "domain-")
	ok(t, err)
	t.Cleanup(func() { ok(t, os.RemoveAll(dir)) })
	return dir
}

// opener opens a directory as another process would: nothing is shared but the file system.
func opener(path string) func(t testing.TB) engine.Engine {
	return func(t testing.TB) engine.Engine {
		t.Helper()
		e, err := Open(t.Context(), map[string]string{"path": path, "allowLocal": "true"}, host.NewLocal(host.Exec{}))
		ok(t, err)
		return e
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
