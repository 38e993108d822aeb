package lvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host"
)

const mib = 1 << 20

// group is a volume group that ends with its test.
type group struct {
	name   string
	disk   string
	params map[string]string
}

// newGroup makes a group of so many MiB with extents of 1 MiB on a disk of its
// own. What is only metadata works without device-mapper.
func newGroup(t testing.TB, size int64, args ...string) *group {
	t.Helper()
	var unique [4]byte
	_, _ = rand.Read(unique[:])
	return newGroupOn(t, "quarry-test-"+hex.EncodeToString(unique[:]), loop(t, size*mib), args...)
}

func newGroupOn(t testing.TB, name, disk string, args ...string) *group {
	t.Helper()
	g := &group{name: name, disk: disk, params: map[string]string{"vg": name, "devices": disk}}
	if len(args) == 0 {
		args = []string{"--metadatasize", "8m"}
	}
	g.lvm(t, "vgcreate", append(args, "-s", "1m", name, disk)...)
	t.Cleanup(func() {
		if _, err := os.Stat("/sys/class/misc/device-mapper"); err != nil {
			return // nothing can be active
		}
		ctx := context.WithoutCancel(t.Context())
		if _, err := (host.Exec{}).Run(ctx, g.command("vgchange", "-an", g.name)); err != nil && !strings.Contains(err.Error(), "not found") {
			t.Error(err)
		}
	})
	return g
}

// loop is a loop device over an empty file.
func loop(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	res, err := (host.Exec{}).Run(t.Context(), host.Command{Name: "losetup", Args: []string{"-f", "--show", path}})
	if err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(string(res.Stdout))
	t.Cleanup(func() {
		if _, err := (host.Exec{}).Run(context.WithoutCancel(t.Context()), host.Command{Name: "losetup", Args: []string{"-d", device}}); err != nil {
			t.Error(err)
		}
	})
	return device
}

// withPool makes a thin pool for the slabs.
func (g *group) withPool(t testing.TB, data, metadata string) *group {
	t.Helper()
	g.lvm(t, "lvcreate", "-y", "--type", "thin-pool", "-L", data, "--poolmetadatasize", metadata, "-n", "pool", g.name)
	g.params["thinPool"] = "pool"
	return g
}

func (g *group) opener() func(t testing.TB) engine.Engine {
	return func(t testing.TB) engine.Engine { t.Helper(); return g.open(t, host.Exec{}) }
}

func (g *group) open(t testing.TB, run host.Runner) engine.Engine {
	t.Helper()
	e, err := Open(t.Context(), maps.Clone(g.params), run)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (g *group) command(program string, args ...string) host.Command {
	all := []string{program, "--devices", g.disk, "--config", "backup{backup=0 archive=0} activation{udev_sync=0 udev_rules=0 monitoring=0}"}
	if _, err := os.Stat("/sys/class/misc/device-mapper"); err != nil {
		all = append(all, "--driverloaded", "n")
	}
	return host.Command{Name: "lvm", Args: append(all, args...)}
}

// lvm does what an administrator does, and returns what the program wrote.
func (g *group) lvm(t testing.TB, program string, args ...string) string {
	t.Helper()
	res, err := (host.Exec{}).Run(t.Context(), g.command(program, args...))
	if err != nil {
		t.Fatalf("%v\n%s", err, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
