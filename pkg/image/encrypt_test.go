package image_test

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

const header = 16 << 20

func (r *rig) encrypted(name, domain, source string, size int64) (image.Image, error) {
	return r.CreateVolume(r.ctx, image.CreateRequest{Name: name, Domains: []string{domain}, Accesses: []image.Access{mount}, Size: size, Source: source, Encrypted: true})
}

// slabHas checks the size of an image's slab.
func (r *rig) slabHas(img image.Image, size int64) {
	r.t.Helper()
	st, err := os.Stat(r.path(img))
	r.must(err)
	if st.Size() != size {
		r.t.Fatalf("the slab of %s has %d bytes, want %d", img.Handle, st.Size(), size)
	}
}

func TestAnEncryptedVolumeHasTheSizeThatWasAskedForAndAHeader(t *testing.T) {
	r := newRig(t, "a", "b").start()
	img, err := r.encrypted("v", "a", "", 64<<20)
	r.must(err)
	again, err := r.encrypted("v", "a", "", 64<<20)
	r.must(err)
	if img.Size != 64<<20 || !img.Encrypted || again.Handle != img.Handle {
		t.Fatalf("%+v %+v", img, again)
	}
	r.slabHas(img, 64<<20+header)

	grown, err := r.Expand(r.ctx, img.Handle, 80<<20, 80<<20)
	r.must(err)
	if grown.Size != 80<<20 {
		t.Fatal(grown.Size)
	}
	r.slabHas(grown, 80<<20+header)
	same, err := r.Expand(r.ctx, img.Handle, 80<<20, 0)
	r.must(err)
	if same.Size != 80<<20 {
		t.Fatal(same.Size)
	}

	snap := r.snapshot("s", grown)
	if snap.Size != 80<<20 || !snap.Encrypted {
		t.Fatalf("%+v", snap)
	}
	for i, domain := range []string{"a", "b"} {
		to, err := r.encrypted("r"+domain, domain, snap.Handle.String(), 96<<20)
		r.must(err)
		if to.Size != 96<<20 || !to.Encrypted {
			t.Fatalf("%d %+v", i, to)
		}
		r.slabHas(to, 96<<20+header)
	}
	r.restart()
	found, err := r.Get(r.ctx, img.Handle)
	r.must(err)
	if found.Size != 80<<20 || !found.Encrypted || found.State != image.Optimized {
		t.Fatalf("%+v", found)
	}
}

func TestEncryptedAndPlainAreNotTheSame(t *testing.T) {
	r := newRig(t, "a").start()
	secret, err := r.encrypted("secret", "a", "", 32<<20)
	r.must(err)
	plain := r.volume("plain", "a", 32<<20)

	_, err = r.encrypted("plain", "a", "", 32<<20)
	r.is(err, fault.Exists)
	_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "secret", Domains: []string{"a"}, Accesses: []image.Access{mount}, Size: 32 << 20})
	r.is(err, fault.Exists)

	for _, of := range []image.Image{secret, plain} {
		for _, src := range []image.Image{of, r.snapshot("of-"+of.Name, of)} {
			_, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "c", Domains: []string{"a"}, Accesses: []image.Access{mount},
				Source: src.Handle.String(), SourceMutable: src.Mutable, Encrypted: !of.Encrypted})
			r.is(err, fault.Invalid)
			if !strings.Contains(err.Error(), "the source is "+map[bool]string{true: "encrypted", false: "not encrypted"}[of.Encrypted]) {
				t.Fatal(err)
			}
		}
	}
	_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "tree", Domains: []string{"a"}, Accesses: []image.Access{{Mode: image.MultiNodeMultiWriter}}, Encrypted: true})
	r.is(err, fault.Invalid)
	if !strings.Contains(err.Error(), "directory") || !strings.Contains(err.Error(), "encrypted") {
		t.Fatal(err)
	}

	// Two nodes would both make a header.
	everywhere := image.Access{Block: true, Mode: image.MultiNodeMultiWriter}
	_, err = r.CreateVolume(r.ctx, image.CreateRequest{Name: "many", Domains: []string{"a"}, Accesses: []image.Access{everywhere}, Encrypted: true})
	r.is(err, fault.Invalid)
	_, err = r.Attach(r.ctx, secret.Handle, "n1", everywhere, false)
	r.is(err, fault.Invalid)
	if !strings.Contains(err.Error(), "encrypted") {
		t.Fatal(err)
	}
}

// A raw block volume is fresh until its header is sealed: else a crash in
// between would leave one that nobody can open and nobody may format.
func TestAnEncryptedRawVolumeIsFreshUntilItsHeaderIsSealed(t *testing.T) {
	r := newRig(t, "a").start()
	raw := image.Access{Block: true, Mode: image.SingleNodeWriter}
	img, err := r.CreateVolume(r.ctx, image.CreateRequest{Name: "v", Domains: []string{"a"}, Accesses: []image.Access{raw}, Size: 32 << 20, Encrypted: true})
	r.must(err)
	a, err := r.Attach(r.ctx, img.Handle, "n1", raw, false)
	r.must(err)
	for range 2 {
		st, err := r.Stage(r.ctx, img.Handle, "n1", a.Generation)
		r.must(err)
		if !st.Fresh || st.Crypt != header || st.Size != 32<<20+header || st.Slabs[0].Size != st.Size {
			t.Fatalf("%+v", st)
		}
	}
	r.must(r.Formatted(r.ctx, img.Handle, "n1", ""))
	st, err := r.Stage(r.ctx, img.Handle, "n1", a.Generation)
	r.must(err)
	if st.Fresh {
		t.Fatal("it would be formatted again")
	}
}

// blind are agents whose nodes cannot open encrypted images, but for those named.
type blind struct {
	*agents
	able string
}

type blindAgent struct {
	image.Agent
	why error
}

func (b blindAgent) Encrypts(context.Context) error { return b.why }

func (b blind) Agent(node string) (image.Agent, error) {
	a, err := b.agents.Agent(node)
	if err != nil || node == b.able {
		return a, err
	}
	return blindAgent{a, fault.New(fault.Unsupported, "the kernel of %s has no target crypt", node)}, nil
}

func TestEncryptionIsRefusedWhereNoNodeCanOpenIt(t *testing.T) {
	r := newRig(t, "a").start()
	r.must(r.Close())
	for _, able := range []string{"", "n2"} {
		r.mapAgents = blind{r.agents, able}
		r.start()
		_, err := r.encrypted("v", "a", "", 32<<20)
		if able == "" {
			r.is(err, fault.Invalid)
			if !strings.Contains(err.Error(), "has no target crypt") {
				t.Fatal(err)
			}
		} else {
			r.must(err)
		}
		r.must(r.Close())
	}
}
