package main

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

// manager is the part of the Image Manager that openers use. An entry's overcommit tells its
// versions apart.
type manager struct {
	mu     sync.Mutex
	open   map[string]float64 // by node: the overcommit in force
	said   []string           // what was done, in order
	closes chan struct{}      // if not nil: closing a domain lasts until it is closed
	opens  chan struct{}      // if not nil: the next opening of storage does, whatever its context says
	wrong  error              // what is wrong with settings
	tried  int                // how often settings were
}

func (m *manager) say(what, node string) { m.said = append(m.said, strings.TrimSpace(what+" "+node)) }

// storage is openers.open.
func (m *manager) storage(context.Context, domain.Entry, string) (engine.Engine, func(context.Context, string) error, error) {
	m.mu.Lock()
	lasts := m.opens
	m.opens = nil
	m.mu.Unlock()
	if lasts != nil {
		<-lasts
	}
	return closable{}, nil, nil
}

type closable struct{ engine.Engine }

func (closable) Close() error { return nil }

func (m *manager) AddDomain(ctx context.Context, cfg image.DomainConfig, _ engine.Engine) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ctx.Err() != nil {
		return "", fault.Wrap(fault.Canceled, ctx.Err())
	}
	if _, ok := m.open[cfg.Node]; ok {
		return "", fault.New(fault.Exists, "it is open")
	}
	m.open[cfg.Node] = cfg.Overcommit
	m.say("open", cfg.Node)
	return cfg.Name, nil
}

func (m *manager) Unopened(image.DomainConfig, error) {}

func (m *manager) Reconfigure(cfg image.DomainConfig) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tried++; m.wrong != nil {
		return "", m.wrong
	}
	if _, ok := m.open[cfg.Node]; !ok {
		return "", fault.New(fault.Unavailable, "it is not open")
	}
	m.open[cfg.Node] = cfg.Overcommit
	m.say("settings", cfg.Node)
	return cfg.Name, nil
}

func (m *manager) CloseDomain(_ context.Context, cfg image.DomainConfig, _ error) error {
	m.mu.Lock()
	_, ok := m.open[cfg.Node]
	delete(m.open, cfg.Node)
	lasts := m.closes
	m.mu.Unlock()
	if !ok {
		return nil
	}
	if lasts != nil {
		<-lasts
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.say("closed", cfg.Node)
	return nil
}

// is checks what is in force on each node, and what was done, after all that can go on without
// somebody or the time.
func (m *manager) is(t *testing.T, when string, open map[string]float64, said ...string) {
	t.Helper()
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	same := len(m.open) == len(open)
	for node, version := range open {
		same = same && m.open[node] == version
	}
	if !same || !slices.Equal(m.said, said) {
		t.Fatalf("%s: open %v, done %q; want %v, %q", when, m.open, m.said, open, said)
	}
}

// withOpeners has a manager and its openers in a time of their own, in which they end.
func withOpeners(t *testing.T, do func(t *testing.T, ctx context.Context, o *openers, m *manager)) {
	synctest.Test(t, func(t *testing.T) {
		m := &manager{open: map[string]float64{}}
		o := &openers{manager: m, open: m.storage}
		ctx, stop := context.WithCancel(t.Context())
		t.Cleanup(func() { stop(); o.running.Wait() })
		do(t, ctx, o, m)
	})
}

// channel is ended at the latest when the test is.
func channel(t *testing.T) chan struct{} {
	c := make(chan struct{})
	t.Cleanup(func() { end(c) })
	return c
}

func end(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

func of(n float64) domain.Entry { return domain.Entry{Name: "a", Overcommit: n} }

func TestWhatComesBackBeforeItIsClosedIsOpenInTheEnd(t *testing.T) {
	type on = map[string]float64
	t.Run("after it was open", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			m.closes = channel(t)
			o.one(ctx, of(1), "", nil, nil)
			m.is(t, "at first", on{"": 1}, "open")
			var left []string
			ended := false
			o.remove(ctx, "a", func() { left, ended = o.nodesOf("a"), true })
			m.is(t, "removed", on{}, "open")
			if n := o.nodesOf("a"); len(n) > 0 {
				t.Errorf("it is being closed, and is to be on %q", n)
			}
			o.one(ctx, of(2), "", nil, nil)
			time.Sleep(retryLast)
			m.is(t, "back, before it is closed", on{}, "open")
			if ended {
				t.Error("the removal has ended before it is closed")
			}
			end(m.closes)
			m.is(t, "back", on{"": 2}, "open", "closed", "open")
			if !ended || !slices.Equal(left, []string{""}) {
				t.Errorf("the removal has ended %t, and sees it on %q", ended, left)
			}
		})
	})
	t.Run("while it was being opened", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			hangs := channel(t)
			m.opens = hangs
			o.one(ctx, of(1), "", nil, nil)
			synctest.Wait()
			o.remove(ctx, "a", func() {})
			synctest.Wait()
			o.one(ctx, of(2), "", nil, nil)
			m.is(t, "back, while the first still hangs", on{})
			end(hangs)
			time.Sleep(retryLast)
			m.is(t, "back", on{"": 2}, "open")
		})
	})
	t.Run("twice", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			m.closes = channel(t)
			o.one(ctx, of(1), "", nil, nil)
			synctest.Wait()
			ended := 0
			for n := range 2 {
				o.remove(ctx, "a", func() { ended++ })
				synctest.Wait()
				o.one(ctx, of(float64(n+2)), "", nil, nil)
				synctest.Wait()
			}
			end(m.closes)
			synctest.Wait()
			if ended != 2 {
				t.Errorf("%d of 2 removals have ended", ended)
			}
			m.is(t, "back", on{"": 3}, "open", "closed", "open")
		})
	})
	t.Run("and is gone if it was removed again", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			m.closes = channel(t)
			o.one(ctx, of(1), "", nil, nil)
			synctest.Wait()
			o.remove(ctx, "a", func() {})
			o.one(ctx, of(2), "", nil, nil)
			o.remove(ctx, "a", func() {})
			synctest.Wait()
			end(m.closes)
			time.Sleep(retryLast)
			m.is(t, "removed", on{}, "open", "closed")
			if len(o.all) > 0 {
				t.Errorf("kept: %v", o.all)
			}
		})
	})
	t.Run("each node by itself", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			own := func(n float64) domain.Entry { e := of(n); e.Scope = domain.ScopeNode; return e }
			o.one(ctx, own(1), "n1", nil, nil)
			m.is(t, "n1", on{"n1": 1}, "open n1")
			o.one(ctx, own(1), "n2", nil, nil)
			m.is(t, "n2", on{"n1": 1, "n2": 1}, "open n1", "open n2")
			m.closes = channel(t)
			o.remove(ctx, "a", func() {})
			o.one(ctx, own(2), "n2", nil, nil)
			m.is(t, "n2 is to come back", on{}, "open n1", "open n2")
			end(m.closes)
			synctest.Wait()
			if n := o.nodesOf("a"); !slices.Equal(n, []string{"n2"}) {
				t.Errorf("it is on %q", n)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if len(m.open) != 1 || m.open["n2"] != 2 || !slices.Contains(m.said, "closed n1") {
				t.Errorf("open %v, done %q", m.open, m.said)
			}
			if again := slices.Index(m.said[2:], "open n2"); again < slices.Index(m.said[2:], "closed n2") {
				t.Errorf("n2 was opened before it was closed: %q", m.said)
			}
		})
	})
}

func TestSettingsAreTriedUntilTheyAreInForce(t *testing.T) {
	type on = map[string]float64
	taken := fault.New(fault.Invalid, "the alias is another domain's")
	// failing has one open whose new settings cannot be in force yet, and were tried more than once.
	failing := func(t *testing.T, ctx context.Context, o *openers, m *manager) {
		t.Helper()
		o.one(ctx, of(1), "", nil, nil)
		m.is(t, "at first", on{"": 1}, "open")
		m.wrong = taken
		o.one(ctx, of(2), "", nil, nil)
		m.is(t, "with settings that fail", on{"": 1}, "open")
		time.Sleep(2 * retryLast)
		m.is(t, "with settings that still fail", on{"": 1}, "open")
		if m.tried < 3 {
			t.Fatalf("settings were tried %d times in two minutes", m.tried)
		}
	}
	t.Run("without opening it again", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			failing(t, ctx, o, m)
			m.mu.Lock()
			m.wrong = nil
			m.mu.Unlock()
			time.Sleep(retryLast)
			m.is(t, "at last", on{"": 2}, "open", "settings")
			tried := m.tried
			time.Sleep(2 * retryLast)
			m.is(t, "later", on{"": 2}, "open", "settings")
			if m.tried != tried {
				t.Error("settings that are in force were tried again")
			}
		})
	})
	t.Run("or others come", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			failing(t, ctx, o, m)
			m.wrong = nil
			o.one(ctx, of(3), "", nil, nil)
			m.is(t, "with others", on{"": 3}, "open", "settings")
			time.Sleep(2 * retryLast)
			m.is(t, "later", on{"": 3}, "open", "settings")
		})
	})
	t.Run("or it is removed", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			failing(t, ctx, o, m)
			o.remove(ctx, "a", func() {})
			m.is(t, "removed", on{}, "open", "closed")
			m.wrong = nil
			time.Sleep(2 * retryLast)
			m.is(t, "later", on{}, "open", "closed")
		})
	})
	t.Run("or it is at another storage", func(t *testing.T) {
		withOpeners(t, func(t *testing.T, ctx context.Context, o *openers, m *manager) {
			failing(t, ctx, o, m)
			moved := of(4)
			moved.Params = map[string]string{"path": "/elsewhere"}
			o.one(ctx, moved, "", nil, nil)
			m.is(t, "moved", on{"": 4}, "open", "closed", "open")
		})
	})
}
