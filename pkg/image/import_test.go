package image_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// legacy puts a file system into a domain's folder import/, and returns its path.
func (r *rig) legacy(domain, name, fstype string, size int64) string {
	r.t.Helper()
	path := filepath.Join(r.dirs[domain], "import", name)
	r.must(os.MkdirAll(filepath.Dir(path), 0o755))
	f, err := os.Create(path)
	r.must(err)
	r.must(f.Truncate(size))
	if fstype != "" {
		if out, err := exec.Command("mkfs."+fstype, "-q", "-F", path).CombinedOutput(); err != nil {
			r.t.Fatalf("%v: %s", err, out)
		}
	}
	_, err = f.WriteAt(content(9, 100_000), size-1*mib) // in free blocks: mkfs discards what was there
	r.must(err)
	r.must(f.Close())
	return path
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

func TestAFileBecomesAVolume(t *testing.T) {
	r := newRig(t, "a").start()
	path := r.legacy("a", "disk.img", "ext4", 64*mib)
	req := image.ImportRequest{Name: "legacy", Domain: "a", Source: "disk.img", Described: image.Described{Namespace: "shop", Claim: "data"}}
	dry := req
	dry.DryRun = true
	v, err := r.Import(r.ctx, dry)
	r.must(err)
	if v.Size != 64*mib || v.Filesystem != "ext4" || len(r.All(r.ctx)) > 0 || !exists(path) {
		t.Errorf("a dry run: %+v", v)
	}
	v, err = r.Import(r.ctx, req)
	r.must(err)
	if v.State != image.Optimized || v.Fresh || v.Filesystem != "ext4" || v.Size != 64*mib || v.How != "native: import of disk.img" || v.Described.Claim != "data" || exists(path) {
		t.Errorf("%+v, its old name is there: %t", v, exists(path))
	}
	again, err := r.Import(r.ctx, req)
	r.must(err)
	r.restart()
	more, err := r.Import(r.ctx, req)
	r.must(err)
	if again.Handle != v.Handle || more.Handle != v.Handle {
		t.Errorf("asked again: %s, %s, first %s", again.Handle, more.Handle, v.Handle)
	}
	// It is a volume like any other, and never formatted.
	at, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	st, err := r.Stage(r.ctx, v.Handle, "n1", at.Generation)
	r.must(err)
	if st.Fresh || st.Filesystem != "ext4" || !st.Cloned {
		t.Errorf("staged as %+v", st)
	}
	r.unstaged(v, "n1")
	r.must(r.Detach(r.ctx, v.Handle, "n1"))
	s := r.snapshot("s", v)
	r.must(r.DeleteVolume(r.ctx, v.Handle))
	r.must(r.DeleteSnapshot(r.ctx, s.Handle))
	r.collect()
	r.empty("a")
}

// A domain that cannot be opened is in the way of no other one's imports; one of the same name, on another
// node, may have the volume.
func TestAnImportIsNoMatterOfOtherDomains(t *testing.T) {
	r := newRig(t, "a").start()
	r.legacy("a", "disk.img", "ext4", 64*mib)
	req := image.ImportRequest{Name: "legacy", Domain: "a", Source: "disk.img"}
	away := fault.New(fault.NotFound, "no such volume group")
	r.Unopened(image.DomainConfig{Name: "pool", Node: "n1"}, away)
	r.Unopened(image.DomainConfig{Name: "a", Node: "n2"}, away)
	_, err := r.Import(r.ctx, req)
	r.is(err, fault.Unavailable)
	r.Gone(image.DomainConfig{Name: "a", Node: "n2"})
	_, err = r.Import(r.ctx, req)
	r.must(err)
}

func TestAnImportThatCannotBeLeavesTheFileAlone(t *testing.T) {
	r := newRig(t, "a").start()
	ext4 := r.legacy("a", "ext4.img", "ext4", 64*mib)
	raw := r.legacy("a", "raw.img", "", 64*mib)
	r.volume("taken", "a", 32*mib)
	for what, x := range map[string]struct {
		req  image.ImportRequest
		kind fault.Kind
		want string
	}{
		"another filesystem":   {image.ImportRequest{Source: "ext4.img", Filesystem: "xfs"}, fault.Invalid, "ext4.img holds ext4, not xfs"},
		"unknown filesystem":   {image.ImportRequest{Source: "ext4.img", Filesystem: "ntfs"}, fault.Invalid, `filesystem "ntfs" is unknown`},
		"no filesystem":        {image.ImportRequest{Source: "raw.img"}, fault.Invalid, "raw.img holds nothing, not a filesystem that a volume can carry"},
		"both":                 {image.ImportRequest{Source: "raw.img", Block: true, Filesystem: "ext4"}, fault.Invalid, "a raw block volume has no filesystem"},
		"not there":            {image.ImportRequest{Source: "none.img"}, fault.NotFound, "there is no "},
		"a name that is taken": {image.ImportRequest{Name: "taken", Source: "ext4.img"}, fault.Exists, `a volume "taken" exists that is not this import`},
		"no such domain":       {image.ImportRequest{Domain: "b", Source: "ext4.img"}, fault.Unavailable, "domain b is not configured"},
	} {
		if x.req.Name == "" {
			x.req.Name = "v"
		}
		if x.req.Domain == "" {
			x.req.Domain = "a"
		}
		_, err := r.Import(r.ctx, x.req)
		if err == nil || fault.KindOf(err) != x.kind || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v (%v)", what, err, fault.KindOf(err))
		}
	}
	if !exists(ext4) || !exists(raw) || len(r.All(r.ctx)) != 1 {
		t.Errorf("files are gone, or images are there: %v", r.All(r.ctx))
	}
	v, err := r.Import(r.ctx, image.ImportRequest{Name: "raw", Domain: "a", Source: "raw.img", Block: true})
	r.must(err)
	if v.Filesystem != "" || v.Fresh || exists(raw) {
		t.Errorf("%+v", v)
	}
	r.wrap = engine.Minimal
	r.restart()
	_, err = r.Import(r.ctx, image.ImportRequest{Name: "v", Domain: "a", Source: "ext4.img"})
	r.is(err, fault.Unsupported)
}

// dying is an engine that dies at the nth of the calls that an import makes.
type dying struct {
	engine.Engine
	engine.Importer
	left *int
}

func (d dying) die() error {
	if *d.left--; *d.left <= 0 {
		return fault.New(fault.Unavailable, "died")
	}
	return nil
}

func (d dying) CreateTag(ctx context.Context, t engine.Tag) error {
	if err := d.die(); err != nil {
		return err
	}
	if err := d.Engine.CreateTag(ctx, t); err != nil {
		return err
	}
	return d.die()
}

func (d dying) ImportSlab(ctx context.Context, source string, spec engine.SlabSpec) error {
	if err := d.die(); err != nil {
		return err
	}
	if err := d.Importer.ImportSlab(ctx, source, spec); err != nil {
		return err
	}
	return d.die()
}

func (d dying) KeepSlab(ctx context.Context, source, id string) error {
	if err := d.die(); err != nil {
		return err
	}
	if err := d.Importer.KeepSlab(ctx, source, id); err != nil {
		return err
	}
	return d.die()
}

func (d dying) DeleteSlab(ctx context.Context, id string) error {
	if *d.left <= 0 {
		return fault.New(fault.Unavailable, "died")
	}
	return d.Engine.DeleteSlab(ctx, id)
}

func (d dying) DeleteTag(ctx context.Context, name string) error {
	if *d.left <= 0 {
		return fault.New(fault.Unavailable, "died")
	}
	return d.Engine.DeleteTag(ctx, name)
}

// TestAnImportMayDieAnywhere: then the file is where it was, or is the volume, and
// asking again makes it one.
func TestAnImportMayDieAnywhere(t *testing.T) {
	ended := false
	for at := 1; !ended; at++ {
		r := newRig(t, "a")
		left := 1 << 30
		r.wrap = func(e engine.Engine) engine.Engine { return dying{e, e.(engine.Importer), &left} }
		r.start()
		path := r.legacy("a", "disk.img", "ext4", 64*mib)
		left = at
		req := image.ImportRequest{Name: "v", Domain: "a", Source: "disk.img"}
		_, err := r.Import(r.ctx, req)
		ended = err == nil
		left = 0 // nothing more happens in this life
		_ = r.Close()
		r.wrap = nil
		r.start()
		if at%2 == 0 { // the collector comes first, and all of its time
			r.collect()
		}
		if !exists(path) {
			if all := r.All(r.ctx); len(all) != 1 || all[0].State != image.Optimized {
				t.Fatalf("died at %d: the file is gone, and there are %+v", at, all)
			}
		}
		v, err := r.Import(r.ctx, req)
		if err != nil || v.State != image.Optimized || exists(path) {
			t.Fatalf("died at %d, then asked again: %+v, %v, the old name is there: %t", at, v, err, exists(path))
		}
		f, err := os.Open(r.path(v))
		r.must(err)
		got := make([]byte, 100_000)
		_, err = f.ReadAt(got, 63*mib)
		r.must(err)
		f.Close()
		if string(got) != string(content(9, 100_000)) {
			t.Fatalf("died at %d: the content is not what was imported", at)
		}
		if at > 40 {
			t.Fatal("an import makes so many calls?")
		}
	}
}
