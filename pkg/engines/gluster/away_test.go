package gluster_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	server "github.com/quarry-csi/quarry/test/gluster"
)

const mib = 1 << 20

func warning(t *testing.T, e engine.Engine) string {
	t.Helper()
	u, err := engine.Discover(e).Meter.DomainUsage(t.Context())
	ok(t, err)
	return u.Warning
}

func create(t *testing.T, e engine.Engine, name string) error {
	t.Helper()
	return e.CreateTag(t.Context(), engine.Tag{Name: name, Slab: "a", Record: []byte(name)})
}

func tags(t *testing.T, e engine.Engine) (names []string) {
	t.Helper()
	list, err := e.ListTags(t.Context(), "")
	ok(t, err)
	for _, tag := range list {
		names = append(names, tag.Name)
		if string(tag.Record) != tag.Name {
			t.Errorf("tag %q has the record %q", tag.Name, tag.Record)
		}
	}
	slices.Sort(names)
	return names
}

func equal[T comparable](t *testing.T, what string, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// eventually waits for what a server or a client does by itself.
func eventually(t *testing.T, limit time.Duration, what string, is func() error) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		err := is()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s still not %s: %v", limit, what, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// TestTwoClientsSeeOneAnothersWorkAtOnce: nothing that a client, its kernel or a brick remembers is older than the
// last verb of the other, not even for the second for which a Gluster client remembers things unless told otherwise.
func TestTwoClientsSeeOneAnothersWorkAtOnce(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	a, b := opener(v, "k8s")(t), opener(v, "k8s")(t)
	defer a.Close()
	defer b.Close()
	for i := range 20 {
		one, other := a, b
		if i%2 == 1 {
			one, other = b, a
		}
		id := fmt.Sprintf("slab-%d", i)
		equal(t, "tags before", tags(t, other), nil)
		ok(t, create(t, one, "t.x"))
		equal(t, "tags", tags(t, other), []string{"t.x"})
		if err := create(t, other, "t.x"); err != nil { // the same record
			t.Error(err)
		}
		ok(t, other.DeleteTag(t.Context(), "t.x"))
		equal(t, "tags after the deletion", tags(t, one), nil)

		ok(t, one.CreateSlab(t.Context(), engine.SlabSpec{ID: id, Kind: engine.Block, Size: mib}))
		if size := sizeOf(t, other, id); size != mib {
			t.Errorf("a new slab of %d bytes has %d for the other", mib, size)
		}
		ok(t, one.ResizeSlab(t.Context(), id, 2*mib))
		if size := sizeOf(t, other, id); size != 2*mib {
			t.Errorf("a slab that grew to %d bytes has %d for the other", 2*mib, size)
		}
		f, err := os.OpenFile(attach(t, one, id), os.O_WRONLY, 0)
		ok(t, err)
		_, err = f.WriteString(id)
		ok(t, errors.Join(err, f.Close()))
		if got, err := os.ReadFile(attach(t, other, id)); err != nil || !strings.HasPrefix(string(got), id) {
			t.Errorf("the other reads %.20q (%v) where %q was written", got, err, id)
		}
		ok(t, other.DeleteSlab(t.Context(), id))
		if _, err := one.AttachSlab(t.Context(), id, engine.AttachOptions{}); !errors.Is(err, fault.NotFound) {
			t.Errorf("a slab that the other has deleted is attached: %v", err)
		}
	}
}

func attach(t *testing.T, e engine.Engine, id string) string {
	t.Helper()
	a, err := e.AttachSlab(t.Context(), id, engine.AttachOptions{})
	ok(t, err)
	return a.Path
}

func sizeOf(t *testing.T, e engine.Engine, id string) int64 {
	t.Helper()
	info, err := os.Stat(attach(t, e, id))
	ok(t, err)
	return info.Size()
}

// TestABrickThatIsAway is no reason to stop, but one to tell; when it is back, what it missed is healed.
func TestABrickThatIsAway(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	e := opener(v, "k8s")(t)
	defer e.Close()
	ok(t, create(t, e, "t.before"))
	if w := warning(t, e); w != "" {
		t.Errorf("a volume in good health warns: %s", w)
	}
	v.Kill(t, 1)
	eventually(t, 10*time.Second, "warned", func() error {
		if w := warning(t, e); !strings.Contains(w, "brick "+v.Server.Address+":"+v.Brick(1)+" cannot be reached") {
			return errors.New(w)
		}
		return nil
	})
	ok(t, create(t, e, "t.meanwhile"))
	ok(t, e.DeleteTag(t.Context(), "t.before"))
	if w := warning(t, e); !strings.Contains(w, "wait to be healed") || strings.Contains(w, v.Brick(0)) {
		t.Errorf("warning %q: what waits to be healed is missing, or the brick that is there is in it", w)
	}
	v.Restart(t)
	v.Healed(t)
	eventually(t, 30*time.Second, "without a warning", func() error {
		if w := warning(t, e); w != "" {
			return errors.New(w)
		}
		return nil
	})
	v.Kill(t, 0) // what was made while the other was away is on it now
	equal(t, "tags on the healed brick", tags(t, e), []string{"t.meanwhile"})
}

// TestSplitBrainIsTold with the names of what has two versions.
func TestSplitBrainIsTold(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol", Options: map[string]string{"cluster.self-heal-daemon": "off"}})
	e := opener(v, "k8s")(t)
	defer e.Close()
	for _, id := range []string{"whole", "torn"} {
		ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: id, Kind: engine.Block, Size: mib}))
	}
	for i := range 2 { // each brick has a write that the other misses
		v.Kill(t, i)
		eventually(t, 30*time.Second, "written", func() error {
			f, err := os.OpenFile(attach(t, e, "torn"), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(f, "version %d", i)
			return errors.Join(err, f.Sync(), f.Close())
		})
		v.Restart(t)
		eventually(t, 30*time.Second, "connected", func() error {
			if w := warning(t, e); strings.Contains(w, "cannot be reached") {
				return errors.New(w)
			}
			return nil
		})
	}
	eventually(t, 30*time.Second, "told", func() error {
		if w := warning(t, e); !strings.Contains(w, "split brain: the copies of slabs/torn differ") || !strings.Contains(w, "gluster volume heal vol split-brain") {
			return errors.New(w)
		}
		return nil
	})
}

// TestAServerThatStandsStill costs each call no more than its limit, and nothing once it goes on.
func TestAServerThatStandsStill(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	e := opener(v, "k8s")(t)
	defer e.Close()
	ok(t, create(t, e, "t.before"))
	v.Server.Pause(t)
	resumed := false
	defer func() {
		if !resumed {
			v.Server.Resume(t)
		}
	}()
	bounded := func(what string, limit time.Duration, do func() error) {
		began := time.Now()
		err := do()
		if took := time.Since(began); !errors.Is(err, fault.Unavailable) || took > limit+5*time.Second {
			t.Errorf("%s: %v after %s, want unavailable within %s", what, err, took, limit)
		}
	}
	bounded("the first call", 30*time.Second, func() error { return create(t, e, "t.meanwhile") })
	bounded("the next one", 10*time.Second, func() error { return e.DeleteTag(t.Context(), "t.before") })
	bounded("the usage", 10*time.Second, func() error {
		_, err := engine.Discover(e).Meter.DomainUsage(t.Context())
		return err
	})
	began := time.Now()
	if _, err := e.Describe(t.Context()); err != nil || time.Since(began) > time.Second {
		t.Errorf("Describe: %v after %s", err, time.Since(began))
	}
	v.Server.Resume(t)
	resumed = true
	eventually(t, 60*time.Second, "going on", func() error { return create(t, e, "t.after") })
	eventually(t, 10*time.Second, "complete", func() error { // the first call's work may still happen, or not
		have := slices.DeleteFunc(tags(t, e), func(name string) bool { return name == "t.meanwhile" })
		if !slices.Equal(have, []string{"t.after", "t.before"}) {
			return fmt.Errorf("%v", have)
		}
		return nil
	})
}

// TestAServerThatIsGone and comes back: calls fail soon, the mount is the same afterwards, and so is what uses it.
func TestAServerThatIsGone(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	e := opener(v, "k8s")(t)
	defer e.Close()
	ok(t, create(t, e, "t.before"))
	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "a", Kind: engine.Block, Size: mib}))
	f, err := os.OpenFile(attach(t, e, "a"), os.O_RDWR, 0)
	ok(t, err)
	defer f.Close()
	var before, after unix.Stat_t
	ok(t, unix.Fstat(int(f.Fd()), &before))
	v.Server.StopManager(t)
	v.Kill(t, 0)
	v.Kill(t, 1)
	for range 3 {
		began := time.Now()
		err := create(t, e, "t.meanwhile")
		if took := time.Since(began); !errors.Is(err, fault.Unavailable) || took > 35*time.Second {
			t.Errorf("%v after %s", err, took)
		}
	}
	v.Server.StartManager(t)
	v.Restart(t)
	eventually(t, 60*time.Second, "back", func() error { return create(t, e, "t.after") })
	ok(t, unix.Stat(attach(t, e, "a"), &after))
	if before.Dev != after.Dev || before.Ino != after.Ino {
		t.Errorf("slab a was %d on device %x, and is %d on %x: its mount was replaced without need", before.Ino, before.Dev, after.Ino, after.Dev)
	}
	_, err = f.WriteAt([]byte("through the old descriptor"), 0)
	ok(t, errors.Join(err, f.Sync()))
}

// TestAVolumeThatGrowsIntoADistributedOne is not used any further, before two nodes can make the same tag.
func TestAVolumeThatGrowsIntoADistributedOne(t *testing.T) {
	v := server.Start(t).Volume(t, server.VolumeSpec{Name: "vol"})
	e := opener(v, "k8s")(t)
	defer e.Close()
	ok(t, create(t, e, "t.before"))
	v.Add(t, 2)
	eventually(t, 30*time.Second, "warned", func() error {
		if u, err := engine.Discover(e).Meter.DomainUsage(t.Context()); err == nil && !strings.Contains(u.Warning, "distributed over 2 groups") {
			return errors.New(u.Warning)
		}
		return nil
	})
	eventually(t, 30*time.Second, "refused", func() error {
		if err := create(t, e, "t.after"); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "distributed over 2 groups") {
			return fmt.Errorf("a tag was made: %v", err)
		}
		return nil
	})
	_, err := open(t, params(v, "k8s"))
	if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "a volume of one group is needed") {
		t.Errorf("%v (%v), want invalid", err, fault.KindOf(err))
	}
}
