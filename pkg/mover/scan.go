package mover

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// TreeStats counts what is in a tree, its root not included.
type TreeStats struct {
	Directories, Files, Symlinks, Specials int64 // names of each kind
	// Bytes is the length of all files, each file once whatever its number of names.
	Bytes int64
}

func (s *TreeStats) add(mode uint32, n int64) {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		s.Directories += n
	case unix.S_IFREG:
		s.Files += n
	case unix.S_IFLNK:
		s.Symlinks += n
	default:
		s.Specials += n
	}
}

// scanner counts a tree.
type scanner struct {
	stats TreeStats
	seen  map[fileID]bool // of files with several names
	// other must not be met: the root of the copy's other side.
	other     fileID
	otherName string
}

// scan counts what is under root. It fails with fault.Invalid when it meets
// the directory other.
func scan(ctx context.Context, root int, rootName string, other fileID, otherName string) (TreeStats, error) {
	s := &scanner{seen: map[fileID]bool{}, other: other, otherName: otherName}
	err := walk(ctx, root, rootName, s)
	return s.stats, err
}

func (s *scanner) visit(e *entry) error {
	if idOf(&e.st) == s.other {
		return fault.New(fault.Invalid, "%q holds %q: a tree cannot be copied into or out of itself", e.path, s.otherName)
	}
	s.stats.add(e.st.Mode, 1)
	if isRegular(&e.st) {
		if e.st.Nlink == 1 {
			s.stats.Bytes += e.st.Size
		} else if !s.seen[idOf(&e.st)] {
			s.seen[idOf(&e.st)] = true
			s.stats.Bytes += e.st.Size
		}
	}
	return nil
}

func (s *scanner) leave(*entry) error { return nil }

func (s *scanner) mountPoint(dir *handle, name, _ string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	s.stats.add(st.Mode, 1)
	return nil
}
