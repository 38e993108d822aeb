package layer

// Reserve is how much space a storage keeps free for the stores on it that have not
// all their space, in bytes. A store whose write finds the storage full is given up by
// the kernel; so whoever writes to one waits before that.
type Reserve struct {
	// Low is where writes begin to wait, and below which no such layer is made. It has to
	// be enough for what can be written between two looks at what is free, from all nodes.
	Low int64
	// High is where they go on.
	High int64
	// Floor is where they wait without exception. It has to be enough for what is under way then.
	Floor int64
}

// The bounds of Reserve.Low. Looks are at most a second apart, a quarter of that where
// less than SoonLow is free: a writer that is faster than 1 GB/s, from 4 GiB down, is not
// stopped in time. A small storage keeps an eighth, else nothing could be used of it.
const (
	reserveLeast, reserveMost  = 256 << 20, 1 << 30
	reserveShare, reserveSmall = 100, 8
)

// ReserveOf is the reserve of a storage of total bytes.
func ReserveOf(total int64) Reserve {
	low := min(max(total/reserveShare, reserveLeast), reserveMost, total/reserveSmall)
	return Reserve{Low: low, High: low + low/2, Floor: low / 2}
}

// Scarce says whether writes have to wait where so many bytes are free; waiting: they do already.
func (r Reserve) Scarce(free int64, waiting bool) bool {
	return free < r.Low || waiting && free < r.High
}

// SoonLow is below what free space Low may be reached soon.
func (r Reserve) SoonLow() int64 { return 4 * r.Low }
