package behaviour

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/gluster"
)

func sharedDirectory() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER},
	}
}

// glusterClients are the processes behind mounts of Gluster servers at an address.
func glusterClients(t *testing.T, address string) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil && strings.HasPrefix(string(b), "glusterfs\x00") && strings.Contains(string(b), "--volfile-server="+address+"\x00") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// slabLoops are the loop devices over slabs of some volumes, by the slabs' names. Their paths are of mounts that nobody may see any more.
func slabLoops(t *testing.T, of []*volume) map[string][]string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if name := filepath.Base(strings.TrimSpace(string(text))); err == nil && slices.ContainsFunc(of, func(v *volume) bool { return v.image() == name }) {
			out[name] = append(out[name], strings.Split(f, "/")[3])
		}
	}
	return out
}

// TestVolumesOnGluster: a volume of each layout goes on while Quarry is down, is found again by the next Quarry, and
// comes back with all that was acknowledged after the processes behind its mounts were killed.
func TestVolumesOnGluster(t *testing.T) { volumesOnGluster(t, "") }

// TestVolumesOnGlusterByAnEngineProcess does the same where the engine has a process of its own.
func TestVolumesOnGlusterByAnEngineProcess(t *testing.T) { volumesOnGluster(t, "  process: true\n") }

func volumesOnGluster(t *testing.T, more string) {
	g := gluster.Start(t).Volume(t, gluster.VolumeSpec{Name: "vol"})
	r := newRig(t, place{name: "gv", entry: fmt.Sprintf("- name: gv\n  engine: gluster\n  params: {servers: %s, volume: vol, folder: k8s}\n%s", g.Server.Address, more)})
	t.Cleanup(func() {
		for _, pid := range glusterClients(t, g.Server.Address) { // of a test that has failed
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	})
	image := r.volume("gv", "image", 64*mib, filesystem("ext4"))
	tree := r.volume("gv", "tree", 64*mib, sharedDirectory())
	raw := r.volume("gv", "raw", 64*mib, rawBlock())
	volumes := []*volume{image, tree, raw}
	file := func(v *volume) string {
		if v == raw {
			return v.target
		}
		return filepath.Join(v.target, "file")
	}
	write := func(v *volume, text string) error {
		flags := os.O_RDWR | os.O_CREATE
		if v == raw {
			flags = os.O_RDWR
		}
		f, err := os.OpenFile(file(v), flags, 0o644)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte(text), 0)
		return errors.Join(err, f.Sync(), f.Close())
	}
	holds := func(when, want string) {
		t.Helper()
		for _, v := range volumes {
			f, err := os.Open(file(v))
			if err != nil {
				t.Errorf("%s, volume %s: %v", when, v.name, err)
				continue
			}
			got := make([]byte, len(want))
			if _, err := f.ReadAt(got, 0); err != nil || string(got) != want {
				t.Errorf("%s, volume %s holds %q (%v), want %q", when, v.name, got, err, want)
			}
			f.Close()
		}
	}
	all := func(do func(v *volume)) {
		for _, v := range volumes {
			do(v)
		}
	}
	oneLoopEach := func(when string) {
		t.Helper()
		for name, devices := range slabLoops(t, volumes) {
			if len(devices) > 1 {
				t.Errorf("%s, slab %s has the loop devices %q", when, name, devices)
			}
		}
	}
	mustWrite := func(text string) {
		t.Helper()
		all(func(v *volume) {
			if err := write(v, text); err != nil {
				t.Errorf("volume %s: %v", v.name, err)
			}
		})
	}
	all(func(v *volume) { v.mount() })
	mustWrite("first")

	r.kill()
	holds("while quarry is down", "first")
	mustWrite("second")
	r.start()
	all(func(v *volume) { v.mount() }) // as a kubelet that was restarted, too
	oneLoopEach("with the next quarry")
	holds("with the next quarry", "second")
	mustWrite("third")
	all(func(v *volume) { v.unmount() })
	if left := slabLoops(t, volumes); len(left) > 0 {
		t.Errorf("loop devices that are left: %v", left)
	}
	all(func(v *volume) { v.mount() })
	holds("staged anew", "third")

	for _, restart := range []bool{false, true} {
		when := fmt.Sprintf("after the clients were killed (quarry restarted: %v)", restart)
		for _, pid := range glusterClients(t, g.Server.Address) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		all(func(v *volume) {
			began := time.Now()
			if err := write(v, "never"); err == nil || time.Since(began) > 10*time.Second {
				t.Errorf("%s, volume %s was written to: %v after %s", when, v.name, err, time.Since(began))
			}
		})
		if restart {
			r.kill()
			r.start()
		}
		all(func(v *volume) { v.unmount() })
		if left := slabLoops(t, volumes); len(left) > 0 {
			t.Errorf("%s, loop devices that are left: %v", when, left)
		}
		all(func(v *volume) { v.mount() })
		holds(when, "third")
	}

	snapshot := r.snapshot(image, "snapshot")
	copied := r.copyOf(fromSnapshot(snapshot), "gv", "copy", 64*mib, filesystem("ext4")).mount()
	if got, err := os.ReadFile(filepath.Join(copied.target, "file")); !strings.HasPrefix(string(got), "third") {
		t.Errorf("a copy of a snapshot holds %q (%v)", got, err)
	}
	copied.unmount()
	copied.remove()
	r.removeSnapshot(snapshot)

	g.Kill(t, 1)
	r.eventually("the warning of a brick that is away", func() error {
		if out, _ := r.kubectl("domains"); !strings.Contains(out, g.Brick(1)) {
			return errors.New(out)
		}
		return nil
	})
	holds("with one brick", "third")
	all(func(v *volume) { v.unmount(); v.remove() })
	r.stop()
	r.eventually("the clients to end", func() error {
		if left := glusterClients(t, g.Server.Address); len(left) > 0 {
			return fmt.Errorf("processes %v", left)
		}
		return nil
	})
}
