package agent_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// apart is a rig with two nodes, each of which has a domain for itself.
type apart struct {
	*rig
	one, two *worker
	id       map[string]string // node: its domain's ID
	dir      map[string]string // and directory
}

func newApart(t *testing.T) *apart {
	r := newRig(t)
	a := &apart{rig: r, one: r.agent("n1"), two: r.agent("n2"), id: map[string]string{}, dir: map[string]string{"n1": r.dirs["a"], "n2": r.dirs["b"]}}
	a.openAll()
	return a
}

func (a *apart) openAll() {
	a.t.Helper()
	for node, dir := range a.dir {
		id, err := a.nodes(node, dir, false)
		a.must(err)
		a.id[node] = id
	}
}

func (a *apart) path(img image.Image) string {
	for node, id := range a.id {
		if id == img.Handle.Domain {
			return filepath.Join(a.dir[node], "slabs", img.Slab)
		}
	}
	return ""
}

// sparse is a volume on n1 with data at its begin and its end, and its content.
func (a *apart) sparse(name string, size int64) (image.Image, []byte) {
	a.t.Helper()
	v := a.volume(name, a.id["n1"], size)
	content := make([]byte, size)
	_, _ = rand.Read(content[:size/4])
	_, _ = rand.Read(content[size-4096:])
	f, err := os.OpenFile(a.path(v), os.O_WRONLY, 0)
	a.must(err)
	defer f.Close()
	_, err = f.WriteAt(content[:size/4], 0)
	a.must(err)
	_, err = f.WriteAt(content[size-4096:], size-4096)
	a.must(err)
	return v, content
}

func (a *apart) same(img image.Image, content []byte) {
	a.t.Helper()
	got, err := os.ReadFile(a.path(img))
	a.must(err)
	if len(got) < len(content) || !bytes.Equal(got[:len(content)], content) || len(bytes.Trim(got[len(content):], "\x00")) > 0 {
		a.t.Errorf("%s holds something else", img.Name)
	}
}

func on(node, name, source string, size int64) image.CreateRequest {
	return image.CreateRequest{Name: name, Domains: []string{"b"}, Nodes: []string{node}, Accesses: []image.Access{writer()}, Size: size, Source: source}
}

// TestARestoreOnAnotherNode: what one node has for itself becomes what another one has, from a
// snapshot and from a volume, to the same size and a larger one; holes stay holes.
func TestARestoreOnAnotherNode(t *testing.T) {
	a := newApart(t)
	const size = 8 << 20
	v, content := a.sparse("v", size)
	snap, err := a.manager.CreateSnapshot(a.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	a.must(err)
	restored, err := a.manager.CreateVolume(a.ctx, on("n2", "r", snap.Handle.String(), 2*size))
	a.must(err)
	clone := on("n2", "c", v.Handle.String(), size)
	clone.SourceMutable = true
	cloned, err := a.manager.CreateVolume(a.ctx, clone)
	a.must(err)
	for _, img := range []image.Image{restored, cloned} {
		if img.Handle.Domain != a.id["n2"] || !strings.Contains(img.How, a.id["n1"]) && img.Name == "r" {
			t.Errorf("%s is in %s, made by %q", img.Name, img.Handle.Domain, img.How)
		}
		a.same(img, content)
		var st unix.Stat_t
		a.must(unix.Stat(a.path(img), &st))
		if n := st.Blocks * 512; n > size/2 {
			t.Errorf("%s takes %d bytes", img.Name, n)
		}
	}
	// And back.
	back, err := a.manager.CreateVolume(a.ctx, func() image.CreateRequest {
		r := on("n1", "back", cloned.Handle.String(), size)
		r.SourceMutable = true
		return r
	}())
	a.must(err)
	a.same(back, content)
}

// TestAMoveKeepsToTheLowerRate of both domains; one of a volume, which is kept still for it, does not.
func TestAMoveKeepsToTheLowerRate(t *testing.T) {
	a := newApart(t)
	next := a.successor()
	next.rates = map[string]int64{"n1": 64 << 20, "n2": 32 << 20}
	a.one.moves(next)
	a.two.moves(next)
	a.rig = next
	a.openAll()
	v, content := a.sparse("v", 4<<20)
	snap, err := a.manager.CreateSnapshot(a.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	a.must(err)
	a.same(a.again(on("n2", "r", snap.Handle.String(), 4<<20)), content)
	clone := on("n2", "c", v.Handle.String(), 4<<20)
	clone.SourceMutable = true
	a.same(a.again(clone), content)
	a.one.mu.Lock()
	defer a.one.mu.Unlock()
	if want := []int64{32 << 20, 0}; !slices.Equal(a.one.rates, want) {
		t.Errorf("the rates were %d, want %d", a.one.rates, want)
	}
}

// TestADirectoryOnAnotherNode is the same with files.
func TestADirectoryOnAnotherNode(t *testing.T) {
	a := newApart(t)
	access := []image.Access{{Mode: image.SingleNodeWriter}}
	v, err := a.manager.CreateVolume(a.ctx, image.CreateRequest{Name: "v", Domains: []string{a.id["n1"]}, Layout: image.LayoutDirectory, Accesses: access, Size: 16 << 20})
	a.must(err)
	data := filepath.Join(a.path(v), "data")
	a.must(os.Mkdir(filepath.Join(data, "dir"), 0o750))
	a.must(os.WriteFile(filepath.Join(data, "dir", "file"), []byte("content"), 0o640))
	a.must(os.Link(filepath.Join(data, "dir", "file"), filepath.Join(data, "second")))
	a.must(os.Symlink("dir/file", filepath.Join(data, "link")))
	snap, err := a.manager.CreateSnapshot(a.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	a.must(err)
	r := on("n2", "r", snap.Handle.String(), 16<<20)
	r.Layout, r.Accesses = image.LayoutDirectory, access
	img, err := a.manager.CreateVolume(a.ctx, r)
	a.must(err)
	got := filepath.Join(a.path(img), "data")
	for _, name := range []string{"dir/file", "second", "link"} {
		if b, err := os.ReadFile(filepath.Join(got, name)); err != nil || string(b) != "content" {
			t.Errorf("%s holds %q, %v", name, b, err)
		}
	}
	first, err := os.Stat(filepath.Join(got, "dir", "file"))
	a.must(err)
	second, err := os.Stat(filepath.Join(got, "second"))
	a.must(err)
	if !os.SameFile(first, second) || first.Mode().Perm() != 0o640 {
		t.Errorf("the file has mode %s, its second name is the same: %t", first.Mode(), os.SameFile(first, second))
	}
}

// TestAMoveIsBrokenOff by the loss of either node: it ends, and is made again.
func TestAMoveIsBrokenOff(t *testing.T) {
	for _, lost := range []string{"n1", "n2"} {
		t.Run(lost, func(t *testing.T) {
			a := newApart(t)
			const size = 96 << 20 // more data than connections hold
			v, content := a.sparse("v", size)
			snap, err := a.manager.CreateSnapshot(a.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
			a.must(err)
			a.two.slow = make(chan struct{})
			request := on("n2", "r", snap.Handle.String(), size)
			done := make(chan error, 1)
			go func() {
				_, err := a.manager.CreateVolume(context.Background(), request)
				done <- err
			}()
			select {
			case a.two.slow <- struct{}{}:
			case err := <-done:
				t.Fatalf("the copy has ended: %v", err)
			}
			w := map[string]*worker{"n1": a.one, "n2": a.two}[lost]
			w.cut()
			if err := <-done; err == nil {
				t.Fatal("a copy from or to a node that is lost is made")
			} else {
				a.is(err, fault.Unavailable)
			}
			close(a.two.slow)
			a.wait("both nodes", func() bool { return len(a.hub.Nodes()) == 2 && a.one.link.Connected() && a.two.link.Connected() })
			a.same(a.again(request), content)
		})
	}
}

// TestAMoveThatFailsSaysWhy: what was wrong on the target's node, and not that the source's lost
// its connection then; and nothing remains.
func TestAMoveThatFailsSaysWhy(t *testing.T) {
	a := newApart(t)
	const size = 96 << 20 // more data than connections hold
	v, content := a.sparse("v", size)
	snap, err := a.manager.CreateSnapshot(a.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	a.must(err)
	a.two.full = true
	request := on("n2", "r", snap.Handle.String(), size)
	_, err = a.manager.CreateVolume(a.ctx, request)
	if a.is(err, fault.Exhausted); !strings.Contains(err.Error(), "node n2") {
		t.Errorf("the error is %v", err)
	}
	left, err := filepath.Glob(filepath.Join(a.dir["n2"], "slabs", "*"))
	if a.must(err); len(left) > 0 {
		t.Errorf("there are still %v", left)
	}
	a.two.full = false
	a.same(a.again(request), content)

	a.must(os.Truncate(a.path(snap), size/2)) // as if a disk had lost it
	_, err = a.manager.CreateVolume(a.ctx, on("n2", "r2", snap.Handle.String(), size))
	a.is(err, fault.Corrupt)
}

// TestTheNextControllerGoesOnWithAMove where it was.
func TestTheNextControllerGoesOnWithAMove(t *testing.T) {
	a := newApart(t)
	v, content := a.sparse("v", 4<<20)
	snap, err := a.manager.CreateSnapshot(a.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	a.must(err)
	a.two.slow = make(chan struct{})
	request := on("n2", "r", snap.Handle.String(), 4<<20)
	done := make(chan error, 1)
	go func() {
		_, err := a.manager.CreateVolume(context.Background(), request)
		done <- err
	}()
	for range 2 { // one checkpoint is sealed, and another one
		select {
		case a.two.slow <- struct{}{}:
		case err := <-done:
			t.Fatalf("the copy has ended: %v", err)
		}
	}
	next := a.successor()
	a.one.moves(next)
	a.two.moves(next)
	a.is(<-done, fault.Unavailable)
	close(a.two.slow)
	a.rig = next
	a.openAll()
	a.same(a.again(request), content)
	a.two.mu.Lock()
	defer a.two.mu.Unlock()
	if n := len(a.two.began); n != 2 || a.two.began[0] != 0 || a.two.began[1] == 0 {
		t.Errorf("the copy began at %v", a.two.began)
	}
}

// TestATicketIsForOneNode: nobody gets or sends data with what is not his.
func TestATicketIsForOneNode(t *testing.T) {
	r := newRig(t)
	r.tokens["good"] = "n1"
	for _, ticket := range []string{"x", "n1", strings.Repeat("y", 26)} {
		w := r.introduction(framed(t, &agentpb.Hello{Version: 1, Node: "n1", Token: "good", Ticket: ticket}))
		if w == nil || !strings.Contains(w.GetRefused(), "no data is expected") {
			t.Errorf("answered %v", w)
		}
		w = r.introduction(framed(t, &agentpb.Hello{Version: 1, Node: "n1", Token: "forged", Ticket: ticket}))
		if w == nil || !strings.Contains(w.GetRefused(), "not that of node n1") {
			t.Errorf("answered %v", w)
		}
	}
}
