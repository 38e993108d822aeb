package nfs_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/test/lab"
)

// TestAStorageThatCannotBeIsRefused: with the reason, within seconds, and nothing is changed on the server.
func TestAStorageThatCannotBeIsRefused(t *testing.T) {
	server := lab.StartNFS(t)
	x := server.Export(t, "ext4")
	if err := os.WriteFile(filepath.Join(x.Dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused := func(t *testing.T, p protocol, params map[string]string, says string, kinds ...fault.Kind) {
		t.Helper()
		begin := time.Now()
		e, err := p.tryOpen(t, params)
		if err == nil {
			e.Close()
			t.Fatalf("%s was opened; %q was expected", p.name, says)
		}
		if took := time.Since(begin); took > 20*time.Second {
			t.Errorf("it took %s", took)
		}
		t.Logf("%v", err)
		for _, k := range kinds {
			if fault.KindOf(err) == k && strings.Contains(err.Error(), says) {
				return
			}
		}
		t.Errorf("error %v of kind %q; one of %v that says %q was expected", err, fault.KindOf(err), kinds, says)
	}
	both(t, func(t *testing.T, p protocol) {
		// The one export has other options in turn.
		again := func(options ...string) {
			t.Helper()
			server.Options(t, x, options...)
		}
		for _, c := range []struct {
			name   string
			params map[string]string
			export []string
			says   string
			kinds  []fault.Kind
		}{
			{"no such host", p.params(x, "d", "server", "no-such-host.invalid"), nil, "no-such-host.invalid", []fault.Kind{fault.Unavailable}},
			{"nobody listens", p.params(x, "d", "options", "port=2"), nil, "refuses the connection", []fault.Kind{fault.Unavailable}},
			{"another service", p.params(x, "d", "options", "port=111"), nil, "no NFS service at that port", []fault.Kind{fault.Unsupported}},
			{"no such export", p.params(x, "d", "export", "/no/such/export"), nil, "127.0.0.1:/no/such/export", []fault.Kind{fault.NotFound, fault.Permission}},
			{"a file", p.params(x, "file"), nil, "not a directory", []fault.Kind{fault.Invalid}},
			{"read-only export", p.params(x, "d"), []string{"ro"}, "read-only", []fault.Kind{fault.Permission, fault.Invalid}},
			{"squashed to nobody", p.params(x, "d"), []string{"root_squash"}, "no_root_squash", []fault.Kind{fault.Permission, fault.Invalid}},
			{"all squashed", p.params(x, "d"), []string{"all_squash"}, "no_root_squash", []fault.Kind{fault.Permission, fault.Invalid}},
		} {
			t.Run(c.name, func(t *testing.T) {
				if c.export != nil {
					again(c.export...)
					defer again()
				}
				refused(t, p, c.params, c.says, c.kinds...)
			})
		}
		t.Run("squashed, and everybody may write", func(t *testing.T) {
			again("root_squash")
			defer again()
			if err := os.Chmod(x.Dir, 0o777); err != nil {
				t.Fatal(err)
			}
			defer os.Chmod(x.Dir, 0o755)
			refused(t, p, p.params(x, "squashed-"+p.name), "no_root_squash", fault.Permission, fault.Invalid)
			if err := os.RemoveAll(filepath.Join(x.Dir, "squashed-"+p.name)); err != nil {
				t.Error(err)
			}
		})
		t.Run("exported to somebody else", func(t *testing.T) {
			server.Withdraw(t, x)
			defer again()
			refused(t, p, p.params(x, "d"), "exported", fault.Permission, fault.NotFound)
		})
		t.Run("the server does not answer", func(t *testing.T) {
			mend := server.Cut(t)
			defer mend()
			refused(t, p, p.params(x, "d"), "no answer within 5s", fault.Unavailable)
		})
		t.Run("the server is stopped", func(t *testing.T) {
			server.Stop(t)
			defer server.Start(t)
			refused(t, p, p.params(x, "d"), "refuses the connection", fault.Unavailable)
		})
	})
	t.Run("the server has no NFS 3", func(t *testing.T) {
		server.Stop(t)
		server.Versions(t, "3")
		defer func() { server.Stop(t); server.Start(t) }()
		refused(t, v3, v3.params(x, "d"), "has no NFS version 3: it has version 4 only", fault.Unsupported)
	})
	t.Run("the server has no NFS 4.2", func(t *testing.T) {
		server.Stop(t)
		server.Versions(t, "4.2")
		defer func() { server.Stop(t); server.Start(t) }()
		refused(t, v4, v4.params(x, "d", "version", "4.2"), "NFS 4.2: ", fault.Unsupported)
		e, err := v4.tryOpen(t, v4.params(x, "older"))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		if d, err := e.Describe(t.Context()); err != nil || !contains(d.Notes, "version of NFS: 4.1") {
			t.Errorf("notes %q, %v", d.Notes, err)
		}
		if err := os.RemoveAll(filepath.Join(x.Dir, "older")); err != nil {
			t.Error(err)
		}
	})
	entries, err := os.ReadDir(x.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if name := e.Name(); name != "file" && name != "lost+found" {
			t.Errorf("%s was made on the server", name)
		}
	}
}

// TestClassOptions: a tree's mount has what its class says, a lock on it holds on other nodes, and what would
// lose data is refused when it is attached.
func TestClassOptions(t *testing.T) {
	server := lab.StartNFS(t)
	x := server.Export(t, "xfs")
	both(t, func(t *testing.T, p protocol) {
		params := p.params(x, "domain-"+p.name)
		nodes := []engine.Engine{p.openAs(t, 0, params), p.openAs(t, 1, params)}
		for _, n := range nodes {
			defer func() { ok(t, n.Close()) }()
		}
		d, err := nodes[0].Describe(t.Context())
		ok(t, err)
		if !d.MountOptions {
			t.Error("the domain does not say that it takes mount options")
		}
		ok(t, nodes[0].CreateSlab(t.Context(), engine.SlabSpec{ID: "tree", Kind: engine.Tree, Size: 1 << 20}))
		for _, o := range []string{"soft", "nolock", "nconnect=2", "vers=4.1", "unheard-of"} {
			_, err := nodes[0].AttachSlab(t.Context(), "tree", engine.AttachOptions{MountOptions: []string{o}})
			if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), strings.Split(o, "=")[0]) {
				t.Errorf("option %s: %v", o, err)
			}
		}
		var files []*os.File
		for i, n := range nodes {
			a, err := n.AttachSlab(t.Context(), "tree", engine.AttachOptions{MountOptions: []string{"actimeo=7", "noatime"}})
			ok(t, err)
			defer func() { ok(t, n.DetachSlab(t.Context(), "tree")) }()
			m := mountAt(t, filepath.Dir(a.Path)) // of the slab, in which its data is
			if m.Type != "nfs" && m.Type != "nfs4" {
				t.Errorf("%s is on %+v, not a mount of its own", a.Path, m)
			}
			for _, want := range []string{"acregmin=7", "hard"} {
				if !contains(m.Super, want) {
					t.Errorf("node %d: the mount has options %q, not %s", i, m.Super, want)
				}
			}
			if contains(m.Super, "lookupcache=none") || contains(m.Super, "local_lock=all") {
				t.Errorf("node %d: the mount has options %q, those of the domain's own mount", i, m.Super)
			}
			f, err := os.OpenFile(filepath.Join(a.Path, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
			ok(t, err)
			defer f.Close()
			files = append(files, f)
		}
		ok(t, lock(files[0]))
		if err := lock(files[1]); err == nil {
			t.Error("two nodes have the same lock")
		} else {
			t.Logf("the second node's lock: %v", err)
		}
	})
}
