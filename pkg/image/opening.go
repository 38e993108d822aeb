package image

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// A manager that was overtaken while it was creating a tag may create it much
// later. The one that overtook it did not see the tag, and holds it void. So
// that every later opening does the same, an opening writes down, before it
// acts, what it saw of the manager that acted before it:
//
//	o.<epoch, 8 hex>   an opening: its predecessor, and which of that one's revisions count
//
// Revisions are created in order but for a window, which a manager never
// leaves: below the window everything is settled, so one bit for each revision
// within it is all that needs to be kept.

const (
	prefixOpening = "o."
	// window is how many revisions a manager may have under way at once. As
	// base64 of a bit each it takes 172 bytes of a record.
	window = 1024
	// openingKept is how long an opening's record is kept: a process that
	// stays paused for longer must not be resumed.
	openingKept = 30 * 24 * time.Hour
)

// openingRecord is the content of an o. tag.
type openingRecord struct {
	Before uint32 `json:"b"` // the epoch that acted before; 0: none
	Top    uint32 `json:"c"` // the highest counter of that epoch that was there
	Seen   []byte `json:"s"` // bit i: counter Top-i was there
	Time   int64  `json:"t"`
	Nonce  string `json:"no"`
}

func openingTag(epoch uint32) string { return fmt.Sprintf("%s%08x", prefixOpening, epoch) }

func parseOpeningTag(name string) (uint32, bool) {
	s, ok := strings.CutPrefix(name, prefixOpening)
	if !ok {
		return 0, false
	}
	return parseEpochTag(prefixEpoch + s)
}

// revisionOf a tag that has one: i., a. and p. tags.
func revisionOf(name string) (revision, bool) {
	if !strings.HasPrefix(name, prefixImage) && !strings.HasPrefix(name, prefixAttachment) && !strings.HasPrefix(name, prefixPin) {
		return 0, false
	}
	return parseRevision(name[strings.LastIndexByte(name, '.')+1:])
}

// openings are the openings of a domain, by epoch, and the last that acted.
type openings struct {
	byEpoch map[uint32]openingRecord
	last    uint32
}

// readOpenings reads the openings in a listing. An unreadable one is
// fault.Corrupt: without it nobody can tell what counts.
func readOpenings(tags []engine.Tag) (openings, error) {
	o := openings{byEpoch: map[uint32]openingRecord{}}
	for _, t := range tags {
		epoch, ok := parseOpeningTag(t.Name)
		if !ok {
			continue
		}
		var r openingRecord
		if err := json.Unmarshal(t.Record, &r); err != nil || len(r.Seen) != window/8 || r.Before >= epoch {
			return o, fault.New(fault.Corrupt, "tag %s, which says what counted when epoch %d began, cannot be read; restore it, or remove it when no older Quarry can still be running", t.Name, epoch)
		}
		o.byEpoch[epoch] = r
		o.last = max(o.last, epoch)
	}
	return o, nil
}

// void says whether a revision was created by a manager that had been overtaken.
func (o openings) void(r revision) bool {
	for epoch := o.last; r.epoch() < epoch; {
		rec, known := o.byEpoch[epoch]
		switch {
		case !known:
			return false // before the first opening that is known
		case r.epoch() > rec.Before:
			return true // that manager never acted
		case r.epoch() == rec.Before:
			return !rec.counts(uint32(r))
		}
		epoch = rec.Before
	}
	return false
}

func (r openingRecord) counts(counter uint32) bool {
	if counter > r.Top {
		return false
	}
	i := r.Top - counter
	return i >= window || r.Seen[i/8]&(1<<(i%8)) != 0
}

// newOpening sums up what a listing holds of the manager that acted last.
func (o openings) newOpening(tags []engine.Tag, own uint32) openingRecord {
	rec := openingRecord{Before: o.last, Seen: make([]byte, window/8), Nonce: nonce()}
	each := func(do func(counter uint32)) {
		for _, t := range tags {
			if r, ok := revisionOf(t.Name); ok && r.epoch() == rec.Before {
				do(uint32(r))
			}
		}
	}
	if rec.Before == 0 { // nobody wrote down an opening yet
		for _, t := range tags {
			if r, ok := revisionOf(t.Name); ok && r.epoch() < own {
				rec.Before = max(rec.Before, r.epoch())
			}
		}
	}
	each(func(counter uint32) { rec.Top = max(rec.Top, counter) })
	each(func(counter uint32) {
		if i := rec.Top - counter; i < window {
			rec.Seen[i/8] |= 1 << (i % 8)
		}
	})
	return rec
}

// settle drops the void tags from the opening listing and writes this opening
// down. From then on this manager may act.
func (d *domain) settle(ctx context.Context, tags []engine.Tag) ([]engine.Tag, error) {
	o, err := readOpenings(tags)
	if err != nil {
		return nil, fault.In(err, "index the tags", d.cfg.Name, "")
	}
	counting := make([]engine.Tag, 0, len(tags))
	for _, t := range tags {
		if r, ok := revisionOf(t.Name); !ok || !o.void(r) {
			counting = append(counting, t)
		}
	}
	rec := o.newOpening(counting, d.epoch)
	rec.Time = d.m.cfg.Now().UnixMilli()
	body, err := marshal(rec)
	if err != nil {
		return nil, err
	}
	if err := d.createTag(ctx, engine.Tag{Name: openingTag(d.epoch), Record: body}); err != nil {
		return nil, fault.In(err, "write down the opening", d.cfg.Name, "")
	}
	now := d.m.cfg.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	for epoch, r := range o.byEpoch {
		if now.Sub(time.UnixMilli(r.Time)) > openingKept {
			d.oldTags[openingTag(epoch)] = now
		}
	}
	return counting, nil
}

// underWay are the revisions whose tags are being created, or may be: the
// outcome is unknown. All of them lie within a window.
type underWay struct {
	counters map[uint32]string // counter: tag
	top      uint32            // the highest that ever was under way
	ended    chan struct{}     // closed, and replaced, when one ends
}

func newUnderWay() underWay {
	return underWay{counters: map[uint32]string{}, ended: make(chan struct{})}
}

// begin notes that a tag is going to be created. Where one that is still under
// way is too far behind it returns that tag's name: wait for ended and try again.
// fault.Unavailable: the tag itself is too far behind. The caller holds d.mu.
func (u *underWay) begin(name string, r revision) (behind string, err error) {
	counter := uint32(r)
	if _, again := u.counters[counter]; again {
		return "", nil
	}
	if counter+window <= u.top {
		return "", fault.New(fault.Unavailable, "tag %s comes too late: %d others were created meanwhile; try again", name, window)
	}
	for c, other := range u.counters {
		if c+window <= counter {
			return other, nil
		}
	}
	u.counters[counter] = name
	u.top = max(u.top, counter)
	return "", nil
}

// has says whether a tag is under way.
func (u *underWay) has(r revision) bool {
	_, ok := u.counters[uint32(r)]
	return ok
}

// end notes that nothing will create the tag any more.
func (u *underWay) end(r revision) {
	delete(u.counters, uint32(r))
	close(u.ended)
	u.ended = make(chan struct{})
}

// patience is how long a new tag waits for one that is too far behind.
const patience = 10 * time.Second

// begin waits until a tag may be created. fault.Unavailable: an older one has an
// unknown outcome, and nothing more is created until that is known.
func (d *domain) begin(ctx context.Context, name string, r revision) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		d.mu.Lock()
		behind, err := d.underWay.begin(name, r)
		ended := d.underWay.ended
		d.mu.Unlock()
		if behind == "" || err != nil {
			return err
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "tag %s is not created yet or has an unknown outcome, and %d others were created since: nothing more is until that is known; try again", behind, window)
		}
	}
}
