package image

import (
	"context"
	"errors"
	"time"
)

// freezeMargin is how much longer than a copy may take an agent keeps a
// filesystem frozen, so that the copy ends first.
const freezeMargin = 2 * time.Second

// quiet is an image whose writers were asked to be still.
type quiet struct {
	m        *Manager
	frozen   []frozen
	busy     bool // in use where nothing can be frozen
	busyNode string
	released bool
	err      error
}

// frozen is where a filesystem is frozen, under the handle that its node knows.
type frozen struct {
	node   string
	handle Handle
}

// quiesce freezes the filesystem of an image on every node that may write it.
// The result is never nil, also beside an error.
func (m *Manager) quiesce(ctx context.Context, src *image) (*quiet, error) {
	q := &quiet{m: m}
	limit := src.quiesceLimit() + freezeMargin
	for _, a := range src.writers() {
		agent, err := m.cfg.Agents.Agent(a)
		if err != nil {
			return q, err
		}
		for _, h := range src.d.handles(src) {
			state, err := agent.Freeze(ctx, h, limit)
			if err != nil {
				return q, err
			}
			switch state {
			case IsFrozen:
				q.frozen = append(q.frozen, frozen{a, h})
			case NotFreezable:
				q.busy, q.busyNode = true, a
			case NotStaged:
			}
		}
	}
	return q, nil
}

func (img *image) writers() []string {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	var out []string
	for _, a := range img.attached {
		if !a.ReadOnly {
			out = append(out, a.Node)
		}
	}
	return out
}

// release thaws. Its error says that some filesystem had not stayed frozen
// until now. Called again it returns the same.
func (q *quiet) release(ctx context.Context) error {
	if q.released {
		return q.err
	}
	q.released = true
	ctx = context.WithoutCancel(ctx) // a frozen filesystem is thawed whatever happens
	for _, f := range q.frozen {
		agent, err := q.m.cfg.Agents.Agent(f.node)
		if err == nil {
			err = agent.Thaw(ctx, f.handle)
		}
		q.err = errors.Join(q.err, err)
	}
	return q.err
}

func (img *image) quiesceLimit() time.Duration {
	img.d.mu.Lock()
	defer img.d.mu.Unlock()
	if t := img.rec.Tuning; t != nil && t.QuiesceLimit > 0 {
		return t.QuiesceLimit
	}
	return DefaultQuiesceLimit
}
