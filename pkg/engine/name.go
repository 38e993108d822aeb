package engine

import (
	"strings"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// CheckName verifies a slab ID or a tag name: 1 to MaxName characters of
// [a-z0-9._-], the first a letter or a digit. what says which of them it is,
// for the message. The error is fault.Invalid.
func CheckName(what, name string) error {
	if name == "" || len(name) > MaxName {
		return fault.New(fault.Invalid, "%s %q has %d characters: 1 to %d are allowed", what, name, len(name), MaxName)
	}
	for i := range len(name) {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '.' && c != '_' && c != '-') {
			return fault.New(fault.Invalid, "%s %q: character %q at %d is not allowed: [a-z0-9._-], beginning with a letter or digit", what, name, c, i)
		}
	}
	return nil
}

// CheckTag verifies a tag's name, slab and record size. The error is fault.Invalid.
func CheckTag(t Tag) error {
	if err := CheckName("tag name", t.Name); err != nil {
		return err
	}
	if t.Slab != "" {
		if err := CheckName("slab ID", t.Slab); err != nil {
			return err
		}
	}
	if len(t.Record) > MaxRecord {
		return fault.New(fault.Invalid, "record of tag %q has %d bytes: at most %d are allowed", t.Name, len(t.Record), MaxRecord)
	}
	return nil
}

// CheckSpec verifies a slab's ID, kind and size. The error is fault.Invalid.
func CheckSpec(s SlabSpec) error {
	if err := CheckName("slab ID", s.ID); err != nil {
		return err
	}
	if s.Kind != Block && s.Kind != Tree {
		return fault.New(fault.Invalid, "slab %q: kind %q is unknown: %q or %q", s.ID, s.Kind, Block, Tree)
	}
	if s.Size <= 0 {
		return fault.New(fault.Invalid, "slab %q: size %d: it must be greater than zero", s.ID, s.Size)
	}
	return nil
}

// NoMountOptions refuses mount options, for an engine that takes none. The value of an option may
// be secret, and is not in the error.
func NoMountOptions(opts AttachOptions) error {
	if len(opts.MountOptions) == 0 {
		return nil
	}
	name, _, _ := strings.Cut(opts.MountOptions[0], "=")
	return fault.New(fault.Invalid, "mount option %q: this storage takes no mount options: leave it out of the class's mountOptions", name)
}
