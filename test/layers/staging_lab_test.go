package layers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
)

// TestStagingRacesWithSnapshots: a volume is staged, written and unstaged all the
// time while snapshots of it are made and deleted. Each holds what was durable
// when it was asked for, whether the volume was in use, on its way there or back,
// and staging never meets with anything but success.
func TestStagingRacesWithSnapshots(t *testing.T) {
	disk := spare(t)
	snapshots := 12
	if long() {
		snapshots = 60
	}
	seed := seedOf(t)
	r := newRig(t, disk)
	v, err := r.volume("v", 64*mib, filesystem(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call(r.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target}); err != nil {
		t.Fatal(err)
	}
	if err := v.unstage(); err != nil {
		t.Fatal(err)
	}
	load := &restaged{mounted: mounted{workers: newWorkers(t), work: t.TempDir()}, v: v}
	load.g.Go(func() error { return load.run(rand.New(rand.NewPCG(seed, 0))) })

	met := 0
	lives, ctx := errgroup.WithContext(load.going())
	lives.SetLimit(3)
	for i := range snapshots {
		moves := load.moves.Load()
		err := during(ctx, "another staging", patience, func() error {
			if load.moves.Load() == moves {
				return errors.New("none yet")
			}
			return nil
		})
		if err != nil {
			t.Fatal(errors.Join(err, lives.Wait(), load.end()))
		}
		before, moves := load.mark(), load.moves.Load()
		reply, err := call(r.CreateSnapshot, &csi.CreateSnapshotRequest{Name: fmt.Sprintf("s%d", i), SourceVolumeId: v.id})
		if err != nil {
			t.Fatal(errors.Join(err, lives.Wait(), load.end()))
		}
		after, passed := load.mark(), load.moves.Load()-moves
		t.Logf("snapshot %d: between %v and %v, %d times a staging or unstaging began or ended meanwhile", i, before, after, passed)
		if passed > 0 {
			met++
		}
		lives.Go(func() error { return load.life(ctx, i, reply.GetSnapshot().GetSnapshotId(), before, after) })
	}
	if err := errors.Join(lives.Wait(), load.end()); err != nil {
		t.Fatal(err)
	}
	if met == 0 {
		t.Error("no snapshot ever met with a staging")
	}
	t.Logf("%d of %d snapshots met with a staging; the volume was staged %d times", met, snapshots, load.moves.Load()/4)
	if err := v.stage(); err != nil {
		t.Fatal(err)
	}
	if n, err := load.look(v.staging, load.mark(), load.mark()); err != nil || n != load.durable.Load() {
		t.Errorf("the volume itself has %d entries, %d were durable: %v", n, load.durable.Load(), err)
	}
	if err := errors.Join(r.alone(v), v.remove(), r.leavesNothing()); err != nil {
		t.Fatal(err)
	}
}

// restaged is a load that writes its journal in pieces, one in each staging.
type restaged struct {
	mounted
	v *volume
	// moves counts the beginnings and ends of stagings and unstagings.
	moves atomic.Uint64
}

func (m *restaged) run(rnd *rand.Rand) error {
	for n := uint64(0); m.quit.Err() == nil && m.ctx.Err() == nil; {
		if err := m.move(m.v.stage); err != nil {
			return err
		}
		f, err := os.OpenFile(filepath.Join(m.v.staging, journal), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		for range rnd.IntN(6) {
			if err := m.enter(f, m.v.staging, n); err != nil {
				return errors.Join(err, f.Close())
			}
			n++
		}
		if err := f.Close(); err != nil {
			return err
		}
		if err := m.move(m.v.unstage); err != nil {
			return err
		}
	}
	return nil
}

func (m *restaged) move(do func() error) error {
	m.moves.Add(1)
	defer m.moves.Add(1)
	return do()
}

// life of one snapshot: a clone of it, mounted, and then both are deleted.
func (m *restaged) life(ctx context.Context, i int, id string, before, after mark) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	c, err := m.v.r.volume(fmt.Sprintf("s%d-clone", i), m.v.size, filesystem(), id)
	if err != nil {
		return err
	}
	if _, err := m.look(c.target, before, after); err != nil {
		return fmt.Errorf("snapshot %d: %w", i, err)
	}
	return errors.Join(m.v.r.removeSnapshot(id), c.remove())
}
