package block

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

// logged is a block device with a write cache that a power cut empties: the kernel's
// log-writes target notes each write when a flush has ended after it.
type logged struct {
	name, log string // the log is a device
	size      int64
	gone      bool
}

func (r *rig) logged(name string, size int64) *logged {
	r.Helper()
	l := &logged{name: name, log: lab.Loop(r.T, 64*mib), size: size}
	disk := lab.Loop(r.T, size)
	run(r.T, "modprobe", "dm-log-writes")
	run(r.T, "dmsetup", "create", name, "--table", fmt.Sprintf("0 %d log-writes %s %s", size/sector, disk, l.log))
	r.Cleanup(func() {
		if !l.gone {
			run(r.T, "dmsetup", "remove", "--retry", "--force", name)
		}
	})
	return l
}

const cut = "cut"

// cut is the moment at which the power goes.
func (l *logged) cut(t testing.TB) { run(t, "dmsetup", "message", l.name, "0", "mark", cut) }

// after writes into a file what the device holds when the power is back. The
// device is removed. The log: see drivers/md/dm-log-writes.c.
func (l *logged) after(r *rig, file string) {
	r.Helper()
	run(r.T, "dmsetup", "remove", "--retry", l.name)
	l.gone = true
	const (
		magic            = 0x6a736677736872
		discard, isAMark = 1 << 2, 1 << 3
	)
	f, err := os.Open(l.log)
	r.must(err)
	defer f.Close()
	out, err := os.Create(file)
	r.must(err)
	defer out.Close()
	r.must(out.Truncate(l.size))
	var b [unit]byte
	read := func(at int64) []byte {
		r.Helper()
		_, err := f.ReadAt(b[:], at)
		r.must(err)
		return b[:]
	}
	le := binary.LittleEndian
	super := read(0)
	block := int64(le.Uint32(super[24:]))
	entries := le.Uint64(super[16:])
	if le.Uint64(super) != magic || block < sector || block > unit {
		r.Fatalf("the log of %s begins with %x", l.name, super[:32])
	}
	writes := 0
	for at := block; entries > 0; entries-- {
		e := read(at)
		to, n, flags, length := int64(le.Uint64(e)), int64(le.Uint64(e[8:])), le.Uint64(e[16:]), le.Uint64(e[24:])
		if flags&isAMark != 0 && bytes.HasPrefix(e[32:], []byte(cut)) && length >= uint64(len(cut)) {
			r.Logf("%s: %d writes were durable", l.name, writes)
			return
		}
		at += block
		if flags&discard != 0 {
			_, err = out.WriteAt(make([]byte, n*block), to*block)
			r.must(err)
			continue
		}
		_, err := io.Copy(io.NewOffsetWriter(out, to*block), io.NewSectionReader(f, at, n*block))
		r.must(err)
		at += n * block
		writes++
	}
	r.Fatalf("the log of %s has no power cut", l.name)
}

// powered is an image of a layer over a raw slab, of both of which is known what was
// durable when the power went.
type powered struct {
	*rig
	size    int64
	logs    []*logged
	slabs   []Slab // the layer first
	dev     Device
	content content
}

// powered attaches the raw slab alone.
func (r *rig) powered(size int64) *powered {
	r.Helper()
	chunk := layer.ChunkSize(size)
	p := &powered{rig: r, size: size, content: content{}}
	for _, s := range []Slab{{ID: "d/logged-over", Chunk: chunk}, {ID: "d/logged-base"}} {
		name, room := strings.TrimPrefix(s.ID, "d/"), size
		if s.Chunk > 0 {
			room = layer.StoreSize(size, chunk)
		}
		p.logs = append(p.logs, r.logged(name, room))
		s.Path, s.Size = "/dev/mapper/"+name, size
		p.slabs = append(p.slabs, s)
	}
	f, err := os.OpenFile(p.slabs[0].Path, os.O_RDWR, 0)
	r.must(err)
	r.must(layer.Format(f, chunk))
	r.must(f.Close())
	p.dev = r.attach(spec(p.slabs[1]))
	return p
}

// unflushed writes to the image, and no flush follows.
func (p *powered) unflushed(value uint64, units ...int64) {
	p.Helper()
	f, err := direct(p.dev.Path, os.O_RDWR)
	p.must(err)
	defer f.Close()
	for _, u := range units {
		p.content[u] = value
		_, err := f.WriteAt(pattern(aligned(unit), u, value), u*unit)
		p.must(err)
	}
}

// cut takes the power away and compares what is there when it is back with the
// content; lost are the units that were never flushed, and may have either.
func (p *powered) cut(lost ...int64) {
	p.Helper()
	for _, l := range p.logs {
		l.cut(p)
	}
	want := p.content.copy()
	p.unflushed(99, lost...)
	p.detach(p.dev)
	p.must(p.d.Collect(bg, "d"))
	for i, l := range p.logs {
		p.slabs[i].Path = p.dir + "/" + strings.TrimPrefix(p.slabs[i].ID, "d/")
		l.after(p.rig, p.slabs[i].Path)
	}
	again := p.attach(spec(p.slabs...))
	f, err := direct(again.Path, os.O_RDONLY)
	p.must(err)
	defer f.Close()
	got, expected := aligned(unit), aligned(unit)
	for u := range p.size / unit {
		_, err := f.ReadAt(got, u*unit)
		p.must(err)
		if !slices.Contains(lost, u) && !bytes.Equal(got, pattern(expected, u, want[u])) {
			p.Fatalf("after the power cut unit %d has number %d, want %d", u, binary.LittleEndian.Uint64(got[8:]), want[u])
		}
	}
}

// A raw volume is written without a flush, gets a layer, and is written and flushed
// then: that flush goes to the layer's store, and all that was written before it must be
// there after a power cut, in the layer and below it.
func TestAPowerCutRightAfterACut(t *testing.T) {
	p := newRig(t).powered(2 * mib)
	p.unflushed(1, every(0, 3, p.size)...)
	p.change(p.slabs...)
	p.unflushed(2, every(0, 5, p.size)...)
	p.write(p.dev.Path, p.content, 3, 7) // with the flush
	p.cut(1, 2, 11)
	snap := p.reader("snapshot", p.slabs[1])
	before := content{}
	for _, u := range every(0, 3, p.size) {
		before[u] = 1
	}
	p.verify("the snapshot", snap.Path, p.size, before)
}

// While the layer is merged, what is written to other chunks goes to the slab below,
// also when all is merged, and the kernel has nothing to flush any more. The flush comes
// when the merge was stopped, and goes to the layer's store alone.
func TestAPowerCutAfterAMergeWasStopped(t *testing.T) {
	p := newRig(t).powered(4 * mib)
	p.change(p.slabs...)
	half := p.size / unit / 2
	p.write(p.dev.Path, p.content, 1, every(0, 1, p.size/2)...)
	m, err := p.d.Merge(bg, p.slabs)
	p.must(err)
	if m.Done {
		t.Fatal("merged too soon for this test")
	}
	for end := time.Now().Add(2 * time.Minute); p.stored(p.slabs[0]) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the kernel does not merge")
		}
	}
	p.unflushed(2, every(half, 3, p.size)...)
	p.must(p.d.StopMerge(bg, p.slabs[0].ID))
	p.write(p.dev.Path, p.content, 3, 7) // with the flush
	p.cut(1, 2, half)
}
