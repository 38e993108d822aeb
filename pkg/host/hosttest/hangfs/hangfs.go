// Package hangfs is storage that stops answering when a test says so: a
// filesystem of one file, served by the test itself through /dev/fuse. What
// waits for it sleeps in the kernel and cannot be killed, as with a dead server.
package hangfs

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

// The requests that a test may want to hold.
const (
	Lookup  Op = 1
	Getattr Op = 3
	Open    Op = 14
	Read    Op = 15
	Write   Op = 16
	Fsync   Op = 20
)

const (
	forget, setattr, statfs, release, flush  = 2, 4, 17, 18, 25
	initialise, opendir, readdir, releasedir = 26, 27, 28, 29
	interrupt, destroy, batchForget          = 36, 38, 42
)

const (
	inHeader, outHeader = 40, 16
	rootNode, fileNode  = 1, 2
	maxWrite            = 128 << 10
	directIO            = 1 // FOPEN_DIRECT_IO: every read and write comes here
)

// FS is the filesystem.
type FS struct {
	// File is the path of its one file.
	File string

	dev     int
	content *os.File
	size    int64

	mu    sync.Mutex
	hold  func(Op) bool
	held  chan Op
	goOn  chan struct{}
	calls sync.WaitGroup
}

// New makes a filesystem whose file has size bytes and mounts it for the time
// of the test. Nothing hangs yet.
func New(t testing.TB, size int64) *FS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	point := filepath.Join(dir, "mnt")
	content, err := os.Create(filepath.Join(dir, "content"))
	if err := errors.Join(err, os.Mkdir(point, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := content.Truncate(size); err != nil {
		t.Fatal(err)
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		t.Skipf("this kernel has no FUSE: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	f := &FS{File: filepath.Join(point, "slab"), dev: dev, content: content, size: size,
		held: make(chan Op, 1024), goOn: make(chan struct{})}
	options := "fd=" + strconv.Itoa(dev) + ",rootmode=40000,user_id=0,group_id=0,allow_other"
	if err := unix.Mount("hangfs", point, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		_ = unix.Close(dev)
		t.Fatalf("mount fuse: %v", err)
	}
	served := make(chan struct{})
	go func() { defer close(served); f.serve() }()
	f.refusePolls(t)
	t.Cleanup(func() {
		f.Release()
		err := unix.Unmount(point, 0)
		for i := 0; errors.Is(err, unix.EBUSY) && i < 500; i++ { // what was held is on its way out
			time.Sleep(10 * time.Millisecond)
			err = unix.Unmount(point, 0)
		}
		if err != nil {
			t.Errorf("unmount %s: %v", point, err)
			_ = unix.Unmount(point, unix.MNT_DETACH|unix.MNT_FORCE)
		}
		<-served
		f.calls.Wait()
		_ = unix.Close(dev)
		_ = content.Close()
	})
	return f
}

// refusePolls lets the kernel ask once whether the file can be polled and learn
// that it never need ask. If it asked later, this process's own poller would
// wait for an answer that this process cannot give meanwhile.
func (f *FS) refusePolls(t testing.TB) {
	t.Helper()
	fd, err := unix.Open(f.File, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil && !errors.Is(err, unix.EINTR) {
		t.Fatal(err)
	}
}

// Hang holds the requests for which hold says true, from now until Release.
func (f *FS) Hang(hold func(Op) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hold = hold
}

// Held waits until a request is held, and says which.
func (f *FS) Held(t testing.TB) Op {
	t.Helper()
	select {
	case op := <-f.held:
		return op
	case <-time.After(time.Minute):
		t.Fatal("nothing came to hang")
		return 0
	}
}

// Release answers everything that is held, and lets nothing hang any more.
func (f *FS) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hold = nil
	close(f.goOn)
	f.goOn = make(chan struct{})
}

func (f *FS) serve() {
	buf := make([]byte, maxWrite+(64<<10))
	for {
		n, err := unix.Read(f.dev, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil || n < inHeader { // ENODEV: it was unmounted
			return
		}
		request := bytes.Clone(buf[:n])
		f.calls.Go(func() { f.answer(request) })
	}
}

func (f *FS) answer(request []byte) {
	le := binary.LittleEndian
	op, node := le.Uint32(request[4:]), le.Uint64(request[16:])
	body := request[inHeader:]
	f.mu.Lock()
	holds, goOn := f.hold != nil && f.hold(Op(op)), f.goOn
	f.mu.Unlock()
	if holds {
		f.held <- Op(op)
		<-goOn
	}
	var reply []byte
	var errno unix.Errno
	switch op {
	case forget, batchForget, interrupt: // no answer is wanted
		return
	case initialise:
		reply = make([]byte, 64)
		le.PutUint32(reply, 7)
		le.PutUint32(reply[4:], 31)
		le.PutUint32(reply[20:], maxWrite)
		le.PutUint32(reply[24:], 1)
	case uint32(Lookup):
		if node != rootNode || string(bytes.TrimRight(body, "\x00")) != "slab" {
			errno = unix.ENOENT
			break
		}
		reply = append(make([]byte, 40), f.attr(fileNode)...)
		le.PutUint64(reply, fileNode)
	case uint32(Getattr), setattr:
		reply = append(make([]byte, 16), f.attr(node)...) // valid for no time: it is asked again
	case uint32(Open):
		reply = make([]byte, 16)
		le.PutUint32(reply[8:], directIO)
	case opendir:
		reply = make([]byte, 16)
	case uint32(Read):
		reply = make([]byte, min(int64(le.Uint32(body[16:])), max(0, f.size-int64(le.Uint64(body[8:])))))
		if _, err := f.content.ReadAt(reply, int64(le.Uint64(body[8:]))); err != nil {
			reply, errno = nil, unix.EIO
		}
	case uint32(Write):
		data := body[40:]
		if _, err := f.content.WriteAt(data, int64(le.Uint64(body[8:]))); err != nil {
			errno = unix.EIO
		}
		reply = make([]byte, 8)
		le.PutUint32(reply, uint32(len(data)))
	case statfs:
		reply = make([]byte, 80)
	case release, releasedir, flush, uint32(Fsync), destroy, readdir:
	default:
		errno = unix.ENOSYS
	}
	if errno != 0 {
		reply = nil
	}
	head := make([]byte, outHeader)
	le.PutUint32(head, uint32(outHeader+len(reply)))
	le.PutUint32(head[4:], uint32(-int32(errno)))
	copy(head[8:], request[8:16])
	// ENOENT: the one who asked was killed and waits no more.
	_, _ = unix.Write(f.dev, append(head, reply...))
}

// attr is struct fuse_attr.
func (f *FS) attr(node uint64) []byte {
	le := binary.LittleEndian
	b := make([]byte, 88)
	size, mode := uint64(f.size), uint32(unix.S_IFREG|0o600)
	if node == rootNode {
		size, mode = 0, unix.S_IFDIR|0o755
	}
	le.PutUint64(b, node)
	le.PutUint64(b[8:], size)
	le.PutUint64(b[16:], size/512)
	le.PutUint32(b[60:], mode)
	le.PutUint32(b[64:], 1)
	le.PutUint32(b[80:], 4096)
	return b
}
