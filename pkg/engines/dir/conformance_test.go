package dir

import (
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

func TestExt4(t *testing.T) { conforms(t, "ext4", nil, engine.CapMeter) }

func TestXFS(t *testing.T) {
	conforms(t, "xfs", nil, engine.CapSnapshot, engine.CapClone, engine.CapMeter)
}

func TestBtrfs(t *testing.T) {
	conforms(t, "btrfs", nil, engine.CapSnapshot, engine.CapClone, engine.CapMeter)
}

func TestBtrfsWithQuotas(t *testing.T) {
	conforms(t, "btrfs", []string{"btrfs", "quota", "enable"}, engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapQuota)
}

func conforms(t *testing.T, fstype string, prepare []string, expect ...engine.Capability) {
	t.Parallel() // they wait for disks, not for processors
	filesystem := hosttest.Filesystem(t, fstype, 1<<30)
	if len(prepare) > 0 {
		if _, err := (host.Exec{}).Run(t.Context(), host.Command{Name: prepare[0], Args: append(prepare[1:], filesystem)}); err != nil {
			t.Fatal(err)
		}
	}
	enginetest.Run(t, enginetest.Harness{Expect: expect, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
		return opener(newDirectory(t, filesystem))
	}})
}
