// Package farfs is a share on a server that a test can stop, crash and replace: a FUSE file system
// that shows a directory, served by the test itself. It can lose replies, too, as a network does: what was
// asked for is done, and asked for again.
package farfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Op is a request of the kernel: FUSE_GETATTR and so on in linux/fuse.h.
type Op uint32

// The requests that are served.
const (
	Lookup      Op = 1
	forget      Op = 2
	Getattr     Op = 3
	Setattr     Op = 4
	Readlink    Op = 5
	Symlink     Op = 6
	mknod       Op = 8
	Mkdir       Op = 9
	Unlink      Op = 10
	Rmdir       Op = 11
	Rename      Op = 12
	Link        Op = 13
	Open        Op = 14
	Read        Op = 15
	Write       Op = 16
	Statfs      Op = 17
	release     Op = 18
	Fsync       Op = 20
	Flush       Op = 25
	initialise  Op = 26
	Opendir     Op = 27
	Readdir     Op = 28
	releasedir  Op = 29
	Fsyncdir    Op = 30
	setlk       Op = 32
	setlkw      Op = 33
	Create      Op = 35
	interrupt   Op = 36
	destroy     Op = 38
	batchForget Op = 42
	rename2     Op = 45
)

const (
	inHeader, outHeader = 40, 16
	rootNode            = 1
	maxWrite            = 128 << 10
	directIO            = 1 // FOPEN_DIRECT_IO
)

// Server has the share.
type Server struct {
	t testing.TB

	mu     sync.Mutex
	dir    string // what new mounts show
	conns  []*conn
	hold   func(Op) bool
	held   chan Op
	goOn   chan struct{}
	twice  func(Op) bool
	refuse map[Op]unix.Errno
	names  map[string]unix.Errno
	squash *uint32
	direct bool
	count  map[Op]int
	seen   []Op
}

// New makes a server of a directory, for the time of the test.
func New(t testing.TB, dir string) *Server {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	s := &Server{t: t, dir: dir, held: make(chan Op, 4096), goOn: make(chan struct{}), count: map[Op]int{}, refuse: map[Op]unix.Errno{}, names: map[string]unix.Errno{}}
	t.Cleanup(func() {
		s.Release()
		s.mu.Lock()
		conns := s.conns
		s.mu.Unlock()
		for _, c := range conns {
			_ = unix.Unmount(c.point, unix.MNT_FORCE) // EINVAL: it was unmounted, as it should
			_ = unix.Unmount(c.point, unix.MNT_DETACH)
		}
		for _, c := range conns {
			select {
			case <-c.served:
			case <-time.After(10 * time.Second):
				t.Errorf("something still uses the share that was mounted at %s", c.point)
			}
		}
	})
	return s
}

// Mount mounts a folder of the share. unix.ENOENT: there is none.
func (s *Server) Mount(folder, target string) error { return s.MountAs("fuse.farfs", folder, target) }

// MountAs is Mount with another type of file system ("fuse.glusterfs") in the kernel's list of mounts.
func (s *Server) MountAs(fsType, folder, target string) error {
	s.mu.Lock()
	dir := filepath.Join(s.dir, folder)
	s.mu.Unlock()
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		s.t.Skipf("this kernel has no FUSE: %v", err)
	}
	if err != nil {
		return errors.Join(err, unix.Close(root))
	}
	options := "fd=" + strconv.Itoa(dev) + ",rootmode=40000,user_id=0,group_id=0,allow_other"
	if err := unix.Mount("farfs", target, fsType, unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return errors.Join(err, unix.Close(dev), unix.Close(root))
	}
	c := &conn{server: s, dev: dev, point: target, served: make(chan struct{}),
		nodes: map[uint64]*node{rootNode: {fd: root}}, ids: map[inode]uint64{}, files: map[uint64]*os.File{}, last: rootNode}
	s.mu.Lock()
	s.conns = append(s.conns, c)
	s.mu.Unlock()
	go c.serve()
	return refusePolls(dir, target)
}

// refusePolls lets the kernel ask once whether a file can be polled and learn that it never need
// ask. If it asked later, this process's own poller would wait for an answer that this process
// cannot give meanwhile.
func refusePolls(dir, target string) error {
	const name = ".polled"
	if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
		return err
	}
	fd, err := unix.Open(filepath.Join(target, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		err = errors.Join(err, unix.Close(fd))
	}
	return errors.Join(err, os.Remove(filepath.Join(dir, name)))
}

// Move lets mounts that are made from now on show another directory, as if another server had got the address.
func (s *Server) Move(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dir = dir
}

// Crash lets all mounts lose their server: whatever is asked of them is unix.ENOTCONN.
func (s *Server) Crash(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	conns := s.conns
	s.mu.Unlock()
	for _, c := range conns {
		if err := unix.Unmount(c.point, unix.MNT_FORCE); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			t.Fatalf("crash %s: %v", c.point, err)
		}
	}
}

// Hang holds the requests for which hold says true, from now until Release.
func (s *Server) Hang(hold func(Op) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold = hold
}

// Held waits until a request is held, and says which.
func (s *Server) Held(t testing.TB) Op {
	t.Helper()
	select {
	case op := <-s.held:
		return op
	case <-time.After(time.Minute):
		t.Fatal("nothing came to hang")
		return 0
	}
}

// Release answers everything that is held, and lets nothing hang any more.
func (s *Server) Release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold = nil
	close(s.goOn)
	s.goOn = make(chan struct{})
}

// Twice does each request for which it says true two times, and answers what came of the second:
// that the first was answered, nobody will ever know.
func (s *Server) Twice(which func(Op) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.twice = which
}

// Refuse answers every request of a kind with an error and does nothing; 0: no more.
func (s *Server) Refuse(op Op, with unix.Errno) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse[op] = with
}

// RefuseName answers every question for a name, in whatever folder, with an error; 0: no more.
func (s *Server) RefuseName(name string, with unix.Errno) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[name] = with
}

// Squash gives what is made from now on to a user, as a server does that trusts no root.
func (s *Server) Squash(user uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.squash = &user
}

// Uncached lets every read and write of what is opened from now on come here, past the kernel's page cache.
func (s *Server) Uncached() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.direct = true
}

// Count is how many requests of a kind came.
func (s *Server) Count(op Op) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count[op]
}

// Seen are the requests since the last Forget, in the order in which they came.
func (s *Server) Seen() []Op {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Op{}, s.seen...)
}

// Forget forgets what was seen.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = nil
}

type inode struct{ dev, ino uint64 }

// node is what the kernel knows by a number: O_PATH keeps it what it is, whatever its name.
type node struct {
	fd      int
	lookups uint64
	inode   inode
}

// conn is one mount.
type conn struct {
	server *Server
	dev    int
	point  string
	served chan struct{}
	calls  sync.WaitGroup

	mu    sync.Mutex
	nodes map[uint64]*node
	ids   map[inode]uint64
	files map[uint64]*os.File
	last  uint64
}

func (c *conn) serve() {
	buf := make([]byte, maxWrite+(64<<10))
	for {
		n, err := unix.Read(c.dev, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil || n < inHeader { // ENODEV: it was unmounted
			break
		}
		request := bytes.Clone(buf[:n])
		c.calls.Go(func() { c.answer(request) })
	}
	c.calls.Wait() // or they would answer whoever gets the number of dev next
	_ = unix.Close(c.dev)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.nodes {
		_ = unix.Close(n.fd)
	}
	for _, f := range c.files {
		_ = f.Close()
	}
	close(c.served)
}

func (c *conn) answer(request []byte) {
	le := binary.LittleEndian
	op, id, body := Op(le.Uint32(request[4:])), le.Uint64(request[16:]), request[inHeader:]
	if op == rename2 { // struct fuse_rename2_in: newdir, flags, padding
		op, body = Rename, append(bytes.Clone(body[:8]), body[16:]...)
	}
	s := c.server
	s.mu.Lock()
	s.count[op]++
	s.seen = append(s.seen, op)
	refuse, squash := s.refuse[op], s.squash
	if op == Lookup && s.names[text(body)] != 0 {
		refuse = s.names[text(body)]
	}
	holds, twice, goOn := s.hold != nil && s.hold(op), s.twice != nil && s.twice(op), s.goOn
	s.mu.Unlock()
	if holds {
		s.held <- op
		<-goOn
	}
	var reply []byte
	err := error(refuse)
	if refuse == 0 {
		reply, err = c.do(op, id, body)
		if twice {
			reply, err = c.do(op, id, body)
		}
	}
	if squash != nil && err == nil && (op == Mkdir || op == Create) {
		// struct fuse_entry_out and in it struct fuse_attr: the kernel is told whose it is.
		reply, err = c.squash(reply, *squash)
	}
	if op == forget || op == batchForget || op == interrupt { // no answer is wanted
		return
	}
	var errno unix.Errno
	if refuse != 0 {
		errno = refuse
	} else if err != nil && !errors.As(err, &errno) {
		errno = unix.EIO
	}
	if errno != 0 {
		reply = nil
	}
	head := make([]byte, outHeader)
	le.PutUint32(head, uint32(outHeader+len(reply)))
	le.PutUint32(head[4:], uint32(-int32(errno)))
	copy(head[8:], request[8:16])
	// ENOENT: the one who asked was killed and waits no more; ENODEV: it was unmounted.
	_, _ = unix.Write(c.dev, append(head, reply...))
}
