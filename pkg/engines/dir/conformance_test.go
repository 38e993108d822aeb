package dir

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

func TestExt4(t *testing.T) { conforms(t, "ext4", nil, engine.CapMeter, engine.CapImport) }

func TestXFS(t *testing.T) {
	conforms(t, "xfs", nil, engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapImport)
}

func TestBtrfs(t *testing.T) {
	conforms(t, "btrfs", nil, engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapImport)
}

func TestBtrfsWithQuotas(t *testing.T) {
	conforms(t, "btrfs", []string{"btrfs", "quota", "enable"}, engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapQuota, engine.CapImport)
}

func conforms(t *testing.T, fstype string, prepare []string, expect ...engine.Capability) {
	t.Parallel() // they wait for disks, not for processors
	filesystem := hosttest.Filesystem(t, fstype, 1<<30)
	if len(prepare) > 0 {
		if _, err := (host.Exec{}).Run(t.Context(), host.Command{Name: prepare[0], Args: append(prepare[1:], filesystem)}); err != nil {
			t.Fatal(err)
		}
	}
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
