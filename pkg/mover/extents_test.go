package mover

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host/hosttest"
	"github.com/quarry-csi/quarry/pkg/layer"
)

func TestDataIsWhatWasWritten(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			file := filepath.Join(hosttest.Filesystem(t, fs, 512*mib), "file")
			makeSparse(t, file, 64*mib, []extent{{mib, 8192}, {8 * mib, mib}, {64*mib - 100, 100}})
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			// Allocated and never written, as a merge leaves it.
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 64*mib); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(make([]byte, 4096), 32*mib); err != nil { // not even flushed
				t.Fatal(err)
			}
			var want []engine.Extent
			for _, e := range []extent{{mib, 8192}, {8 * mib, mib}, {32 * mib, 4096}, {64*mib - 4096, 4096}} {
				want = append(want, engine.Extent{Offset: e.off, Length: e.n})
			}
			got, err := New(Options{}).DataExtents(t.Context(), file, 64*mib)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%v, %v; want %v", got, err, want)
			}
			got, err = New(Options{}).DataExtents(t.Context(), file, 8*mib+4096)
			if err != nil || !slices.Equal(got, []engine.Extent{want[0], {Offset: 8 * mib, Length: 4096}}) {
				t.Errorf("of the beginning: %v, %v", got, err)
			}
			// A device tells nothing: all of it counts.
			got, err = New(Options{}).DataExtents(t.Context(), loopDevice(t, file), 64*mib)
			if err != nil || !slices.Equal(got, []engine.Extent{everything(64 * mib)}) {
				t.Errorf("of a device: %v, %v", got, err)
			}
		})
	}
}

func TestALayerListsItsChunks(t *testing.T) {
	const size, chunk = 16 * mib, 4096
	path := filepath.Join(hosttest.Filesystem(t, "ext4", 64*mib), "layer")
	room := layer.StoreSize(size, chunk)
	makeEmpty(t, path, room)
	m := New(Options{})
	if err := m.FormatLayer(t.Context(), path, room, chunk); err != nil {
		t.Fatal(err)
	}
	got, err := m.LayerExtents(t.Context(), path, room)
	if err != nil || len(got) != 0 {
		t.Errorf("an empty layer holds %v, %v", got, err)
	}
	for i, old := range []uint64{7, 300, 8, 0} { // as the kernel writes them: package layer's lab test
		entry := binary.LittleEndian.AppendUint64(nil, old)
		write(t, path, chunk+int64(i)*16, binary.LittleEndian.AppendUint64(entry, uint64(2+i)))
	}
	want := []engine.Extent{{Offset: 0, Length: chunk}, {Offset: 7 * chunk, Length: 2 * chunk}, {Offset: 300 * chunk, Length: chunk}}
	for _, p := range []string{path, loopDevice(t, path)} {
		if got, err = m.LayerExtents(t.Context(), p, room); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v", p, got, err)
		}
	}
}
