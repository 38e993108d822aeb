package block_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/block"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
	"github.com/quarry-csi/quarry/pkg/layer"
	"github.com/quarry-csi/quarry/test/lab"
)

const (
	header = 16 << 20
	pass   = "correct horse\nbattery staple"
)

// safe is an encrypted image in a domain of files.
type safe struct {
	*testing.T
	dir   string
	owner string
	d     *block.Devices
	slabs []block.Slab // head first
	size  int64        // payload
	use   block.Use
}

func newSafe(t *testing.T) *safe {
	lab.Need(t)
	s := &safe{T: t, dir: t.TempDir(), owner: "crypt/v", d: devicesHere(), size: 32 << 20, use: block.Raw}
	s.slabs = []block.Slab{s.slab("base", false)}
	t.Cleanup(func() {
		all, err := s.d.All(context.Background())
		for _, dev := range all {
			err = errors.Join(err, s.d.Detach(context.Background(), dev))
		}
		left, err2 := s.d.Host.Mapped(context.Background(), "QUARRY-")
		if err != nil || err2 != nil || len(left) > 0 {
			t.Errorf("left %v, %v, %v", left, err, err2)
		}
	})
	return s
}

func devicesHere() *block.Devices { return &block.Devices{Host: host.NewLocal(host.Exec{})} }

func (s *safe) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *safe) is(err error, kind fault.Kind, words ...string) {
	s.Helper()
	if !errors.Is(err, kind) {
		s.Fatalf("%v, want %v", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			s.Fatalf("%v does not mention %q", err, w)
		}
	}
	if strings.Contains(err.Error(), "horse") {
		s.Fatalf("%v tells the passphrase", err)
	}
}

func (s *safe) slab(name string, layered bool) block.Slab {
	s.Helper()
	b := block.Slab{ID: "crypt/" + name, Path: filepath.Join(s.dir, name), Size: s.size + header}
	bytes := b.Size
	if layered {
		b.Chunk = layer.ChunkSize(b.Size)
		bytes = layer.StoreSize(b.Size, b.Chunk)
	}
	f, err := os.Create(b.Path)
	s.must(err)
	defer f.Close()
	s.must(f.Truncate(bytes))
	if layered {
		s.must(layer.Format(f, b.Chunk))
	}
	return b
}

func (s *safe) spec(passphrase host.Secret, format bool) block.Spec {
	return block.Spec{Owner: s.owner, Use: s.use, Slabs: s.slabs, Size: s.size + header,
		Crypt: &block.Crypt{Header: header, Passphrase: passphrase, Format: format}}
}

func (s *safe) open(format bool) block.Device {
	s.Helper()
	dev, err := s.d.Attach(context.Background(), s.spec(pass, format))
	s.must(err)
	if dev.Locked || dev.Size != s.size {
		s.Fatalf("%+v, want %d bytes", dev, s.size)
	}
	return dev
}

func (s *safe) close(dev block.Device) {
	s.Helper()
	s.must(s.d.Detach(context.Background(), dev))
}

func (s *safe) run(name string, args ...string) string {
	s.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		s.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func line(n int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("plain text %04d\n", n)), 4096/16) }

func (s *safe) write(path string, at int64, n int) {
	s.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	s.must(err)
	_, err = f.WriteAt(line(n), at)
	s.must(errors.Join(err, f.Sync(), f.Close()))
}

func (s *safe) reads(path string, at int64, n int) {
	s.Helper()
	f, err := os.Open(path)
	s.must(err)
	defer f.Close()
	got := make([]byte, 4096)
	_, err = f.ReadAt(got, at)
	s.must(err)
	if !bytes.Equal(got, line(n)) {
		s.Fatalf("%s at %d holds %q, want %q", path, at, got[:16], line(n)[:16])
	}
}

// hides checks that no slab shows what was written, or the passphrase.
func (s *safe) hides() {
	s.Helper()
	for _, b := range s.slabs {
		all, err := os.ReadFile(b.Path)
		s.must(err)
		if bytes.Contains(all, []byte("plain text")) || bytes.Contains(all, []byte("horse")) {
			s.Fatalf("%s holds clear text", b.Path)
		}
	}
}

func TestAnEncryptedImageOpensWithItsPassphraseOnly(t *testing.T) {
	s := newSafe(t)
	ctx := context.Background()
	s.must(s.d.Encrypts(ctx))
	dev := s.open(true)
	s.write(dev.Path, 0, 1)
	s.write(dev.Path, s.size-4096, 2)
	if b, err := os.ReadFile("/sys/class/block/" + filepath.Base(dev.Path) + "/queue/discard_max_bytes"); err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Fatalf("discards reach the slab, and tell what is in use: %q %v", b, err)
	}
	s.hides()

	// Another process finds it again, without a passphrase, as it is.
	s.d = devicesHere()
	found, err := s.d.Find(ctx, s.owner)
	s.must(err)
	if len(found) != 1 || found[0].Path != dev.Path || found[0].Locked || found[0].Size != s.size {
		t.Fatalf("%+v", found)
	}
	if again := s.open(false); again.Path != dev.Path {
		t.Fatalf("%s and %s", again.Path, dev.Path)
	}
	s.close(found[0])

	_, err = s.d.Attach(ctx, s.spec("something else", false))
	s.is(err, fault.Permission)
	if found, err = s.d.Find(ctx, s.owner); err != nil || len(found) > 0 {
		t.Fatal("a refused passphrase leaves ", found, err)
	}

	dev = s.open(false)
	s.reads(dev.Path, 0, 1)
	s.reads(dev.Path, s.size-4096, 2)
	s.close(dev)

	// It is nothing special: cryptsetup alone opens it.
	name := "foreign-" + fmt.Sprint(os.Getpid())
	cmd := exec.Command("cryptsetup", "open", "--key-file=-", s.slabs[0].Path, name)
	cmd.Stdin = strings.NewReader(pass)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.reads("/dev/mapper/"+name, 0, 1)
	s.reads("/dev/mapper/"+name, s.size-4096, 2)
	s.run("cryptsetup", "close", name)
}

func TestAnEncryptedImageIsCutWhileItIsWritten(t *testing.T) {
	s := newSafe(t)
	ctx := context.Background()
	s.use = block.Filesystem
	dev := s.open(true)
	s.run("mkfs.ext4", "-q", dev.Path)
	at := t.TempDir()
	s.must(unix.Mount(dev.Path, at, "ext4", 0, ""))
	defer func() { s.must(unix.Unmount(at, 0)) }()
	s.must(os.WriteFile(at+"/before", line(1), 0o600)) // not synced: the freeze does that
	base := s.slabs

	s.slabs = append([]block.Slab{s.slab("layer", true)}, base...)
	s.must(s.d.Switch(ctx, []block.Spec{{Owner: s.owner, Use: s.use, Slabs: s.slabs, Size: s.size + header}}))
	s.must(os.WriteFile(at+"/after", line(2), 0o600))
	unix.Sync()
	s.hides()

	clone := *s
	clone.owner, clone.slabs = "crypt/clone", append([]block.Slab{s.slab("clone", true)}, base...)
	cdev := clone.open(false)
	s.run("e2fsck", "-f", "-n", cdev.Path)
	cat := t.TempDir()
	s.must(unix.Mount(cdev.Path, cat, "ext4", 0, ""))
	got, err := os.ReadFile(cat + "/before")
	_, gone := os.Stat(cat + "/after")
	s.must(unix.Unmount(cat, 0))
	s.must(err)
	if !bytes.Equal(got, line(1)) || !os.IsNotExist(gone) {
		t.Fatalf("the snapshot holds %d bytes of before, and of after: %v", len(got), gone)
	}
	clone.close(cdev)

	// Merged back under the mount.
	for deadline := time.Now().Add(2 * time.Minute); ; {
		m, err := s.d.Merge(ctx, s.slabs)
		s.must(err)
		if m.Done {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the merge does not end")
		}
		time.Sleep(10 * time.Millisecond) // the kernel tells nobody
	}
	s.slabs = base
	s.must(s.d.Switch(ctx, []block.Spec{{Owner: s.owner, Use: s.use, Slabs: s.slabs, Size: s.size + header}}))
	if got, err = os.ReadFile(at + "/after"); err != nil || !bytes.Equal(got, line(2)) {
		t.Fatal(len(got), err)
	}
}

func TestAnEncryptedImageGrowsOpenAndClosed(t *testing.T) {
	s := newSafe(t)
	dev := s.open(true)
	s.write(dev.Path, s.size-4096, 1)
	grow := func(more int64) {
		s.size += more
		s.slabs[0].Size += more
		s.must(os.Truncate(s.slabs[0].Path, s.slabs[0].Size))
	}
	f, err := os.Open(dev.Path) // in use
	s.must(err)
	grow(16 << 20)
	dev, err = devicesHere().Grow(context.Background(), dev, s.size) // by an agent that never knew the passphrase
	s.must(err)
	s.must(f.Close())
	if dev.Size != s.size {
		t.Fatal(dev.Size, s.size)
	}
	s.write(dev.Path, s.size-4096, 2)
	s.close(dev)
	grow(16 << 20)
	dev = s.open(false)
	s.write(dev.Path, s.size-4096, 3)
	s.close(dev)

	ro := s.spec(pass, false)
	ro.ReadOnly = true
	dev, err = s.d.Attach(context.Background(), ro)
	s.must(err)
	for i, at := range []int64{32 << 20, 48 << 20, 64 << 20} {
		s.reads(dev.Path, at-4096, i+1)
	}
	f, err = os.OpenFile(dev.Path, os.O_RDWR, 0)
	s.must(err)
	if _, err := f.WriteAt(line(0), 0); !dev.ReadOnly || !errors.Is(err, unix.EPERM) {
		t.Fatalf("a read-only device (%t) is written: %v", dev.ReadOnly, err)
	}
	s.must(f.Close())
	s.close(dev)
	if back, err := s.d.Attach(context.Background(), ro); err != nil {
		t.Fatal(err)
	} else if dev = s.open(false); dev.ReadOnly || back.Path == "" {
		t.Fatal("it stayed read-only")
	}
	s.close(dev)
}

// snapshotOf is what a slab holds.
func (s *safe) snapshotOf() []byte {
	s.Helper()
	b, err := os.ReadFile(s.slabs[0].Path)
	s.must(err)
	return b
}

func TestOnlyAFreshImageGetsAHeader(t *testing.T) {
	s := newSafe(t)
	ctx := context.Background()
	// Formatted by its record, and nothing there: never made anew.
	_, err := s.d.Attach(ctx, s.spec(pass, false))
	s.is(err, fault.Corrupt, "LUKS2")
	if bytes.Trim(s.snapshotOf(), "\x00") != nil {
		t.Fatal("something was written")
	}
	// Fresh, and something else there.
	s.run("mkfs.ext4", "-q", s.slabs[0].Path)
	before := s.snapshotOf()
	_, err = s.d.Attach(ctx, s.spec(pass, true))
	s.is(err, fault.Corrupt, "ext4")
	if !bytes.Equal(before, s.snapshotOf()) {
		t.Fatal("something was written")
	}
	// Fresh and read-only.
	ro := s.spec(pass, true)
	ro.ReadOnly = true
	_, err = s.d.Attach(ctx, ro)
	s.is(err, fault.InUse, "read-only")
	// A damaged header.
	s.must(os.Truncate(s.slabs[0].Path, 0))
	s.must(os.Truncate(s.slabs[0].Path, s.slabs[0].Size))
	s.close(s.open(true))
	f, err := os.OpenFile(s.slabs[0].Path, os.O_RDWR, 0)
	s.must(err)
	_, err = f.WriteAt(make([]byte, 1<<20), 0)
	s.must(errors.Join(err, f.Close()))
	_, err = s.d.Attach(ctx, s.spec(pass, false))
	s.is(err, fault.Corrupt, "header")
}

// A cryptsetup that is killed anywhere leaves an image that is fresh still, and
// gets another header. What an agent that was killed later left open goes.
func TestAHeaderThatWasHalfMadeIsMadeAgain(t *testing.T) {
	s := newSafe(t)
	for i := range 3 {
		cmd := exec.Command("cryptsetup", "luksFormat", "--type=luks2", "--batch-mode", "--key-file=-", "--pbkdf=argon2id",
			"--pbkdf-memory=65536", "--pbkdf-force-iterations=4", "--offset=32768", s.slabs[0].Path)
		cmd.Stdin = strings.NewReader("of the one that was killed")
		s.must(cmd.Start())
		before := s.snapshotOf()
		for began := time.Now(); time.Since(began) < time.Minute && bytes.Equal(before, s.snapshotOf()); { // into its first writes
		}
		time.Sleep(time.Duration(i*i) * time.Second) // and then anywhere, while the key is derived too
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		dev := s.open(true)
		s.write(dev.Path, 0, i)
		s.reads(dev.Path, 0, i)
		if i%2 == 0 {
			s.close(dev)
		} // else it stays open
		s.d = devicesHere()
	}
	dev := s.open(true)
	got := make([]byte, 4096)
	f, err := os.Open(dev.Path)
	s.must(err)
	defer f.Close()
	if _, err := f.ReadAt(got, 0); err != nil || bytes.Equal(got, line(2)) {
		t.Fatal("it has its key of before", err)
	}
	s.must(f.Close())
	s.close(dev)
}

// An agent that was killed between the two devices leaves one that nobody takes for the image.
func TestATopWithoutItsCryptDeviceIsLocked(t *testing.T) {
	s := newSafe(t)
	ctx := context.Background()
	dev := s.open(true)
	s.write(dev.Path, 0, 1)
	all, err := s.d.Host.Mapped(ctx, "QUARRY-c-")
	s.must(err)
	if len(all) != 1 || strings.Contains(fmt.Sprint(all[0].Targets), "aes-xts-plain64 0") || !strings.Contains(fmt.Sprint(all[0].Targets), "aes-xts-plain64 - 0") {
		t.Fatalf("%v", all)
	}
	s.must(s.d.Host.RemoveMapped(ctx, all[0]))
	found, err := s.d.Find(ctx, s.owner)
	s.must(err)
	if len(found) != 1 || !found[0].Locked || found[0].Path == dev.Path {
		t.Fatalf("%+v", found)
	}
	if _, err := s.d.Grow(ctx, found[0], s.size); !errors.Is(err, fault.InUse) {
		t.Fatal(err)
	}
	plain := s.spec("", false)
	plain.Crypt = nil
	_, err = s.d.Attach(ctx, plain)
	s.is(err, fault.InUse)
	dev = s.open(false)
	s.reads(dev.Path, 0, 1)
	s.close(dev)
}
