package gluster_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/test/gluster"
)

// TestAServerServesAndIsGoneAfterwards: a volume of two copies takes a file through a native mount, survives the
// loss of a brick and heals; when the test ends nothing of it is left.
func TestAServerServesAndIsGoneAfterwards(t *testing.T) {
	var address string
	t.Run("server", func(t *testing.T) {
		s := gluster.Start(t)
		address = s.Address
		v := s.Volume(t, gluster.VolumeSpec{Name: "vol"})
		at, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
		if _, err := (host.Exec{}).Run(t.Context(), host.Command{Name: "glusterfs", Args: []string{"--volfile-server=" + s.Address, "--volfile-id=vol", "--log-file=" + log, at}}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(at, 0); err != nil {
				t.Error(err)
			}
		})
		v.Kill(t, 1)
		if err := os.WriteFile(filepath.Join(at, "file"), []byte("kept"), 0o644); err != nil {
			t.Fatal(err)
		}
		v.Restart(t)
		v.Healed(t)
		if got := v.Run(t, "cat", v.Brick(1)+"/file"); got != "kept" {
			t.Errorf("the healed brick has %q", got)
		}
	})
	if address == "" {
		return
	}
	links, err := filepath.Glob("/sys/class/net/quarry-gl" + strings.Split(address, ".")[2])
	if err != nil || len(links) > 0 {
		t.Errorf("interfaces that are left: %q (error %v)", links, err)
	}
}
