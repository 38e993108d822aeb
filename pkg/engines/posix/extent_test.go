package posix

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// TestMappedSeesWhatSeekSees: both ways to find data agree, wherever one begins.
func TestMappedSeesWhatSeekSees(t *testing.T) {
	f, err := os.Create(filepath.Join(hosttest.Filesystem(t, "ext4", 64<<20), "file"))
	ok(t, err)
	defer f.Close()
	const mib = 1 << 20
	ok(t, f.Truncate(8*mib))
	for _, at := range []int64{0, 2 * mib, 8*mib - Granularity} {
		_, err := f.WriteAt(make([]byte, Granularity), at)
		ok(t, err)
	}
	ok(t, f.Sync())
	for _, c := range []struct{ at, end, data, hole int64 }{
		{0, 8 * mib, 0, Granularity},
		{Granularity, 8 * mib, 2 * mib, 2*mib + Granularity},
		{2*mib + Granularity, 8 * mib, 8*mib - Granularity, 8 * mib},
		{Granularity, 2 * mib, 2 * mib, 2 * mib},
		{2 * mib, 2*mib + 512, 2 * mib, 2*mib + 512},
	} {
		for name, find := range map[string]func(*os.File, int64, int64) (int64, int64, error){"seek": extent, "map": mapped} {
			data, hole, err := find(f, c.at, c.end)
			if data != c.data || hole != c.hole || err != nil {
				t.Errorf("%s: from %d to %d there is data from %d to %d (%v), not from %d to %d", name, c.at, c.end, data, hole, err, c.data, c.hole)
			}
		}
	}
}
