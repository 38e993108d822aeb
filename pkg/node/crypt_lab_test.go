package node

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/image"
	"github.com/quarry-csi/quarry/test/lab"
)

const (
	testHeader     = 16 << 20
	testPassphrase = "correct horse"
)

// encrypted makes a fresh encrypted image.
func (w *world) encrypted(name string, payload int64) image.Handle {
	w.t.Helper()
	h := w.volume(name, payload+testHeader)
	w.change(h, func(s *image.Staging) { s.Crypt = testHeader })
	return h
}

func (w *world) open(h image.Handle, passphrase Passphrase) error {
	r := w.request(h, host.Ext4)
	r.Access.Block = w.images[h].Block
	r.Passphrase = passphrase
	err := w.node.Stage(context.Background(), r)
	if err != nil && strings.Contains(err.Error(), "horse") {
		w.t.Fatalf("%v tells the passphrase", err)
	}
	return err
}

// sealed checks that a slab does not show what it holds.
func (w *world) sealed(name string) {
	w.t.Helper()
	b, err := os.ReadFile(w.path(name))
	w.ok(err)
	if bytes.Contains(b, []byte("clear text")) || bytes.Contains(b, []byte("horse")) {
		w.t.Fatalf("slab %s holds clear text", name)
	}
}

func TestAnEncryptedVolumeIsStagedWithItsPassphraseOnly(t *testing.T) {
	lab.Need(t)
	w := newWorld(t)
	h := w.encrypted("v", 32<<20)
	w.fails(w.open(h, ""), fault.Invalid, "encryptionPassphrase")
	w.ok(w.open(h, testPassphrase))
	if w.formatted[h] != 1 || w.images[h].Fresh {
		t.Fatal("it was not sealed")
	}
	at := w.staging(h)
	w.write(filepath.Join(at, "f"), "clear text")
	w.ok(w.open(h, testPassphrase)) // once more
	w.fails(w.open(h, ""), fault.Unavailable, "encryptionPassphrase")

	// It grows in use, of an agent that was restarted and has no passphrase.
	w.restart()
	w.ok(os.Truncate(w.path("v"), 64<<20+testHeader))
	w.change(h, func(s *image.Staging) { s.Size = 64<<20 + testHeader })
	got, err := w.node.Expand(context.Background(), h, at, 64<<20)
	w.ok(err)
	u, err := w.node.Stats(context.Background(), h, at)
	w.ok(err)
	if got != 64<<20 || u.Total < 50<<20 || u.Total > 64<<20 || len(u.Conditions) > 0 {
		t.Fatalf("%d, %+v", got, u)
	}
	w.reads(filepath.Join(at, "f"), "clear text")
	w.unstage(h)
	w.sealed("v")

	w.fails(w.open(h, "something else"), fault.Permission, "encryptionPassphrase", "clone")
	if staged, err := w.node.Staged(context.Background(), h); err != nil || staged || w.slabs.of("v") {
		t.Fatal("a refused passphrase leaves something on the node", err)
	}
	w.ok(w.open(h, testPassphrase))
	w.reads(filepath.Join(at, "f"), "clear text")
	if w.formatted[h] != 1 {
		t.Fatal("it was formatted again")
	}
	w.unstage(h)
}

func TestAnEncryptedRawVolumeIsSealedBeforeItIsHandedOut(t *testing.T) {
	lab.Need(t)
	w := newWorld(t)
	h := w.encrypted("r", 8<<20)
	w.change(h, func(s *image.Staging) { s.Block = true })
	w.failSeal = fault.New(fault.Unavailable, "the manager is away")
	w.fails(w.open(h, testPassphrase), fault.Unavailable)
	p := w.publication(h, "target")
	p.Access.Block = true
	w.restart() // killed there
	w.failSeal = nil
	w.ok(w.open(h, testPassphrase))
	w.ok(w.node.Publish(context.Background(), p))
	f, err := os.OpenFile(p.TargetPath, os.O_RDWR, 0)
	w.ok(err)
	size, err := f.Seek(0, 2)
	w.ok(err)
	if size != 8<<20 {
		t.Fatalf("the workload sees %d bytes", size)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte("clear text......"), 256), 0)
	w.ok(err)
	w.ok(f.Close())
	w.ok(w.node.Unpublish(context.Background(), h, p.TargetPath))
	w.unstage(h)
	w.sealed("r")

	w.ok(w.open(h, testPassphrase))
	p.ReadOnly = true
	w.ok(w.node.Publish(context.Background(), p))
	f, err = os.Open(p.TargetPath)
	w.ok(err)
	b := make([]byte, 16)
	_, err = f.ReadAt(b, 0)
	w.ok(err)
	w.ok(f.Close())
	if string(b) != "clear text......" {
		t.Fatalf("%q", b)
	}
	w.ok(w.node.Unpublish(context.Background(), h, p.TargetPath))
	w.unstage(h)
}

// A top whose crypt device is missing, as an agent leaves it that is killed in
// between, is neither published nor in the way.
func TestCiphertextIsNeverPublished(t *testing.T) {
	lab.Need(t)
	w := newWorld(t)
	ctx := context.Background()
	h := w.encrypted("r", 8<<20)
	w.change(h, func(s *image.Staging) { s.Block = true })
	w.ok(w.open(h, testPassphrase))
	over, err := w.node.host.Mapped(ctx, "QUARRY-c-b-")
	w.ok(err)
	for _, m := range over {
		w.ok(w.node.host.RemoveMapped(ctx, m))
	}
	p := w.publication(h, "target")
	p.Access.Block = true
	w.fails(w.node.Publish(ctx, p), fault.InUse, "not staged")
	w.fails(w.open(h, "something else"), fault.Permission)
	w.ok(w.open(h, testPassphrase))
	w.ok(w.node.Publish(ctx, p))
	w.ok(w.node.Unpublish(ctx, h, p.TargetPath))
	w.unstage(h)
}
