package crash_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// kernel plays the device-mapper of the nodes over the real slabs, so that
// thousands of crashes can be tried without one: it lives longer than managers
// and agents do, and forgets at a reboot. A slab is in use on one node at a time. What the real one does is tested in
// packages block and node, on a stock kernel. It fails the test when it is asked
// for what would show a workload other content than it wrote.
type kernel struct {
	t    testing.TB
	dirs map[string]string

	mu        sync.Mutex
	tops      map[image.Handle][]image.SlabRef // of what is staged
	nodes     map[image.Handle]string          // and where
	ready     map[string][]image.Staging       // switches that are prepared, by what Prepare returned
	held      map[string][]image.Staging       // those that are held
	holds     int
	merging   map[string]bool          // "domain/slab": its layer is being merged
	merged    map[string]bool          // "domain/slab": its device shows the parent's
	private   map[string]image.Staging // devices for copies, by path
	steps     int                      // exceptions that one look at a merge finds merged; 0: all
	merges    []int                    // of how many slabs the chain of each merge was
	looks     int                      // at merges
	complaint error
	epochs    map[string]int64 // domain: the highest that the agent has heard of
}

// admit is what an agent does with the word of a manager. The caller holds k.mu.
func (k *kernel) admit(st image.Staging) error {
	if st.Epoch < k.epochs[st.Domain] {
		return fault.New(fault.Unavailable, "there is a newer manager")
	}
	k.epochs[st.Domain] = st.Epoch
	return nil
}

func newKernel(t testing.TB, dirs map[string]string) *kernel {
	return &kernel{t: t, dirs: dirs, tops: map[image.Handle][]image.SlabRef{}, nodes: map[image.Handle]string{}, ready: map[string][]image.Staging{}, held: map[string][]image.Staging{}, merging: map[string]bool{},
		merged: map[string]bool{}, private: map[string]image.Staging{}, epochs: map[string]int64{}}
}

// reboot forgets everything that is not on disk.
func (k *kernel) reboot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.tops)
	clear(k.ready)
	clear(k.held)
	clear(k.merging)
	clear(k.merged)
	k.dropPrivate()
}

// restart is what a starting agent does.
func (k *kernel) restart() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropPrivate()
	k.expire(nil)
	for slab := range k.merging {
		if !k.live(slab) { // its device went with the private ones
			delete(k.merging, slab)
			delete(k.merged, slab)
		}
	}
}

func (k *kernel) dropPrivate() {
	for path := range k.private {
		_ = os.Remove(path)
	}
	clear(k.private)
}

func (k *kernel) live(slab string) bool {
	for h, chain := range k.tops {
		if slices.ContainsFunc(chain, func(s image.SlabRef) bool { return h.Domain+"/"+s.ID == slab }) {
			return true
		}
	}
	return false
}

func (k *kernel) stage(st image.Staging, node string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tops[st.Handle] == nil {
		k.tops[st.Handle], k.nodes[st.Handle] = slices.Clone(st.Slabs), node
	}
}

func (k *kernel) unstage(h image.Handle) {
	k.mu.Lock()
	defer k.mu.Unlock()
	chain := k.tops[h]
	delete(k.tops, h)
	for _, s := range chain {
		if slab := h.Domain + "/" + s.ID; !k.live(slab) {
			delete(k.merging, slab)
			delete(k.merged, slab)
		}
	}
}

// chainOf is the chain through which a workload sees an image: that of the
// device where it is staged, else the recorded one.
func (k *kernel) chainOf(img image.Image) []image.SlabRef {
	if top := k.tops[img.Handle]; top != nil {
		return top
	}
	return img.Chain
}

// kernelChunk is what all images of the stories have.
const kernelChunk = 32 << 10

// open slab with its exceptions.
type openSlab struct {
	image.SlabRef
	f    *os.File
	made map[int64]int64 // old chunk: new chunk
	next int64           // exceptions in the store
}

func (k *kernel) open(domain string, chain []image.SlabRef) (out []*openSlab, err error) {
	for _, s := range chain {
		if k.merged[domain+"/"+s.ID] {
			continue // its device shows the next one
		}
		f, err := os.OpenFile(filepath.Join(k.dirs[domain], "slabs", s.ID), os.O_RDWR, 0)
		if err != nil {
			closeAll(out)
			return nil, err
		}
		o := &openSlab{SlabRef: s, f: f, made: map[int64]int64{}}
		out = append(out, o)
		if s.Chunk == 0 {
			continue
		}
		size := layer.StoreSize(s.Size, s.Chunk)
		err = layer.Exceptions(f, size, func(old, new int64) error {
			o.made[old] = new
			o.next++
			return nil
		})
		if err != nil {
			closeAll(out)
			return nil, fmt.Errorf("slab %s: %w", s.ID, err)
		}
	}
	return out, nil
}

func closeAll(slabs []*openSlab) {
	for _, s := range slabs {
		_ = s.f.Close()
	}
}

// read reads a chunk through a chain; what lies beyond a slab's size is zero.
func readChunk(slabs []*openSlab, chunk int64, b []byte) error {
	for _, s := range slabs {
		if chunk*kernelChunk >= s.Size {
			clear(b)
			return nil
		}
		at := chunk
		if s.Chunk > 0 {
			new, ok := s.made[chunk]
			if !ok {
				continue
			}
			at = new
		}
		_, err := s.f.ReadAt(b, at*kernelChunk)
		return err
	}
	clear(b)
	return nil
}

// write writes a chunk into the first slab.
func (s *openSlab) write(chunk int64, b []byte) error {
	if chunk*kernelChunk >= s.Size {
		return fmt.Errorf("a write to chunk %d of slab %s, which stands for %d bytes", chunk, s.ID, s.Size)
	}
	if s.Chunk == 0 {
		_, err := s.f.WriteAt(b, chunk*kernelChunk)
		return err
	}
	if s.Chunk != kernelChunk {
		return fmt.Errorf("slab %s has chunks of %d bytes", s.ID, s.Chunk)
	}
	if at, ok := s.made[chunk]; ok {
		_, err := s.f.WriteAt(b, at*kernelChunk)
		return err
	}
	new, entry := place(s.next)
	if _, err := s.f.WriteAt(b, new*kernelChunk); err != nil {
		return err
	}
	var e [16]byte
	binary.LittleEndian.PutUint64(e[0:], uint64(chunk))
	binary.LittleEndian.PutUint64(e[8:], uint64(new))
	if _, err := s.f.WriteAt(e[:], entry); err != nil {
		return err
	}
	s.made[chunk] = new
	s.next++
	return nil
}

// place is where exception n has its chunk, and where its entry, in bytes: see package layer.
func place(n int64) (chunk, entry int64) {
	const perArea = kernelChunk / 16
	area := 1 + n/perArea*(perArea+1)
	return area + 1 + n%perArea, area*kernelChunk + n%perArea*16
}

// put writes pieces through an image's chain.
func (k *kernel) put(img image.Image, at []int64, pieces [][]byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	slabs, err := k.open(img.Handle.Domain, k.chainOf(img))
	if err != nil {
		return err
	}
	defer closeAll(slabs)
	if img.Mutable && k.tops[img.Handle] == nil && len(img.Attachments) > 0 {
		return errors.New("a write to what is attached and not staged")
	}
	b := make([]byte, kernelChunk)
	for i, off := range at {
		for piece := pieces[i]; len(piece) > 0; {
			chunk := off / kernelChunk
			if err := readChunk(slabs, chunk, b); err != nil {
				return err
			}
			n := copy(b[off%kernelChunk:], piece)
			if err := slabs[0].write(chunk, b); err != nil {
				return err
			}
			off, piece = off+int64(n), piece[n:]
		}
	}
	return nil
}

// content reads an image through its recorded chain, and through its device
// where it is staged: both must be the same.
func (k *kernel) content(img image.Image) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	b, err := k.whole(img.Handle.Domain, img.Chain, img.Size)
	if err != nil {
		return nil, err
	}
	if top := k.tops[img.Handle]; top != nil {
		live, err := k.whole(img.Handle.Domain, top, img.Size)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(b, live) {
			return nil, fmt.Errorf("%s: the recorded chain %v reads other than the device %v", img.Handle, img.Chain, top)
		}
	}
	return b, nil
}

func (k *kernel) whole(domain string, chain []image.SlabRef, size int64) ([]byte, error) {
	slabs, err := k.open(domain, chain)
	if err != nil {
		return nil, err
	}
	defer closeAll(slabs)
	b := make([]byte, size)
	for c := int64(0); c < size/kernelChunk; c++ {
		if err := readChunk(slabs, c, b[c*kernelChunk:(c+1)*kernelChunk]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// broken notes what must never be asked of a kernel.
func (k *kernel) broken(format string, args ...any) error {
	err := fault.New(fault.Internal, format, args...)
	if k.complaint == nil {
		k.complaint = err
	}
	return err
}

func (k *kernel) fine() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.complaint
}

// chainAgents are the agents that one process of a manager speaks with.
type chainAgents struct {
	k *kernel
	c *control
}

func (a chainAgents) Nodes() []string { return []string{"n1", "n2"} }

func (a chainAgents) Agent(node string) (image.Agent, error) {
	if !slices.Contains(a.Nodes(), node) {
		return nil, fault.New(fault.NotFound, "there is no node %s", node)
	}
	return chainAgent{a.k, a.c, node}, nil
}

// chainAgent is that of one node.
type chainAgent struct {
	k    *kernel
	c    *control
	node string
}

func (a chainAgent) call(verb string, h image.Handle, f func() error) error {
	return a.c.call("agent "+verb, h.String(), func() error {
		a.k.mu.Lock()
		defer a.k.mu.Unlock()
		return f()
	})
}

func (a chainAgent) Freeze(context.Context, image.Handle, time.Duration) (image.Frozen, error) {
	return image.NotFreezable, nil
}
func (a chainAgent) Thaw(context.Context, image.Handle) error { return nil }

func (a chainAgent) Staged(_ context.Context, h image.Handle) (staged bool, err error) {
	err = a.call("Staged", h, func() error { staged = a.k.tops[h] != nil && a.k.nodes[h] == a.node; return nil })
	return staged, err
}

func (a chainAgent) Layers(_ context.Context, h image.Handle) error {
	return a.call("Layers", h, func() error { return nil })
}

func (a chainAgent) Switch(_ context.Context, images []image.Staging, prepared string) error {
	if len(images) == 0 {
		return nil
	}
	return a.call("Switch", images[0].Handle, func() error {
		delete(a.k.ready, prepared)
		a.k.expire(images)
		return a.k.change(images, a.node)
	})
}

func (a chainAgent) Prepare(_ context.Context, images []image.Staging) (prepared string, err error) {
	err = a.call("Prepare", images[0].Handle, func() error {
		a.k.expire(images)
		a.k.holds++
		prepared = fmt.Sprint(a.k.holds)
		if err := a.k.changeable(images, a.node); err != nil {
			return err
		}
		a.k.ready[prepared] = images
		return nil
	})
	return prepared, err
}

func (a chainAgent) Hold(_ context.Context, _ []image.Staging, prepared string) error {
	return a.call("Hold", image.Handle{Image: prepared}, func() error {
		images, ok := a.k.ready[prepared]
		delete(a.k.ready, prepared)
		if !ok {
			return fault.New(fault.Conflict, "it is not prepared any more")
		}
		a.k.expire(images)
		if err := a.k.changeable(images, a.node); err != nil {
			return err
		}
		a.k.held[prepared] = images
		return nil
	})
}

func (a chainAgent) Release(_ context.Context, prepared string) error {
	return a.call("Release", image.Handle{Image: prepared}, func() error {
		if _, ok := a.k.ready[prepared]; ok {
			delete(a.k.ready, prepared)
			return nil
		}
		images, ok := a.k.held[prepared]
		delete(a.k.held, prepared)
		if !ok {
			return fault.New(fault.Conflict, "it is not held any more")
		}
		return a.k.change(images, a.node)
	})
}

// expire ends what is held on the nodes: time has passed, since somebody works on these
// images, or with nil an agent has died. The caller holds k.mu.
func (k *kernel) expire(now []image.Staging) {
	over := func(images []image.Staging) bool {
		return now == nil || slices.ContainsFunc(images, func(st image.Staging) bool {
			return slices.ContainsFunc(now, func(other image.Staging) bool { return other.Handle == st.Handle })
		})
	}
	maps.DeleteFunc(k.ready, func(_ string, images []image.Staging) bool { return over(images) })
	for hold, images := range k.held {
		if !over(images) {
			continue
		}
		delete(k.held, hold)
		for _, node := range []string{"n1", "n2"} {
			if err := k.change(images, node); err != nil && k.complaint == nil && fault.KindOf(err) != fault.Unavailable {
				k.complaint = err
			}
		}
	}
}

// changeable refuses other chains for images where they would show something else.
// The caller holds k.mu.
func (k *kernel) changeable(images []image.Staging, node string) error {
	for _, st := range images {
		if err := k.admit(st); err != nil {
			return err
		}
		top := k.tops[st.Handle]
		if top == nil || k.nodes[st.Handle] != node {
			continue
		}
		before, err := k.whole(st.Domain, top, st.Size)
		if err != nil {
			return err
		}
		after, err := k.whole(st.Domain, st.Slabs, st.Size)
		if err != nil {
			return err
		}
		if !bytes.Equal(before, after) {
			return k.broken("a switch of %s from %v to %v changes what it holds", st.Handle, top, st.Slabs)
		}
	}
	return nil
}

// change gives images on a node other chains. The caller holds k.mu.
func (k *kernel) change(images []image.Staging, node string) error {
	if err := k.changeable(images, node); err != nil {
		return err
	}
	for _, st := range images {
		top := k.tops[st.Handle]
		if top == nil || k.nodes[st.Handle] != node {
			continue
		}
		for _, s := range top {
			if !slices.Contains(st.Slabs, s) {
				delete(k.merging, st.Domain+"/"+s.ID)
			}
		}
		k.tops[st.Handle] = slices.Clone(st.Slabs)
	}
	return nil
}

func (a chainAgent) Merge(_ context.Context, st image.Staging) (m image.Merging, err error) {
	err = a.call("Merge", st.Handle, func() error {
		if err := a.k.admit(st); err != nil {
			return err
		}
		m, err = a.k.merge(st)
		return err
	})
	return m, err
}

// merge copies some exceptions of the first slab into what lies below it.
func (k *kernel) merge(st image.Staging) (image.Merging, error) {
	child, parent := st.Slabs[0], st.Slabs[1]
	k.looks++
	slab := st.Domain + "/" + child.ID
	if k.merged[slab] {
		return image.Merging{Done: true}, nil
	}
	if parent.Size < child.Size {
		return image.Merging{}, k.broken("merge %s into %s, which is smaller", child.ID, parent.ID)
	}
	for h, chain := range k.tops {
		has := func(id string) bool {
			return slices.ContainsFunc(chain, func(s image.SlabRef) bool { return s.ID == id })
		}
		if h.Domain == st.Domain && has(parent.ID) && !has(child.ID) {
			return image.Merging{}, k.broken("merge %s into %s, which %s reads", child.ID, parent.ID, h)
		}
	}
	for _, read := range k.private {
		if read.Domain == st.Domain && slices.ContainsFunc(read.Slabs, func(s image.SlabRef) bool { return s.ID == child.ID || s.ID == parent.ID }) {
			return image.Merging{}, k.broken("merge %s into %s while a copy of %v runs", child.ID, parent.ID, read.Slabs)
		}
	}
	slabs, err := k.open(st.Domain, st.Slabs)
	if err != nil {
		return image.Merging{}, err
	}
	defer closeAll(slabs)
	if !k.merging[slab] {
		k.merging[slab] = true
		k.merges = append(k.merges, len(st.Slabs))
	}
	from, below := slabs[0], slabs[1:]
	order := make([]int64, from.next)
	for old, new := range from.made {
		const perArea = kernelChunk / 16
		i := (new-1)/(perArea+1)*perArea + (new-1)%(perArea+1) - 1
		order[i] = old
	}
	b := make([]byte, kernelChunk)
	for n := 0; from.next > 0 && (k.steps == 0 || n < k.steps); n++ {
		old := order[from.next-1]
		new, entry := place(from.next - 1)
		if _, err := from.f.ReadAt(b, new*kernelChunk); err != nil {
			return image.Merging{}, err
		}
		if err := below[0].write(old, b); err != nil {
			return image.Merging{}, err
		}
		if _, err := from.f.WriteAt(make([]byte, 16), entry); err != nil {
			return image.Merging{}, err
		}
		from.next--
	}
	if from.next > 0 {
		return image.Merging{Left: from.next * kernelChunk}, nil
	}
	delete(k.merging, slab)
	if k.live(slab) {
		k.merged[slab] = true
	}
	return image.Merging{Done: true}, nil
}

func (a chainAgent) StopMerge(_ context.Context, st image.Staging) error {
	return a.call("StopMerge", st.Handle, func() error {
		if err := a.k.admit(st); err != nil {
			return err
		}
		delete(a.k.merging, st.Domain+"/"+st.Slabs[0].ID)
		return nil
	})
}

func (a chainAgent) AttachImage(_ context.Context, st image.Staging) (path string, err error) {
	err = a.call("AttachImage", st.Handle, func() error {
		b, err := a.k.whole(st.Domain, st.Slabs, st.Size)
		if err != nil {
			return err
		}
		f, err := os.CreateTemp(a.k.t.TempDir(), "chain-")
		if err != nil {
			return err
		}
		path = f.Name()
		a.k.private[path] = st
		_, err = f.Write(b)
		return errors.Join(err, f.Close())
	})
	return path, err
}

func (a chainAgent) DetachImage(_ context.Context, h image.Handle, path string) error {
	return a.call("DetachImage", h, func() error {
		delete(a.k.private, path)
		return os.Remove(path)
	})
}

var _ image.ChainAgent = chainAgent{}

// isMerge says whether an operation is a merge or a flattening, which nobody waits for.
func isMerge(op image.Operation) bool {
	return strings.HasPrefix(op.Op, "merge") || strings.HasPrefix(op.Op, "flatten")
}
