package lvm

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
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

// pools answers each report of a thin pool with the next transaction ID.
type pools struct{ ids []int64 }

func (p *pools) Run(context.Context, host.Command) (host.Result, error) {
	id := p.ids[0]
	p.ids = p.ids[1:]
	return host.Result{Stdout: fmt.Appendf(nil, `{"report": [{"lv": [{"lv_name":"pool", "lv_layout":"thin,pool", "lv_size":"67108864", "lv_metadata_size":"4194304", "data_percent":"1.00",
		"metadata_percent":"1.00", "lv_when_full":"queue", "zero":"zero", "transaction_id":"%d", "lv_health_status":""}]}]}`, id)}, nil
}

func TestAPoolThatIsNewerThanItsGroup(t *testing.T) {
	for name, c := range map[string]struct {
		kernel, ours int64
		again        []int64 // what LVM says when it is asked once more
		refused      bool
	}{
		"the same":                            {5, 5, nil, false},
		"a killed program's change":           {4, 5, nil, false},
		"a volume that was made meanwhile":    {6, 5, []int64{6}, false},
		"volumes that were made meanwhile":    {6, 5, []int64{8}, false},
		"a backup of one change before":       {6, 5, []int64{5}, true},
		"a backup, and a volume made in it":   {9, 5, []int64{6}, true},
		"a backup of before the first change": {1, 0, []int64{0}, true},
	} {
		run := &pools{c.again}
		e := &lvmEngine{name: "data", pool: "pool", group: lvm.New(run, "data", lvm.Options{})}
		err := e.checkTransaction(t.Context(), c.kernel, c.ours)
		if c.refused {
			is(t, name, err, fault.Corrupt, "vgcfgrestore --force")
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if len(run.ids) > 0 {
			t.Errorf("%s: LVM was not asked again", name)
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
