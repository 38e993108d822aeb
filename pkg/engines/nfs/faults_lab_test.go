package nfs_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/test/lab"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func contains(list []string, word string) bool { return slices.Contains(list, word) }

// lock is what a program asks for that wants a file for itself, on all nodes.
func lock(f *os.File) error {
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: 0})
}

// mountAt is the visible mount at exactly path.
func mountAt(t *testing.T, path string) host.Mount {
	t.Helper()
	at, err := host.NewLocal(host.Exec{}).MountsAt(path)
	ok(t, err)
	if len(at) == 0 {
		t.Fatalf("nothing is mounted at %s", path)
	}
	return at[len(at)-1]
}

// TestAServerThatIsAway: while the server is stopped, or cut off, each verb ends within its limit, with words that
// name the cause; another domain does not notice; what an acknowledged write has written is there afterwards; and all
// verbs work again, the interrupted ones too.
func TestAServerThatIsAway(t *testing.T) {
	server := lab.StartNFS(t)
	for _, away := range []struct {
		name string
		do   func(t testing.TB) (back func())
	}{
		{"stopped", func(t testing.TB) func() { server.Stop(t); return func() { server.Start(t) } }},
		{"cut off", func(t testing.TB) func() { return server.Cut(t) }},
	} {
		t.Run(away.name, func(t *testing.T) {
			both(t, func(t *testing.T, p protocol) { awayFor(t, p, server, away.do) })
		})
	}
}

func awayFor(t *testing.T, p protocol, server *lab.NFS, away func(t testing.TB) func()) {
	x := server.Export(t, "ext4")
	e := p.openAs(t, 0, p.params(x, "domain"))
	defer func() { ok(t, e.Close()) }()
	other, err := dir.Open(t.Context(), map[string]string{"path": hosttest.Filesystem(t, "ext4", 64<<20)}, host.Exec{})
	ok(t, err)
	defer func() { ok(t, other.Close()) }()

	ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "disk", Kind: engine.Block, Size: 64 << 20}))
	a, err := e.AttachSlab(t.Context(), "disk", engine.AttachOptions{})
	ok(t, err)
	w := startWriter(t, a.Path)
	w.wait(t, 3)

	back := away(t)
	begin := time.Now()
	var wg sync.WaitGroup
	wg.Go(func() {
		// The first one waits for its whole limit. Those after it find out that the server is away.
		for _, verb := range []struct {
			name  string
			limit time.Duration
			do    func() error
		}{
			{"CreateTag", 40 * time.Second, func() error { return e.CreateTag(t.Context(), engine.Tag{Name: "i.away.1", Record: []byte("r")}) }},
			{"CreateTag again", 15 * time.Second, func() error { return e.CreateTag(t.Context(), engine.Tag{Name: "i.away.1", Record: []byte("r")}) }},
			{"ListTags", 15 * time.Second, func() error { _, err := e.ListTags(t.Context(), "i."); return err }},
			{"CreateSlab", 15 * time.Second, func() error {
				return e.CreateSlab(t.Context(), engine.SlabSpec{ID: "away", Kind: engine.Block, Size: 1 << 20})
			}},
		} {
			at := time.Now()
			err := verb.do()
			took := time.Since(at)
			t.Logf("%s: %s: %v", verb.name, took.Round(time.Millisecond), err)
			if !errors.Is(err, fault.Unavailable) || took > verb.limit {
				t.Errorf("%s took %s: %v; unavailable within %s was expected", verb.name, took, err, verb.limit)
			}
		}
	})
	// The other domain is as fast as ever, all the time.
	wg.Go(func() {
		var worst time.Duration
		n := 0
		for ; time.Since(begin) < 20*time.Second; n++ {
			at := time.Now()
			if err := other.CreateTag(t.Context(), engine.Tag{Name: fmt.Sprintf("i.other.%d", n), Record: []byte("r")}); err != nil {
				t.Error(err)
				return
			}
			worst = max(worst, time.Since(at))
			time.Sleep(50 * time.Millisecond)
		}
		t.Logf("%d tags in the other domain, the slowest in %s", n, worst)
		if worst > 5*time.Second {
			t.Errorf("a tag of another domain took %s", worst)
		}
	})
	// Other programs of this process, too.
	wg.Go(func() {
		for time.Since(begin) < 35*time.Second {
			at := time.Now()
			if err := exec.Command("/bin/true").Run(); err != nil || time.Since(at) > 10*time.Second {
				t.Errorf("a program took %s to run: %v", time.Since(at), err)
			}
			time.Sleep(time.Second)
		}
	})
	described := time.Now()
	if _, err := e.Describe(t.Context()); err != nil || time.Since(described) > time.Second {
		t.Errorf("Describe waited %s: %v", time.Since(described), err)
	}
	wg.Wait()
	t.Logf("away for %s", time.Since(begin).Round(time.Second))
	back()
	resumed := time.Now()
	t.Log("it is back")
	eventually(t, 2*time.Minute, func() error {
		return e.CreateTag(t.Context(), engine.Tag{Name: "i.away.1", Record: []byte("r")})
	})
	eventually(t, time.Minute, func() error {
		return e.CreateSlab(t.Context(), engine.SlabSpec{ID: "away", Kind: engine.Block, Size: 1 << 20})
	})
	eventually(t, time.Minute, func() error { _, err := e.ListTags(t.Context(), "i."); return err })
	t.Logf("the verbs work again after %s", time.Since(resumed).Round(time.Millisecond))
	w.wait(t, 3)
	w.check(t, filepath.Join(x.Dir, "domain", "slabs", "disk"))
}

// TestARestartedServer: everything goes on by itself, NFS 4 after its grace period.
func TestARestartedServer(t *testing.T) {
	server := lab.StartNFS(t)
	both(t, func(t *testing.T, p protocol) {
		x := server.Export(t, "xfs")
		e := p.openAs(t, 0, p.params(x, "domain"))
		defer func() { ok(t, e.Close()) }()
		ok(t, e.CreateSlab(t.Context(), engine.SlabSpec{ID: "disk", Kind: engine.Block, Size: 64 << 20}))
		a, err := e.AttachSlab(t.Context(), "disk", engine.AttachOptions{})
		ok(t, err)
		w := startWriter(t, a.Path)
		w.wait(t, 3)
		server.Stop(t)
		server.Start(t)
		begin := time.Now()
		eventually(t, 2*time.Minute, func() error { return e.CreateTag(t.Context(), engine.Tag{Name: "i.after.1", Record: []byte("r")}) })
		t.Logf("the first tag after the restart: %s", time.Since(begin).Round(time.Millisecond))
		w.wait(t, 3)
		w.check(t, filepath.Join(x.Dir, "domain", "slabs", "disk"))
	})
}

// eventually repeats what the Image Manager would, as long as the domain says that it is unavailable.
func eventually(t *testing.T, limit time.Duration, do func() error) {
	t.Helper()
	begin := time.Now()
	for {
		err := do()
		if err == nil {
			return
		}
		if !errors.Is(err, fault.Unavailable) {
			t.Fatalf("after %s: %v", time.Since(begin), err)
		}
		if time.Since(begin) > limit {
			t.Fatalf("not within %s: %v", limit, err)
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// writer writes block after block of a file, each synced before the next.
type writer struct {
	mu     sync.Mutex
	synced int
	err    error
	stop   chan struct{}
	done   chan struct{}
}

const writerBlock = 4096

func startWriter(t *testing.T, path string) *writer {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0) // as a loop device writes
	ok(t, err)
	w := &writer{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		defer f.Close()
		for n := 0; n < (64<<20)/writerBlock; n++ {
			select {
			case <-w.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			_, err := f.WriteAt([]byte(w.block(n)), int64(n)*writerBlock)
			if err == nil {
				err = f.Sync()
			}
			w.mu.Lock()
			if err == nil {
				w.synced++
			}
			w.err = err
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { w.end(); <-w.done })
	return w
}

func (w *writer) block(n int) string {
	line := fmt.Sprintf("block %08d\n", n)
	return (strings.Repeat(line, writerBlock/len(line)+1))[:writerBlock]
}

func (w *writer) state() (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.synced, w.err
}

func (w *writer) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.stop:
	default:
		close(w.stop)
	}
}

// wait waits until so many more blocks were acknowledged.
func (w *writer) wait(t *testing.T, more int) {
	t.Helper()
	begin := time.Now()
	first, err := w.state()
	for n := first; ; n, err = w.state() {
		if err != nil {
			t.Fatalf("a write failed after %d blocks: %v", n, err)
		}
		if n >= first+more {
			return
		}
		if time.Since(begin) > 2*time.Minute {
			t.Fatalf("no write has ended for %s", time.Since(begin))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// check ends the writer and looks at the server's disk for everything that was acknowledged.
func (w *writer) check(t *testing.T, path string) {
	t.Helper()
	w.end()
	<-w.done
	n, err := w.state()
	ok(t, err)
	content, err := os.ReadFile(path)
	ok(t, err)
	for i := range n {
		if got := string(content[i*writerBlock : (i+1)*writerBlock]); got != w.block(i) {
			t.Fatalf("block %d of %d acknowledged ones is not there: %.20q", i, n, got)
		}
	}
	t.Logf("%d acknowledged blocks are on the server's disk", n)
}
