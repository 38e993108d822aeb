package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
)

// write makes a file of n bytes that seed determines, durable on return, and
// returns their checksum.
func write(path string, seed uint64, n int64) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	sum := sha256.New()
	_, err = io.CopyN(io.MultiWriter(f, sum), rand.NewChaCha8(key), n)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func checksum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// verify compares the files of a mounted volume with what was written: the
// checksums by file name, and no file more than these and `besides`.
func verify(v *volume, want map[string]string, besides ...string) error {
	entries, err := os.ReadDir(v.target)
	if err != nil {
		return err
	}
	found := 0
	for _, e := range entries {
		sum, known := want[e.Name()]
		switch {
		case known:
			got, err := checksum(filepath.Join(v.target, e.Name()))
			if err != nil {
				return err
			}
			if got != sum {
				return fmt.Errorf("volume %s: checksum of %s is %s, written was %s", v.name, e.Name(), got, sum)
			}
			found++
		case e.Name() != "lost+found" && !slices.Contains(besides, e.Name()):
			return fmt.Errorf("volume %s holds %s, which did not exist at its cut", v.name, e.Name())
		}
	}
	if found != len(want) {
		return fmt.Errorf("volume %s holds %d of the %d files of its cut", v.name, found, len(want))
	}
	return nil
}

// journalName is the file that is being appended to while a snapshot is taken.
const journalName = "journal"

// writer appends counted entries to a file, each durable before the next, until
// it is stopped.
type writer struct {
	synced  atomic.Uint64 // entries that were durable, at least
	stopped chan struct{}
	ended   chan error
}

func startWriter(dir string) (*writer, error) {
	f, err := os.OpenFile(filepath.Join(dir, journalName), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	w := &writer{stopped: make(chan struct{}), ended: make(chan error, 1)}
	go func() {
		var err error
		for n := uint64(0); err == nil; n++ {
			select {
			case <-w.stopped:
				w.ended <- f.Close()
				return
			default:
			}
			if _, err = f.Write(binary.BigEndian.AppendUint64(nil, n)); err == nil {
				err = f.Sync()
			}
			if err == nil {
				w.synced.Store(n + 1)
			}
		}
		w.ended <- errors.Join(err, f.Close())
	}()
	return w, nil
}

// stop ends the writer and returns why it had ended before, if it had.
func (w *writer) stop() error {
	close(w.stopped)
	return <-w.ended
}

// verifyJournal checks that a cut holds entries 0, 1, 2 ... without a gap, and
// at least those that were durable before the cut was asked for.
func verifyJournal(v *volume, atLeast uint64) (entries uint64, err error) {
	data, err := os.ReadFile(filepath.Join(v.target, journalName))
	if err != nil {
		return 0, err
	}
	for ; len(data) >= 8; data = data[8:] {
		if got := binary.BigEndian.Uint64(data); got != entries {
			return entries, fmt.Errorf("volume %s: entry %d of the journal is %d", v.name, entries, got)
		}
		entries++
	}
	if entries < atLeast {
		return entries, fmt.Errorf("volume %s: the journal has %d entries, %d were durable before the cut", v.name, entries, atLeast)
	}
	return entries, nil
}
