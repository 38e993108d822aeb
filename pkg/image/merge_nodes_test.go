package image_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// chainNodes are nodes "n1" and "n2" that take every chain, stage nothing, and merge for
// ever, or at once, until they are told to stop. The real ones are tested in packages
// block and node.
type chainNodes struct {
	mu      sync.Mutex
	merging map[string]string // slab: node
	asked   int               // times to merge
	done    bool              // a merge is done when it is asked for
	busy    bool              // in the middle of a staging
	copies  []string          // for each copy asked for: the node, and that which merges then
}

func (c *chainNodes) Agent(node string) (image.Agent, error) {
	if node != "n1" && node != "n2" {
		return nil, fault.New(fault.NotFound, "there is no node %s", node)
	}
	return chainNode{c, node}, nil
}

func (*chainNodes) Nodes() []string { return []string{"n1", "n2"} }

// on is the node that merges some slab, or "".
func (c *chainNodes) on() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, node := range c.merging {
		return node
	}
	return ""
}

type chainNode struct {
	*chainNodes
	name string
}

func (n chainNode) Freeze(context.Context, image.Handle, time.Duration) (image.Frozen, error) {
	return image.NotStaged, nil
}
func (n chainNode) Thaw(context.Context, image.Handle) error            { return nil }
func (n chainNode) Layers(context.Context, image.Handle) error          { return nil }
func (n chainNode) Hold(context.Context, []image.Staging, string) error { return nil }
func (n chainNode) Release(context.Context, string) error               { return nil }

func (n chainNode) Switch(context.Context, []image.Staging, string) error { return nil }

func (n chainNode) Prepare(context.Context, []image.Staging) (string, error) { return "", nil }

var _ image.ChainAgent = chainNode{}

func (n chainNode) Staged(context.Context, image.Handle) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy {
		return false, fault.New(fault.Pending, "a staging is running")
	}
	return false, nil
}

func (n chainNode) Merge(_ context.Context, chain image.Staging) (image.Merging, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked++
	n.merging[chain.Slabs[0].ID] = n.name
	return image.Merging{Left: 1, Done: n.done}, nil
}

func (n chainNode) StopMerge(_ context.Context, chain image.Staging) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.merging[chain.Slabs[0].ID] == n.name {
		delete(n.merging, chain.Slabs[0].ID)
	}
	return nil
}

func (n chainNode) AttachImage(context.Context, image.Staging) (string, error) {
	on := n.on()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.copies = append(n.copies, n.name+" "+on)
	return "", fault.New(fault.Unsupported, "no copies here")
}
func (n chainNode) DetachImage(context.Context, image.Handle, string) error { return nil }

// TestAMergeBelowAVolumeThatMovesToAnotherNode: it was begun where the volume was in
// use, and writes to a slab of the chain that the other node is about to read.
func TestAMergeBelowAVolumeThatMovesToAnotherNode(t *testing.T) {
	r := newRig(t, "a")
	nodes := &chainNodes{merging: map[string]string{}}
	r.mapAgents = nodes
	r.start()
	v := r.volume("v", "a", 1<<20)
	stage := func(node string) {
		t.Helper()
		a, err := r.Attach(r.ctx, v.Handle, node, mount, false)
		r.must(err)
		_, err = r.Stage(r.ctx, v.Handle, node, a.Generation)
		r.must(err)
	}
	stage("n1")
	s1 := r.snapshot("s1", v)
	r.snapshot("s2", v)
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	r.must(r.Collect(r.ctx))
	for end := time.Now().Add(time.Minute); nodes.on() == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no merge begins")
		}
	}
	r.unstaged(v, "n1")
	r.must(r.Detach(r.ctx, v.Handle, "n1"))
	stage("n2")
	if on := nodes.on(); on == "n1" {
		t.Fatalf("the volume is in use on n2, and %s merges a layer of its chain", on)
	}
}

// TestAMergeBelowACopyOnAnotherNode: a node that makes a device of a chain reads each
// layer's metadata once, so no other may take anything from them meanwhile.
func TestAMergeBelowACopyOnAnotherNode(t *testing.T) {
	for _, node := range []string{"n1", "n2"} { // copies are made on the first that can
		r := newRig(t, "a", "b")
		nodes := &chainNodes{merging: map[string]string{}}
		r.mapAgents = nodes
		r.start()
		v := r.volume("v", "a", 1<<20)
		a, err := r.Attach(r.ctx, v.Handle, node, mount, false)
		r.must(err)
		_, err = r.Stage(r.ctx, v.Handle, node, a.Generation)
		r.must(err)
		s1 := r.snapshot("s1", v)
		s2 := r.snapshot("s2", v)
		s3 := r.snapshot("s3", v)
		r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
		r.must(r.Collect(r.ctx))
		for end := time.Now().Add(time.Minute); nodes.on() == ""; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("no merge begins")
			}
		}
		for _, s := range []image.Image{s2, s3} { // the merge is of the layer of s2
			_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "c-" + s.Name, Domains: []string{"b"}, Accesses: []image.Access{mount}, Source: s.Handle.String()})
			r.is(err, fault.Unsupported)
		}
		want := []string{"n1 n1", "n1 n1"}
		if node == "n2" {
			want = []string{"n2 n2", "n1 "} // it is held where it is merged
		}
		nodes.mu.Lock()
		if !slices.Equal(nodes.copies, want) {
			t.Errorf("with the volume on %s the copies, and the merges meanwhile, were on %q, want %q", node, nodes.copies, want)
		}
		nodes.mu.Unlock()
	}
}

// TestAMergeEndsWhenNobodyBuildsTheChain: a node that was told a chain finds all of its
// slabs, however long it takes to build it.
func TestAMergeEndsWhenNobodyBuildsTheChain(t *testing.T) {
	t.Run("as the node tells", func(t *testing.T) {
		endOfAMerge(t, func(r *rig, _ *chainNodes, v image.Image, st image.Staging) { // it is busy with something else by now
			r.must(r.Built(r.ctx, v.Handle, "n1", st.Told-1)) // of an earlier staging
			r.must(r.Built(r.ctx, v.Handle, "n1", st.Told))
		})
	})
	t.Run("as the node answers", func(t *testing.T) {
		endOfAMerge(t, func(_ *rig, nodes *chainNodes, _ image.Image, _ image.Staging) {
			nodes.mu.Lock()
			defer nodes.mu.Unlock()
			nodes.busy = false
		})
	})
}

func endOfAMerge(t *testing.T, built func(*rig, *chainNodes, image.Image, image.Staging)) {
	r := newRig(t, "a")
	nodes := &chainNodes{merging: map[string]string{}, done: true, busy: true}
	r.mapAgents = nodes
	r.start()
	v := r.volume("v", "a", 1<<20)
	s1 := r.snapshot("s1", v)
	r.snapshot("s2", v)
	a, err := r.Attach(r.ctx, v.Handle, "n1", mount, false)
	r.must(err)
	st, err := r.Stage(r.ctx, v.Handle, "n1", a.Generation)
	r.must(err)
	r.must(r.DeleteSnapshot(r.ctx, s1.Handle))
	r.must(r.Collect(r.ctx))
	waitFor := func(what string, is func(chain int) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			now, err := r.Get(r.ctx, v.Handle)
			r.must(err)
			if is(len(now.Chain)) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: the chain is %v", what, now.Chain)
			}
		}
	}
	waitFor("a merge that goes on", func(chain int) bool {
		if chain < len(st.Slabs) {
			t.Fatalf("the node builds a chain of %d slabs, and %d are left", len(st.Slabs), chain)
		}
		nodes.mu.Lock()
		defer nodes.mu.Unlock()
		return nodes.asked >= 2
	})
	built(r, nodes, v, st)
	waitFor("its end", func(chain int) bool { return chain == len(st.Slabs)-1 })
}
