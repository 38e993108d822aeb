package lvm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// These need no device-mapper: what is imported is not active, and nobody looks into it.

// legacy makes a volume as an administrator would, without looking at its content.
func (g *group) legacy(t testing.TB, name string, size int, args ...string) {
	t.Helper()
	g.lvm(t, "lvcreate", append(args, "-y", "-an", "-Zn", "-Wn", "-L", fmt.Sprintf("%dm", size), "--addtag", "backup=daily", "-n", name, g.name)...)
}

// about says of a volume what fields hold; "" where it is not there.
func (g *group) about(t testing.TB, lv, fields string) string {
	t.Helper()
	return g.lvm(t, "lvs", "--noheadings", "--separator", " ", "-o", fields, "-S", `lv_name="`+lv+`"`, g.name)
}

// itself is what stays whatever a volume is called: its UUID and where on the disks its content is.
const itself = "lv_uuid,lv_size,seg_pe_ranges"

func block(id string, size int64) engine.SlabSpec {
	return engine.SlabSpec{ID: id, Kind: engine.Block, Size: size}
}

func TestAnImportIsTheVolumeItselfAndTakesItsNameOnlyAtLast(t *testing.T) {
	g := newGroup(t, 64)
	e, other := g.open(t, host.Exec{}).(*lvmEngine), g.open(t, host.Exec{})
	ctx := t.Context()
	for _, id := range []string{"a", "hashed_" + strings.Repeat("x", 190)} {
		lv := volume(slabs, id)
		g.legacy(t, "old-disk", 4)
		what := g.about(t, "old-disk", itself)
		for range 2 { // an answer may be lost
			ok(t, e.ImportSlab(ctx, "old-disk", block(id, 4*mib)))
		}
		if g.about(t, lv, itself) != what || g.about(t, "old-disk", itself) != "" {
			t.Errorf("the slab is not the volume: %s, want %s", g.about(t, lv, itself), what)
		}
		list, err := other.ListSlabs(ctx)
		if ok(t, err); len(list) != 1 || list[0] != (engine.Slab{ID: id, Kind: engine.Block, Size: 4 * mib}) {
			t.Errorf("another process lists %v", list)
		}
		is(t, "imported again as another slab", other.(engine.Importer).ImportSlab(ctx, "old-disk", block("b", 4*mib)), fault.NotFound, "has no logical volume old-disk")
		is(t, "final under another name", e.KeepSlab(ctx, "other", id), fault.Invalid, "was not imported from")
		for range 2 {
			ok(t, other.DeleteSlab(ctx, id))
		}
		if g.about(t, "old-disk", itself) != what || g.about(t, "old-disk", "lv_tags,lv_skip_activation,lv_autoactivation") != "backup=daily  enabled" {
			t.Errorf("given back as %q", g.about(t, "old-disk", itself+",lv_tags,lv_skip_activation,lv_autoactivation"))
		}
		list, err = e.ListSlabs(ctx)
		if ok(t, err); len(list) != 0 {
			t.Errorf("slabs after it was given back: %v", list)
		}

		ok(t, e.ImportSlab(ctx, "old-disk", block(id, 4*mib)))
		for range 2 {
			ok(t, other.(engine.Importer).KeepSlab(ctx, "old-disk", id))
		}
		if have, want := g.about(t, lv, itself+",lv_tags,lv_skip_activation,lv_autoactivation"), what+" backup=daily,"+slabTag+id+" skip activation"; strings.TrimSpace(have) != want {
			t.Errorf("final: %q, want %q", have, want)
		}
		is(t, "imported again as the slab that it is", e.ImportSlab(ctx, "old-disk", block(id, 4*mib)), fault.Exists, "exists and is not")
		g.legacy(t, "old-disk", 4) // another volume of that name is nobody's business
		ok(t, e.KeepSlab(ctx, "old-disk", id))
		ok(t, e.ResizeSlab(ctx, id, 8*mib))
		ok(t, e.DeleteSlab(ctx, id))
		if g.about(t, lv, itself) != "" || g.about(t, "old-disk", itself) == "" {
			t.Error("deleted when it was final: the slab is there, or another volume is gone")
		}
		g.lvm(t, "lvremove", "-y", g.name+"/old-disk")
	}
	is(t, "final, of nothing", e.KeepSlab(ctx, "old-disk", "a"), fault.NotFound, `slab "a"`)
	is(t, "final, without a name", e.KeepSlab(ctx, "vg/x", "a"), fault.Invalid, "name of a logical volume")
}

func TestWhatCannotBeImportedIsLeftAlone(t *testing.T) {
	g := newGroup(t, 96)
	second := loop(t, 64*mib)
	g.params["devices"] = g.disk + "," + second
	g.disk = g.params["devices"]
	g.lvm(t, "pvcreate", second)
	g.lvm(t, "vgextend", g.name, second)
	e := g.open(t, host.Exec{}).(*lvmEngine)
	ctx := t.Context()
	ok(t, e.CreateSlab(ctx, block("taken", 4*mib)))
	g.legacy(t, "fine", 4)
	g.legacy(t, "striped", 4, "-i2")
	g.legacy(t, "qs-own", 4)
	g.legacy(t, "frozen", 4)
	g.lvm(t, "lvchange", "--permission", "r", g.name+"/frozen")
	g.lvm(t, "lvcreate", "-y", "-an", "--type", "error", "-l4", "-n", "broken", g.name)
	g.lvm(t, "lvcreate", "-y", "-an", "--type", "zero", "-l4", "-n", "empty", g.name)
	g.legacy(t, "mixed", 2)
	g.lvm(t, "lvextend", "--type", "error", "-l", "+2", g.name+"/mixed")
	before := g.lvm(t, "lvs", "-o", "lv_name,lv_tags,"+itself, g.name)
	for source, want := range map[string]struct {
		kind  fault.Kind
		tells string
	}{
		"none": {fault.NotFound, "has no logical volume none"}, "": {fault.Invalid, "name of a logical volume"}, "..": {fault.Invalid, "name of a logical volume"},
		"-y": {fault.Invalid, "name of a logical volume"}, g.name + "/fine": {fault.Invalid, "without the group's"}, "/dev/" + g.name + "/fine": {fault.Invalid, "without the group's"},
		`fine"||lv_name=~"`: {fault.Invalid, "name of a logical volume"},
		"quarry":            {fault.Invalid, "Quarry's own"}, "qs.taken": {fault.Invalid, "Quarry's own"}, "qs-own": {fault.Invalid, "Quarry's own"}, "qt.i.a.1": {fault.Invalid, "Quarry's own"}, "qp.x": {fault.Invalid, "Quarry's own"},
		"frozen": {fault.Invalid, "--permission rw " + g.name + "/frozen"}, "broken": {fault.Invalid, "type error"}, "empty": {fault.Invalid, "type zero"}, "mixed": {fault.Invalid, "error,linear"},
	} {
		is(t, "ImportSlab of "+source, e.ImportSlab(ctx, source, block("s", 4*mib)), want.kind, want.tells)
		_, err := e.Importable(ctx, source)
		is(t, "Importable of "+source, err, want.kind, want.tells)
	}
	is(t, "another size than there was", e.ImportSlab(ctx, "fine", block("s", 8*mib)), fault.Conflict, "not 8388608 as when it was looked at")
	is(t, "over a slab", e.ImportSlab(ctx, "fine", block("taken", 4*mib)), fault.Exists, "taken")
	is(t, "as a folder", e.ImportSlab(ctx, "fine", engine.SlabSpec{ID: "s", Kind: engine.Tree, Size: 4 * mib}), fault.Unsupported, "block")
	e.pool = "pool" // as if slabs were thin
	is(t, "a thick volume among thin slabs", e.ImportSlab(ctx, "fine", block("s", 4*mib)), fault.Invalid, "no thin volume (its layout is linear)")
	e.pool = ""
	e.extent *= 8 // as if the group's extents had become smaller since
	is(t, "a part of an extent", e.ImportSlab(ctx, "fine", block("s", 4*mib)), fault.Invalid, "a multiple of 8388608")
	e.extent /= 8
	half := e.group
	e.group = newEngineGroup(&group{name: g.name, disk: strings.Split(g.disk, ",")[0]})
	is(t, "with a disk missing", e.ImportSlab(ctx, "fine", block("s", 4*mib)), fault.Unavailable, "cannot be seen")
	e.group = half
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	e.importing <- struct{}{}
	is(t, "while another import is under way", e.ImportSlab(canceled, "fine", block("s", 4*mib)), fault.Canceled, "something else is being imported")
	<-e.importing
	if after := g.lvm(t, "lvs", "-o", "lv_name,lv_tags,"+itself, g.name); after != before {
		t.Errorf("volumes were\n%s\nand are\n%s", before, after)
	}
	ok(t, e.ImportSlab(ctx, "striped", block("s", 4*mib)))
	ok(t, e.KeepSlab(ctx, "striped", "s"))
}

func TestAnOldNameThatIsTakenMeanwhile(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{}).(*lvmEngine)
	g.legacy(t, "old", 4)
	what := g.about(t, "old", itself)
	ok(t, e.ImportSlab(t.Context(), "old", block("a", 4*mib)))
	g.legacy(t, "old", 4)
	another := g.about(t, "old", itself)
	is(t, "DeleteSlab", e.DeleteSlab(t.Context(), "a"), fault.InUse, "another one has that name now")
	if g.about(t, "old", itself) != another || g.about(t, "qs.a", itself) != what {
		t.Error("one of the two is not what it was")
	}
	g.lvm(t, "lvrename", g.name, "old", "new")
	ok(t, e.DeleteSlab(t.Context(), "a"))
	if g.about(t, "old", itself) != what {
		t.Error("it has not got its name back")
	}
}

// TestNothingIsDestroyedWithoutTheTagOfASlab: whatever became of an import.
func TestNothingIsDestroyedWithoutTheTagOfASlab(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{}).(*lvmEngine)
	g.legacy(t, "qs.foreign", 4)
	ok(t, e.CreateSlab(t.Context(), block("a", mib)))
	g.lvm(t, "lvchange", "--deltag", slabTag+"a", g.name+"/qs.a")
	for _, id := range []string{"foreign", "a"} {
		is(t, "DeleteSlab", e.DeleteSlab(t.Context(), id), fault.Corrupt, "lvremove")
		is(t, "KeepSlab", e.KeepSlab(t.Context(), "old", id), fault.Invalid, "not imported")
		if g.about(t, "qs."+id, itself) == "" {
			t.Errorf("%s is gone", id)
		}
	}
}

func TestOfManyImportsOfOneVolumeOneSucceeds(t *testing.T) {
	g := newGroup(t, 64)
	es := []*lvmEngine{}
	for range 4 {
		es = append(es, g.open(t, host.Exec{}).(*lvmEngine))
	}
	g.legacy(t, "old", 4)
	what := g.about(t, "old", itself)
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for round := range rounds {
		id := func(i int) string { return fmt.Sprintf("n_%d.%d", round, i) } // hashed: an LVM tag has to tell the ID
		errs := make([]error, len(es))
		var all sync.WaitGroup
		for i, e := range es {
			all.Go(func() { errs[i] = e.ImportSlab(t.Context(), "old", block(id(i), 4*mib)) })
		}
		all.Wait()
		winner := slices.Index(errs, nil)
		for i, err := range errs {
			if i != winner && (err == nil || fault.KindOf(err) != fault.NotFound && fault.KindOf(err) != fault.Conflict) {
				t.Errorf("%d: %v, and %d has it", i, err, winner)
			}
		}
		if winner < 0 {
			t.Fatalf("nobody has it: %v", errs)
		}
		list, err := es[0].ListSlabs(t.Context())
		if ok(t, err); len(list) != 1 || list[0].ID != id(winner) || g.about(t, volume(slabs, id(winner)), itself) != what {
			t.Fatalf("slabs %v, want %s", list, id(winner))
		}
		for i := range es { // the losers' managers sweep
			if i != winner {
				ok(t, es[i].DeleteSlab(t.Context(), id(i)))
			}
		}
		if round < rounds-1 {
			ok(t, es[winner].DeleteSlab(t.Context(), id(winner)))
			continue
		}
		ok(t, es[winner].KeepSlab(t.Context(), "old", id(winner)))
		if tags := g.about(t, volume(slabs, id(winner)), "lv_tags"); tags != "backup=daily,"+slabTag+id(winner) {
			t.Errorf("final, with LVM tags %q", tags)
		}
	}
}

// between runs something right before the programs of one name, or after them.
type between struct {
	program       string
	before, after func()
}

func (b *between) Run(ctx context.Context, c host.Command) (host.Result, error) {
	if c.Name != "lvm" || c.Args[0] != b.program {
		return host.Exec{}.Run(ctx, c)
	}
	if b.before != nil {
		b.before()
		b.before = nil
	}
	res, err := host.Exec{}.Run(ctx, c)
	if b.after != nil {
		b.after()
		b.after = nil
	}
	return res, err
}

// TestWhatChangesDuringAnImportIsGivenBack, or was not taken.
func TestWhatChangesDuringAnImportIsGivenBack(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{}).(*lvmEngine)
	other := g.open(t, host.Exec{}).(*lvmEngine)
	for what, c := range map[string]struct {
		with  *between
		kind  fault.Kind
		tells string
		names []string // afterwards
	}{
		"it grows": {&between{program: "lvrename", before: func() { g.lvm(t, "lvextend", "-L", "8m", g.name+"/old") }},
			fault.Conflict, "has 8388608 bytes", []string{"old"}},
		"it is gone": {&between{program: "lvchange", before: func() { g.lvm(t, "lvrename", g.name, "old", "away") }},
			fault.Conflict, "gone", []string{"away"}},
		"another one has its name": {&between{program: "lvchange", before: func() {
			g.lvm(t, "lvrename", g.name, "old", "away")
			g.legacy(t, "old", 4)
		}}, fault.Conflict, "another has changed it", []string{"away", "old"}},
		"another one has its name, later": {&between{program: "lvrename", before: func() {
			g.lvm(t, "lvrename", g.name, "old", "away")
			g.legacy(t, "old", 4)
		}}, fault.Conflict, "changed meanwhile", []string{"away", "old"}},
		"its slab's name is taken": {&between{program: "lvchange", after: func() { g.legacy(t, "qs.s", 4) }},
			fault.Exists, "exists and is not", []string{"old", "qs.s"}},
		"it is given back": {&between{program: "lvrename", after: func() { ok(t, other.DeleteSlab(t.Context(), "s")) }},
			fault.Conflict, "given back", []string{"old"}},
	} {
		g.legacy(t, "old", 4)
		e.group = newEngineGroupRun(g, c.with)
		is(t, what, e.ImportSlab(t.Context(), "old", block("s", 4*mib)), c.kind, c.tells)
		for _, name := range []string{"away", "old", "qs.s"} {
			there := g.about(t, name, "lv_uuid") != ""
			if there != slices.Contains(c.names, name) {
				t.Errorf("%s: %s is there: %t", what, name, there)
			}
			if tags := g.about(t, name, "lv_tags"); there && name != "away" && tags != "backup=daily" {
				t.Errorf("%s: %s has LVM tags %q", what, name, tags)
			}
			if there {
				g.lvm(t, "lvremove", "-y", g.name+"/"+name)
			}
		}
	}
}

// lastly is a process that dies at one of the programs that change something: before it ran, or
// after.
type lastly struct {
	at    int
	after bool
	ran   int
}

func (l *lastly) Run(ctx context.Context, c host.Command) (host.Result, error) {
	if c.Name == "lvm" && !slices.Contains([]string{"lvs", "vgs"}, c.Args[0]) {
		l.ran++
	}
	dead := fault.New(fault.Unavailable, "the process is dead")
	if l.ran > l.at || l.ran == l.at && !l.after {
		return host.Result{}, dead
	}
	res, err := host.Exec{}.Run(ctx, c)
	if l.ran == l.at && l.after {
		l.ran++
		return host.Result{}, dead
	}
	return res, err
}

// TestEveryProgramOfAnImportMayBeTheLast: then the volume has its own name, or is the slab; a new
// process can give it back, and can end the import.
func TestEveryProgramOfAnImportMayBeTheLast(t *testing.T) {
	g := newGroup(t, 64)
	sound := g.open(t, host.Exec{}).(*lvmEngine)
	ctx := t.Context()
	g.legacy(t, "old", 4)
	what := g.about(t, "old", itself)
	doing := map[string]func(e *lvmEngine) error{
		"given back": func(e *lvmEngine) error {
			return errors.Join(e.ImportSlab(ctx, "old", block("a", 4*mib)), e.DeleteSlab(ctx, "a"))
		},
		"final": func(e *lvmEngine) error {
			if err := e.ImportSlab(ctx, "old", block("a", 4*mib)); err != nil {
				return err
			}
			return e.KeepSlab(ctx, "old", "a")
		},
	}
	for name, do := range doing {
		died := 0
		for at, ended := 1, false; !ended; at++ {
			for _, after := range []bool{false, true} {
				run := &lastly{at: at, after: after}
				shaky := g.open(t, host.Exec{}).(*lvmEngine)
				shaky.group = newEngineGroupRun(g, run)
				err := do(shaky)
				if ended = err == nil; !ended {
					died++
				}
				where := fmt.Sprintf("%s, died at program %d, after it: %t", name, at, after)
				own, slab := g.about(t, "old", itself), g.about(t, "qs.a", itself)
				if own+slab != what {
					t.Fatalf("%s: old is %q, the slab is %q, want %q once", where, own, slab, what)
				}
				final := strings.Contains(g.about(t, "qs.a", "lv_tags"), slabTag)
				if !final && at%2 == 0 { // swept
					ok(t, sound.DeleteSlab(ctx, "a"))
					if g.about(t, "old", itself) != what {
						t.Fatalf("%s: it has not got its name back", where)
					}
				}
				if !final { // asked again
					ok(t, sound.ImportSlab(ctx, "old", block("a", 4*mib)))
				}
				ok(t, sound.KeepSlab(ctx, "old", "a"))
				if have := g.about(t, "qs.a", itself+",lv_tags"); have != what+" backup=daily,"+slabTag+"a" {
					t.Fatalf("%s: it ends as %q", where, have)
				}
				// As it was.
				g.lvm(t, "lvchange", "--deltag", slabTag+"a", "--setactivationskip", "n", "--setautoactivation", "y", g.name+"/qs.a")
				g.lvm(t, "lvrename", g.name, "qs.a", "old")
			}
		}
		if died < 4 {
			t.Errorf("%s: it died %d times: that shows little", name, died)
		}
	}
}

// TestKilledImportsLoseNothing.
func TestKilledImportsLoseNothing(t *testing.T) {
	g := newGroup(t, 64)
	sound := g.open(t, host.Exec{}).(*lvmEngine)
	g.legacy(t, "old", 4)
	what := g.about(t, "old", itself)
	begin := time.Now()
	ok(t, sound.ImportSlab(t.Context(), "old", block("warm", 4*mib)))
	limit := float64(time.Since(begin)) / 3 // follows the machine's load, so that half of the calls are killed
	ok(t, sound.DeleteSlab(t.Context(), "warm"))
	shaky := g.open(t, host.Exec{}).(*lvmEngine)
	shaky.group = newEngineGroupRun(g, killer{func() time.Duration { return time.Duration(rand.Float64() * limit) }})
	killed, done := 0, 0
	count := func(err error) {
		if err == nil {
			done++
			limit *= 0.9
		} else {
			killed++
			limit *= 1.2
		}
	}
	for i := range 20 {
		id := fmt.Sprintf("n_%d", i)
		count(shaky.ImportSlab(t.Context(), "old", block(id, 4*mib)))
		if i%2 == 0 {
			count(shaky.DeleteSlab(t.Context(), id))
		}
		ok(t, sound.DeleteSlab(t.Context(), id))
		if g.about(t, "old", itself) != what {
			t.Fatalf("after round %d: %q, want %q", i, g.about(t, "old", itself), what)
		}
	}
	if killed < 4 || done < 4 {
		t.Errorf("%d calls were killed and %d were not: that shows nothing", killed, done)
	}
}

// importing is a dying engine that imports. Nobody can look into what it imports, for that
// needs a device.
type importing struct{ *dying }

func (i importing) Importable(ctx context.Context, source string) (engine.Importable, error) {
	v, _, err := i.Engine.(*lvmEngine).source(ctx, source)
	return engine.Importable{Size: v.Size, Allocated: v.Size, Holds: host.Ext4}, err
}

func (i importing) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	return i.change(func() error { return i.Engine.(*lvmEngine).ImportSlab(ctx, source, spec) })
}

func (i importing) KeepSlab(ctx context.Context, source, id string) error {
	return i.change(func() error { return i.Engine.(*lvmEngine).KeepSlab(ctx, source, id) })
}

// TestAnImportMayDieAnywhereBeneathAManager: then the volume is under its own name, or is the
// image, and asking again makes it that. With QUARRY_CRASH=long every change is tried, otherwise every second.
func TestAnImportMayDieAnywhereBeneathAManager(t *testing.T) {
	w := &world{t: t, group: newGroup(t, 64), now: time.UnixMilli(1_700_000_000_000), as: func(d *dying) engine.Engine { return importing{d} }}
	ok(t, w.start(0, false))
	opening := w.engine.calls
	request := image.ImportRequest{Name: "first", Domain: "a", Source: "old", Described: image.Described{Namespace: "shop", Claim: "data"}}
	w.group.legacy(t, "old", 4)
	img, err := w.Import(t.Context(), request)
	ok(t, err)
	points := w.engine.calls - opening
	ok(t, w.DeleteVolume(t.Context(), img.Handle))
	ok(t, w.collect())
	ok(t, w.Close())
	if points != 5 || w.group.about(t, "old", itself) != "" {
		t.Fatalf("%d changes, want intent, description, slab, seal and final; or the volume is left", points)
	}
	step := 2
	if os.Getenv("QUARRY_CRASH") == "long" {
		step = 1
	}
	for at := opening + 1; at <= opening+points; at += step {
		for _, after := range []bool{false, true} {
			where := fmt.Sprintf("died at change %d of %d, after it: %t", at-opening, points, after)
			w.group.legacy(t, "old", 4)
			what := w.group.about(t, "old", itself)
			request.Name = fmt.Sprintf("v%d-%t", at, after)
			err := w.start(at, after)
			if err == nil {
				_, err = w.Import(t.Context(), request)
			}
			if err == nil {
				t.Errorf("%s, and nobody noticed", where)
			}
			_ = w.Close()
			ok(t, w.start(0, false))
			if after { // the collector comes first, and all of its time
				ok(t, w.collect())
			}
			if own := w.group.about(t, "old", itself); own != what && len(w.All(t.Context())) != 1 {
				t.Fatalf("%s: the volume is %q, want %q, and images are %v", where, own, what, w.All(t.Context()))
			}
			img, err := w.Import(t.Context(), request)
			if err != nil || img.State != image.Optimized || w.group.about(t, volume(slabs, img.Slab), itself) != what || w.group.about(t, "old", itself) != "" {
				t.Fatalf("%s, then asked again: %+v, %v", where, img, err)
			}
			ok(t, w.DeleteVolume(t.Context(), img.Handle))
			ok(t, w.collect())
			list, err := w.engine.ListSlabs(t.Context())
			if ok(t, err); len(list) != 0 {
				t.Errorf("%s: slabs are left: %v", where, list)
			}
			ok(t, w.Close())
		}
	}
}
