package node

import (
	"context"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
)

// Passphrase is a text that nothing prints.
type Passphrase = host.Secret

// PassphraseKey is the key of the passphrase in the secrets of a call, the one
// that ceph-csi has too: a secret made for it serves here.
const PassphraseKey = "encryptionPassphrase"

var _ image.Encrypter = (*Node)(nil)

// Encrypts implements image.Encrypter.
func (n *Node) Encrypts(ctx context.Context) error { return n.devices.Encrypts(ctx) }

// cryptOf says how to open an image; nil: it is not encrypted.
func cryptOf(r StageRequest, st image.Staging) *block.Crypt {
	if st.Crypt == 0 {
		return nil
	}
	return &block.Crypt{Header: st.Crypt, Passphrase: r.Passphrase, Format: st.Fresh}
}

// sealHeader seals that a raw block volume has its header; until then it is
// fresh. One with a filesystem is sealed with that.
func (n *Node) sealHeader(ctx context.Context, r StageRequest, st image.Staging) error {
	if st.Crypt == 0 || !st.Fresh {
		return nil
	}
	return n.cfg.Manager.Formatted(ctx, r.Handle, n.cfg.NodeID, "")
}

// refused adds to an error about an encrypted image what to do.
func refused(err error, st image.Staging) error {
	if st.Crypt == 0 || fault.KindOf(err) != fault.Permission {
		return err
	}
	return fault.New(fault.Permission, "%w: the key %q of the secret that the storage class names must hold the passphrase with which the volume, or the one that it is a clone of, was first used, to the last byte", err, PassphraseKey)
}
