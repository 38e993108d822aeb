package crash_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/image"
)

// fill takes the last block and, where they are counted, the last inode of a
// file system, and returns what gives them back.
func fill(t *testing.T, root string) (free func()) {
	t.Helper()
	dir := filepath.Join(root, "foreign")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "0"))
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size > 0; { // ever smaller
		switch _, err := f.Write(make([]byte, size)); {
		case errors.Is(err, unix.ENOSPC):
			size /= 2
		case err != nil:
			t.Fatal(err)
		}
	}
	_ = f.Sync() // says that it is full
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for i := 1; ; i++ {
		err := os.WriteFile(fmt.Sprintf("%s/%d", dir, i), []byte("x"), 0o600)
		if errors.Is(err, unix.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAFullDisk fills the file system before each operation: it fails with
// Exhausted or succeeds, leaves nothing behind, harms nothing, and works when
// there is room again. Deleting works on a full disk.
func TestAFullDisk(t *testing.T) {
	t.Setenv("TMPDIR", shm(t))
	for _, st := range []storage{
		{name: "native on XFS", root: hosttest.Filesystem(t, "xfs", 300<<20)},
		{name: "defaults on ext4", root: hosttest.Filesystem(t, "ext4", 64<<20)},
		{name: "minimal on ext4", root: hosttest.Filesystem(t, "ext4", 64<<20), minimal: true},
	} {
		t.Run(st.name, func(t *testing.T) {
			t.Parallel() // not what is in it: there is one disk
			for _, layout := range []image.Layout{image.LayoutImage, image.LayoutDirectory} {
				for _, sc := range scenarios() {
					if sc.userWrites {
						continue // the user's own write fails
					}
					t.Run(fmt.Sprintf("%s, %s", layout, sc.name), func(t *testing.T) {
						w := newWorld(t, st, layout)
						w.story = sc.name
						s := newStory(w)
						sc.prepare(s)
						w.restart()
						full(t, s, strings.HasPrefix(sc.name, "delete"))
					})
				}
			}
		})
	}
}

func full(t *testing.T, s *story, deletes bool) {
	w := s.w
	free := fill(t, w.kind.root)
	err := s.run(s)
	switch {
	case err != nil && deletes:
		w.fatalf("deleting on a full disk: %v", err)
	case err != nil && !errors.Is(err, fault.Exhausted):
		w.fatalf("a full disk became another kind of error: %v", err)
	}
	t.Logf("on a full disk: %v", err)
	s.check()
	w.restart() // opening works, too
	s.check()
	w.must(w.collect())
	groups := len(s.groups)
	w.noLeaks(groups)
	free()
	w.must(s.run(s))
	s.check()
	w.must(w.collect())
	w.noLeaks(len(s.groups))
	free = fill(t, w.kind.root) // and everything can be deleted when it is full again
	defer free()
	var list []image.Handle
	for _, g := range s.groups {
		list = append(list, g)
	}
	w.empty(list...)
	w.end()
}
