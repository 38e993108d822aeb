package crash_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/nfs3"
	"github.com/quarry-csi/quarry/pkg/engines/smb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/test/lab"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

// The matrix over engines of real servers. The quick form tries every operation on each layout and every mishap at a
// few calls; with QUARRY_CRASH=long each test tries every point, which takes hours: -run chooses an operation
// ("TestLabMatrixOnSMB/image,_snapshot,").

func TestLabMatrixOnNFS3(t *testing.T) {
	x := lab.StartNFS(t).Export(t, "ext4")
	mounts := t.TempDir()
	onShare(t, storage{name: "nfs3", root: x.Dir, share: &share{
		engine: "nfs3",
		open: func(ctx context.Context, folder string) (engine.Engine, error) {
			return patiently(func() (engine.Engine, error) {
				params := map[string]string{"server": "127.0.0.1", "export": x.Dir, "folder": filepath.Base(folder)}
				return nfs3.Open(ctx, params, host.NewLocal(host.Exec{}), mounts)
			})
		},
	}})
}

func TestLabMatrixOnSMB(t *testing.T) {
	lab.Need(t)
	shared := filepath.Join(hosttest.Filesystem(t, "xfs", 2<<30), "shared")
	if err := os.Mkdir(shared, 0o755); err != nil {
		t.Fatal(err)
	}
	server := samba.Start(t, nil, samba.Share{Name: "k8s", Path: shared})
	mounts := t.TempDir()
	onShare(t, storage{name: "smb", root: shared, share: &share{
		engine: "smb", decorated: true,
		give: func(folder string) { samba.Give(t, folder) },
		open: func(ctx context.Context, folder string) (engine.Engine, error) {
			return patiently(func() (engine.Engine, error) {
				params := map[string]string{"server": server.Address(), "share": "k8s", "folder": filepath.Base(folder)}
				secrets := map[string]string{"username": samba.User, "password": samba.Password}
				return smb.Open(ctx, params, secrets, host.NewLocal(host.Exec{}), mounts)
			})
		},
	}})
}

// patiently opens a domain again that cannot be reached, as Quarry does: a machine whose processor is emulated may
// take its server for dead.
func patiently(open func() (engine.Engine, error)) (e engine.Engine, err error) {
	for range 3 {
		if e, err = open(); err == nil || !errors.Is(err, fault.Unavailable) {
			break
		}
	}
	return e, err
}

// onShare tries the matrix, or a sample of it that is the same each time.
func onShare(t *testing.T, st storage) {
	var points atomic.Int64
	rnd := rand.New(rand.NewPCG(1, 1))
	for l, layout := range []image.Layout{image.LayoutImage, image.LayoutDirectory} {
		for i, sc := range scenarios() {
			for j, m := range mishaps {
				// Of an operation's six mishaps each layout gets one; all of them have had their turn after six operations.
				if !long() && j != (i+3*l)%len(mishaps) {
					continue
				}
				first := 1 + rnd.IntN(12)
				t.Run(fmt.Sprintf("%s, %s, %s", layout, sc.name, m), func(t *testing.T) {
					t.Parallel()
					if long() {
						points.Add(int64(matrix(t, st, layout, sc, m)))
						return
					}
					points.Add(int64(sample(t, st, layout, sc, m, first)))
				})
			}
		}
	}
	t.Cleanup(func() { t.Logf("%d points", points.Load()) })
}

// sample tries an operation with a mishap at one call, the one that was wished or, where it makes
// fewer, an earlier one. It returns how many points that were: there may be no call of the kind that the mishap is about.
func sample(t *testing.T, st storage, layout image.Layout, sc scenario, m mode, at int) int {
	for ; at > 0; at /= 2 {
		if hit := tried(t, st, layout, sc, m, at); hit != "" {
			t.Logf("%s: %s", point(m, at), hit)
			return 1
		}
	}
	if m != misread && m != refused {
		t.Error("the operation makes no engine call")
	}
	return 0
}
