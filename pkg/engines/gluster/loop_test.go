package gluster_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/gluster"
	"github.com/quarry-csi/quarry/pkg/host"
	server "github.com/quarry-csi/quarry/test/gluster"
)

const slabSize = 64 * mib

// process is an agent's: what it remembers of the host, and its domain.
type process struct {
	engine.Engine
	local  *host.Local
	mounts string
}

func newProcess(t *testing.T, v *server.Volume) process {
	t.Helper()
	p := process{local: host.NewLocal(host.Exec{}), mounts: mountsFolder(t)}
	var err error
	p.Engine, err = gluster.Open(t.Context(), params(v, "k8s"), host.Exec{}, p.local, p.mounts)
	ok(t, err)
	return p
}

func (p process) loop(t *testing.T) (host.Loop, error) {
	t.Helper()
	return p.local.AttachLoop(t.Context(), host.LoopSpec{File: attach(t, p.Engine, "a"), Size: slabSize, Mark: "quarry-test:k8s/a"})
}

// mounted has a file system on a loop device over slab "a" in use, with a file that was synced.
func mounted(t *testing.T, p process) (lp host.Loop, at string) {
	t.Helper()
	ok(t, p.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: slabSize}))
	lp, err := p.loop(t)
	ok(t, err)
	t.Cleanup(func() { _ = p.local.DetachLoop(context.Background(), lp) }) // a test that failed has not
	if !lp.DirectIO {
		t.Error("the loop device works through the page cache, although Gluster takes direct I/O")
	}
	_, err = (host.Exec{}).Run(t.Context(), host.Command{Name: "mkfs.ext4", Args: []string{"-q", lp.Path}})
	ok(t, err)
	at = t.TempDir()
	ok(t, p.local.MountFilesystem(t.Context(), lp.Path, at, "ext4", nil))
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	f, err := os.Create(filepath.Join(at, "file"))
	ok(t, err)
	_, err = f.WriteString("acknowledged")
	ok(t, errors.Join(err, f.Sync(), f.Close()))
	return lp, at
}

// TestTheNextAgentFindsTheLoopDevice of a slab, although it sees the slab by a mount of its own, which is another file
// system to the kernel: two devices over one file would destroy what is in it.
func TestTheNextAgentFindsTheLoopDevice(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	first := newProcess(t, v)
	lp, at := mounted(t, first)
	ok(t, first.Close())
	next := newProcess(t, v)
	defer next.Close()
	again, err := next.loop(t)
	ok(t, err)
	if again.Path != lp.Path {
		t.Errorf("the slab has %s, and the next agent gives it %s too", lp.Path, again.Path)
	}
	if got, err := os.ReadFile(filepath.Join(at, "file")); string(got) != "acknowledged" {
		t.Errorf("read %q (%v) from what was mounted", got, err)
	}
	ok(t, next.local.Unmount(t.Context(), at))
	ok(t, next.local.DetachLoop(t.Context(), again))
	noDaemons(t, first.mounts) // nothing uses its mount any more
}

// TestAVolumeSurvivesTheDeathOfItsClient: I/O fails at once, what was acknowledged is there when the volume is staged
// anew, and no node is restarted: by the same agent, and by one that knows nothing of before.
func TestAVolumeSurvivesTheDeathOfItsClient(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	for name, restart := range map[string]bool{"same agent": false, "next agent": true} {
		t.Run(name, func(t *testing.T) {
			p := newProcess(t, v)
			defer func() { _ = p.Close() }()
			lp, at := mounted(t, p)
			for _, pid := range daemons(t, p.mounts) {
				ok(t, unix.Kill(pid, unix.SIGKILL))
			}
			began := time.Now()
			err := os.WriteFile(filepath.Join(at, "more"), make([]byte, mib), 0o644)
			if f, errOpen := os.Open(at); err == nil && errOpen == nil {
				err = unix.Syncfs(int(f.Fd()))
				f.Close()
			}
			if took := time.Since(began); err == nil || took > 10*time.Second {
				t.Errorf("writing to a volume whose client is dead: %v after %s", err, took)
			}
			if _, err := p.loop(t); err == nil || !strings.Contains(err.Error(), lp.Path) {
				t.Errorf("a dead device that is mounted was taken or replaced: %v", err)
			}
			if restart {
				_ = p.Close()
				p = newProcess(t, v)
			}
			// What the kubelet has done when the pod is deleted.
			ok(t, p.local.Unmount(t.Context(), at))
			again, err := p.loop(t)
			ok(t, err)
			ok(t, p.local.MountFilesystem(t.Context(), again.Path, at, "ext4", nil))
			if got, err := os.ReadFile(filepath.Join(at, "file")); string(got) != "acknowledged" {
				t.Errorf("read %q (%v)", got, err)
			}
			ok(t, p.local.Unmount(t.Context(), at))
			ok(t, p.local.DetachLoop(t.Context(), again))
			loops, err := p.local.Loops(t.Context(), func(l host.Loop) bool { return strings.HasSuffix(l.Backing, "/slabs/a") })
			if err != nil || len(loops) > 0 {
				t.Errorf("loop devices that are left: %+v (%v)", loops, err)
			}
			ok(t, p.DeleteSlab(t.Context(), "a"))
		})
	}
}
