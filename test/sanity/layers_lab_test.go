package sanity

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
)

// The suite where the kernel has device-mapper, in the lab: on an ext4, and on a
// volume group with thick volumes, every snapshot and every clone is by layers; a
// thin pool makes them by itself. These runs are long: the lab's processor may be
// emulated. With -short nobody waits for superseded tags, which stay ten minutes.

// storage is a domain as the tests need to know it.
type storage struct {
	entry string              // in the domains file
	size  int64               // of the suite's volumes, in bytes; 0: the suite's own
	mark  string              // in what the kernel says of mounts and loop devices
	space func() error        // what it holds beside tags
	tags  func() (int, error) // how many tags of images it has
	takes string              // how snapshots of images are to be taken, as the log says it
	trees bool                // it has directory volumes, too
}

func TestLabDirectory(t *testing.T) {
	lab.Need(t)
	root := hosttest.Filesystem(t, "ext4", fsSize)
	domain := filepath.Join(root, "domain")
	if err := os.Mkdir(domain, 0o755); err != nil {
		t.Fatal(err)
	}
	runLab(t, storage{entry: directory(domain), mark: root + "/", takes: "layer",
		space: func() error { return emptyDirectory(domain) },
		tags:  func() (int, error) { return tagsIn(domain) }})
}

func TestLabThickVolumes(t *testing.T) {
	lab.Need(t)
	vg := volumeGroup(t)
	runLab(t, vg.storage("layer", ""))
}

func TestLabThinVolumes(t *testing.T) {
	lab.Need(t)
	vg := volumeGroup(t)
	vg.lvm(t, "lvcreate", "-q", "-y", "--type", "thin-pool", "-L", "8g", "--poolmetadatasize", "64m", "-n", "pool", vg.name)
	runLab(t, vg.storage("snapshot", "    thinPool: pool\n"))
}

// TestLabGroupSnapshot cuts two mounted volumes at one moment, by layers.
func TestLabGroupSnapshot(t *testing.T) {
	lab.Need(t)
	d := groupSnapshot(t, build(t), "ext4")
	d.noCopies(t, "layer")
	d.stop(t)
	noMapped(t)
}

// runLab runs the suite for every kind of volume, in one life of the driver.
func runLab(t *testing.T, s storage) {
	dir := t.TempDir()
	if out := os.Getenv("LAB_OUT"); out != "" { // to be read while it runs
		if err := os.Symlink(filepath.Join(out, t.Name()+".log"), filepath.Join(dir, "quarry.log")); err != nil {
			t.Fatal(err)
		}
	}
	d := start(t, build(t), dir, s.entry)
	defer func() {
		if t.Failed() {
			t.Logf("the end of quarry's log:\n%s", d.LastLog(200))
		}
	}()
	id := d.openDomain(t)
	suite := func(name string, c specCase) {
		t.Run(name, func(t *testing.T) {
			c.Dir, c.Domain, c.Size = dir, id, s.size
			d.suite(t, c)
			d.noImages(t)
			wait(t, "the collector to give back all space", patience, s.space)
			nothingIsInUse(t, s.mark, dir+"/", id+"/")
			noMapped(t)
			if t.Failed() {
				t.Logf("the end of quarry's log:\n%s", d.LastLog(100))
			}
		})
	}
	suite("mount", specCase{Access: "mount"})
	suite("block", specCase{Access: "block"})
	d.noCopies(t, s.takes)
	if s.trees { // of which copies are made
		suite("directory", specCase{Access: "mount", Parameters: map[string]string{"layout": "directory"}})
	}
	if !testing.Short() {
		wait(t, "the collector to remove the tags of all images", 30*time.Minute, func() error {
			n, err := s.tags()
			if err == nil && n > 0 {
				err = fmt.Errorf("%d tags are left", n)
			}
			return err
		})
	}
	d.stop(t)
	nothingIsInUse(t, s.mark, dir+"/", id+"/")
	noMapped(t)
}

// noCopies reads in the log how snapshots and clones were made.
func (d *driver) noCopies(t *testing.T, want string) {
	t.Helper()
	as := 0
	for line := range strings.Lines(d.LastLog(1 << 30)) {
		switch {
		case !strings.Contains(line, `"Operation done"`):
		case strings.Contains(line, `reason="copy`):
			t.Errorf("a copy was made: %s", line)
		case strings.Contains(line, `reason="`+want):
			as++
		}
	}
	t.Logf("%d snapshots and clones were made as \"%s\"", as, want)
	if as == 0 {
		t.Errorf("none was made as %q", want)
	}
}

// noMapped fails if there are device-mapper devices of Quarry.
func noMapped(t *testing.T) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/dm-*/dm/uuid")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		uuid, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(uuid), "QUARRY-") {
			name, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "name"))
			t.Errorf("a device is left behind: %s, %s, UUID %s", f, strings.TrimSpace(string(name)), strings.TrimSpace(string(uuid)))
		}
	}
}

// group is a volume group on a disk of the lab.
type group struct{ name, disk string }

func volumeGroup(t *testing.T) *group {
	t.Helper()
	g := &group{name: "quarry-sanity", disk: lab.Disk(t)}
	g.lvm(t, "vgcreate", "-q", "--metadatasize", "16m", g.name, g.disk)
	t.Cleanup(func() {
		if out, err := g.command(context.WithoutCancel(t.Context()), "vgchange", "-q", "-an", g.name).CombinedOutput(); err != nil {
			t.Errorf("vgchange -an: %v\n%s", err, out)
		}
	})
	return g
}

func (g *group) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "lvm", append([]string{program, "--devices", g.disk, "--config", "backup{backup=0 archive=0}"}, args...)...)
}

func (g *group) lvm(t *testing.T, program string, args ...string) {
	t.Helper()
	if out, err := g.command(t.Context(), program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, out)
	}
}

// volumes are the names of the group's logical volumes.
func (g *group) volumes() ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := g.command(ctx, "lvs", "--noheadings", "--readonly", "-o", "lv_name", g.name).Output()
	if err != nil {
		return nil, fmt.Errorf("lvs: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// count is of the logical volumes whose names begin so.
func (g *group) count(beginnings ...string) (int, error) {
	names, err := g.volumes()
	n := 0
	for _, name := range names {
		for _, b := range beginnings {
			if strings.HasPrefix(name, b) {
				n++
			}
		}
	}
	return n, err
}

func (g *group) storage(takes, more string) storage {
	return storage{
		entry: fmt.Sprintf("- name: local\n  engine: lvm\n  params:\n    vg: %s\n    devices: %s\n%s", g.name, g.disk, more),
		size:  256 << 20, mark: "/" + strings.ReplaceAll(g.name, "-", "--") + "-", takes: takes,
		space: func() error {
			n, err := g.count("qs.", "qs-", "qp.", "qp-")
			if err == nil && n > 0 {
				err = fmt.Errorf("%d slabs are left behind", n)
			}
			return err
		},
		tags: func() (int, error) { return g.count("qt-", "qt.i.", "qt.d.", "qt.a.", "qt.p.") },
	}
}
