package image

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// The names of tags. Each prefix ends at the first dot.
//
//	e.<epoch, 8 hex>                          a manager's claim to the domain
//	o.<epoch, 8 hex>                          what it found of its predecessor: see opening.go
//	n.id                                      the ID of a node-scope domain
//	n.node.<epoch, 8 hex>                     the node that it belongs to: the highest counts
//	i.<image>.<revision, 16 hex>              an image's record
//	d.<image>                                 its description for people
//	a.<image>.<node>.<generation, 16 hex>     an attachment, or its end: the highest generation counts
//	p.<image>.<revision, 16 hex>              a pin: a copy into another domain reads this image
const (
	prefixEpoch      = "e."
	prefixImage      = "i."
	prefixDescribe   = "d."
	prefixAttachment = "a."
	prefixPin        = "p."
	prefixDomain     = "n."
	nameDomainID     = prefixDomain + "id"
	prefixDomainNode = prefixDomain + "node."
)

// The formats of records. An image whose slab is a layer is written in the
// second, which a Quarry without layers refuses, an encrypted one in the third, one whose
// layers are thin in the fourth, all others in the first.
const (
	recordVersion      = 1
	recordVersionLayer = 2
	recordVersionCrypt = 3
	recordVersionThin  = 4
)

// A revision is epoch<<32 | counter: within a domain it is never used twice.
type revision uint64

func (r revision) epoch() uint32  { return uint32(r >> 32) }
func (r revision) String() string { return fmt.Sprintf("%016x", uint64(r)) }

func parseRevision(s string) (revision, bool) {
	if len(s) != 16 {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 16, 64)
	return revision(n), err == nil
}

func epochTag(epoch uint32) string { return fmt.Sprintf("%s%08x", prefixEpoch, epoch) }

func parseEpochTag(name string) (uint32, bool) {
	s, ok := strings.CutPrefix(name, prefixEpoch)
	if !ok || len(s) != 8 {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 16, 32)
	return uint32(n), err == nil
}

func imageTag(id string, r revision) string { return prefixImage + id + "." + r.String() }
func pinTag(id string, r revision) string   { return prefixPin + id + "." + r.String() }

// parseRevTag splits "<prefix><image>.<revision>".
func parseRevTag(prefix, name string) (id string, r revision, ok bool) {
	s, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return "", 0, false
	}
	id, rev, ok := strings.Cut(s, ".")
	if !ok || id == "" {
		return "", 0, false
	}
	r, ok = parseRevision(rev)
	return id, r, ok
}

// attachmentTag names an attachment. A node name that does not fit into a tag
// name is replaced by its hash; the record holds the real one.
func attachmentTag(id, node string, gen revision) string {
	short := node
	if len(short) > 63 || strings.Contains(short, ".") || engine.CheckName("node", short) != nil {
		sum := sha256.Sum256([]byte(node))
		short = "h-" + hex.EncodeToString(sum[:10])
	}
	return prefixAttachment + id + "." + short + "." + gen.String()
}

// nodeOfAttachment reads the node out of an attachment's name; ok is false
// where the name holds its hash only.
func nodeOfAttachment(tag string) (node string, ok bool) {
	parts := strings.Split(tag, ".")
	if len(parts) != 4 || strings.HasPrefix(parts[2], "h-") {
		return "", false
	}
	return parts[2], true
}

// incarnation makes an image ID: the hash of the CSI name (80 bits, so that
// it is short and needs no escaping) and the revision of the intent.
func incarnation(space, name string, r revision) string {
	sum := sha256.Sum256([]byte(space + "/" + name))
	return hex.EncodeToString(sum[:10]) + "-" + strconv.FormatUint(uint64(r), 16)
}

// born is the revision of the intent that an incarnation came from.
func born(id string) revision {
	_, rev, _ := strings.Cut(id, "-")
	n, _ := strconv.ParseUint(rev, 16, 64) // 0 for an ID that Quarry did not make
	return revision(n)
}

// EpochOf is the epoch of the manager that gave a slab its name; 0: none did.
func EpochOf(slab string) int64 { return int64(born(slab).epoch()) }

// What a weak record is about.
const (
	opCreate   = "create"   // a volume is being made
	opSnapshot = "snapshot" // a snapshot is being made
	opHidden   = "hidden"   // a snapshot that only a running copy needs
	opMember   = "member"   // a snapshot that is visible through its group's record
	opGroup    = "group"    // a group snapshot is being made
	opFlatten  = "flatten"  // the raw slab of an image whose chain is too long is being made
	opDelete   = "delete"   // deleted by its user
	opSwept    = "swept"    // an operation that nobody will ever finish
)

// record is the content of an i. tag.
type record struct {
	Version  int               `json:"v"`
	Name     string            `json:"n,omitempty"`
	Kind     string            `json:"k"` // "block", "tree" or "group"
	Mutable  bool              `json:"m,omitempty"`
	Strong   bool              `json:"s,omitempty"`
	Op       string            `json:"o,omitempty"` // weak: what about
	Size     int64             `json:"z,omitempty"`
	Alloc    int64             `json:"a,omitempty"` // immutable: bytes allocated at the cut
	Source   string            `json:"src,omitempty"`
	SrcVol   bool              `json:"sv,omitempty"` // the source is a volume
	Created  int64             `json:"t"`            // Unix, milliseconds
	Used     bool              `json:"u,omitempty"`
	FS       string            `json:"fs,omitempty"`
	Cloned   bool              `json:"c,omitempty"`
	Params   map[string]string `json:"p,omitempty"`
	Tuning   *Tuning           `json:"tu,omitempty"`
	How      string            `json:"h,omitempty"`
	Group    string            `json:"g,omitempty"`
	Members  int               `json:"gm,omitempty"`
	Inexact  bool              `json:"x,omitempty"`
	Progress int64             `json:"pr,omitempty"` // bytes of a copy that are durable
	Parent   string            `json:"pa,omitempty"` // the image whose slab lies below
	Chunk    int64             `json:"ck,omitempty"` // of the layer, in bytes; 0: the slab is raw
	Crypt    int64             `json:"cr,omitempty"` // encrypted: bytes of Size that the header takes
	Thin     bool              `json:"th,omitempty"` // the space of its layers is not allocated
	Nonce    string            `json:"no"`
	Sum      string            `json:"sum,omitempty"` // CRC-32C over tag name, slab and the rest
}

const kindGroup = "group"

func (r *record) layout() Layout {
	if r.Kind == string(engine.Tree) {
		return LayoutDirectory
	}
	return LayoutImage
}

func (r *record) created() time.Time { return time.UnixMilli(r.Created) }

// dead says whether the image is gone for users and nothing will revive it.
func (r *record) dead() bool { return !r.Strong && (r.Op == opDelete || r.Op == opSwept) }

// space is the name space of the CSI name: volumes, snapshots and groups have
// one each.
func (r *record) space() string {
	switch {
	case r.Kind == kindGroup:
		return spaceGroup
	case r.Mutable:
		return spaceVolume
	}
	return spaceSnapshot
}

const (
	spaceVolume   = "v"
	spaceSnapshot = "s"
	spaceGroup    = "g"
)

func nonce() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

func checksum(name, slab string, body []byte) string {
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	for _, part := range [][]byte{[]byte(name), {0}, []byte(slab), {0}, body} {
		h.Write(part)
	}
	return fmt.Sprintf("%08x", h.Sum32())
}

// encode makes the tag of a record. The error is fault.Invalid: the record is
// too large because of its name or parameters.
func (r record) encode(name, slab string) (engine.Tag, error) {
	r.Version, r.Sum = recordVersion, ""
	if r.Chunk > 0 {
		r.Version = recordVersionLayer
	}
	if r.Crypt > 0 {
		r.Version = recordVersionCrypt
	}
	if r.Thin {
		r.Version = recordVersionThin
	}
	body, err := marshal(r)
	if err != nil {
		return engine.Tag{}, err
	}
	r.Sum = checksum(name, slab, body)
	if body, err = marshal(r); err != nil {
		return engine.Tag{}, err
	}
	if len(body) > engine.MaxRecord {
		return engine.Tag{}, fault.New(fault.Invalid, "name, source and parameters make a record of %d bytes: at most %d fit; use a shorter name or fewer parameters", len(body), engine.MaxRecord)
	}
	return engine.Tag{Name: name, Slab: slab, Record: body}, nil
}

// marshal is JSON without HTML escapes and without a final newline.
func marshal(v any) ([]byte, error) {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fault.New(fault.Internal, "encode record: %w", err)
	}
	return []byte(strings.TrimSuffix(b.String(), "\n")), nil
}

// decode reads a tag's record back and checks it. The error is fault.Corrupt,
// or fault.Unsupported for a newer format.
func decode(t engine.Tag) (record, error) {
	var r record
	if len(t.Record) == 0 {
		return r, fault.New(fault.Corrupt, "tag %s cannot be read back", t.Name)
	}
	if err := json.Unmarshal(t.Record, &r); err != nil {
		return r, fault.New(fault.Corrupt, "tag %s: %w", t.Name, err)
	}
	if r.Version > recordVersionThin {
		return r, fault.New(fault.Unsupported, "tag %s has format %d, this version of Quarry knows up to %d: upgrade Quarry", t.Name, r.Version, recordVersionThin)
	}
	sum := r.Sum
	r.Sum = ""
	body, err := marshal(r)
	if err != nil {
		return r, err
	}
	if checksum(t.Name, t.Slab, body) != sum {
		return r, fault.New(fault.Corrupt, "tag %s fails its checksum", t.Name)
	}
	return r, nil
}

// epochRecord is the content of an e. tag.
type epochRecord struct {
	Owner string `json:"owner"`
	Time  int64  `json:"t"`
	Nonce string `json:"no"`
}

// attachRecord is the content of an a. tag.
type attachRecord struct {
	Node     string `json:"node"`
	Mode     Mode   `json:"mode"`
	Block    bool   `json:"b,omitempty"`
	FS       string `json:"fs,omitempty"`
	ReadOnly bool   `json:"ro,omitempty"`
	Ended    bool   `json:"e,omitempty"` // the image is not attached to the node any more
	Nonce    string `json:"no"`
}

// pinRecord is the content of a p. tag: Target is the handle of the image
// that is being filled from this one.
type pinRecord struct {
	Target string `json:"target"`
	Nonce  string `json:"no"`
}
