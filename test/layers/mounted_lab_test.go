package layers

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSnapshotsOfAMountedVolumeUnderLoad: fio writes and verifies, a journal is
// written with fsync, and meanwhile snapshots and clones come and go.
func TestSnapshotsOfAMountedVolumeUnderLoad(t *testing.T) {
	disk := spare(t)
	p := plot{size: 32 * mib, snapshots: 12, clones: 4, alive: 6, busy: 2}
	if long() {
		p.snapshots, p.clones, p.alive = 50, 20, 12
	}
	seed := seedOf(t)
	r := newRig(t, disk)
	v, err := r.volume("v", p.size, filesystem(), "")
	if err != nil {
		t.Fatal(err)
	}
	load := startMounted(t, v.target, seed)
	s := &story{plot: p, r: r, v: v, load: load, cap: filesystem(), seed: seed}
	if err := s.play(t); err != nil {
		t.Fatal(errors.Join(err, load.end()))
	}
	// What the last round of fio wrote has seen the last merges; now from the disk.
	if err := errors.Join(v.unpublish(), v.publish()); err != nil {
		t.Fatal(err)
	}
	if err := load.fio(v.target, load.round, "--verify_only"); err != nil {
		t.Error(err)
	}
	if n, err := readJournal(filepath.Join(v.target, journal)); err != nil || n != load.durable.Load() {
		t.Errorf("the journal has %d entries, %d were acknowledged: %v", n, load.durable.Load(), err)
	}
	if err := v.unpublish(); err != nil {
		t.Fatal(err)
	}
	for _, slab := range r.files("slabs") {
		run(t, "e2fsck", "-f", "-n", filepath.Join(r.path, slab))
	}
	if err := v.remove(); err != nil {
		t.Fatal(err)
	}
	if err := r.leavesNothing(); err != nil {
		t.Fatal(err)
	}
	if err := r.leavesNoTags(); err != nil {
		t.Fatal(err)
	}
}

const journal = "journal"

// mounted is the load on a mounted volume: fio in rounds, each of which writes its
// file in random order and verifies all of it, and a journal with numbered files
// beside it, each durable before the next.
type mounted struct {
	*workers
	durable atomic.Uint64 // entries and files, at least
	round   uint64        // of fio, when it has ended
	work    string        // a folder for mounts
}

func startMounted(t *testing.T, dir string, seed uint64) *mounted {
	t.Helper()
	m := &mounted{workers: newWorkers(t), work: t.TempDir(), round: seed}
	f, err := os.OpenFile(filepath.Join(dir, journal), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	m.g.Go(func() error { return errors.Join(m.write(f, dir), f.Close()) })
	m.g.Go(func() error {
		for {
			if err := m.fio(dir, m.round); err != nil || m.quit.Err() != nil || m.ctx.Err() != nil {
				return err
			}
			m.round++
		}
	})
	return m
}

// fio runs one round. How much it writes is for the sake of the merges: the kernel moves one
// piece at a time and makes each durable, so that the emulated machine merges
// about ten a second.
func (m *mounted) fio(dir string, round uint64, more ...string) error {
	args := append([]string{"--name=load", "--filename=" + filepath.Join(dir, "fio"), "--size=2m", "--bs=16k", "--rw=randwrite",
		"--ioengine=psync", "--direct=1", "--fsync=32", "--rate_iops=30", fmt.Sprintf("--randseed=%d", round),
		"--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64", "--verify_dump=0", "--output-format=terse"}, more...)
	cmd := exec.Command("fio", args...)
	cmd.Dir = m.work
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("fio %q: %w\n%s", args, err, out)
	}
	return nil
}

// write appends entries to the journal and makes and removes numbered files, at
// most ten a second: the other processor is everybody else's.
func (m *mounted) write(f *os.File, dir string) error {
	pace := time.NewTicker(100 * time.Millisecond)
	defer pace.Stop()
	for n := uint64(0); ; n++ {
		if !m.tick(pace) {
			return nil
		}
		if err := m.enter(f, dir, n); err != nil {
			return err
		}
	}
}

// enter writes entry n, and the file of that number.
func (m *mounted) enter(f *os.File, dir string, n uint64) error {
	if _, err := f.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := numbered(dir, n); err != nil {
		return err
	}
	m.durable.Store(n + 1)
	return nil
}

// keptFiles is how many numbered files there are.
const keptFiles = 64

func numbered(dir string, n uint64) error {
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("f%08d", n)))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "content %d", n)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil || n < keptFiles {
		return err
	}
	return os.Remove(filepath.Join(dir, fmt.Sprintf("f%08d", n-keptFiles)))
}

func (m *mounted) mark() mark { return mark{m.durable.Load()} }

// holds: the filesystem is clean without a replay, for it was frozen, and the journal
// ends between the marks.
func (m *mounted) holds(device string, before, after mark) (mark, error) {
	if out, err := exec.Command("e2fsck", "-f", "-n", device).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("e2fsck -f -n: %w\n%s", err, out)
	}
	dir, err := os.MkdirTemp(m.work, "look-")
	if err != nil {
		return nil, err
	}
	if err := unix.Mount(device, dir, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		return nil, fmt.Errorf("mount %s: %w", device, err)
	}
	n, err := m.look(dir, before, after)
	return mark{n}, errors.Join(err, unix.Unmount(dir, 0), os.Remove(dir))
}

// look reads journal and files.
func (m *mounted) look(dir string, before, after mark) (uint64, error) {
	n, err := readJournal(filepath.Join(dir, journal))
	if err != nil {
		return 0, err
	}
	if n < before[0] || n > after[0]+1 {
		return 0, fmt.Errorf("the journal has %d entries; %d were durable before the cut, %d after it", n, before[0], after[0])
	}
	// The file of the last entry may not have been made at the cut, nor an old one removed.
	for at := n - min(n, keptFiles-1); at+1 < n; at++ {
		if got, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("f%08d", at))); err != nil || string(got) != fmt.Sprintf("content %d", at) {
			return 0, fmt.Errorf("the file of entry %d, durable before entry %d, holds %q: %w", at, n-1, got, err)
		}
	}
	return n, nil
}

// readJournal counts the entries, of which none may be missing.
func readJournal(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n := uint64(len(data) / 8)
	for i := range n {
		if got := binary.BigEndian.Uint64(data[8*i:]); got != i {
			return 0, fmt.Errorf("entry %d of the journal is %d", i, got)
		}
	}
	return n, nil
}

// use writes a file to a clone, which holds the journal as well.
func (m *mounted) use(target string, at mark, seed uint64) (func() error, error) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	want := make([]byte, 2*mib)
	_, _ = rand.NewChaCha8(key).Read(want) // never fails
	path := filepath.Join(target, "own")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(want)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	check := func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return err
		}
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, 0); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errors.New("its own file is not what was written")
		}
		_, err = m.look(target, at, at)
		return err
	}
	return check, check()
}
