package lvm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

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
	for i := range rounds {
		e, name := es[rnd.IntN(len(es))], fmt.Sprintf("n_%d", rnd.IntN(6))
		switch rnd.IntN(7) {
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
