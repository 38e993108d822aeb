package lvm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// counting counts the programs that were run, by their names.
type counting struct {
	mu   sync.Mutex
	runs map[string]int
}

func (c *counting) Run(ctx context.Context, cmd host.Command) (host.Result, error) {
	c.mu.Lock()
	if cmd.Name == "lvm" {
		c.runs[cmd.Args[0]]++
	}
	c.mu.Unlock()
	return host.Exec{}.Run(ctx, cmd)
}

func (c *counting) since(f func()) map[string]int {
	c.mu.Lock()
	c.runs = map[string]int{}
	c.mu.Unlock()
	f()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.runs
}

func TestCommitsAreReadFromTheDisks(t *testing.T) {
	second := loop(t, 64*mib)
	g := newGroup(t, 64, "--metadatasize", "4k") // 1 MiB: the text goes round and round in it
	for _, disks := range [][]string{{g.disk}, {g.disk, second}} {
		g.params["devices"] = strings.Join(disks, ",")
		if len(disks) > 1 {
			g.lvm(t, "pvcreate", "--devices", second, second)
			g.lvm(t, "vgextend", "--devices", g.params["devices"], g.name, second)
		}
		group := lvm.New(host.Exec{}, g.name, lvm.Options{Devices: disks})
		info, err := group.Info(t.Context())
		ok(t, err)
		before := lvm.Commit{}
		for i := range 12 {
			tags := []string{"--devices", g.params["devices"], "-y", "-an", "--type", "error", "-l1", "-n", fmt.Sprintf("junk%d-%d", len(disks), i)}
			for j := range 60 {
				tags = append(tags, "--addtag", fmt.Sprintf("junk%d%s", j, strings.Repeat("x", 1000)))
			}
			g.lvm(t, "lvcreate", append(tags, g.name)...)
			c, err := group.Commit(t.Context(), info.UUID, disks)
			ok(t, err)
			if said := g.lvm(t, "vgs", "--devices", g.params["devices"], "--noheadings", "-o", "vg_seqno", g.name); said != fmt.Sprint(c.Seqno) || c == before {
				t.Fatalf("read %+v after %+v, LVM says %s", c, before, said)
			}
			before = c
			if i%3 == 2 {
				for j := range 3 {
					g.lvm(t, "lvremove", "--devices", g.params["devices"], "-y", fmt.Sprintf("%s/junk%d-%d", g.name, len(disks), i-j))
				}
			}
		}
	}
	both := []string{g.disk, second}
	group := lvm.New(host.Exec{}, g.name, lvm.Options{Devices: both})
	info, err := group.Info(t.Context())
	ok(t, err)
	empty := loop(t, 8*mib)
	for what, read := range map[string]func() (lvm.Commit, error){
		"another group's UUID": func() (lvm.Commit, error) { return group.Commit(t.Context(), strings.Repeat("x", 38), both) },
		"another name": func() (lvm.Commit, error) {
			return lvm.New(host.Exec{}, "other", lvm.Options{}).Commit(t.Context(), info.UUID, both)
		},
		"two metadata areas": func() (lvm.Commit, error) {
			two := newGroup(t, 64, "--pvmetadatacopies", "2")
			group := newEngineGroup(two)
			info, err := group.Info(t.Context())
			ok(t, err)
			return group.Commit(t.Context(), info.UUID, []string{two.disk})
		},
		"no disks": func() (lvm.Commit, error) { return group.Commit(t.Context(), info.UUID, nil) },
		"an empty disk": func() (lvm.Commit, error) {
			return group.Commit(t.Context(), info.UUID, append([]string{empty}, both...))
		},
		"a disk that is gone": func() (lvm.Commit, error) {
			return group.Commit(t.Context(), info.UUID, append(both, "/dev/quarry-nothing"))
		},
	} {
		if c, err := read(); !errors.Is(err, fault.Unavailable) {
			t.Errorf("%s: %+v, %v", what, c, err)
		}
	}
}

// area is the beginning of a disk, with its label and metadata.
func area(t *testing.T, disk string) []byte {
	t.Helper()
	f := open(t, disk)
	b := make([]byte, 16*mib)
	_, err := f.ReadAt(b, 0)
	ok(t, errors.Join(err, f.Close()))
	return b
}

// put writes what area read.
func put(t *testing.T, disk string, b []byte) {
	t.Helper()
	f := open(t, disk)
	_, err := f.WriteAt(b, 0)
	ok(t, errors.Join(err, f.Sync(), f.Close()))
}

// TestDisksOfOneNumberAndTwoContents: what one of them missed is not taken for what
// the other has.
func TestDisksOfOneNumberAndTwoContents(t *testing.T) {
	g, second := newGroup(t, 64, "--metadatasize", "1m"), loop(t, 64*mib)
	both := []string{g.disk, second}
	program := func(name string, args ...string) {
		t.Helper()
		g.lvm(t, name, append([]string{"--devices", g.disk + "," + second}, args...)...)
	}
	program("vgextend", g.name, second)
	record := func(name string) {
		t.Helper()
		program("lvcreate", "-y", "-an", "--type", "error", "-l1", "-n", name, g.name)
	}
	group := lvm.New(host.Exec{}, g.name, lvm.Options{Devices: both})
	info, err := group.Info(t.Context())
	ok(t, err)
	before := [][]byte{area(t, g.disk), area(t, second)}
	record("one")
	one := area(t, second)
	c, err := group.Commit(t.Context(), info.UUID, both)
	ok(t, err)
	put(t, g.disk, before[0])
	put(t, second, before[1])
	record("another.one")
	other, err := group.Commit(t.Context(), info.UUID, both)
	ok(t, err)
	put(t, second, one)
	if have, err := group.Commit(t.Context(), info.UUID, both); c.Seqno != other.Seqno || !errors.Is(err, fault.Unavailable) {
		t.Errorf("%+v on one disk, %+v on the other: read %+v, %v", other, c, have, err)
	}
	put(t, second, before[1]) // so that the group can be ended
	put(t, g.disk, before[0])
}

// editing changes what programs report.
type editing struct {
	counting
	edit func(cmd host.Command, res *host.Result)
}

func (r *editing) Run(ctx context.Context, cmd host.Command) (host.Result, error) {
	res, err := r.counting.Run(ctx, cmd)
	if cmd.Name == "lvm" {
		r.edit(cmd, &res)
	}
	return res, err
}

// TestAReportOfAnotherCommitIsNotKept, although the disks say the same before and
// after it.
func TestAReportOfAnotherCommitIsNotKept(t *testing.T) {
	number := regexp.MustCompile(`"vg_seqno":"\d+"`)
	odd := []string{"lvs", "vgs"} // the programs whose reports are of another commit
	run := &editing{counting: counting{runs: map[string]int{}}, edit: func(cmd host.Command, res *host.Result) {
		if slices.Contains(odd, cmd.Args[0]) {
			res.Stdout = number.ReplaceAll(res.Stdout, []byte(`"vg_seqno":"1"`))
		}
	}}
	e := newGroup(t, 64).open(t, run)
	look := func() {
		_, err := e.ListTags(t.Context(), "")
		ok(t, err)
		_, err = engine.Discover(e).Meter.DomainUsage(t.Context())
		ok(t, err)
	}
	if runs := run.since(func() { look(); look() }); runs["lvs"] != 2 || runs["vgs"] != 2 {
		t.Errorf("reports of another commit were kept: %v", runs)
	}
	odd = []string{"vgs"}
	if runs := run.since(func() { look(); look() }); runs["lvs"] != 1 || runs["vgs"] != 2 {
		t.Errorf("reports of the group at another commit were kept: %v", runs)
	}
	odd = nil
	if runs := run.since(func() { look(); look() }); runs["lvs"] != 0 || runs["vgs"] != 1 {
		t.Errorf("reports of this commit were not kept: %v", runs)
	}
}

// blocking lets programs wait.
type blocking struct{ began, end chan struct{} }

func (b *blocking) Run(ctx context.Context, cmd host.Command) (host.Result, error) {
	if cmd.Name == "lvm" && cmd.Args[0] == "lvcreate" {
		b.began <- struct{}{}
		<-b.end
	}
	return host.Exec{}.Run(ctx, cmd)
}

func TestWhoWaitsForAnothersChangeCanLeave(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{})
	b := &blocking{make(chan struct{}, 1), make(chan struct{})}
	e.(*lvmEngine).group = newEngineGroupRun(g, b)
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- e.CreateTag(t.Context(), engine.Tag{Name: "a"}) }()
	<-b.began
	ctx, cancel := context.WithCancel(t.Context())
	go func() { second <- e.CreateTag(ctx, engine.Tag{Name: "b"}) }()
	cancel()
	select {
	case err := <-second:
		is(t, "CreateTag", err, fault.Canceled, g.name)
	case <-time.After(time.Minute):
		t.Error("it still waits for the other")
	}
	close(b.end)
	ok(t, <-first)
}

// TestListingsStartNoPrograms while nobody else changes the group.
func TestListingsStartNoPrograms(t *testing.T) {
	c := &counting{runs: map[string]int{}}
	e := newGroup(t, 64).open(t, c)
	_, err := e.ListTags(t.Context(), "")
	ok(t, err)
	runs := c.since(func() {
		ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "i.a.1", Slab: "a", Record: []byte("r")}))
		ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
		tags, err := e.ListTags(t.Context(), "i.")
		if ok(t, err); len(tags) != 1 || tags[0].Name != "i.a.1" || string(tags[0].Record) != "r" {
			t.Errorf("tags %v", tags)
		}
		slabs, err := e.ListSlabs(t.Context())
		if ok(t, err); len(slabs) != 1 || slabs[0] != (engine.Slab{ID: "a", Kind: engine.Block, Size: mib}) {
			t.Errorf("slabs %v", slabs)
		}
		ok(t, e.DeleteSlab(t.Context(), "a"))
		ok(t, e.DeleteTag(t.Context(), "i.a.1"))
		tags, err = e.ListTags(t.Context(), "")
		if ok(t, err); len(tags) != 0 {
			t.Errorf("tags %v", tags)
		}
	})
	if want := map[string]int{"lvcreate": 2, "lvremove": 2}; !reflect.DeepEqual(runs, want) {
		t.Errorf("programs %v, want %v", runs, want)
	}
}

// TestARestoredBackupIsNoticedWithoutListing: the number of its commit may be one
// that is known, and stand for another content.
func TestARestoredBackupIsNoticedWithoutListing(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{})
	names := func(e engine.Engine) (out []string) {
		tags, err := e.ListTags(t.Context(), "")
		ok(t, err)
		for _, tag := range tags {
			out = append(out, tag.Name)
		}
		slices.Sort(out)
		return out
	}
	seqno := func() string { return g.lvm(t, "vgs", "--noheadings", "-o", "vg_seqno", g.name) }
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "before"}))
	_ = names(e)
	file := filepath.Join(t.TempDir(), "backup")
	g.lvm(t, "vgcfgbackup", "-f", file, g.name)
	ok(t, g.open(t, host.Exec{}).CreateTag(t.Context(), engine.Tag{Name: "undone"}))
	_ = names(e)
	undone := seqno()
	g.lvm(t, "vgcfgrestore", "-y", "-f", file, g.name)
	if restored := seqno(); restored != undone {
		t.Fatalf("the restored backup has number %s, what it undid %s: that shows nothing", restored, undone)
	}
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "after"}))
	if have, want := names(e), names(g.open(t, host.Exec{})); !slices.Equal(have, want) || slices.Contains(have, "undone") {
		t.Errorf("known are %v, there are %v", have, want)
	}
}

// TestAChangeThatIsNotSeenEndsWhatIsKnown: a disk's name has come to mean a copy of
// it, which stays as it was.
func TestAChangeThatIsNotSeenEndsWhatIsKnown(t *testing.T) {
	g := newGroup(t, 64)
	e := g.open(t, host.Exec{})
	_, err := e.ListTags(t.Context(), "")
	ok(t, err)
	stale := loop(t, 64*mib)
	put(t, stale, area(t, g.disk))
	e.(*lvmEngine).disks = []string{stale}
	ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "a"}))
	for range 2 { // what the first listing finds is not of the commit that the copy shows
		if tags, err := e.ListTags(t.Context(), ""); err != nil || len(tags) != 1 {
			t.Errorf("tags %v, %v", tags, err)
		}
	}
}

// TestWhatIsKnownIsWhatIsThere: several processes and an administrator change a
// group; whoever looks sees what a new process sees.
func TestWhatIsKnownIsWhatIsThere(t *testing.T) {
	g := newGroup(t, 256)
	var es []engine.Engine
	for range 3 {
		es = append(es, g.open(t, host.Exec{}))
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	check := func(e engine.Engine) {
		t.Helper()
		fresh := g.open(t, host.Exec{})
		state := func(e engine.Engine) (out []string) {
			tags, err := e.ListTags(t.Context(), "")
			ok(t, err)
			slabs, err := e.ListSlabs(t.Context())
			ok(t, err)
			u, err := engine.Discover(e).Meter.DomainUsage(t.Context())
			ok(t, err)
			for _, tag := range tags {
				out = append(out, fmt.Sprintf("%+v", tag))
			}
			for _, s := range slabs {
				out = append(out, fmt.Sprintf("%+v", s))
			}
			slices.Sort(out)
			return append(out, fmt.Sprint(u))
		}
		if have, want := state(e), state(fresh); !slices.Equal(have, want) {
			t.Fatalf("known is\n%s\nthere is\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
		}
	}
	imported := map[string]string{}
	for i := range rounds {
		e, name := es[rnd.IntN(len(es))], fmt.Sprintf("n_%d", rnd.IntN(6))
		switch rnd.IntN(10) {
		case 0, 1:
			if err := e.CreateTag(t.Context(), engine.Tag{Name: name, Record: fmt.Append(nil, i)}); fault.KindOf(err) != fault.Exists {
				ok(t, err)
			}
		case 2:
			ok(t, e.DeleteTag(t.Context(), name))
		case 3:
			if err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: name, Kind: engine.Block, Size: mib}); fault.KindOf(err) != fault.Exists {
				ok(t, err)
			}
		case 4:
			ok(t, e.DeleteSlab(t.Context(), name))
		case 5:
			if err := e.ResizeSlab(t.Context(), name, 2*mib); fault.KindOf(err) != fault.NotFound {
				ok(t, err)
			}
		case 6:
			g.lvm(t, "lvcreate", "-y", "-an", "--type", "error", "-l1", "-n", fmt.Sprintf("other%d", i), g.name)
		case 7:
			source := fmt.Sprintf("own%d", i)
			g.lvm(t, "lvcreate", "-y", "-an", "-Zn", "-Wn", "-L", "1m", "-n", source, g.name)
			err := e.(engine.Importer).ImportSlab(t.Context(), source, engine.SlabSpec{ID: name, Kind: engine.Block, Size: mib})
			if fault.KindOf(err) != fault.Exists {
				ok(t, err)
			} else if err == nil {
				imported[name] = source
			}
		case 8, 9:
			if source := imported[name]; source != "" {
				if err := e.(engine.Importer).KeepSlab(t.Context(), source, name); fault.KindOf(err) != fault.NotFound {
					ok(t, err)
				}
			}
		}
		check(es[rnd.IntN(len(es))])
	}

	// A backup that is restored may bring back a number that was there already.
	file := filepath.Join(t.TempDir(), "backup")
	g.lvm(t, "vgcfgbackup", "-f", file, g.name)
	ok(t, es[0].CreateTag(t.Context(), engine.Tag{Name: "after.the.backup"}))
	check(es[0])
	for n := range 3 {
		g.lvm(t, "vgcfgrestore", "-y", "-f", file, g.name)
		check(es[0])
		ok(t, es[0].CreateTag(t.Context(), engine.Tag{Name: fmt.Sprintf("after.restore.%d", n)}))
		check(es[1])
	}
}
