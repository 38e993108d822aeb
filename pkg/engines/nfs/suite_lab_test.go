package nfs_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/engines/nfs3"
	"github.com/quarry-csi/quarry/pkg/engines/nfs4"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/lab"
)

// protocol is one of the two engines, as these tests need to know it.
type protocol struct {
	name string
	open func(ctx context.Context, params map[string]string, h *host.Local, mounts string) (engine.Engine, error)
	// export is an export's name in it.
	export func(x lab.Exported) string
}

var (
	v3 = protocol{"nfs3", nfs3.Open, func(x lab.Exported) string { return x.Dir }}
	v4 = protocol{"nfs4", nfs4.Open, func(x lab.Exported) string { return x.V4 }}
)

func both(t *testing.T, test func(t *testing.T, p protocol)) {
	for _, p := range []protocol{v3, v4} {
		t.Run(p.name, func(t *testing.T) { test(t, p) })
	}
}

// params are those of a folder of an export, and more.
func (p protocol) params(x lab.Exported, folder string, more ...string) map[string]string {
	params := map[string]string{"server": "127.0.0.1", "export": p.export(x), "folder": folder}
	for i := 0; i < len(more); i += 2 {
		params[more[i]] = more[i+1]
	}
	return params
}

// openAs opens a domain as one of several hosts: mounts of different read sizes share no cache, and know of each
// other's work only what the server says.
func (p protocol) openAs(t testing.TB, host int, params map[string]string) engine.Engine {
	t.Helper()
	params = maps.Clone(params)
	params["options"] = fmt.Sprintf("rsize=%d", 4096*(host+2))
	e, err := p.tryOpen(t, params)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (p protocol) tryOpen(t testing.TB, params map[string]string) (engine.Engine, error) {
	return p.open(context.WithoutCancel(t.Context()), params, host.NewLocal(host.Exec{}), "")
}

// TestConformance: every rule and capability, on file systems with reflinks and without.
func TestConformance(t *testing.T) {
	server := lab.StartNFS(t)
	for _, c := range []struct {
		protocol
		kind   string
		expect []engine.Capability
	}{
		{v3, "ext4", []engine.Capability{engine.CapMeter, engine.CapImport}},
		{v3, "xfs", []engine.Capability{engine.CapMeter, engine.CapImport}},
		{v4, "ext4", []engine.Capability{engine.CapCopy, engine.CapMeter, engine.CapImport}},
		{v4, "xfs", []engine.Capability{engine.CapSnapshot, engine.CapClone, engine.CapCopy, engine.CapMeter, engine.CapImport}},
	} {
		t.Run(c.name+"-"+c.kind, func(t *testing.T) {
			x := server.Export(t, c.kind)
			var domains, opened atomic.Int32
			var last string
			enginetest.Run(t, enginetest.Harness{Slow: true, Expect: c.expect, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
				last = fmt.Sprintf("domain-%d", domains.Add(1))
				params := c.params(x, last)
				return func(t testing.TB) engine.Engine {
					host := int(opened.Add(1) % 8)
					if c.name == v3.name && strings.Contains(t.Name(), "GrowthsRace") {
						host = 0 // without a lock manager it is processes of one host that cannot undo each other's growth
					}
					return c.openAs(t, host, params)
				}
			}, Foreign: func(t testing.TB, content []byte) string {
				folder := filepath.Join(x.Dir, last, "import")
				if err := os.MkdirAll(folder, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(folder, "disk.img"), content, 0o644); err != nil {
					t.Fatal(err)
				}
				return "disk.img"
			}})
		})
	}
}
