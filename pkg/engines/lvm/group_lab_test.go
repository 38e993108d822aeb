package lvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"maps"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/lab"
)

const mib = 1 << 20

// group is a volume group that ends with its test.
type group struct {
	name   string
	disk   string
	params map[string]string
}

// newGroup makes a group of so many MiB with extents of 1 MiB on a disk of its own.
func newGroup(t testing.TB, size int64, args ...string) *group {
	t.Helper()
	lab.Need(t)
	var unique [4]byte
	_, _ = rand.Read(unique[:])
	g := &group{name: "quarry-test-" + hex.EncodeToString(unique[:]), disk: lab.Loop(t, size*mib)}
	g.params = map[string]string{"vg": g.name, "devices": g.disk}
	program(t, append([]string{"vgcreate", "--config", quiet, "-s", "1m", "--metadatasize", "8m", g.name, g.disk}, args...)...)
	t.Cleanup(func() {
		_, err := (host.Exec{}).Run(context.WithoutCancel(t.Context()), host.Command{Name: "lvm", Args: []string{"vgremove", "--config", quiet, "--devices", g.disk, "-ff", "-y", g.name}})
		if err != nil && !strings.Contains(err.Error(), "not found") {
			t.Error(err)
		}
	})
	return g
}

const quiet = "backup{backup=0 archive=0} activation{udev_sync=0 udev_rules=0 monitoring=0}"

// withPool makes a thin pool for the slabs.
func (g *group) withPool(t testing.TB, data, metadata string) *group {
	t.Helper()
	program(t, "lvcreate", "--config", quiet, "--devices", g.disk, "-y", "--type", "thin-pool", "-L", data, "--poolmetadatasize", metadata, "-n", "pool", g.name)
	g.params["thinPool"] = "pool"
	return g
}

func (g *group) opener() func(t testing.TB) engine.Engine {
	return func(t testing.TB) engine.Engine { return g.open(t, host.Exec{}) }
}

func (g *group) open(t testing.TB, run host.Runner) engine.Engine {
	t.Helper()
	e, err := Open(t.Context(), maps.Clone(g.params), run)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// program runs a program of lvm2 and returns what it wrote.
func program(t testing.TB, args ...string) string {
	t.Helper()
	res, err := (host.Exec{}).Run(t.Context(), host.Command{Name: "lvm", Args: args})
	if err != nil {
		t.Fatalf("%v\n%s", err, res.Stderr)
	}
	return string(res.Stdout)
}
