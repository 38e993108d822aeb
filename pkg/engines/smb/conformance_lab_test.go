package smb

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/test/lab/samba"
)

func TestLabConformsOnExt4(t *testing.T) { conforms(t, "ext4", "") }

// Each opening has a connection, a session and caches of its own, as if it were on another host.
func TestLabConformsOnXFSAmongHosts(t *testing.T) { conforms(t, "xfs", apart) }

func TestLabConformsEncryptedWithSMB3(t *testing.T) { conforms(t, "ext4", "seal") }

func conforms(t *testing.T, fstype, options string) {
	r := newRig(t, fstype, nil)
	next, folder := r.domains(), ""
	enginetest.Run(t, enginetest.Harness{
		Slow:   true,
		Expect: []engine.Capability{engine.CapMeter, engine.CapImport, engine.CapCopy},
		Domain: func(testing.TB) func(t testing.TB) engine.Engine {
			folder = next()
			mine := folder
			r.give(t, mine) // opening would make it; that is for another test
			return func(t testing.TB) engine.Engine { return r.opened(t, mine, options) }
		},
		Foreign: func(t testing.TB, content []byte) string {
			at := filepath.Join(r.folder, folder, "import")
			r.give(t, filepath.Join(folder, "import"))
			must(t, os.WriteFile(filepath.Join(at, "disk.img"), content, 0o666))
			samba.Give(t, filepath.Join(at, "disk.img"))
			return "disk.img"
		},
	})
}
