package image

import (
	"context"
	"errors"
	"math"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// EncryptionHeader is how many bytes of its slab the header of an encrypted image
// takes: LUKS2's own default, and a multiple of what most storages allocate at once.
const EncryptionHeader = 16 << 20

// cryptSector is what is encrypted at once: encrypted images are a multiple of it.
const cryptSector = 4 << 10

// payload is how many bytes of an image its users see.
func (r *record) payload() int64 { return r.Size - r.Crypt }

// header is what encryption adds to the slab of a new volume.
func (r *CreateRequest) header() int64 {
	if r.Encrypted {
		return EncryptionHeader
	}
	return 0
}

// Encrypter is an Agent that can say whether its node opens encrypted images.
type Encrypter interface {
	// Encrypts is nil, or fault.Unsupported with what the node lacks.
	Encrypts(ctx context.Context) error
}

func encryption(yes bool) string {
	if yes {
		return "encrypted"
	}
	return "not encrypted"
}

// checkEncryption refuses what cannot be encrypted, or stay so.
func (c *creation) checkEncryption(ctx context.Context) error {
	if c.src != nil && (c.srcRec.Crypt > 0) != c.r.Encrypted {
		return fault.New(fault.Invalid, "the source is %s, and the volume asked for is %s (parameter \"encrypted\"): they must be the same", encryption(c.srcRec.Crypt > 0), encryption(c.r.Encrypted))
	}
	if !c.r.Encrypted {
		return nil
	}
	if c.layout != LayoutImage {
		return fault.New(fault.Invalid, "parameter encrypted=\"true\" and layout %q: only layout %q can be encrypted", c.layout, LayoutImage)
	}
	for _, a := range c.r.Accesses {
		if err := checkEncrypted(a); err != nil {
			return err
		}
	}
	return c.m.encrypts(ctx)
}

// checkEncrypted refuses writers on several nodes: each would make the header of
// a fresh image, and the last one's key would win.
func checkEncrypted(a Access) error {
	if a.Mode == MultiNodeMultiWriter {
		return fault.New(fault.Invalid, "access mode %s and parameter encrypted=\"true\": an encrypted volume is written on one node at a time", a.Mode)
	}
	return nil
}

// encrypts refuses encryption where every node says that it cannot.
func (m *Manager) encrypts(ctx context.Context) error {
	var why error
	for _, n := range m.cfg.Agents.Nodes() {
		a, err := m.cfg.Agents.Agent(n)
		if err != nil {
			return nil // it may be the one that can
		}
		e, ok := a.(Encrypter)
		if !ok {
			return nil
		}
		if err = e.Encrypts(ctx); !errors.Is(err, fault.Unsupported) {
			return nil
		}
		why = fault.New(fault.Invalid, "parameter encrypted=\"true\": no node can open an encrypted volume; node %s: %w", n, err)
	}
	return why
}

// slabSizeFor is sizeFor, and room for a header of so many bytes, which users'
// sizes do not count: of an encrypted image the result is the slab's size.
func slabSizeFor(asked, limit, source int64, of unit, fs string, maxSlab, header int64) (int64, error) {
	if header == 0 {
		return sizeFor(asked, limit, source, of, fs, maxSlab)
	}
	if maxSlab > 0 && maxSlab <= header {
		return 0, fault.New(fault.OutOfRange, "the storage allows slabs of %d bytes, and the header of an encrypted volume takes %d", maxSlab, header)
	}
	payload, err := sizeFor(asked, limit, source, func(int64) int64 { return cryptSector }, fs, max(0, maxSlab-header))
	if err != nil {
		return 0, err
	}
	unit := of(payload + header)
	for unit%cryptSector != 0 {
		unit *= 2
	}
	if payload > math.MaxInt64-header-unit {
		return 0, fault.New(fault.OutOfRange, "size %d is too large: at most %d is possible", payload, math.MaxInt64-header-unit)
	}
	size := payload + header
	if rest := size % unit; rest != 0 {
		size += unit - rest
	}
	switch {
	case limit > 0 && size-header > limit:
		return 0, fault.New(fault.OutOfRange, "the limit %s (%d bytes) is too small: the storage gives multiples of %d, of which the header of an encrypted volume takes %d", bytesText(limit), limit, unit, header)
	case maxSlab > 0 && size > maxSlab:
		return 0, fault.New(fault.OutOfRange, "size %d, with the header of an encrypted volume (%d), is above %d, the largest that the storage allows", size, header, maxSlab)
	}
	return size, nil
}
