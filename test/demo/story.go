package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"time"
)

const (
	volumeSize = 1 << 30
	largerSize = 2 << 30
	dataSize   = 64 << 20
)

// story is what happens to one volume in its life, in one domain.
type story struct {
	*screen
	quarry      *quarry
	here, other *place

	ledger  *volume
	clone   *volume
	larger  *volume
	abroad  *volume
	monday  string // the snapshot's ID
	durable uint64 // journal entries that were durable before the cut
	atCut   map[string]string
	now     map[string]string
}

// timed runs f and prints it as a step; f returns which way was taken.
func (s *story) timed(what string, f func() (how string, err error)) error {
	begin := time.Now()
	how, err := f()
	if err != nil {
		return err
	}
	s.done(what, how, time.Since(begin))
	return nil
}

// plain is a step in which there is nothing to choose.
func plain(f func() error) func() (string, error) {
	return func() (string, error) { return "", f() }
}

func (s *story) tell(ctx context.Context) error {
	s.title("A volume's life on %s (%s below, %s inside)", s.here.domain, s.here.disk, s.here.filesystem)
	for _, chapter := range []func(context.Context) error{
		s.begin, s.cut, s.copies, s.grow, s.moveAbroad, s.look, s.deleteAwkwardly,
	} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) begin(ctx context.Context) error {
	err := s.created(ctx, fmt.Sprintf("create volume ledger, %s", size(volumeSize)), &s.ledger, func() (*volume, error) {
		return s.quarry.create(ctx, s.here, "ledger", volumeSize, s.here.filesystem, nil)
	})
	if err != nil {
		return err
	}
	if err := s.timed("attach, stage (format once), publish", plain(func() error { return s.quarry.mount(ctx, s.ledger) })); err != nil {
		return err
	}
	s.atCut = map[string]string{}
	return s.timed(fmt.Sprintf("write %s and fsync", size(2*dataSize)), plain(func() (err error) {
		if s.atCut["accounts"], err = write(filepath.Join(s.ledger.target, "accounts"), 1, dataSize); err != nil {
			return err
		}
		s.atCut["orders"], err = write(filepath.Join(s.ledger.target, "orders"), 2, dataSize)
		return err
	}))
}

// created runs a step that makes an image and says how it came to be.
func (s *story) created(ctx context.Context, what string, into **volume, make func() (*volume, error)) error {
	begin := time.Now()
	v, err := make()
	if err != nil {
		return err
	}
	took := time.Since(begin)
	how, err := s.quarry.how(ctx, v.id)
	if err != nil {
		return err
	}
	*into = v
	s.done(what, how, took)
	return nil
}

// cut takes a snapshot while a writer appends to a file with fsync, then changes
// everything.
func (s *story) cut(ctx context.Context) error {
	w, err := startWriter(s.ledger.target)
	if err != nil {
		return err
	}
	for w.synced.Load() < 10 {
		select {
		case err := <-w.ended:
			return fmt.Errorf("writer: %w", err)
		case <-ctx.Done():
			return errors.Join(ctx.Err(), w.stop())
		case <-time.After(time.Millisecond):
		}
	}
	s.durable = w.synced.Load()
	id, took, err := s.quarry.snapshot(ctx, s.ledger, "monday")
	if err := errors.Join(err, w.stop()); err != nil {
		return err
	}
	s.monday = id
	how, err := s.quarry.how(ctx, id)
	if err != nil {
		return err
	}
	s.done("snapshot monday, mounted and being written", how, took)

	s.now = maps.Clone(s.atCut)
	return s.timed("overwrite one file, add another", plain(func() (err error) {
		if s.now["orders"], err = write(filepath.Join(s.ledger.target, "orders"), 3, dataSize); err != nil {
			return err
		}
		s.now["invoices"], err = write(filepath.Join(s.ledger.target, "invoices"), 4, dataSize)
		return err
	}))
}

// copies clones the live volume and restores the snapshot to a larger size, and
// mounts both beside their source.
func (s *story) copies(ctx context.Context) error {
	err := s.created(ctx, "clone the live volume", &s.clone, func() (*volume, error) {
		return s.quarry.create(ctx, s.here, "clone", volumeSize, s.here.filesystem, fromVolume(s.ledger.id))
	})
	if err != nil {
		return err
	}
	err = s.created(ctx, fmt.Sprintf("restore monday to a larger volume, %s", size(largerSize)), &s.larger, func() (*volume, error) {
		return s.quarry.create(ctx, s.here, "larger", largerSize, s.here.filesystem, fromSnapshot(s.monday))
	})
	if err != nil {
		return err
	}
	if err := s.timed("mount both beside their source", plain(func() error {
		if err := s.quarry.mount(ctx, s.clone); err != nil {
			return err
		}
		return s.quarry.mount(ctx, s.larger)
	})); err != nil {
		return err
	}
	if err := verify(s.clone, s.now, journalName); err != nil {
		return err
	}
	s.proved("the clone holds the volume as it is now (sha256)")
	if err := s.verifyMonday(s.larger); err != nil {
		return err
	}
	return s.proveSize(s.larger, largerSize)
}

// verifyMonday proves that v holds the snapshot's content.
func (s *story) verifyMonday(v *volume) error {
	if err := verify(v, s.atCut, journalName); err != nil {
		return err
	}
	entries, err := verifyJournal(v, s.durable)
	if err != nil {
		return err
	}
	s.proved("%s holds monday's files (sha256) and %d journal entries without a gap; %d were durable before the call", v.name, entries, s.durable)
	return nil
}

// proveSize checks what a workload sees. A filesystem keeps some of its device
// to itself: log, inode tables.
func (s *story) proveSize(v *volume, want int64) error {
	seen, err := filesystemSize(v.target)
	if err != nil {
		return err
	}
	if seen < want*9/10 || seen > v.size {
		return fmt.Errorf("volume %s: its filesystem has %d bytes, its size is %d", v.name, seen, v.size)
	}
	s.proved("%s: its filesystem fills the %s", v.name, size(v.size))
	return nil
}

func (s *story) grow(ctx context.Context) error {
	if err := s.timed(fmt.Sprintf("grow ledger online to %s", size(largerSize)), plain(func() error {
		return s.quarry.expand(ctx, s.ledger, largerSize)
	})); err != nil {
		return err
	}
	if err := s.proveSize(s.ledger, largerSize); err != nil {
		return err
	}
	return verify(s.ledger, s.now, journalName)
}

// moveAbroad restores the snapshot into the other domain.
func (s *story) moveAbroad(ctx context.Context) error {
	err := s.created(ctx, "restore monday into domain "+s.other.domain, &s.abroad, func() (*volume, error) {
		return s.quarry.create(ctx, s.other, "from-"+s.here.domain, volumeSize, s.here.filesystem, fromSnapshot(s.monday))
	})
	if err != nil {
		return err
	}
	if err := s.timed("mount it", plain(func() error { return s.quarry.mount(ctx, s.abroad) })); err != nil {
		return err
	}
	return s.verifyMonday(s.abroad)
}

// look shows what an operator sees.
func (s *story) look(ctx context.Context) error {
	for _, args := range [][]string{{"chain", s.here.domain + "-ledger"}, {"check"}, {"domains"}} {
		if err := s.quarry.show(ctx, s.screen, args...); err != nil {
			return err
		}
	}
	return nil
}

// deleteAwkwardly deletes the source before the snapshot, and the snapshot before
// what was made from it; the survivors keep their data.
func (s *story) deleteAwkwardly(ctx context.Context) error {
	if err := s.timed("delete ledger, whose snapshot and clone live on", plain(func() error {
		if err := s.quarry.unmount(ctx, s.ledger); err != nil {
			return err
		}
		return s.quarry.remove(ctx, s.ledger)
	})); err != nil {
		return err
	}
	if err := s.timed("delete monday, whose restored volumes live on", plain(func() error {
		return s.quarry.removeSnapshot(ctx, s.monday)
	})); err != nil {
		return err
	}
	if err := s.timed("mount clone, larger and from-"+s.here.domain+" afresh", plain(func() error {
		for _, v := range []*volume{s.clone, s.larger, s.abroad} {
			if err := errors.Join(s.quarry.unmount(ctx, v), s.quarry.mount(ctx, v)); err != nil {
				return err
			}
		}
		return nil
	})); err != nil {
		return err
	}
	if err := verify(s.clone, s.now, journalName); err != nil {
		return err
	}
	s.proved("the clone still holds its files (sha256)")
	for _, v := range []*volume{s.larger, s.abroad} {
		if err := s.verifyMonday(v); err != nil {
			return err
		}
	}
	return s.timed("delete the other three", plain(func() error {
		for _, v := range []*volume{s.larger, s.abroad, s.clone} {
			if err := s.quarry.unmount(ctx, v); err != nil {
				return err
			}
			if err := s.quarry.remove(ctx, v); err != nil {
				return err
			}
		}
		return nil
	}))
}
