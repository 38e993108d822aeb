package smb

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
)

// Samba 4.17 answers SEEK_DATA only where there is one stretch of data: here are three.
func TestLabAServerThatCopiesKeepsHoles(t *testing.T) {
	r := newRig(t, "xfs", nil)
	e := r.open(t, "", "")
	ctx := t.Context()
	const size, piece = 64 << 20, 256 << 10
	must(t, e.CreateSlab(ctx, engine.SlabSpec{ID: "a", Kind: engine.Block, Size: size}))
	at, err := e.AttachSlab(ctx, "a", engine.AttachOptions{})
	must(t, err)
	f, err := os.OpenFile(at.Path, os.O_RDWR, 0)
	must(t, err)
	for i, offset := range []int64{0, size / 2, size - piece} {
		_, err := f.WriteAt(bytes.Repeat([]byte{byte('a' + i)}, piece), offset)
		must(t, err)
	}
	must(t, f.Close())
	copier := engine.Discover(e).Copier
	if copier == nil {
		t.Fatal("the server does not copy")
	}
	must(t, copier.CopySlab(ctx, "a", engine.SlabSpec{ID: "b", Kind: engine.Block, Size: size}, nil))
	have, err := os.ReadFile(onServer(t, r, "slabs", "b"))
	must(t, err)
	want, err := os.ReadFile(onServer(t, r, "slabs", "a"))
	must(t, err)
	if !bytes.Equal(have, want) {
		t.Error("the copy has other bytes than its source")
	}
	var st unix.Stat_t
	must(t, unix.Stat(onServer(t, r, "slabs", "b"), &st))
	if st.Blocks*512 > size/4 {
		t.Errorf("a copy of %d KiB of data takes %d KiB", 3*piece>>10, st.Blocks/2)
	}
}
