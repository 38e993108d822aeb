package block

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

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

// A raw volume is written without a flush, gets a layer, and is written and flushed
// then: that flush goes to the layer's store, and all that was written before it must be
// there after a power cut, in the layer and below it.
func TestAPowerCutRightAfterACut(t *testing.T) {
	r := newRig(t)
	const size = 2 * mib
	chunk := layer.ChunkSize(size)
	slab := func(name string, size int64, chunk int64) (*logged, Slab) {
		room := size
		if chunk > 0 {
			room = layer.StoreSize(size, chunk)
		}
		l := r.logged(name, room)
		return l, Slab{ID: "d/" + name, Path: "/dev/mapper/" + name, Size: size, Chunk: chunk}
	}
	baseLog, base := slab("logged-base", size, 0)
	overLog, over := slab("logged-over", size, chunk)
	f, err := os.OpenFile(over.Path, os.O_RDWR, 0)
	r.must(err)
	r.must(layer.Format(f, chunk))
	r.must(f.Close())

	dev := r.attach(spec(base))
	c := content{}
	unflushed := func(value uint64, units ...int64) {
		f, err := direct(dev.Path, os.O_RDWR)
		r.must(err)
		defer f.Close()
		for _, u := range units {
			c[u] = value
			_, err := f.WriteAt(pattern(aligned(unit), u, value), u*unit)
			r.must(err)
		}
	}
	unflushed(1, every(0, 3, size)...)
	r.change(over, base)
	unflushed(2, every(0, 5, size)...)
	r.write(dev.Path, c, 3, 7) // with the flush
	baseLog.cut(t)
	overLog.cut(t)
	unflushed(4, 1, 2, 11)
	delete(c, 1)
	delete(c, 2)
	delete(c, 11)

	r.detach(dev)
	r.must(r.d.Collect(bg, "d"))
	for _, s := range []struct {
		l    *logged
		slab *Slab
	}{{baseLog, &base}, {overLog, &over}} {
		s.slab.Path = r.dir + "/" + strings.TrimPrefix(s.slab.ID, "d/")
		s.l.after(r, s.slab.Path)
	}
	again := r.attach(spec(over, base))
	// What was never flushed may be there or not.
	g, err := direct(again.Path, os.O_RDONLY)
	r.must(err)
	got, want := aligned(unit), aligned(unit)
	for u := range int64(size / unit) {
		_, err := g.ReadAt(got, u*unit)
		r.must(err)
		if u != 1 && u != 2 && u != 11 && !bytes.Equal(got, pattern(want, u, c[u])) {
			t.Fatalf("after the power cut unit %d has number %d, want %d", u, binary.LittleEndian.Uint64(got[8:]), c[u])
		}
	}
	r.must(g.Close())
	snap := r.reader("snapshot", base)
	before := content{}
	for _, u := range every(0, 3, size) {
		before[u] = 1
	}
	r.verify("the snapshot", snap.Path, size, before)
}
