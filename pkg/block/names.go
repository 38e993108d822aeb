package block

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// Every device below a top belongs to a domain, whose hash is part of its name:
// so what takes one domain's devices down needs to look at no other's.
//
//	top     quarry-<use>-<owner>          QUARRY-<use>-<owner>
//	layer   quarry-s-<domain>-<slab>      QUARRY-s-<domain>-<slab>
//	pad     quarry-o-<domain>-<slab>      QUARRY-o-<domain>-<slab>, slab: the layer's
//	crypt   quarry-c-<use>-<owner>        QUARRY-c-<use>-<owner>; the top's name ends with "-crypt" then
//	loop    mark quarry-s-<domain>-<slab>; of a top without device-mapper quarry-<use>-<owner>
const (
	markPrefix = "quarry-"
	uuidPrefix = "QUARRY-"
	slabKind   = "s-"
	padKind    = "o-"
	cryptKind  = "c-"
	cryptEnd   = "-crypt"
	sector     = 512
)

var uses = [...]Use{View, Private, Raw, Filesystem}

func hash(text string, bytes int) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:bytes])
}

// mark is at most host.MaxMark bytes: a handle may be longer, so it is hashed.
func mark(u Use, owner string) string { return markPrefix + string(u) + "-" + hash(owner, 24) }

func topUUID(u Use, owner string) string { return uuidPrefix + string(u) + "-" + hash(owner, 24) }

func slabUUID(id string) string { return uuidPrefix + slabKind + slabHash(id) }
func slabMark(id string) string { return markPrefix + slabKind + slabHash(id) }

func slabHash(id string) string {
	domain, _, _ := strings.Cut(id, "/")
	return domainHash(domain) + "-" + hash(id, 20)
}

func domainHash(domain string) string { return hash(domain, 4) }

// padOf is the UUID of the pad under a layer's device.
func padOf(layer string) string {
	return uuidPrefix + padKind + strings.TrimPrefix(layer, uuidPrefix+slabKind)
}

// cryptOf is the UUID of the crypt device over a top.
func cryptOf(top string) string { return uuidPrefix + cryptKind + strings.TrimPrefix(top, uuidPrefix) }

// topName is the name of a spec's top. It says whether a crypt device belongs
// over it: what is under it must not be taken for the image's content then.
func (s Spec) topName() string {
	name := nameOf(topUUID(s.Use, s.Owner))
	if s.Crypt != nil {
		name += cryptEnd
	}
	return name
}

// nameOf is the name that goes with a UUID.
func nameOf(uuid string) string { return markPrefix + strings.TrimPrefix(uuid, uuidPrefix) }

func isSlab(uuid string) bool { return strings.HasPrefix(uuid, uuidPrefix+slabKind) }
func isPad(uuid string) bool  { return strings.HasPrefix(uuid, uuidPrefix+padKind) }

// domainOf is the domain's hash in the UUID of a layer or pad, or in a loop
// device's mark; "" for anything else.
func domainOf(name string) string {
	for _, prefix := range []string{uuidPrefix + slabKind, uuidPrefix + padKind, markPrefix + slabKind} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			domain, _, _ := strings.Cut(rest, "-")
			return domain
		}
	}
	return ""
}

// useOf tells a top's use from its mark or UUID.
func useOf(name string) (Use, bool) {
	rest, ok := strings.CutPrefix(name, markPrefix)
	if !ok {
		rest, ok = strings.CutPrefix(name, uuidPrefix)
	}
	if !ok || len(rest) < 3 || rest[1] != '-' || !slices.Contains(uses[:], Use(rest[0])) {
		return 0, false
	}
	return Use(rest[0]), true
}

func number(major, minor uint32) string { return fmt.Sprintf("%d:%d", major, minor) }
