package image

import (
	"fmt"
	"strings"
	"time"
)

// Event is something that the user of an image should hear of. In Kubernetes it becomes an
// Event on the claim or the VolumeSnapshot.
type Event struct {
	Subject
	// Warning: somebody may have to do something.
	Warning bool
	// Reason is one of those below.
	Reason  string
	Message string
}

// Subject is whom an Event is about.
type Subject struct {
	Name      string // the CSI name
	Snapshot  bool
	Described Described
}

// The reasons of events.
const (
	EventCreated   = "QuarryCreated"   // where it is, and how its content came to be
	EventProgress  = "QuarryCopying"   // how far a long copy is; its message replaces the one before
	EventDegraded  = "QuarryDegraded"  // correct, but slower or larger than it could be
	EventOptimized = "QuarryOptimized" // not so any more
	EventBroken    = "QuarryBroken"
	EventAttached  = "QuarryStillAttached" // a node is refused, or keeps what it was to give back
	EventPaused    = "QuarryWritesPaused"  // reads and writes wait: the storage is nearly full
	EventResumed   = "QuarryWritesGoOn"
)

const (
	// longCopy is how long a copy takes before its user is told, and
	// progressEvery how often then.
	longCopy      = 10 * time.Second
	progressEvery = 30 * time.Second
)

// tell tells the user of an image, if anybody wants to hear.
func (m *Manager) tell(e Event) {
	if m.cfg.Tell != nil && e.Name != "" {
		m.cfg.Tell(e)
	}
}

// subject of an image. The caller holds d.mu.
func (d *domain) subject(img *image) Subject {
	return Subject{Name: img.rec.Name, Snapshot: !img.rec.Mutable, Described: img.desc}
}

func (img *image) tell(warning bool, reason, format string, args ...any) {
	img.d.mu.Lock()
	s := img.d.subject(img)
	img.d.mu.Unlock()
	img.d.m.tell(Event{Subject: s, Warning: warning, Reason: reason, Message: fmt.Sprintf(format, args...)})
}

// tellCreated tells where an image was placed, which way its content took, and why.
func (m *Manager) tellCreated(img *image) {
	v, d := m.view(img), img.d
	text := fmt.Sprintf("in domain %s (%s): %s", d.id, d.desc.Location, v.How)
	if why := d.whyDefault(v); why != "" {
		text += ", because " + why
	}
	img.tell(false, EventCreated, "%s", text)
}

// whyDefault says why an image's content did not come to be natively; "" where it did.
func (d *domain) whyDefault(v Image) string {
	if !strings.HasPrefix(v.How, how{}.path()) || v.Source == "" {
		return ""
	}
	source, err := ParseHandle(v.Source)
	if err != nil {
		return ""
	}
	if from := d.m.canonical(source); from.Domain != d.id {
		return "its source is in domain " + from.Domain
	}
	have, what := d.caps.Snapshotter != nil, "snapshot"
	if v.Mutable {
		have, what = d.caps.Cloner != nil || d.caps.Copier != nil, "clone"
	}
	if !have {
		return "the storage has no native " + what + "s"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if src := d.images[source.Image]; src != nil && src.rec.Chunk > 0 {
		return "the newest data of its source is in a layer"
	}
	return "the storage declined this one"
}

// tellStates tells of images whose state has changed since it was last told.
func (d *domain) tellStates() {
	if d.m.cfg.Tell == nil {
		return
	}
	var events []Event
	d.mu.Lock()
	for _, img := range d.images {
		if !d.visible(img) {
			continue
		}
		state, reason := d.stateOf(img)
		if scarce := img.scarce != ""; scarce != img.toldScarce && state != Broken {
			e := Event{Subject: d.subject(img), Warning: scarce, Reason: EventPaused, Message: img.scarce}
			if !scarce {
				e.Reason, e.Message = EventResumed, "its storage has space for its layer again"
			}
			events = append(events, e)
			img.toldScarce, img.toldState = scarce, state // that is what has changed
		}
		if state == img.toldState || img.toldState == "" && state == Optimized {
			img.toldState = state
			continue
		}
		img.toldState = state
		e := Event{Subject: d.subject(img), Warning: true, Reason: EventDegraded, Message: reason}
		switch state {
		case Broken:
			e.Reason = EventBroken
			e.Message += "; see kubectl quarry check"
		case Optimized:
			e.Reason, e.Warning, e.Message = EventOptimized, false, "nothing slows it down any more"
		}
		events = append(events, e)
	}
	d.mu.Unlock()
	for _, e := range events {
		d.m.tell(e)
	}
}

// stateOf a visible image, and why it is not Optimized. The caller holds d.mu.
func (d *domain) stateOf(img *image) (State, string) {
	if img.broken != nil {
		return Broken, img.broken.Error()
	}
	if why := d.whyDegraded(img); why != "" {
		return Degraded, why
	}
	return Optimized, ""
}

// about says whose image an operation makes: it hears of a long copy.
func (o *operation) about(m *Manager, s Subject) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.teller, o.subject, o.told = m, s, o.started.Add(longCopy-progressEvery)
}

// news is an event about how far the operation is, if one is due. The caller holds o.mu.
func (o *operation) news() *Event {
	if o.teller == nil || o.totalB <= 0 || o.doneB >= o.totalB {
		return nil
	}
	now := o.teller.cfg.Now()
	if now.Sub(o.told) < progressEvery {
		return nil
	}
	o.told = now
	return &Event{Subject: o.subject, Reason: EventProgress, Message: o.stepText()}
}
