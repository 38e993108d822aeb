package layer

import "testing"

func TestAReserveFitsItsStorage(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for total, low := range map[int64]int64{
		0: 0, 64 * mib: 8 * mib, gib: 128 * mib, 2 * gib: 256 * mib, 25 * gib: 256 * mib, 50 * gib: 512 * mib, 100 * gib: gib, 100 << 40: gib,
	} {
		r := ReserveOf(total)
		if r.Low != low {
			t.Errorf("of %d bytes %d are kept, want %d", total, r.Low, low)
		}
		if total > 0 && (r.Floor <= 0 || r.Floor >= r.Low || r.High <= r.Low || r.SoonLow() <= r.High || r.High >= total) {
			t.Errorf("of %d bytes: %+v", total, r)
		}
	}
}
