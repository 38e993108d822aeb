package posix

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
)

// TestAShareThatIsBrieflyAwayLosesNothing: what cannot be found while it is away is neither left out of a listing nor
// taken for deleted, and is all there when the share is back.
func TestAShareThatIsBrieflyAwayLosesNothing(t *testing.T) {
	for name, o := range map[string]Options{"NFS": {Refresh: true}, "SMB": {DeletePending: true}, "any other": {}} {
		t.Run(name, func(t *testing.T) { losesNothing(t, o) })
	}
}

func losesNothing(t *testing.T, o Options) {
	s, dir, point := onShare(t)
	d := openWith(t, point, o)
	for i := range 5 {
		ok(t, d.CreateTag(t.Context(), engine.Tag{Name: fmt.Sprintf("i.%d", i)}))
	}
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "b", Kind: engine.Block, Size: 1}))
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "t", Kind: engine.Tree, Size: 1}))
	listTags := func(prefix string) error { _, err := d.ListTags(t.Context(), prefix); return err }
	listSlabs := func() error { _, err := d.ListSlabs(t.Context()); return err }
	for _, c := range []struct {
		name string
		op   farfs.Op
		with unix.Errno
		do   func() error
	}{
		{"tags, before its exports", farfs.Open, unix.ESTALE, func() error { return listTags("i.") }},
		{"tags, without its names", farfs.Open, unix.ENOENT, func() error { return listTags("i.") }},
		{"tags, when nothing is found", farfs.Lookup, unix.ENOENT, func() error { return listTags("i.") }},
		{"all tags, when nothing is found", farfs.Lookup, unix.ENOENT, func() error { return listTags("") }},
		{"tags of which there are none, when nothing is found", farfs.Lookup, unix.ENOENT, func() error { return listTags("n.") }},
		{"slabs, before its exports", farfs.Lookup, unix.ESTALE, listSlabs},
		{"slabs, when nothing is found", farfs.Lookup, unix.ENOENT, listSlabs},
		{"slabs, when everything is busy", farfs.Lookup, unix.EBUSY, listSlabs},
		{"deletion of a tag", farfs.Lookup, unix.ENOENT, func() error { return d.DeleteTag(t.Context(), "i.0") }},
		{"deletion of a block slab", farfs.Lookup, unix.ENOENT, func() error { return d.DeleteSlab(t.Context(), "b") }},
		{"deletion of a tree slab", farfs.Lookup, unix.ENOENT, func() error { return d.DeleteSlab(t.Context(), "t") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.Refuse(c.op, c.with)
			err := c.do()
			s.Refuse(c.op, 0)
			if !errors.Is(err, fault.Unavailable) || !errors.Is(err, c.with) {
				t.Errorf("%v, want it unavailable because of %q", err, c.with)
			}
			if have := tagNames(t, d); len(have) != 5 {
				t.Errorf("then there are the tags %q", have)
			}
			if slabs, err := d.ListSlabs(t.Context()); err != nil || len(slabs) != 2 {
				t.Errorf("then there are the slabs %v, %v", slabs, err)
			}
		})
	}
	// What finds nothing finds it in the folder that was opened, and not in one that has gone from its place.
	ok(t, os.Rename(filepath.Join(dir, "tags"), filepath.Join(dir, "away")))
	for name, do := range map[string]func() error{
		"listing":  func() error { return listTags("n.") },
		"deletion": func() error { return d.DeleteTag(t.Context(), "n.0") },
	} {
		if err := do(); !errors.Is(err, fault.Unavailable) {
			t.Errorf("%s without the tags' folder: %v", name, err)
		}
	}
	ok(t, os.Mkdir(filepath.Join(dir, "tags"), 0o700))
	fails(t, listTags("n."), fault.Unavailable)
}

// TestWhatIsGoneIsGone: on a storage that answers, it costs nobody an error.
func TestWhatIsGoneIsGone(t *testing.T) {
	_, _, point := onShare(t)
	d := openWith(t, point, Options{Refresh: true})
	for range 2 {
		ok(t, d.DeleteTag(t.Context(), "i.0"))
		ok(t, d.DeleteSlab(t.Context(), "a"))
		if tags, err := d.ListTags(t.Context(), "i."); err != nil || len(tags) != 0 {
			t.Errorf("tags %v, %v", tags, err)
		}
		ok(t, d.CreateTag(t.Context(), engine.Tag{Name: "i.0"}))
		ok(t, d.DeleteTag(t.Context(), "i.0"))
	}
}

// TestWhatCannotBeSeenIsNotGone: a server that goes away in the middle of a verb is no reason to say that a slab does
// not exist, or that an import was finished before.
func TestWhatCannotBeSeenIsNotGone(t *testing.T) {
	s, dir, point := onShare(t)
	d := openWith(t, point, Options{NoLeases: true})
	ok(t, d.CreateSlab(t.Context(), engine.SlabSpec{ID: "t", Kind: engine.Tree, Size: 1}))
	ok(t, os.Mkdir(filepath.Join(dir, "import"), 0o700))
	ok(t, os.WriteFile(filepath.Join(dir, "import", "disk.img"), make([]byte, Granularity), 0o600))
	ok(t, d.ImportSlab(t.Context(), "disk.img", engine.SlabSpec{ID: "b", Kind: engine.Block, Size: Granularity}))
	for _, c := range []struct {
		name, slab string
		opens      unix.Errno // what the file answers that is opened when the server goes away
		do         func() error
	}{
		{"the list of slabs", "t", unix.EHOSTDOWN, func() error { _, err := d.ListSlabs(t.Context()); return err }},
		{"attaching", "t", unix.EHOSTDOWN, func() error { _, err := d.AttachSlab(t.Context(), "t", engine.AttachOptions{}); return err }},
		{"growing", "t", unix.EHOSTDOWN, func() error { return d.ResizeSlab(t.Context(), "t", 2) }},
		{"finishing an import", "b", 0, func() error { return d.KeepSlab(t.Context(), "disk.img", "b") }},
		{"importing again", "b", 0, func() error {
			return d.ImportSlab(t.Context(), "disk.img", engine.SlabSpec{ID: "b", Kind: engine.Block, Size: Granularity})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.Refuse(farfs.Open, c.opens)
			s.Hang(func(op farfs.Op) bool { return op == farfs.Open })
			done := make(chan error, 1)
			go func() { done <- c.do() }()
			s.Held(t)
			s.RefuseName(c.slab, unix.EHOSTDOWN)
			s.Release()
			err := <-done
			s.RefuseName(c.slab, 0)
			s.Refuse(farfs.Open, 0)
			if !errors.Is(err, fault.Unavailable) || !errors.Is(err, unix.EHOSTDOWN) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := os.Lstat(filepath.Join(dir, "import", "disk.img")); err != nil {
		t.Error(err)
	}
	ok(t, d.KeepSlab(t.Context(), "disk.img", "b"))
	if _, err := os.Lstat(filepath.Join(dir, "import", "disk.img")); !os.IsNotExist(err) {
		t.Errorf("the import was not finished: %v", err)
	}
}

// TestWhatIsNotFoundWhenItGetsItsNameIsMadeAgain, a few times: the folders are there.
func TestWhatIsNotFoundWhenItGetsItsNameIsMadeAgain(t *testing.T) {
	s, _, point := onShare(t)
	d := openWith(t, point, Options{})
	for lifted, want := range map[int]error{2: nil, 4: unix.ENOENT} {
		tries := 0
		s.Refuse(farfs.Link, unix.ENOENT)
		err := d.place(d.slabs, fmt.Sprint("after", lifted), func(*os.File) error {
			if tries++; tries == lifted {
				s.Refuse(farfs.Link, 0)
			}
			return nil
		})
		s.Refuse(farfs.Link, 0)
		if !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("found from the %dth time on: %v after %d tries", lifted, err, tries)
		}
	}
}
