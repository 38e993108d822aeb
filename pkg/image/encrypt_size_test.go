package image

import (
	"errors"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
)

func TestASlabHasRoomForTheHeader(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name                            string
		asked, limit, source, unit, max int64
		want                            int64 // of the payload; 0: fault.OutOfRange
	}{
		{name: "as asked", asked: 64 * mib, unit: 4096, want: 64 * mib},
		{name: "small units", asked: 64*mib + 1, unit: 512, want: 64*mib + 4096},
		{name: "LVM's extents", asked: 65 * mib, unit: 4 * mib, want: 68 * mib},
		{name: "units larger than the header", asked: 64 * mib, unit: 64 * mib, want: 112 * mib},
		{name: "odd units", asked: 64 * mib, unit: 3 * 4096, want: 64*mib + 4096},
		{name: "the source's", source: 33 * mib, unit: 4096, want: 33 * mib},
		{name: "the limit is the users'", asked: 64 * mib, limit: 64 * mib, unit: 4096, want: 64 * mib},
		{name: "the limit cannot be kept", asked: 64 * mib, limit: 70 * mib, unit: 64 * mib},
		{name: "the storage's largest", asked: 64 * mib, max: 80 * mib, unit: 4096, want: 64 * mib},
		{name: "above the storage's largest", asked: 64*mib + 4096, max: 80 * mib, unit: 4096},
		{name: "a storage of small slabs", asked: mib, max: 16 * mib, unit: 4096},
		{name: "overflow", asked: 1<<63 - 5000, unit: 4096},
	} {
		got, err := slabSizeFor(c.asked, c.limit, c.source, func(int64) int64 { return c.unit }, "", c.max, EncryptionHeader)
		switch {
		case c.want == 0 && !errors.Is(err, fault.OutOfRange):
			t.Errorf("%s: %d %v", c.name, got, err)
		case c.want > 0 && (err != nil || got != c.want+EncryptionHeader || got%c.unit != 0):
			t.Errorf("%s: %d %v, want %d", c.name, got-EncryptionHeader, err, c.want)
		}
	}
}
