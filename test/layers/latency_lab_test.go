package layers

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/test/lab"
)

// TestSnapshotLatencyOfAMountedVolume measures how long CreateSnapshot of a mounted volume takes,
// for volumes of three sizes under the same small load, and where the time goes. The
// largest needs a storage of 4 TiB: the first virtual disk if it is large enough
// (--disk 4T), else a sparse file.
func TestSnapshotLatencyOfAMountedVolume(t *testing.T) {
	lab.Need(t)
	const room = 4 << 40
	disk := ""
	if all := strings.Fields(os.Getenv("LAB_DISKS")); len(all) > 0 && sizeOf(t, all[0]) >= room {
		disk = lab.Disk(t)
	} else {
		disk = lab.Loop(t, room)
	}
	times := 2
	if long() {
		times = 20
	}
	r := newRig(t, disk)
	table := &strings.Builder{}
	w := tabwriter.NewWriter(table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "size\tsnapshots\tp50\tp99\tmax\trepeated\t\n")
	for _, v := range []struct {
		name string
		size int64
	}{{"1 GiB", gib}, {"100 GiB", 100 * gib}, {"1 TiB", 1024 * gib}} {
		t.Run(v.name, func(t *testing.T) {
			took, repeated := measure(t, r, strings.ReplaceAll(strings.ToLower(v.name), " ", ""), v.size, times)
			slices.Sort(took)
			at := func(p int) time.Duration {
				return took[min(len(took)-1, len(took)*p/100)].Round(time.Millisecond)
			}
			fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%d\t\n", v.name, len(took), at(50), at(99), at(100), repeated)
		})
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	t.Logf("latency of CreateSnapshot:\n%s", table)
	if err := r.leavesNothing(); err != nil {
		t.Fatal(err)
	}
}

func sizeOf(t *testing.T, path string) int64 {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	n, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// settled waits until the storage has taken back the space of what was deleted: where an image of 1
// TiB had its space, that alone keeps an emulated processor busy for a while after its file is gone.
func (r *rig) settled() error {
	free := uint64(0)
	return eventually("the storage to take space back", patience, func() error {
		var st unix.Statfs_t
		if err := unix.Statfs(r.path, &st); err != nil {
			return err
		}
		time.Sleep(2 * time.Second)
		if before := free; before != st.Bfree {
			free = st.Bfree
			return fmt.Errorf("%d blocks are free, %d were a moment ago", free, before)
		}
		return nil
	})
}

// measure takes snapshots one after the other and says how long each took, until the
// answer was final. In the long form each is deleted and merged before the next.
func measure(t *testing.T, r *rig, name string, size int64, times int) (took []time.Duration, repeated int) {
	t.Helper()
	c := filesystem()
	// The kernel would write 16 GiB of zeros for inodes into 1 TiB, beside the load.
	c.GetMount().MountFlags = []string{"noinit_itable"}
	v, err := r.volume(name, size, c, "")
	if err != nil {
		t.Fatal(err)
	}
	load := startMounted(t, v.target, 1)
	var made []string
	for i := range times + 1 {
		from := load.mark().sum()
		if err := eventually("the load to go on", patience, func() error {
			if load.mark().sum() < from+10 {
				return fmt.Errorf("at %v", load.mark())
			}
			return load.going().Err()
		}); err != nil {
			t.Fatal(err)
		}
		req := &csi.CreateSnapshotRequest{Name: name + "-s" + strconv.Itoa(i), SourceVolumeId: v.id}
		var snapshot *csi.CreateSnapshotResponse
		cut := func() {
			began := time.Now()
			snapshot, err = r.CreateSnapshot(t.Context(), req)
			if err != nil {
				repeated++
				t.Logf("%s, first answer after %s: %v", name, time.Since(began).Round(time.Millisecond), err)
				snapshot, err = call(r.CreateSnapshot, req)
			}
			if err != nil {
				t.Fatal(err)
			}
			if i < times {
				took = append(took, time.Since(began))
				t.Logf("%s: %s", name, time.Since(began).Round(time.Millisecond))
			}
		}
		if i < times {
			cut()
		} else { // the last one is looked at more closely, which takes longer
			t.Logf("%s, system calls of one snapshot:\n%s", name, traced(t, cut))
		}
		made = append(made, snapshot.GetSnapshot().GetSnapshotId())
		if !long() && i < times {
			continue
		}
		for _, id := range made {
			if err := r.removeSnapshot(id); err != nil {
				t.Fatal(err)
			}
		}
		made = nil
		if !long() {
			break
		}
		if err := errors.Join(r.alone(v), r.settled()); err != nil {
			t.Fatal(err)
		}
	}
	if err := load.end(); err != nil {
		t.Fatal(err)
	}
	if err := v.remove(); err != nil {
		t.Fatal(err)
	}
	return took, repeated
}
