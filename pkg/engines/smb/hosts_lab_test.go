package smb

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

func tagNames(t testing.TB, e engine.Engine) []string {
	t.Helper()
	tags, err := e.ListTags(t.Context(), "i.")
	must(t, err)
	var names []string
	for _, tag := range tags {
		names = append(names, tag.Name)
	}
	slices.Sort(names)
	return names
}

func has(names []string, name string) error {
	if !slices.Contains(names, name) {
		return fmt.Errorf("%s is not among %v", name, names)
	}
	return nil
}

func TestLabWhatOneHostDoesTheOtherSeesAtOnce(t *testing.T) {
	r := newRig(t, "ext4", nil)
	a, b := r.open(t, "d", apart), r.open(t, "d", apart)
	ctx := t.Context()
	for n := range 5 {
		for _, kind := range []engine.Kind{engine.Block, engine.Tree} {
			id := fmt.Sprintf("%s-%d", kind, n)
			// a has just seen that there is none.
			if _, err := a.AttachSlab(ctx, id, engine.AttachOptions{}); !errors.Is(err, fault.NotFound) {
				t.Fatalf("%s does not exist yet: %v", id, err)
			}
			must(t, b.CreateSlab(ctx, engine.SlabSpec{ID: id, Kind: kind, Size: 1 << 20}))
			if _, err := a.AttachSlab(ctx, id, engine.AttachOptions{}); err != nil {
				t.Errorf("the other host has made %s: %v", id, err)
			}
			if kind == engine.Block {
				must(t, b.ResizeSlab(ctx, id, 2<<20))
				slabs, err := a.ListSlabs(ctx)
				must(t, err)
				if !slices.Contains(slabs, engine.Slab{ID: id, Kind: kind, Size: 2 << 20}) {
					t.Errorf("the other host has grown %s: %v", id, slabs)
				}
			}
			must(t, a.DetachSlab(ctx, id))
			must(t, b.DeleteSlab(ctx, id))
			if _, err := a.AttachSlab(ctx, id, engine.AttachOptions{}); !errors.Is(err, fault.NotFound) {
				t.Errorf("the other host has deleted %s: %v", id, err)
			}
		}
		name := fmt.Sprintf("i.%d", n)
		must(t, a.DeleteTag(ctx, name)) // looked at, and not there
		must(t, b.CreateTag(ctx, tag(name)))
		if err := has(tagNames(t, a), name); err != nil {
			t.Errorf("the other host has made a tag: %v", err)
		}
		if err := a.CreateTag(ctx, engine.Tag{Name: name, Record: []byte("another")}); !errors.Is(err, fault.Exists) {
			t.Errorf("a tag that the other host has made: %v", err)
		}
	}
}

func TestLabADirectoryVolumeIsMountedAsItsClassSays(t *testing.T) {
	r := newRig(t, "ext4", nil)
	e, other := r.open(t, "d", apart), r.open(t, "d", apart)
	ctx := t.Context()
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "con", Kind: engine.Tree, Size: 1 << 20}))
	options := engine.AttachOptions{MountOptions: []string{"uid=1000", "gid=2000", "file_mode=0640", "dir_mode=0750", "seal", "actimeo=0"}}
	at, err := e.AttachSlab(ctx, "con", options)
	must(t, err)
	again, err := e.AttachSlab(ctx, "con", options)
	if err != nil || again != at {
		t.Errorf("attached again it is %v, %v, not %v", again, err, at)
	}
	there, err := other.AttachSlab(ctx, "con", options)
	must(t, err)

	must(t, os.WriteFile(filepath.Join(at.Path, "file"), []byte("hello"), 0o600))
	must(t, os.Symlink("file", filepath.Join(at.Path, "link")))
	must(t, os.Link(filepath.Join(at.Path, "file"), filepath.Join(at.Path, "second")))
	for name, want := range map[string]uint32{".": 0o750 | unix.S_IFDIR, "file": 0o640 | unix.S_IFREG} {
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(at.Path, name), &st))
		if st.Uid != 1000 || st.Gid != 2000 || st.Mode != want {
			t.Errorf("%s belongs to %d:%d with mode %o", name, st.Uid, st.Gid, st.Mode)
		}
	}
	for _, name := range []string{"file", "link", "second"} {
		if content, err := os.ReadFile(filepath.Join(there.Path, name)); err != nil || string(content) != "hello" {
			t.Errorf("on the other host %s has %q, %v", name, content, err)
		}
	}
	if to, err := os.Readlink(filepath.Join(there.Path, "link")); err != nil || to != "file" {
		t.Errorf("on the other host the link leads to %q, %v", to, err)
	}
	if _, err := e.AttachSlab(ctx, "con", engine.AttachOptions{MountOptions: []string{"soft"}}); !errors.Is(err, fault.Invalid) {
		t.Errorf("a class with \"soft\": %v", err)
	}
	must(t, e.DetachSlab(ctx, "con"))
	must(t, other.DetachSlab(ctx, "con"))
	must(t, e.DeleteSlab(ctx, "con"))
}

// A slab that is in use grows: nothing locks its users out.
func TestLabASlabGrowsWhileItIsWritten(t *testing.T) {
	r := newRig(t, "ext4", nil)
	e := r.open(t, "d", "")
	ctx := t.Context()
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "s", Kind: engine.Block, Size: 1 << 20}))
	at, err := e.AttachSlab(ctx, "s", engine.AttachOptions{})
	must(t, err)
	f, err := os.OpenFile(at.Path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				failed <- nil
				return
			default:
			}
			if _, err := f.WriteAt(make([]byte, 64<<10), 0); err != nil {
				failed <- err
				return
			}
		}
	}()
	for n := range 20 {
		must(t, e.ResizeSlab(ctx, "s", int64(n+2)<<20))
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Errorf("a write failed while the slab grew: %v", err)
	}
}
