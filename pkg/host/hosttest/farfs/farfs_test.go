package farfs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestAShareIsADirectoryElsewhere: what is done in the mount is done in the directory.
func TestAShareIsADirectoryElsewhere(t *testing.T) {
	dir, point := t.TempDir(), t.TempDir()
	s := New(t, dir)
	ok(t, s.Mount("", point))
	ok(t, os.MkdirAll(filepath.Join(point, "a", "b"), 0o750))
	ok(t, os.WriteFile(filepath.Join(point, "a", "b", "file"), []byte("content"), 0o640))
	ok(t, os.Link(filepath.Join(point, "a", "b", "file"), filepath.Join(point, "linked")))
	ok(t, os.Rename(filepath.Join(point, "a"), filepath.Join(point, "moved")))
	ok(t, os.Symlink("linked", filepath.Join(point, "symlink")))
	ok(t, os.Chmod(filepath.Join(point, "moved"), 0o2711))
	ok(t, os.Chown(filepath.Join(point, "linked"), 7, 8))
	ok(t, os.Truncate(filepath.Join(point, "linked"), 4))
	for _, at := range []string{point, dir} {
		for _, name := range []string{"moved/b/file", "linked", "symlink"} {
			if got, err := os.ReadFile(filepath.Join(at, name)); err != nil || string(got) != "cont" {
				t.Errorf("%s: %q, %v", filepath.Join(at, name), got, err)
			}
		}
		var st unix.Stat_t
		ok(t, unix.Stat(filepath.Join(at, "linked"), &st))
		if st.Nlink != 2 || st.Uid != 7 || st.Gid != 8 || st.Size != 4 {
			t.Errorf("%s: %+v", at, st)
		}
		if list, err := os.ReadDir(at); err != nil || len(list) != 3 {
			t.Errorf("%s: %v, %v", at, list, err)
		}
	}
	ok(t, os.Remove(filepath.Join(point, "linked")))
	ok(t, os.RemoveAll(filepath.Join(point, "moved")))
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
}

// TestAServerFails: it hangs, loses a reply, and crashes.
func TestAServerFails(t *testing.T) {
	point := t.TempDir()
	s := New(t, t.TempDir())
	ok(t, s.Mount("", point))
	s.Twice(func(op Op) bool { return op == Mkdir })
	if err := os.Mkdir(filepath.Join(point, "a"), 0o700); !errors.Is(err, os.ErrExist) {
		t.Errorf("the reply was not lost: %v", err)
	}
	s.Twice(nil)
	s.Hang(func(op Op) bool { return op == Statfs })
	done := make(chan error, 1)
	go func() { done <- unix.Statfs(point, new(unix.Statfs_t)) }()
	s.Held(t)
	select {
	case err := <-done:
		t.Fatalf("it did not hang: %v", err)
	default:
	}
	s.Release()
	ok(t, <-done)
	open, err := os.Open(filepath.Join(point, "a"))
	ok(t, err)
	defer open.Close()
	s.Crash(t)
	if err := unix.Fstat(int(open.Fd()), new(unix.Stat_t)); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("it did not crash: %v", err)
	}
}
