package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"

	"github.com/quarry-csi/quarry/test/lab"
)

// TestAVolumeGroupInAProcessOfItsOwn: volumes, snapshots by layers and clones on logical volumes, whose
// engine is killed in the middle of each.
func TestAVolumeGroupInAProcessOfItsOwn(t *testing.T) {
	lab.Need(t)
	disk, group := lab.Disk(t), "quarry-test-apart"
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	run("vgcreate", "-s", "1m", "--metadatasize", "8m", group, disk)
	t.Cleanup(func() { run("vgremove", "-ff", "-y", group) })
	u := newUser(t, fmt.Sprintf("- name: fast\n  engine: lvm\n  process: true\n  params: {vg: %s, devices: %s}\n", group, disk))

	id, path := u.volume("fast", "v", 64<<20, "")
	first, second := picture{}, picture{}
	scribble(t, path, 64<<20, 20, 8192, 1, first, second)

	killed := 0
	// during does something while the engine's process is killed, a moment after it began.
	during := func(do func()) {
		t.Helper()
		var g errgroup.Group
		g.Go(func() error {
			time.Sleep(rand.N(2 * time.Second))
			pid, err := engineOf("lvm")
			if err != nil || pid == 0 { // the next one is on its way
				return err
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
				killed++
				return err
			}
			return nil
		})
		do()
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	var snapshot, clone, clonePath string
	during(func() { snapshot = u.snapshot(id, "s") })
	scribble(t, path, 64<<20, 20, 8192, 2, second)
	during(func() { clone, clonePath = u.volume("fast", "c", 64<<20, snapshot) })
	holds(t, path, 64<<20, second)
	holds(t, clonePath, 64<<20, first)
	during(func() { u.remove(clone, clonePath) })
	during(func() { ask(u, u.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: snapshot}) })
	holds(t, path, 64<<20, second)
	during(func() { u.remove(id, path) })
	if killed < 2 {
		t.Errorf("the engine's process was killed %d times only", killed)
	}
	t.Logf("the engine's process was killed %d times", killed)
	left := ""
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); time.Sleep(time.Second) {
		slabs, err := exec.Command("lvs", "--noheadings", "-o", "lv_name", "-S", `lv_name=~"^q[sp]"`, group).Output()
		if err != nil {
			t.Fatal(err)
		}
		if left = strings.TrimSpace(string(slabs)); left == "" {
			return
		}
	}
	t.Errorf("slabs are left: %s", left)
}

// engineOf finds the process of an engine's type, 0 if there is none.
func engineOf(engine string) (pid int, err error) {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range all {
		line, err := os.ReadFile(name)
		if err == nil && bytes.Contains(line, []byte("\x00engine\x00"+engine+"\x00")) { // else it has ended
			return strconv.Atoi(filepath.Base(filepath.Dir(name)))
		}
	}
	return 0, err
}
