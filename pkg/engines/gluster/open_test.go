package gluster_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/gluster"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	server "github.com/quarry-csi/quarry/test/gluster"
)

// open opens with parameters and mounts of its own.
func open(t testing.TB, params map[string]string) (engine.Engine, error) {
	t.Helper()
	return gluster.Open(t.Context(), params, host.Exec{}, host.NewLocal(host.Exec{}), mountsFolder(t))
}

// with changes some of the parameters.
func with(params map[string]string, change ...string) map[string]string {
	p := maps.Clone(params)
	for i := 0; i < len(change); i += 2 {
		p[change[i]] = change[i+1]
		if change[i+1] == "" {
			delete(p, change[i])
		}
	}
	return p
}

// TestParametersThatCannotBe are refused by name before anybody is asked.
func TestParametersThatCannotBe(t *testing.T) {
	good := map[string]string{"servers": "g1,g2", "volume": "vol"}
	for name, c := range map[string]struct {
		change []string
		tells  string
	}{
		"an unknown one":        {[]string{"server", "g1"}, `parameter "server" is unknown: engine gluster knows folder, options, servers, volume`},
		"no servers":            {[]string{"servers", ""}, `parameter "servers" is ""`},
		"a server twice a path": {[]string{"servers", "g1:/vol"}, `"g1:/vol" is none`},
		"an option as a server": {[]string{"servers", "g1,--debug"}, `"--debug" is none`},
		"an empty server":       {[]string{"servers", "g1,,g2"}, `"" is none`},
		"no volume":             {[]string{"volume", ""}, `parameter "volume" is ""`},
		"a path as a volume":    {[]string{"volume", "vol/k8s"}, `parameter "volume" is "vol/k8s"`},
		"an option as a volume": {[]string{"volume", "-vol"}, `parameter "volume" is "-vol"`},
		"a folder outside":      {[]string{"folder", "../k8s"}, `parameter "folder" is "../k8s"`},
		"an unknown option":     {[]string{"options", "acl,magic=secret"}, `mount option "magic" is unknown or not allowed: allowed are acl`},
		"an option that loses data": {[]string{"options", "kernel-writeback-cache=yes"},
			`mount option "kernel-writeback-cache" is refused: the kernel would keep what was written`},
		"an option that turns off copies": {[]string{"options", "xlator-option=*replicate*.x=off"}, `"xlator-option" is refused`},
		"a cache of the domain's":         {[]string{"options", "attribute-timeout=60"}, "has to show at once what other nodes do"},
		"a value that cannot be":          {[]string{"options", "lru-limit=many"}, `"lru-limit": its value has to match`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := open(t, with(good, c.change...))
			if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.tells) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v (%v), want invalid and %q", err, fault.KindOf(err), c.tells)
			}
		})
	}
}

// TestWhatIsNotThere: each thing that can be missing is named, soon, and nothing stays mounted.
func TestWhatIsNotThere(t *testing.T) {
	s := server.Start(t)
	v := s.Volume(t, server.VolumeSpec{Name: "vol"})
	good := params(v, "k8s")
	fails := func(t *testing.T, params map[string]string, kind fault.Kind, tells ...string) {
		t.Helper()
		began := time.Now()
		mounts := mountsFolder(t)
		_, err := gluster.Open(t.Context(), params, host.Exec{}, host.NewLocal(host.Exec{}), mounts)
		if !errors.Is(err, kind) {
			t.Fatalf("%v (%v), want kind %v", err, fault.KindOf(err), kind)
		}
		for _, word := range tells {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%v: %q is missing", err, word)
			}
		}
		if took := time.Since(began); took > 40*time.Second {
			t.Errorf("it took %s", took)
		}
		if left, err := os.ReadDir(mounts); err != nil || len(left) > 0 {
			t.Errorf("left: %v (%v)", left, err)
		}
	}
	t.Run("server", func(t *testing.T) {
		fails(t, with(good, "servers", s.Nowhere), fault.Unavailable, `volume "vol"`, "24007", s.Nowhere)
	})
	t.Run("name", func(t *testing.T) {
		fails(t, with(good, "servers", "no.such.host.invalid"), fault.Unavailable, `"no.such.host.invalid"`, "cannot be resolved")
	})
	t.Run("volume", func(t *testing.T) {
		fails(t, with(good, "volume", "nosuch"), fault.Invalid, `no volume "nosuch"`, "gluster volume list")
	})
	t.Run("folder", func(t *testing.T) { // is made, with those above it
		e, err := open(t, with(good, "folder", "teams/a/k8s"))
		ok(t, err)
		ok(t, e.Close())
		if _, err := os.Stat(filepath.Join(mount(t, v), "teams/a/k8s/slabs")); err != nil {
			t.Error(err)
		}
	})
	t.Run("folder that is a file", func(t *testing.T) {
		ok(t, os.WriteFile(filepath.Join(mount(t, v), "file"), nil, 0o644))
		fails(t, with(good, "folder", "file"), fault.Invalid, `"file" is not a folder`)
	})
	t.Run("distributed volume", func(t *testing.T) {
		spread := s.Volume(t, server.VolumeSpec{Name: "spread", Bricks: 2, Replica: 1, Size: 400 << 20})
		fails(t, params(spread, ""), fault.Invalid, `volume "spread" is distributed over 2 groups`)
	})
	t.Run("right", func(t *testing.T) {
		s.CLI(t, "volume", "set", "vol", "auth.reject", "*")
		fails(t, good, fault.Permission, "auth.allow", "auth.reject")
		s.CLI(t, "volume", "reset", "vol", "auth.reject")
	})
	t.Run("write access", func(t *testing.T) {
		s.CLI(t, "volume", "set", "vol", "features.read-only", "on")
		fails(t, with(good, "folder", "teams/a/k8s"), fault.Permission)
		s.CLI(t, "volume", "reset", "vol", "features.read-only")
	})
	t.Run("bricks", func(t *testing.T) {
		v.Kill(t, 0)
		v.Kill(t, 1)
		fails(t, good, fault.Unavailable, "no brick of it can be reached", "gluster volume status vol")
		v.Restart(t)
		e, err := open(t, good) // and nothing is in the way when they are back
		ok(t, err)
		ok(t, e.Close())
	})
	t.Run("one of several servers", func(t *testing.T) {
		e, err := open(t, with(good, "servers", s.Nowhere+", no.such.host.invalid,"+s.Address))
		ok(t, err)
		ok(t, e.Close())
	})
}

// TestNotesTellWhatAnOperatorShouldKnow of a volume.
func TestNotesTellWhatAnOperatorShouldKnow(t *testing.T) {
	s := server.Start(t)
	notes := func(t *testing.T, spec server.VolumeSpec) string {
		spec.Name, spec.Size = strings.ReplaceAll(strings.ToLower(t.Name()[len("TestNotesTellWhatAnOperatorShouldKnow/"):]), "_", "-"), 400<<20
		e, err := open(t, params(s.Volume(t, spec), ""))
		ok(t, err)
		defer e.Close()
		d, err := e.Describe(t.Context())
		ok(t, err)
		return strings.Join(d.Notes, "\n")
	}
	check := func(t *testing.T, notes, layout string, splits bool) {
		if !strings.Contains(notes, layout) || strings.Contains(notes, "split brain is possible") != splits {
			t.Errorf("notes %q: want %q in them, and a warning of split brain: %v", notes, layout, splits)
		}
	}
	t.Run("two copies", func(t *testing.T) {
		check(t, notes(t, server.VolumeSpec{}), "bricks: 2 copies on "+s.Address+":", true)
	})
	t.Run("two copies with quorum", func(t *testing.T) {
		check(t, notes(t, server.VolumeSpec{Options: map[string]string{"cluster.quorum-type": "auto"}}), "bricks: 2 copies on", false)
	})
	t.Run("arbiter", func(t *testing.T) {
		check(t, notes(t, server.VolumeSpec{Bricks: 3, Replica: 3, Arbiter: true}), "bricks: 2 copies and an arbiter on", false)
	})
	t.Run("three copies", func(t *testing.T) {
		check(t, notes(t, server.VolumeSpec{Bricks: 3, Replica: 3}), "bricks: 3 copies on", false)
	})
	t.Run("dispersed", func(t *testing.T) {
		check(t, notes(t, server.VolumeSpec{Bricks: 3, Disperse: 1}), "bricks: dispersed, any 1 of which may be away, on", false)
	})
	t.Run("one copy", func(t *testing.T) {
		check(t, notes(t, server.VolumeSpec{Bricks: 1, Replica: 1}), "bricks: one copy on "+s.Address+":", false)
	})
}
