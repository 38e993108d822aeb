package mover

import (
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// stashPrefix begins the name of a linkStash.
const stashPrefix = ".quarry-links-"

// linkStash keeps one name of every file with several names in a directory of
// its own, so that each further name is one link(2) away, however many
// there are and wherever they lie. The last name takes the stashed one's place.
type linkStash struct {
	root   *handle // of the target
	name   string
	dir    *handle // nil until needed
	next   int
	groups map[fileID]*linkGroup
}

type linkGroup struct {
	stashed string
	left    uint64 // names not yet seen
}

// chooseName finds a name for the stash that the source does not use.
func (s *linkStash) chooseName(srcRoot int) error {
	fd, err := reopen(srcRoot, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return sysErr(err, "open", "the copy's source")
	}
	defer unix.Close(fd)
	names, err := listNames(fd)
	if err != nil {
		return sysErr(err, "read", "the copy's source")
	}
	for i := 0; ; i++ {
		s.name = stashPrefix + strconv.Itoa(i)
		if !slices.Contains(names, s.name) {
			return nil
		}
	}
}

// find places a file that was met before (linked), or returns the name in the
// stash under which it is to be made; place follows then. names: how many it has.
func (s *linkStash) find(e *entry, names uint64, to *handle) (name string, linked bool, err error) {
	if _, ok := s.groups[idOf(&e.st)]; ok {
		return "", true, s.place(e, to)
	}
	if s.dir == nil {
		if err := unix.Mkdirat(s.root.fd, s.name, 0o700); err != nil {
			return "", false, err
		}
		fd, err := openAt(s.root.fd, s.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if err != nil {
			return "", false, err
		}
		s.dir = newHandle(fd)
	}
	g := &linkGroup{stashed: strconv.Itoa(s.next), left: names}
	s.next++
	s.groups[idOf(&e.st)] = g
	return g.stashed, false, nil
}

// place gives a stashed file the name of e in the directory to.
func (s *linkStash) place(e *entry, to *handle) error {
	g := s.groups[idOf(&e.st)]
	if g.left--; g.left > 0 {
		return unix.Linkat(s.dir.fd, g.stashed, to.fd, e.name, 0)
	}
	delete(s.groups, idOf(&e.st))
	return unix.Renameat(s.dir.fd, g.stashed, to.fd, e.name)
}

// remove takes the stash away, with the stashed names of files that have
// further names outside of the tree.
func (s *linkStash) remove() error {
	if s.dir == nil {
		return nil
	}
	defer s.close()
	for _, g := range s.groups {
		if err := unix.Unlinkat(s.dir.fd, g.stashed, 0); err != nil {
			return sysErr(err, "remove", s.name+"/"+g.stashed)
		}
	}
	return sysErr(unix.Unlinkat(s.root.fd, s.name, unix.AT_REMOVEDIR), "remove", s.name)
}

func (s *linkStash) close() {
	s.dir.release()
	s.dir = nil
}
