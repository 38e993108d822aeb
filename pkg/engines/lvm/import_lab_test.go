package lvm

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
	"github.com/quarry-csi/quarry/test/lab"
)

// foreign makes a volume with a content as an administrator would, thin where slabs are thin. It is
// active afterwards.
func (g *group) foreign(t testing.TB, name string, content []byte) (device string) {
	t.Helper()
	args := []string{"-y", "-Zn", "-Wn", "-L", "4m", "-n", name, g.name}
	if g.params["thinPool"] != "" {
		args = []string{"-y", "--type", "thin", "-V", "4m", "--thinpool", "pool", "-n", name, g.name}
	}
	// Else udev makes it active by itself, some time after the group has changed.
	g.lvm(t, "vgchange", "--setautoactivation", "n", g.name)
	g.lvm(t, "lvcreate", args...)
	device = "/dev/mapper/" + lvm.DeviceName(g.name, name)
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	ok(t, err)
	_, err = f.WriteAt(content, 0)
	ok(t, errors.Join(err, f.Sync(), f.Close()))
	return device
}

// TestAVolumeInUseIsNotImported; one that is only active is looked at as it is, and one that is not is so
// again afterwards.
func TestAVolumeInUseIsNotImported(t *testing.T) {
	lab.Need(t)
	for _, thin := range []bool{false, true} {
		t.Run(map[bool]string{false: "thick", true: "thin"}[thin], func(t *testing.T) {
			g := newGroup(t, 200)
			if thin {
				g.withPool(t, "64m", "4m")
			}
			e := g.open(t, host.Exec{}).(*lvmEngine)
			ctx := t.Context()
			content := bytes.Repeat([]byte("kept"), mib)
			device := g.foreign(t, "old", content)
			active := func() bool {
				dev, err := e.group.Device(ctx, e.uuid, "old")
				ok(t, err)
				return dev != nil
			}
			importable := func() {
				t.Helper()
				was := active()
				found, err := e.Importable(ctx, "old")
				if err != nil || found != (engine.Importable{Size: 4 * mib, Allocated: 4 * mib, Holds: "nothing"}) {
					t.Errorf("%+v, %v", found, err)
				}
				if active() != was {
					t.Errorf("it was active: %t, and is not so any more", was)
				}
			}
			f := open(t, device)
			_, err := e.Importable(ctx, "old")
			is(t, "Importable of what is open", err, fault.InUse, "1 users have /dev/dm-")
			is(t, "ImportSlab of what is open", e.ImportSlab(ctx, "old", block("s", 4*mib)), fault.InUse, "1 users have /dev/dm-")
			ok(t, f.Close())
			importable()
			g.lvm(t, "lvchange", "-an", g.name+"/old")
			importable()
			g.lvm(t, "lvchange", "-ay", g.name+"/old")
			ok(t, e.ImportSlab(ctx, "old", block("s", 4*mib)))
			have := make([]byte, len(content))
			f = open(t, attach(t, e, "s"))
			_, err = f.ReadAt(have, 0)
			if ok(t, err); !bytes.Equal(have, content) {
				t.Error("the slab does not hold what the volume held")
			}
			is(t, "giving back what is open", e.DeleteSlab(ctx, "s"), fault.InUse, "open")
			ok(t, f.Close())
			ok(t, e.DeleteSlab(ctx, "s")) // attached, but not open
			importable()

			// Taken into use in the last moment.
			e.group = newEngineGroupRun(g, &between{program: "lvrename", before: func() {
				g.lvm(t, "lvchange", "-ay", g.name+"/old")
				f = open(t, device)
			}})
			is(t, "taken into use meanwhile", e.ImportSlab(ctx, "old", block("s", 4*mib)), fault.InUse, "taken into use meanwhile")
			if tags := g.about(t, "old", "lv_name,lv_tags"); tags != "old" {
				t.Errorf("it is %q", tags)
			}
			ok(t, f.Close())
		})
	}
}

// TestVolumesOfOtherLayoutsAreNotImported.
func TestVolumesOfOtherLayoutsAreNotImported(t *testing.T) {
	lab.Need(t)
	g := newGroup(t, 400).withPool(t, "32m", "4m")
	g.lvm(t, "lvcreate", "-y", "--type", "thin", "-V", "4m", "--thinpool", "pool", "-n", "thin", g.name)
	g.lvm(t, "lvcreate", "-y", "-s", "-n", "cut", g.name+"/thin")
	g.lvm(t, "lvcreate", "-y", "--type", "thin-pool", "-Zn", "-L", "32m", "--poolmetadatasize", "4m", "-n", "other", g.name)
	g.lvm(t, "lvcreate", "-y", "--type", "thin", "-V", "4m", "--thinpool", "other", "-n", "elsewhere", g.name)
	g.legacy(t, "external", 4)
	g.lvm(t, "lvchange", "--permission", "r", g.name+"/external")
	g.lvm(t, "lvcreate", "-y", "-s", "--thinpool", "pool", "-n", "shows", g.name+"/external")
	g.legacy(t, "origin", 4)
	g.lvm(t, "lvcreate", "-y", "-s", "-L", "4m", "-n", "cow", g.name+"/origin")
	g.legacy(t, "linear", 4)

	try := func(e engine.Engine, source, tells string) {
		t.Helper()
		err := e.(engine.Importer).ImportSlab(t.Context(), source, block("s", 4*mib))
		if tells == "" {
			if err == nil {
				err = e.DeleteSlab(t.Context(), "s")
			}
			if err != nil {
				t.Errorf("%s: %v", source, err)
			}
			return
		}
		is(t, source, err, fault.Invalid, tells)
	}
	e := g.open(t, host.Exec{})
	for source, tells := range map[string]string{"pool": "it is a pool", "other": "it is a pool", "pool_tdata": "LVM's own", "pool_tmeta": "LVM's own", "elsewhere": "in thin pool other",
		"shows": "shows logical volume external", "external": "read-only", "origin": "no thin volume", "cow": "no thin volume", "linear": "no thin volume", "thin": "", "cut": ""} {
		try(e, source, tells)
	}
	g.lvm(t, "lvremove", "-y", g.name+"/quarry")
	delete(g.params, "thinPool")
	e = g.open(t, host.Exec{})
	for source, tells := range map[string]string{"pool": "it is a pool", "thin": "it is a thin volume", "cut": "it is a thin volume", "external": "read-only",
		"origin": "others depend on it", "cow": "snapshot", "linear": ""} {
		try(e, source, tells)
	}
	if names := g.lvm(t, "lvs", "--noheadings", "-o", "lv_name", "-S", `lv_name=~"^qs"`, g.name); strings.TrimSpace(names) != "" {
		t.Errorf("left: %s", names)
	}
}
