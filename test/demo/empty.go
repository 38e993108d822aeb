package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// collecting is how long the collector may take to give space back after the
// last deletion.
const collecting = time.Minute

// proveEmpty checks what Quarry promises after everything was deleted: no
// living images, no slabs, no loop devices, no mounts. A few small tags of dead
// images stay for some minutes, so that a listing that runs meanwhile is never
// misled.
func proveEmpty(ctx context.Context, s *screen, q *quarry, dir string, places []*place) error {
	volumes, err := q.ListVolumes(ctx, &csi.ListVolumesRequest{})
	if err != nil {
		return err
	}
	snapshots, err := q.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
	if err != nil {
		return err
	}
	if v, n := len(volumes.GetEntries()), len(snapshots.GetEntries()); v+n > 0 {
		return fmt.Errorf("%d volumes and %d snapshots are left", v, n)
	}
	s.proved("CSI lists no volume and no snapshot")

	images, err := q.images(ctx)
	if err != nil {
		return err
	}
	for _, i := range images {
		if i.State != "deleting" {
			return fmt.Errorf("image %s is left, and is %s", i.Handle, i.State)
		}
	}
	s.proved("no image is left but what is being deleted (of %d the last small tags go after some minutes)", len(images))

	for _, p := range places {
		if err := within(ctx, collecting, func() error { return noSlabs(p.path) }); err != nil {
			return err
		}
		s.proved("no slab is left in %s", p.domain)
	}

	devices, err := loops(dir)
	if err != nil {
		return err
	}
	for _, p := range places {
		delete(devices, filepath.Join(dir, p.disk+".disk"))
	}
	if len(devices) > 0 {
		return fmt.Errorf("loop devices are left: %v", devices)
	}
	s.proved("no loop device is left")

	points, err := mounts(dir)
	if err != nil {
		return err
	}
	points = slices.DeleteFunc(points, func(at string) bool {
		return slices.ContainsFunc(places, func(p *place) bool { return p.path == at })
	})
	if len(points) > 0 {
		return fmt.Errorf("mounts are left: %s", strings.Join(points, ", "))
	}
	s.proved("no mount is left")
	return nil
}

// noSlabs looks at the disk itself rather than asking Quarry: also for what is
// half made or waits for its removal.
func noSlabs(path string) error {
	for _, folder := range []string{"slabs", "tmp", "trash"} {
		entries, err := os.ReadDir(filepath.Join(path, folder))
		if err != nil {
			return err
		}
		if len(entries) > 0 {
			return fmt.Errorf("%d slabs are left in %s, the first is %s", len(entries), filepath.Join(path, folder), entries[0].Name())
		}
	}
	return nil
}

// within repeats check until it succeeds or the time is up.
func within(ctx context.Context, limit time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", limit, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
