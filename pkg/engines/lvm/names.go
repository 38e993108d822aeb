package lvm

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// What is in a volume group beside what others have there:
//
//	quarry     the marker: its LVM tag says what the group is used for
//	qt.<name>  a tag: LVM tags q:t=<name>:<slab>:<checksum> and q:r=<record in base64>
//	qs.<id>    a slab: LVM tag q:s=<id>
//	qp.<id>    a slab that is not finished
//
// A slab that was imported, and is not final, has LVM tag q:i=<id>:<its own name> in place
// of q:s=<id>: without the latter nothing is destroyed.
//
// LVM's names are shorter than ours, and some parts of names are LVM's own: all
// of those begin with an underscore. A name that does not fit is replaced by its
// hash, after a hyphen instead of the dot; the LVM tag holds the real one.
const (
	marker  = "quarry"
	tagSort = "qt"
	slabs   = "qs"
	partial = "qp"

	markTag    = "q:d="
	nameTag    = "q:t="
	recordTag  = "q:r="
	slabTag    = "q:s="
	importTag  = "q:i="
	listedName = 120 // of 127: a tag's volume is never a device
	// deviceName is for slabs, of the 127 that device-mapper has for a name with its
	// group's: hyphens count twice there.
	deviceName = 64
)

// maxGroup is the longest name of a volume group, hyphens counted twice, so
// that every slab's device has a name.
const maxGroup = 127 - len("-") - deviceName

// volume names the logical volume of a tag or slab.
func volume(sort, name string) string {
	plain := sort + "." + name
	fits := len(plain) <= listedName
	if sort != tagSort {
		fits = len(lvm.Escape(plain)) <= deviceName
	}
	if fits && !strings.Contains(name, "_") {
		return plain
	}
	sum := sha256.Sum256([]byte(name))
	return sort + "-" + hex.EncodeToString(sum[:20])
}

// known is the name that a volume's own name shows; "": it is hashed, or not ours.
func known(sort, lv string) string {
	name, ok := strings.CutPrefix(lv, sort+".")
	if !ok || engine.CheckName("name", name) != nil || volume(sort, name) != lv {
		return ""
	}
	return name
}

func checksum(t engine.Tag) uint32 {
	return crc32.Update(crc32.ChecksumIEEE([]byte(t.Name+":"+t.Slab+":")), crc32.IEEETable, t.Record)
}

// encodeTag renders the LVM tags that carry a tag: at most 1024 characters of
// [A-Za-z0-9_+.-/=!:&#] each.
func encodeTag(t engine.Tag) []string {
	out := []string{fmt.Sprintf("%s%s:%s:%08x", nameTag, t.Name, t.Slab, checksum(t))}
	if len(t.Record) > 0 {
		out = append(out, recordTag+base64.RawURLEncoding.EncodeToString(t.Record))
	}
	return out
}

// decodeTag reads a tag from its volume. One that is damaged has a nil Record
// and an empty Slab; ok is false where not even its name is left.
func decodeTag(v lvm.Volume) (t engine.Tag, ok bool) {
	t.Record = []byte{}
	for _, lvmTag := range v.Tags {
		if said, is := strings.CutPrefix(lvmTag, nameTag); is {
			t.Name, said, _ = strings.Cut(said, ":")
			t.Slab, _, _ = strings.Cut(said, ":")
		} else if said, is := strings.CutPrefix(lvmTag, recordTag); is {
			t.Record, _ = base64.RawURLEncoding.DecodeString(said) // what is wrong fails the comparison
		}
	}
	// The one test that nothing can slip through: it reads as it would be written.
	want, have := encodeTag(t), slices.Clone(v.Tags)
	have = slices.DeleteFunc(have, func(s string) bool { return !strings.HasPrefix(s, nameTag) && !strings.HasPrefix(s, recordTag) })
	slices.Sort(want)
	slices.Sort(have)
	if engine.CheckTag(t) == nil && volume(tagSort, t.Name) == v.Name && slices.Equal(want, have) {
		return t, true
	}
	if name := known(tagSort, v.Name); name != "" {
		return engine.Tag{Name: name}, true
	}
	if engine.CheckName("name", t.Name) == nil && volume(tagSort, t.Name) == v.Name {
		return engine.Tag{Name: t.Name}, true
	}
	return engine.Tag{}, false
}

// encodeImport renders the LVM tag of a volume that becomes a slab and keeps its own name in mind.
func encodeImport(id, own string) string { return importTag + id + ":" + own }

// decodeImport reads the own name of a slab that is not final; "": it is, or never was imported.
func decodeImport(v lvm.Volume, id string) string {
	for _, lvmTag := range v.Tags {
		if own, is := strings.CutPrefix(lvmTag, encodeImport(id, "")); is && lvmName(own) {
			return own
		}
	}
	return ""
}

// reserved says whether a name is one of those that only Quarry gives.
func reserved(lv string) bool {
	for _, sort := range []string{tagSort, slabs, partial} {
		if strings.HasPrefix(lv, sort+".") || strings.HasPrefix(lv, sort+"-") {
			return true
		}
	}
	return lv == marker
}

// decodeSlab reads a slab's ID from its volume; "" where it is not to be known.
func decodeSlab(v lvm.Volume) string {
	if id := known(slabs, v.Name); id != "" {
		return id
	}
	for _, lvmTag := range v.Tags {
		id, is := strings.CutPrefix(lvmTag, slabTag)
		if !is {
			id, is = strings.CutPrefix(lvmTag, importTag)
			id, _, _ = strings.Cut(id, ":")
		}
		if is && engine.CheckName("slab ID", id) == nil && volume(slabs, id) == v.Name {
			return id
		}
	}
	return ""
}
