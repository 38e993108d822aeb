package mover

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/hosttest/farfs"
	"github.com/quarry-csi/quarry/pkg/layer"
)

// Chunks of several pages are refused before a layer is made of the file: see package layer, Shares.
func TestALayerOnAShareIsRefusedUnlessItsChunksAreOnePage(t *testing.T) {
	served, at := t.TempDir(), t.TempDir()
	if err := farfs.New(t, served).Mount("", at); err != nil {
		t.Fatal(err)
	}
	for chunk, kind := range map[int64]error{layer.ShareChunk: nil, 32 << 10: fault.Unsupported} {
		const size = 1 << 20
		for _, dir := range []string{served, at} {
			path := filepath.Join(dir, "layer")
			if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			err := New(Options{}).FormatLayer(t.Context(), path, size, chunk)
			if dir == served && err != nil || dir == at && !errors.Is(err, kind) {
				t.Errorf("chunks of %d bytes in %s: %v", chunk, path, err)
			}
		}
	}
}
