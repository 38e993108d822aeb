package agent_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// introduction sends bytes in a frame and returns the controller's answer; nil: it hung up.
func (r *rig) introduction(frame []byte) *agentpb.Welcome {
	r.t.Helper()
	c, err := tls.Dial("tcp", r.address, r.tls)
	r.must(err)
	defer c.Close()
	if _, err = c.Write(frame); err != nil {
		return nil
	}
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return nil
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	_, err = io.ReadFull(c, b)
	w := &agentpb.Welcome{}
	r.must(errors.Join(err, proto.Unmarshal(b, w)))
	return w
}

func framed(t *testing.T, h *agentpb.Hello) []byte {
	b, err := proto.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func TestOnlyAgentsWithTheirOwnTokenAreLetIn(t *testing.T) {
	r := newRig(t)
	r.tokens["good"] = "n1"
	for name, c := range map[string]struct {
		hello *agentpb.Hello
		says  string
	}{
		"a forged token":          {&agentpb.Hello{Version: 1, Node: "n1", Token: "forged"}, "not that of node n1"},
		"no token":                {&agentpb.Hello{Version: 1, Node: "n1"}, "not that of node n1"},
		"another node's token":    {&agentpb.Hello{Version: 1, Node: "n2", Token: "good"}, "not that of node n2"},
		"an old version":          {&agentpb.Hello{Version: 0, Node: "n1", Token: "good"}, "version 0"},
		"no name":                 {&agentpb.Hello{Version: 1, Token: "good"}, "a node's name is needed"},
		"a name that is a path":   {&agentpb.Hello{Version: 1, Node: "../n1", Token: "good"}, "a node's name is needed"},
		"a name with a line more": {&agentpb.Hello{Version: 1, Node: "n1\nn2", Token: "good"}, "a node's name is needed"},
	} {
		t.Run(name, func(t *testing.T) {
			w := r.introduction(framed(t, c.hello))
			if w == nil || !strings.Contains(w.GetRefused(), c.says) {
				t.Errorf("answered %v, want %q", w, c.says)
			}
			if n := r.hub.Nodes(); len(n) > 0 {
				t.Errorf("connected are %v", n)
			}
		})
	}
	asked := r.asked()
	for name, frame := range map[string][]byte{
		"a huge message": binary.BigEndian.AppendUint32(nil, 1<<30),
		"garbage":        []byte("\x00\x00\x00\x05GET /"),
	} {
		if w := r.introduction(frame); w != nil {
			t.Errorf("%s is answered %v", name, w)
		}
	}
	if r.asked() != asked {
		t.Error("a token was looked at that nobody has shown")
	}
	// None of this is in anybody's way.
	r.agent("n1")
}

func TestAnAgentThatIsRefusedTriesAgain(t *testing.T) {
	r := newRig(t)
	r.agentWith("n1", "not yet")
	r.wait("two attempts", func() bool { return r.asked() >= 2 })
	r.mu.Lock()
	r.tokens["not yet"] = "n1"
	r.mu.Unlock()
	r.wait("the agent to be let in", func() bool { return len(r.hub.Nodes()) == 1 })
}

// TestImagesOnNodes: the controller has no storage, and does everything through agents.
func TestImagesOnNodes(t *testing.T) {
	r := newRig(t)
	_, err := r.hub.Agent("n1")
	r.is(err, fault.Unavailable)
	one := r.agent("n1")
	a, b := r.open("a", ""), r.open("b", "n1")
	if a != "a" || !strings.HasPrefix(b, "b.") {
		t.Fatalf("domains %s and %s", a, b)
	}
	v := r.volume("v", "a", 1<<20)
	content := r.fill("a", v)

	same := func(domain string, img image.Image) {
		t.Helper()
		got, err := os.ReadFile(r.slab(domain, img))
		r.must(err)
		if !bytes.Equal(got[:len(content)], content) {
			t.Fatalf("%s in domain %s holds something else", img.Name, domain)
		}
	}
	snap, err := r.manager.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	r.must(err)
	same("a", snap)
	clone, err := r.manager.CreateVolume(r.ctx, image.CreateRequest{Name: "c", Domains: []string{"b"}, Accesses: []image.Access{writer()}, Size: 2 << 20, Source: snap.Handle.String()})
	r.must(err)
	same("b", clone)
	var listed int64
	r.must(r.manager.Allocated(r.ctx, snap.Handle, 0, func(list []engine.Extent) error {
		for _, e := range list {
			listed += e.Length
		}
		return nil
	}))
	if listed != 1<<20 {
		t.Errorf("%d bytes are listed as allocated", listed)
	}

	// The node asks the controller, which knows which one it is.
	at, err := r.manager.Attach(r.ctx, v.Handle, "n1", writer(), false)
	r.must(err)
	st, err := one.link.Stage(r.ctx, v.Handle, "n2, it says", at.Generation)
	r.must(err)
	if len(st.Slabs) != 1 || st.Slabs[0].ID != v.Slab || st.Size != v.Size || st.Domain != "a" {
		t.Errorf("staging is %+v", st)
	}
	r.must(one.link.Formatted(r.ctx, v.Handle, "", ""))
	o, err := one.link.Outline(r.ctx, v.Handle, "")
	r.must(err)
	now, err := r.manager.Get(r.ctx, v.Handle)
	r.must(err)
	if now.Fresh || len(now.Attachments) != 1 || !now.Attachments[0].Staged || o.Size != v.Size {
		t.Errorf("the volume is %+v, its outline %+v", now, o)
	}
	two := r.agent("n2")
	_, err = two.link.Stage(r.ctx, v.Handle, "n1", at.Generation)
	r.is(err, fault.InUse)
	r.must(one.link.Unstaged(r.ctx, v.Handle, "", o.Told))
	r.must(r.manager.Detach(r.ctx, v.Handle, "n1"))

	// Kinds of errors come through.
	_, err = one.link.Stage(r.ctx, image.Handle{Domain: "a", Image: "nothing"}, "", 1)
	r.is(err, fault.NotFound)
	_, err = one.link.Engine("elsewhere")
	r.is(err, fault.Unavailable)
	for _, h := range []image.Handle{v.Handle, clone.Handle} {
		r.must(r.manager.DeleteVolume(r.ctx, h))
	}
	r.must(r.manager.DeleteSnapshot(r.ctx, snap.Handle))
	r.must(r.manager.Collect(r.ctx))
	for d, path := range r.dirs {
		left, err := filepath.Glob(filepath.Join(path, "slabs", "*"))
		r.must(err)
		if len(left) > 0 {
			t.Errorf("in domain %s there are still %v", d, left)
		}
	}
}

// What the nodes lack is known before a volume is made, not when a pod waits for it.
func TestAnEncryptedVolumeIsRefusedWhereNoNodeOpensIt(t *testing.T) {
	r := newRig(t)
	one := r.agent("n1")
	r.open("a", "")
	create := func() error {
		_, err := r.manager.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{writer()}, Size: 64 << 20, Encrypted: true})
		return err
	}
	lacks := one.node.Encrypts(r.ctx)
	n, err := r.hub.Agent("n1")
	r.must(err)
	if got := n.(image.Encrypter).Encrypts(r.ctx); fault.KindOf(got) != fault.KindOf(lacks) || (got == nil) != (lacks == nil) {
		t.Fatalf("the node says %v, and over the link it says %v", lacks, got)
	}
	if lacks == nil {
		r.must(create())
		return
	}
	r.is(create(), fault.Invalid)
	if err := create(); !strings.Contains(err.Error(), "node n1: ") || !strings.Contains(err.Error(), "encrypted") {
		t.Errorf("it is refused without saying why: %v", err)
	}
}

// TestAnotherNodeTakesOver: a shared domain is reached through any of its nodes, one of a
// node through that alone.
func TestAnotherNodeTakesOver(t *testing.T) {
	r := newRig(t)
	one := r.agent("n1")
	r.open("a", "")
	r.open("b", "n1")
	r.agent("n2")
	r.volume("v", "a", 1<<20)
	one.stop()
	r.wait("n1 to be gone", func() bool { return len(r.hub.Nodes()) == 1 })
	r.volume("w", "a", 1<<20)
	_, err := r.manager.CreateVolume(r.ctx, image.CreateRequest{Name: "x", Domains: []string{"b"}, Accesses: []image.Access{writer()}, Size: 1 << 20})
	r.is(err, fault.Unavailable)
	if !strings.Contains(err.Error(), "n1") {
		t.Errorf("which node is missing? %v", err)
	}
	r.agent("n1")
	r.volume("x", "b", 1<<20)
}

// TestAConnectionIsLostDuringACopy: the copy fails, the agent comes back by itself, and the
// copy goes on where it was.
func TestAConnectionIsLostDuringACopy(t *testing.T) {
	r := newRig(t)
	one := r.agent("n1")
	one.slow = make(chan struct{})
	r.open("a", "")
	r.open("b", "")
	v := r.volume("v", "a", 2<<20)
	content := r.fill("a", v)
	snap, err := r.manager.CreateSnapshot(r.ctx, image.SnapshotRequest{Name: "s", Source: v.Handle})
	if err != nil {
		t.Fatal(err)
	}
	request := image.CreateRequest{Name: "c", Domains: []string{"b"}, Accesses: []image.Access{writer()}, Size: 2 << 20, Source: snap.Handle.String()}
	done := make(chan error, 1)
	go func() {
		_, err := r.manager.CreateVolume(context.Background(), request)
		done <- err
	}()
	for range 3 {
		select {
		case one.slow <- struct{}{}:
		case err := <-done:
			t.Fatalf("the copy has ended: %v", err)
		}
	}
	one.cut()
	r.is(<-done, fault.Unavailable)
	close(one.slow)
	r.wait("the agent to come back", func() bool { _, err := r.hub.Agent("n1"); return err == nil })
	var clone image.Image
	r.wait("the copy to be made", func() bool {
		clone, err = r.manager.CreateVolume(r.ctx, request)
		if err != nil && !errors.Is(err, fault.Unavailable) && !errors.Is(err, fault.Pending) {
			t.Fatal(err)
		}
		return err == nil
	})
	got, err := os.ReadFile(r.slab("b", clone))
	r.must(err)
	if !bytes.Equal(got, content) {
		t.Error("the copy is not what was copied")
	}
}

// TestANodeHasOneAgent: of an agent that is gone the controller may not know yet when the
// next one of its node comes, whose connection ends the earlier one's.
func TestANodeHasOneAgent(t *testing.T) {
	r := newRig(t)
	first := r.agent("n1")
	r.open("a", "")
	first.mu.Lock()
	first.lost = true
	first.mu.Unlock()
	second := r.agentWith("n1", "second")
	r.mu.Lock()
	r.tokens["second"] = "n1"
	r.mu.Unlock()
	r.wait("the second one to take over", func() bool { return second.link.Connected() && !first.link.Connected() })
	r.wait("a volume", func() bool { // a call may have met with the end of the first one's connection
		_, err := r.manager.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{writer()}, Size: 1 << 20})
		if err != nil {
			r.is(err, fault.Unavailable)
		}
		return err == nil
	})
	if n := r.hub.Nodes(); len(n) != 1 {
		t.Errorf("nodes are %v", n)
	}
}

// TestAnotherControllerTakesOver: agents find the next one, and refuse what the one before
// still asks.
func TestAnotherControllerTakesOver(t *testing.T) {
	r := newRig(t)
	one := r.agent("n1")
	r.open("a", "")
	v := r.volume("v", "a", 1<<20)
	r.stop()
	serverTLS, clientTLS := certificate(t)
	l, err := tls.Listen("tcp", r.address, serverTLS)
	r.must(err)
	one.mu.Lock()
	r.tls = clientTLS
	one.mu.Unlock()
	r.control(l)
	r.wait("the agent to find the next controller", func() bool { _, err := r.hub.Agent("n1"); return err == nil })
	r.open("a", "")
	now, err := r.manager.Get(r.ctx, v.Handle)
	r.must(err)
	if now.Slab != v.Slab {
		t.Errorf("the volume is %+v", now)
	}
	r.volume("w", "a", 1<<20)
}

// TestAnOlderAgentKeepsTheDomainsThatItKnows: during an upgrade a domain of a new type of storage is opened
// where it can be, and takes the others nothing away.
func TestAnOlderAgentKeepsTheDomainsThatItKnows(t *testing.T) {
	r := newRig(t)
	older := r.agentKnowing("older", "dir")
	_, err := r.hub.OpenDomain(r.ctx, agent.DomainSpec{Name: "b", Engine: "new", Params: map[string]string{"path": r.dirs["b"]}})
	r.is(err, fault.Unavailable)
	if !strings.Contains(err.Error(), `engine "new"`) {
		t.Errorf("%v: does not say what is missing", err)
	}
	newer := r.agentKnowing("newer", "dir", "new")
	fresh := r.openOf("b", "", "new")
	known := r.open("a", "")
	for _, id := range []string{known, fresh} {
		if _, err := newer.link.Engine(id); err != nil {
			t.Errorf("on the newer node: %v", err)
		}
	}
	if _, err := older.link.Engine(known); err != nil {
		t.Errorf("on the older node: %v", err)
	}
	_, err = older.link.Engine(fresh)
	r.is(err, fault.Unavailable)
	r.volume("v", "b", 1<<20)

	older.stop()
	older = r.agentKnowing("older", "dir", "new") // upgraded
	r.wait("the domain of the new type to be open there", func() bool { _, err := older.link.Engine(fresh); return err == nil })
}
