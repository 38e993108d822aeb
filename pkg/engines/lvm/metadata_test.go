package lvm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// These tests use real volume groups, but nothing in them is ever active: they
// need no device-mapper.

// newEngineGroup is the group as it is seen through one disk.
func newEngineGroup(g *group) *lvm.Group { return newEngineGroupRun(g, host.Exec{}) }

func newEngineGroupRun(g *group, run host.Runner) *lvm.Group {
	return lvm.New(run, g.name, lvm.Options{Devices: []string{g.disk}})
}

func is(t *testing.T, what string, err error, kind fault.Kind, tells string) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind || !strings.Contains(err.Error(), tells) {
		t.Errorf("%s: %v, want kind %q and %q in it", what, err, kind, tells)
	}
}

func TestADamagedTagIsNotHidden(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{})
	for _, name := range []string{"i.a.1", "i.b.1", "i.c_d.1"} { // the last has a hashed volume
		ok(t, e.CreateTag(t.Context(), engine.Tag{Name: name, Slab: "s", Record: []byte("record")}))
	}
	record := strings.TrimPrefix(encodeTag(engine.Tag{Name: "i.a.1", Slab: "s", Record: []byte("record")})[1], recordTag)
	g.lvm(t, "lvchange", "--deltag", recordTag+record, g.name+"/"+volume(tagSort, "i.a.1"))
	g.lvm(t, "lvchange", "--addtag", recordTag+"AAAA", g.name+"/"+volume(tagSort, "i.c_d.1"))
	g.lvm(t, "lvchange", "--addtag", "backup=daily", g.name+"/"+volume(tagSort, "i.b.1")) // somebody else's LVM tag
	tags, err := e.ListTags(t.Context(), "i.")
	ok(t, err)
	if len(tags) != 3 {
		t.Errorf("%d tags are listed, 3 are there: %v", len(tags), tags)
	}
	for _, tag := range tags {
		if whole := tag.Name == "i.b.1"; whole != (tag.Slab == "s" && string(tag.Record) == "record") || !whole && (tag.Slab != "" || tag.Record != nil) {
			t.Errorf("listed: %+v", tag)
		}
	}
	is(t, "a damaged tag's name", e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "s", Record: []byte("record")}), fault.Exists, "cannot be read")
	for _, name := range []string{"i.a.1", "i.b.1", "i.c_d.1"} {
		ok(t, e.DeleteTag(t.Context(), name))
	}
	if tags, err := e.ListTags(t.Context(), ""); err != nil || len(tags) != 0 {
		t.Errorf("left: %v, %v", tags, err)
	}
}

func TestAFullGroup(t *testing.T) {
	e := newGroup(t, 64).open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: 40 * mib}))
	is(t, "a second slab", e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 40 * mib}), fault.Exhausted, "vgextend")
	is(t, "growing", e.ResizeSlab(t.Context(), "a", 100*mib), fault.Exhausted, "vgextend")
	ok(t, e.ResizeSlab(t.Context(), "a", 44*mib))
	u, err := engine.Discover(e).Meter.DomainUsage(t.Context())
	ok(t, err)
	ok(t, e.ResizeSlab(t.Context(), "a", 44*mib+u.Available)) // to the last byte
	if u, err := engine.Discover(e).Meter.DomainUsage(t.Context()); err != nil || u.Available != 0 || u.Used != u.Total {
		t.Errorf("a full group: %+v, %v", u, err)
	}
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "a"})) // a tag takes no space
	ok(t, e.DeleteSlab(t.Context(), "a"))
	slabs, err := e.ListSlabs(t.Context())
	if err != nil || len(slabs) != 0 {
		t.Errorf("left: %v, %v", slabs, err)
	}
}

func TestAFullMetadataArea(t *testing.T) {
	g := newGroup(t, 64, "--metadatasize", "4k") // LVM makes 1 MiB of it
	e := g.open(t, host.Exec{})
	d, err := e.Describe(t.Context())
	ok(t, err)
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "first", Record: make([]byte, engine.MaxRecord)}))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
	var junk []string
	for i := range 90 {
		junk = append(junk, "--addtag", fmt.Sprintf("junk%d%s", i, strings.Repeat("x", 1000)))
	}
	reserve := e.(*lvmEngine).reserve
	room := func() int64 {
		info, err := e.(*lvmEngine).group.Info(t.Context())
		ok(t, err)
		return info.MetadataFree
	}
	for i := 0; room() > reserve; i++ {
		some := junk[:2*min(90, max(1, (room()-reserve)/1030+1))]
		g.lvm(t, "lvcreate", append([]string{"-an", "-y", "--type", "error", "-l1", "-n", fmt.Sprintf("junk%d", i), g.name}, some...)...)
	}
	if _, err := e.ListTags(t.Context(), "e."); err != nil { // which looks at the room
		t.Fatal(err)
	}
	is(t, "a slab in the reserve", e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: mib}), fault.Exhausted, "metadata area")
	made := 0
	for ; err == nil; made++ { // but tags
		err = e.CreateTag(t.Context(), engine.Tag{Name: fmt.Sprintf("i.%d", made), Record: make([]byte, engine.MaxRecord)})
	}
	is(t, "a tag where there is no room", err, fault.Exhausted, "--metadatasize")
	if int64(made) < reserve/tagBytes {
		t.Errorf("%d tags fit into the reserve of %d bytes", made, reserve)
	}
	tags, err := e.ListTags(t.Context(), "")
	if err != nil || len(tags) != made { // with the first, without the last
		t.Errorf("%d tags are listed, %d were made: %v", len(tags), made, err)
	}
	ok(t, e.DeleteSlab(t.Context(), "a")) // deleting always works
	ok(t, e.DeleteTag(t.Context(), "first"))
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "again", Record: make([]byte, engine.MaxRecord)}))
	if d.MaxTags < 100 || d.MaxTags > 400 {
		t.Errorf("1 MiB is said to have room for %d tags", d.MaxTags)
	}
}

func TestAGroupThatVanishes(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{})
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
	g.lvm(t, "vgrename", g.name, g.name+"-away")
	gone := func(tells string) {
		t.Helper()
		_, tagsErr := e.ListTags(t.Context(), "")
		_, slabsErr := e.ListSlabs(t.Context())
		is(t, "ListTags", tagsErr, fault.Unavailable, tells)
		is(t, "ListSlabs", slabsErr, fault.Unavailable, tells)
	}
	gone("is not there")
	is(t, "CreateTag", e.CreateTag(t.Context(), engine.Tag{Name: "i.a.2"}), fault.Unavailable, "is not there")
	is(t, "DeleteTag", e.DeleteTag(t.Context(), "i.a.1"), fault.Unavailable, "is not there")
	is(t, "CreateSlab", e.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: mib}), fault.Unavailable, "is not there")
	is(t, "DeleteSlab", e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "is not there")
	is(t, "ResizeSlab", e.ResizeSlab(t.Context(), "a", 2*mib), fault.Unavailable, "is not there")
	_, err := Open(t.Context(), g.params, host.Exec{})
	is(t, "Open", err, fault.Unavailable, "its name is wrong, or its disks cannot be seen")

	// Another group of that name is not it, empty or not.
	other := newGroupOn(t, g.name, loop(t, 64*mib))
	e.(*lvmEngine).group = newEngineGroup(other)
	gone("lost the logical volume quarry")
	is(t, "DeleteTag", e.DeleteTag(t.Context(), "i.a.1"), fault.Unavailable, "lost the logical volume quarry")
	is(t, "DeleteSlab", e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "lost the logical volume quarry")
	twin := other.open(t, host.Exec{})
	gone("is another one")
	is(t, "DeleteTag", e.DeleteTag(t.Context(), "i.a.1"), fault.Unavailable, "is another one")
	is(t, "DeleteSlab", e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "is another one")
	ok(t, twin.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
	ok(t, twin.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
	is(t, "DeleteTag of another's", e.DeleteTag(t.Context(), "i.a.1"), fault.Unavailable, "another group of that name")
	is(t, "DeleteSlab of another's", e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "another group of that name")
	tags, err := twin.ListTags(t.Context(), "")
	slabs, err2 := twin.ListSlabs(t.Context())
	if errors.Join(err, err2) != nil || len(tags) != 1 || len(slabs) != 1 {
		t.Errorf("the other group has tags %v and slabs %v: %v", tags, slabs, errors.Join(err, err2))
	}
	e.(*lvmEngine).group = newEngineGroup(g)
	g.lvm(t, "vgrename", g.name+"-away", g.name)
	if tags, err = e.ListTags(t.Context(), ""); err != nil || len(tags) != 1 {
		t.Errorf("when it is back: %v, %v", tags, err)
	}
}

// readOnly makes the group's disk read-only while volumes are removed.
type readOnly struct {
	t    *testing.T
	disk string
}

func (r readOnly) Run(ctx context.Context, c host.Command) (host.Result, error) {
	if c.Name == "lvm" && c.Args[0] == "lvremove" {
		r.set("--setro")
		defer r.set("--setrw")
	}
	return host.Exec{}.Run(ctx, c)
}

func (r readOnly) set(how string) {
	_, err := (host.Exec{}).Run(context.WithoutCancel(r.t.Context()), host.Command{Name: "blockdev", Args: []string{how, r.disk}})
	ok(r.t, err)
}

// TestASlabThatCannotBeRemovedIsNotSaidToBe, although its unfinished half, which is
// removed with it, is not there.
func TestASlabThatCannotBeRemovedIsNotSaidToBe(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{})
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
	e.(*lvmEngine).pool = "pool" // as if slabs were thin: here is no pool
	e.(*lvmEngine).group = newEngineGroupRun(g, readOnly{t, g.disk})
	is(t, "DeleteSlab", e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "Failed to write")
	e.(*lvmEngine).group = newEngineGroup(g)
	if slabs, err := e.ListSlabs(t.Context()); err != nil || len(slabs) != 1 {
		t.Errorf("slabs %v, %v", slabs, err)
	}
	ok(t, e.DeleteSlab(t.Context(), "a"))
	ok(t, e.DeleteSlab(t.Context(), "a")) // nothing is there, in the right group
	if slabs, err := e.ListSlabs(t.Context()); err != nil || len(slabs) != 0 {
		t.Errorf("left: %v, %v", slabs, err)
	}
}

func TestAMissingDisk(t *testing.T) {
	second := loop(t, 64*mib)
	g := newGroup(t, 64)
	g.lvm(t, "pvcreate", "--devices", second, second)
	both := g.disk + "," + second
	program := func(args ...string) {
		t.Helper()
		g.lvm(t, args[0], append([]string{"--devices", both}, args[1:]...)...)
	}
	program("vgextend", g.name, second)
	g.params["devices"] = both
	e := g.open(t, host.Exec{})
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))

	half := e.(*lvmEngine).group
	e.(*lvmEngine).group = newEngineGroup(g) // which sees only the first disk
	_, tagsErr := e.ListTags(t.Context(), "")
	is(t, "ListTags", tagsErr, fault.Unavailable, "cannot be seen")
	is(t, "CreateTag", e.CreateTag(t.Context(), engine.Tag{Name: "i.a.2"}), fault.Unavailable, "missing")
	is(t, "DeleteTag", e.DeleteTag(t.Context(), "i.a.1"), fault.Unavailable, "missing")
	is(t, "DeleteSlab", e.DeleteSlab(t.Context(), "a"), fault.Unavailable, "missing")
	is(t, "ResizeSlab", e.ResizeSlab(t.Context(), "a", 2*mib), fault.Unavailable, "missing")
	g.params["devices"] = g.disk
	_, err := Open(t.Context(), g.params, host.Exec{})
	is(t, "Open", err, fault.Unavailable, "cannot be seen")

	e.(*lvmEngine).group = half // the disk is back, and was not expelled
	tags, err := e.ListTags(t.Context(), "")
	if err != nil || len(tags) != 1 {
		t.Errorf("when the disk is back: %v, %v", tags, err)
	}
	ok(t, e.DeleteTag(t.Context(), "i.a.1"))
}

func TestGroupsThatAreRefused(t *testing.T) {
	open := func(g *group, change map[string]string) error {
		for k, v := range change {
			g.params[k] = v
		}
		_, err := Open(t.Context(), g.params, host.Exec{})
		return err
	}
	g := newGroup(t, 64)
	is(t, "an unknown parameter", open(&group{params: map[string]string{"path": "/srv"}}, nil), fault.Invalid, "vg")
	is(t, "no group", open(&group{params: map[string]string{}}, nil), fault.Invalid, `"vg"`)
	is(t, "a path for a group", open(&group{params: map[string]string{"vg": "/dev/data"}}, nil), fault.Invalid, `"vg"`)
	is(t, "an option for a group", open(&group{params: map[string]string{"vg": "-y"}}, nil), fault.Invalid, `"vg"`)
	is(t, "a long name", open(&group{params: map[string]string{"vg": strings.Repeat("-x", 30)}}, nil), fault.Invalid, `"vg"`)
	is(t, "a device by name", open(&group{params: map[string]string{"vg": "data", "devices": "sda"}}, nil), fault.Invalid, "sda")
	is(t, "a bad switch", open(&group{params: map[string]string{"vg": "data", "discard": "maybe"}}, nil), fault.Invalid, "maybe")
	is(t, "no such pool", open(g, map[string]string{"thinPool": "nope"}), fault.Invalid, "nope")
	delete(g.params, "thinPool")

	g.lvm(t, "lvcreate", "-y", "-an", "-Zn", "-Wn", "-L", "4m", "-n", "quarry", g.name)
	is(t, "somebody's volume of our name", open(g, nil), fault.Invalid, "lvrename")
	is(t, "a pool that is none", open(g, map[string]string{"thinPool": "quarry"}), fault.Invalid, "no thin pool")
	delete(g.params, "thinPool")
	g.lvm(t, "lvrename", g.name, "quarry", "other")
	ok(t, open(g, nil))

	g.lvm(t, "vgexport", g.name)
	is(t, "an exported group", open(g, nil), fault.Permission, "vgimport")
	g.lvm(t, "vgimport", g.name)
	g.lvm(t, "vgchange", "-y", "--systemid", "another-host", g.name)
	is(t, "another host's group", open(g, nil), fault.Permission, "another host")
}

func TestTwoGroups(t *testing.T) {
	a, b := newGroup(t, 64), newGroup(t, 64)
	ea, eb := a.open(t, host.Exec{}), b.open(t, host.Exec{})
	for _, e := range []engine.Engine{ea, eb} {
		ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1"}))
		ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
	}
	ok(t, ea.DeleteTag(t.Context(), "i.a.1"))
	ok(t, ea.DeleteSlab(t.Context(), "a"))
	tags, err := eb.ListTags(t.Context(), "")
	slabs, err2 := eb.ListSlabs(t.Context())
	if errors.Join(err, err2) != nil || len(tags) != 1 || len(slabs) != 1 {
		t.Errorf("the other group has tags %v and slabs %v: %v", tags, slabs, errors.Join(err, err2))
	}
	twin := newGroupOn(t, a.name, loop(t, 64*mib))
	_, err = Open(t.Context(), map[string]string{"vg": a.name, "devices": a.disk + "," + twin.disk}, host.Exec{})
	is(t, "two of one name", err, fault.Invalid, "vgrename")
}

// killer kills programs of lvm2 after a while, as if the machine ran out of memory.
type killer struct{ after func() time.Duration }

func (k killer) Run(ctx context.Context, c host.Command) (host.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, k.after())
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Name, c.Args...)
	cmd.Env = append(cmd.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	res := host.Result{Stdout: out}
	if ctx.Err() != nil {
		return res, fault.New(fault.Unavailable, "killed")
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		res.Stderr, res.ExitCode = exit.Stderr, exit.ExitCode()
		return res, &host.ExitError{Command: c, Result: res}
	}
	return res, err
}

func TestKilledProgramsLeaveAllOrNothing(t *testing.T) {
	g := newGroup(t, 64)
	sound := g.open(t, host.Exec{})
	begin := time.Now()
	ok(t, sound.CreateTag(t.Context(), engine.Tag{Name: "warm", Record: []byte("up")}))
	limit := 2 * float64(time.Since(begin)) // follows the machine's load, so that half of the programs are killed
	shaky := g.open(t, host.Exec{})
	shaky.(*lvmEngine).group = newEngineGroupRun(g, killer{func() time.Duration { return time.Duration(rand.Float64() * limit) }})
	killed, done := 0, 0
	count := func(err error) {
		if err == nil {
			done++
			limit *= 0.9
		} else {
			killed++
			limit *= 1.1
		}
	}
	for i := range 25 {
		tag := engine.Tag{Name: fmt.Sprintf("i.a.%d", i), Slab: "s", Record: []byte(strings.Repeat("r", i*10))}
		spec := engine.SlabSpec{ID: fmt.Sprintf("s%d", i), Kind: engine.Block, Size: mib}
		count(shaky.CreateTag(t.Context(), tag))
		count(shaky.CreateSlab(t.Context(), spec))
		tags, err := sound.ListTags(t.Context(), tag.Name)
		ok(t, err)
		if len(tags) > 0 && (len(tags) > 1 || tags[0].Slab != tag.Slab || string(tags[0].Record) != string(tag.Record)) {
			t.Fatalf("half made: %+v", tags)
		}
		ok(t, sound.CreateTag(t.Context(), tag)) // whatever had become of it
		ok(t, sound.CreateSlab(t.Context(), spec))
		count(shaky.DeleteTag(t.Context(), tag.Name))
		count(shaky.DeleteSlab(t.Context(), spec.ID))
		ok(t, sound.DeleteTag(t.Context(), tag.Name))
		ok(t, sound.DeleteSlab(t.Context(), spec.ID))
	}
	if killed < 15 || done < 15 {
		t.Errorf("%d programs were killed and %d were not: that shows nothing", killed, done)
	}
	tags, err := sound.ListTags(t.Context(), "i.")
	slabs, err2 := sound.ListSlabs(t.Context())
	if errors.Join(err, err2) != nil || len(tags) > 0 || len(slabs) > 0 {
		t.Errorf("left: tags %v, slabs %v: %v", tags, slabs, errors.Join(err, err2))
	}
}
