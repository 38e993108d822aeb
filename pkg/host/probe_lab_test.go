package host

import (
	"errors"
	"fmt"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/test/lab"
)

func TestADeviceThatCannotBeReadIsNotTakenForAnEmptyOne(t *testing.T) {
	disk := lab.Loop(t, 64<<20)
	l := NewLocal(Exec{})
	for _, bad := range []int64{4096, 65536, 64<<20 - 4096} { // the first block can be read
		at := bad / 512
		m, err := l.CreateMapped(t.Context(), "quarry-lab-unreadable", "QUARRY-lab-unreadable", false, []Target{
			{Length: bad, Type: "linear", Params: disk + " 0"},
			{Start: bad, Length: 4096, Type: "error"},
			{Start: bad + 4096, Length: max(512, 64<<20-bad-4096), Type: "linear", Params: fmt.Sprintf("%s %d", disk, min(at+8, 64<<20/512-1))},
		})
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Probe(t.Context(), m.Path)
		if !errors.Is(err, fault.Unavailable) {
			t.Errorf("byte %d cannot be read: found %s, %v", bad, s, err)
		}
		if err := l.RemoveMapped(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := l.Probe(t.Context(), disk); err != nil || !s.Empty() {
		t.Errorf("an empty disk: found %s, %v", s, err)
	}
}
