package lvm

import (
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

func TestWhatAPoolWarnsOf(t *testing.T) {
	e := &lvmEngine{name: "data", pool: "pool"}
	for name, c := range map[string]struct {
		pool  lvm.Pool
		tells []string // one for each thing
	}{
		"half full":           {lvm.Pool{DataPercent: 50, MetadataPercent: 79.9, MetadataSize: 1 << 30}, nil},
		"data nearly full":    {lvm.Pool{Size: 64 << 20, DataPercent: 80}, []string{"80% of the data of thin pool data/pool (64 MiB) is used: at 95% no"}},
		"data full":           {lvm.Pool{DataPercent: 99.99}, []string{"99% of the data of thin pool data/pool (0 MiB) is used: no new"}},
		"metadata full":       {lvm.Pool{MetadataPercent: 75, MetadataSize: 4 << 20}, []string{"75% of the metadata of thin pool data/pool (4 MiB) is used: no new"}},
		"both":                {lvm.Pool{DataPercent: 90, MetadataPercent: 65, MetadataSize: 20 << 20}, []string{"90% of the data", "65% of the metadata of thin pool data/pool (20 MiB) is used: at 80% no"}},
		"its metadata failed": {lvm.Pool{Health: "metadata_read_only"}, []string{"metadata_read_only"}},
	} {
		have := e.poolWarning(c.pool)
		if parts := strings.Split(have, "; "); len(parts) != max(1, len(c.tells)) || (have == "") != (c.tells == nil) {
			t.Errorf("%s: %q", name, have)
		}
		for _, want := range c.tells {
			if !strings.Contains(have, want) {
				t.Errorf("%s: %q is not in %q", name, want, have)
			}
		}
	}
}

func TestWhatAMetadataAreaWarnsOf(t *testing.T) {
	e := &lvmEngine{name: "data", area: 1 << 20}
	for free, warns := range map[int64]bool{1 << 20: false, 300 << 10: false, 200 << 10: true, 0: true} {
		e.room.Store(free)
		if have := e.areaWarning(); (have != "") != warns {
			t.Errorf("with %d bytes free: %q", free, have)
		}
	}
}
