package kill_test

import (
	"context"
	"fmt"
	"maps"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/pkg/admin"
)

// phase of a name in its life, as far as its user knows.
type phase int

const (
	asked    phase = iota // asked for and not answered yet
	there                 // acknowledged
	leaving               // its deletion was asked for
	left                  // its deletion was acknowledged
	forsaken              // asked for, and given up before it was answered
)

// entry is what was acknowledged about a name.
type entry struct {
	phase    phase
	handle   string
	size     int64 // acknowledged
	most     int64 // asked for
	snapshot bool
}

// ledger holds what was acknowledged, by kind and name.
type ledger struct {
	mu      sync.Mutex
	entries map[string]entry
	gone    map[string]bool // handles whose deletion was acknowledged
}

func newLedger() *ledger { return &ledger{entries: map[string]entry{}, gone: map[string]bool{}} }

func (l *ledger) put(key string, e entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.entries[key]; e.phase == left && old.handle != "" {
		l.gone[old.handle] = true
	}
	l.entries[key] = e
}

func (l *ledger) get(key string) entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.entries[key]
}

func (l *ledger) move(key string, to phase) {
	e := l.get(key)
	e.phase = to
	l.put(key, e)
}

func (l *ledger) copy() (map[string]entry, map[string]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.entries), maps.Clone(l.gone)
}

// listed is what CSI lists.
type listed struct {
	size     int64
	snapshot bool
}

func (q *quarry) list(ctx context.Context) (map[string]listed, error) {
	out := map[string]listed{}
	volumes, err := call(ctx, q.ListVolumes, &csi.ListVolumesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	for _, e := range volumes.GetEntries() {
		out[e.GetVolume().GetVolumeId()] = listed{size: e.GetVolume().GetCapacityBytes()}
	}
	snapshots, err := call(ctx, q.ListSnapshots, &csi.ListSnapshotsRequest{})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	for _, e := range snapshots.GetEntries() {
		out[e.GetSnapshot().GetSnapshotId()] = listed{size: e.GetSnapshot().GetSizeBytes(), snapshot: true}
		if !e.GetSnapshot().GetReadyToUse() {
			return nil, fmt.Errorf("snapshot %s is listed and not ready", e.GetSnapshot().GetSnapshotId())
		}
	}
	return out, nil
}

// audit compares what CSI lists with the ledger, while work goes on: only what
// was so before and after the listing counts.
func (q *quarry) audit(ctx context.Context, l *ledger) error {
	before, gone := l.copy()
	have, err := q.list(ctx)
	if err != nil {
		return err
	}
	after, goneAfter := l.copy()
	known := map[string]bool{}
	for key, e := range after {
		known[e.handle] = true
		was, ok := before[key]
		if !ok || was.phase != there || e.phase != there || was.handle != e.handle {
			continue
		}
		img, is := have[e.handle]
		switch {
		case !is:
			return fmt.Errorf("%s (%s) was acknowledged and is not listed", key, e.handle)
		case img.snapshot != e.snapshot:
			return fmt.Errorf("%s (%s) is listed as another kind", key, e.handle)
		case img.size < was.size || img.size > e.most:
			return fmt.Errorf("%s (%s) is listed with %d bytes: acknowledged were %d, asked for at most %d", key, e.handle, img.size, was.size, e.most)
		}
	}
	var strange []string
	for handle := range have {
		if gone[handle] {
			return fmt.Errorf("%s is listed, and its deletion was acknowledged before", handle)
		}
		if !known[handle] && !goneAfter[handle] {
			strange = append(strange, handle)
		}
	}
	if len(strange) == 0 {
		return nil
	}
	// Listed before its request was answered: that must be one of those.
	images, err := q.images(ctx)
	if err != nil {
		return err
	}
	for _, handle := range strange {
		img, is := images[handle]
		if !is {
			continue // deleted since, by a user who learned its handle
		}
		if key := keyOf(img); !open(after[key]) && !open(l.get(key)) && img.State != "deleting" && l.get(key).handle != handle {
			return fmt.Errorf("%s (%s) is listed, and nobody asked for it: %+v", key, handle, after[key])
		}
	}
	return nil
}

// open says that a name may be visible under a handle that is not known yet.
func open(e entry) bool { return e.handle == "" && (e.phase == asked || e.phase == forsaken) }

func keyOf(img admin.Image) string {
	if img.Group != "" {
		return "member of " + img.Source
	}
	return img.Kind + " " + img.Name
}

// images as operators see them, by handle; asked again until Quarry answers.
func (q *quarry) images(ctx context.Context) (map[string]admin.Image, error) {
	out := map[string]admin.Image{}
	err := until(ctx, func() error {
		images, err := q.admin.Images(ctx)
		for _, i := range images {
			out[i.Handle] = i
		}
		return err
	})
	return out, err
}
