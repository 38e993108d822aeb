package lvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Commit tells one state of a group's metadata from all others: as long as it is
// the same, nothing has changed. Seqno grows by one with each commit, until
// somebody restores a backup.
type Commit struct {
	Seqno    int64
	offset   uint64 // of the text in the metadata area
	size     uint64
	checksum uint32
}

// commitLimit is how long a disk has for answering.
const commitLimit = 10 * time.Second

// Commit reads from the group's disks what their metadata is now, without
// starting a program: some hundred bytes of each. fault.Unavailable: a disk cannot
// be read, they do not say the same, or one of them has no metadata of this
// group, or two areas for them; then only the programs know what to think of it.
func (g *Group) Commit(ctx context.Context, uuid string, disks []string) (Commit, error) {
	var first Commit
	for i, disk := range disks {
		var c Commit
		err := g.kernel.Within(ctx, "read LVM's metadata on "+disk, commitLimit, func() (err error) {
			c, err = commitOn(disk, g.name, uuid)
			return err
		})
		if err != nil {
			return Commit{}, err
		}
		if i == 0 {
			first = c
		}
		if c.Seqno != first.Seqno || c.size != first.size || c.checksum != first.checksum { // the offset is each disk's own
			return Commit{}, fault.New(fault.Unavailable, "%s and %s have different metadata of volume group %s", disks[0], disk, g.name)
		}
	}
	if len(disks) == 0 {
		return Commit{}, fault.New(fault.Unavailable, "the disks of volume group %s are not known", g.name)
	}
	return first, nil
}

// The layout of a disk, as lvm2's lib/format_text/layout.h and lib/label/label.h
// have it: a label in one of the first four sectors; behind it where the metadata
// areas are; each of these begins with a header that says where in the area, a
// ring, the text is that counts.
const (
	sector      = 512
	alignment   = 4096 // of direct reads
	labelMagic  = "LABELONE"
	labelType   = "LVM2 001"
	areaMagic   = " LVM2 x[5A%r0N*>"
	areaVersion = 1
	areaLocns   = 40 // in the header: where the list of texts begins
	ignored     = 1  // flag of a text that does not count
	initialCRC  = 0xf597a6cf
)

func commitOn(path, group, uuid string) (Commit, error) {
	wrong := func(format string, args ...any) error {
		return fault.New(fault.Unavailable, "LVM's metadata on %s: "+format, append([]any{path}, args...)...)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0) // past the page cache: other hosts' programs, and ours, write so
	if err != nil {
		return Commit{}, wrong("%w", err)
	}
	defer f.Close()
	buffer, err := unix.Mmap(-1, 0, 2*alignment, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return Commit{}, wrong("%w", err)
	}
	defer func() { _ = unix.Munmap(buffer) }()
	read := func(offset uint64) ([]byte, error) { // one sector
		if offset > 1<<62 {
			return nil, wrong("an offset of %d", offset)
		}
		start := offset / alignment * alignment
		if _, err := f.ReadAt(buffer, int64(start)); err != nil {
			return nil, wrong("%w", err)
		}
		return bytes.Clone(buffer[offset-start:][:sector]), nil
	}

	area, err := onlyArea(read)
	if err != nil {
		return Commit{}, wrong("%w", err)
	}
	header, err := read(area)
	if err != nil {
		return Commit{}, err
	}
	if string(header[4:20]) != areaMagic || le32(header[20:]) != areaVersion || le64(header[24:]) != area ||
		^crc32.Update(^uint32(initialCRC), crc32.IEEETable, header[4:]) != le32(header) {
		return Commit{}, wrong("the header of its area is not one")
	}
	size, locn := le64(header[32:]), header[areaLocns:]
	c := Commit{offset: le64(locn), size: le64(locn[8:]), checksum: le32(locn[16:])}
	if c.offset < sector || c.offset >= size || le32(locn[20:])&ignored != 0 {
		return Commit{}, wrong("its area is not in use")
	}
	text, err := read(area + c.offset)
	if err != nil {
		return Commit{}, err
	}
	if end := size - c.offset; end < sector { // the area is a ring behind its header
		rest, err := read(area + sector)
		if err != nil {
			return Commit{}, err
		}
		text = append(text[:end], rest[:sector-end]...)
	}
	again, err := read(area)
	if err != nil {
		return Commit{}, err
	}
	if !bytes.Equal(header, again) {
		return Commit{}, wrong("it changes just now")
	}
	text, ok := bytes.CutPrefix(text, fmt.Appendf(nil, "%s {\nid = \"%s\"\nseqno = ", group, uuid))
	number, _, ended := bytes.Cut(text, []byte("\n"))
	if !ok || !ended {
		return Commit{}, wrong("it is not of volume group %s, UUID %s", group, uuid)
	}
	if c.Seqno, err = strconv.ParseInt(string(number), 10, 64); err != nil {
		return Commit{}, wrong("%w", err)
	}
	return c, nil
}

// onlyArea finds the metadata area of a disk, as an offset in bytes. A second one
// may have other metadata, for instance when writing it failed.
func onlyArea(read func(uint64) ([]byte, error)) (uint64, error) {
	for s := range uint64(4) {
		label, err := read(s * sector)
		if err != nil {
			return 0, err
		}
		if string(label[:8]) != labelMagic || string(label[24:32]) != labelType {
			continue
		}
		list := label[min(le32(label[20:]), sector):]
		const before = 32 + 8 // the disk's UUID and size
		list = list[min(before, len(list)):]
		var areas []uint64
		for lists := 0; lists < 2 && len(list) >= 16; list = list[16:] { // offset and size of each
			switch offset := le64(list); {
			case offset == 0:
				lists++ // first that of where data is has ended
			case lists == 1:
				areas = append(areas, offset)
			}
		}
		if len(areas) != 1 {
			return 0, fmt.Errorf("the disk has %d metadata areas, not one", len(areas))
		}
		return areas[0], nil
	}
	return 0, fmt.Errorf("the disk has no label of LVM")
}

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
