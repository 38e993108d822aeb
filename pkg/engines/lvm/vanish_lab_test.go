package lvm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/test/lab"
)

// cable is a disk that can be pulled out: everything that is done with it fails
// then, as with a dead controller.
type cable struct {
	t     *testing.T
	name  string
	table string
}

func newCable(t *testing.T, disk string, size int64) *cable {
	t.Helper()
	var unique [4]byte
	_, _ = rand.Read(unique[:])
	c := &cable{t: t, name: "quarry-test-cable-" + hex.EncodeToString(unique[:]), table: fmt.Sprintf("0 %d linear %s 0", size/512, disk)}
	c.run("create", c.name, "--table", c.table)
	t.Cleanup(func() { c.run("remove", "--retry", c.name) })
	return c
}

func (c *cable) run(args ...string) {
	c.t.Helper()
	if _, err := (host.Exec{}).Run(context.WithoutCancel(c.t.Context()), host.Command{Name: "dmsetup", Args: args}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cable) path() string { return "/dev/mapper/" + c.name }

func (c *cable) load(table string) {
	c.t.Helper()
	c.run("suspend", "--noflush", "--nolockfs", c.name)
	c.run("load", c.name, "--table", table)
	c.run("resume", c.name)
}

func (c *cable) pull() {
	c.t.Helper()
	var sectors int64
	_, err := fmt.Sscanf(c.table, "0 %d", &sectors)
	ok(c.t, err)
	c.load(fmt.Sprintf("0 %d error", sectors))
}

func (c *cable) plug() { c.t.Helper(); c.load(c.table) }

// TestADiskThatVanishesUnderAManager: what is asked meanwhile fails with the
// group's name; once the disk is back everything goes on by itself.
func TestADiskThatVanishesUnderAManager(t *testing.T) {
	lab.Need(t)
	for _, thin := range []bool{false, true} {
		t.Run(map[bool]string{false: "thick", true: "thin"}[thin], func(t *testing.T) { vanish(t, thin) })
	}
}

func vanish(t *testing.T, thin bool) {
	c := newCable(t, loop(t, 200*mib), 200*mib)
	g := newGroupOn(t, "quarry-test-"+c.name[len(c.name)-8:], c.path())
	if thin {
		g.withPool(t, "100m", "4m")
	}
	w := &world{t: t, group: g, now: time.UnixMilli(1_700_000_000_000)}
	ok(t, w.start(0, false))
	defer w.Close()
	request := func(name string) image.CreateRequest {
		return image.CreateRequest{Name: name, Domains: []string{"a"}, Layout: image.LayoutImage, Size: 8 * mib,
			Accesses: []image.Access{{Mode: image.SingleNodeWriter, Block: true}}}
	}
	img, err := w.CreateVolume(t.Context(), request("v"))
	ok(t, err)
	data := bytes.Repeat([]byte("acknowledged"), mib/12)
	write := func() {
		f := open(t, attach(t, w.engine, img.Slab))
		_, err := f.WriteAt(data, 4096)
		ok(t, errors.Join(err, f.Sync(), f.Close()))
	}
	read := func() {
		t.Helper()
		have := make([]byte, len(data))
		f := open(t, attach(t, w.engine, img.Slab))
		_, err := f.ReadAt(have, 4096)
		ok(t, errors.Join(err, f.Close()))
		if !bytes.Equal(have, data) {
			t.Error("what was acknowledged is not there")
		}
		ok(t, w.engine.DetachSlab(t.Context(), img.Slab))
	}
	write()
	ok(t, w.engine.DetachSlab(t.Context(), img.Slab))
	tags, err := w.engine.ListTags(t.Context(), "")
	ok(t, err)

	c.pull()
	_, err = w.CreateVolume(t.Context(), request("w"))
	is(t, "CreateVolume", err, fault.Unavailable, g.name)
	_, err = w.Expand(t.Context(), img.Handle, 16*mib, 0)
	is(t, "Expand", err, fault.Unavailable, g.name)
	_, err = w.engine.AttachSlab(t.Context(), img.Slab, engine.AttachOptions{})
	is(t, "AttachSlab", err, fault.Unavailable, g.name)
	_, err = w.engine.ListTags(t.Context(), "")
	is(t, "ListTags", err, fault.Unavailable, g.name)
	_, err = Open(t.Context(), g.params, host.Exec{})
	is(t, "Open", err, fault.Unavailable, g.name)
	_, err = engine.Discover(w.engine.Engine).Meter.DomainUsage(t.Context()) // what operators are shown
	is(t, "DomainUsage", err, fault.Unavailable, g.name)

	c.plug()
	if again, err := w.engine.ListTags(t.Context(), ""); err != nil || len(again) != len(tags) {
		t.Errorf("%d tags are back, %d were there: %v", len(again), len(tags), err)
	}
	read()
	grown, err := w.Expand(t.Context(), img.Handle, 16*mib, 0)
	ok(t, err)
	if grown.Size != 16*mib {
		t.Errorf("grown to %d bytes", grown.Size)
	}
	more, err := w.CreateVolume(t.Context(), request("w"))
	ok(t, err)
	_, err = engine.Discover(w.engine.Engine).Meter.DomainUsage(t.Context())
	ok(t, err)
	read()
	for _, i := range []image.Image{img, more} {
		ok(t, w.DeleteVolume(t.Context(), i.Handle))
	}
	ok(t, w.collect())
	slabs, err := w.engine.ListSlabs(t.Context())
	if err != nil || len(slabs) > 0 {
		t.Errorf("left: %v, %v", slabs, err)
	}
	if left := slices.DeleteFunc(g.names(t), func(n string) bool { return n[:2] != "qp" && n[:2] != "qs" }); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
