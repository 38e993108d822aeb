package image

import (
	"context"
	"slices"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// now is the configuration in force. What cannot change while the domain is open is in cfg, too.
func (d *domain) now() *DomainConfig { return d.settings.Load() }

// of finds the open domain of an entry; nil: there is none. The caller holds m.mu.
func (m *Manager) of(e entry) *domain {
	for _, d := range m.domains {
		if d.cfg.entry() == e {
			return d
		}
	}
	return nil
}

// Reconfigure changes what can change while a domain is open: NativeOnly, Overcommit,
// CapacityLimit, BackgroundRate and Aliases. An alias that is gone stays valid until the domain is
// opened again: nodes may have images in use under it. It returns the domain's ID.
// fault.Unavailable: the domain is not open. fault.Invalid: an alias is another domain's.
func (m *Manager) Reconfigure(cfg DomainConfig) (string, error) {
	if err := checkDomainConfig(&cfg); err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.of(cfg.entry())
	if d == nil {
		return "", fault.New(fault.Unavailable, "domain %s is not open", cfg.Name)
	}
	cfg.Aliases = slices.Clone(cfg.Aliases)
	for _, a := range d.now().Aliases {
		if !slices.Contains(cfg.Aliases, a) {
			cfg.Aliases = append(cfg.Aliases, a)
		}
	}
	keys := d.idsOf(cfg.Aliases)
	for _, k := range keys {
		if other := m.domains[k]; other != nil && other != d {
			return "", d.double(k, other)
		}
	}
	for _, k := range keys {
		m.domains[k] = d
	}
	d.settings.Store(&cfg)
	return d.id, nil
}

// CloseDomain closes an open domain. Its images stay, and are unavailable for reason, or with
// nil as those of a domain that is not configured. Operations in it end with an unknown outcome; those
// that have not ended when ctx ends are left behind. What is not open is success.
func (m *Manager) CloseDomain(ctx context.Context, cfg DomainConfig, reason error) error {
	m.mu.Lock()
	d := m.of(cfg.entry())
	if reason != nil {
		m.unopened[cfg.entry()] = unopened{cfg, reason}
	}
	if d == nil {
		m.mu.Unlock()
		return nil
	}
	for _, k := range d.ids() {
		delete(m.domains, k)
	}
	m.mu.Unlock()
	if reason == nil {
		reason = fault.New(fault.Unavailable, "it is not configured any more")
	}
	_ = d.fence(fault.New(fault.Unavailable, "domain %s was closed: %w", d.id, reason))
	d.stop()
	m.ops.mu.Lock()
	var running []*operation
	for _, op := range m.ops.byKey {
		if op.view().Domain == d.id {
			running = append(running, op)
		}
	}
	m.ops.mu.Unlock()
	select {
	case <-d.stopped:
	case <-ctx.Done():
	}
	for _, op := range running {
		select {
		case <-op.done:
		case <-ctx.Done():
		}
	}
	return d.engine.Close()
}

// Forget drops what is known of an entry whose domains are closed: it is not configured any more.
func (m *Manager) Forget(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e := range m.unopened {
		if e.name == name {
			delete(m.unopened, e)
		}
	}
	delete(m.listed, name)
}

// AttachedIn names the nodes that images of an entry's open domains are, or may be, attached to.
func (m *Manager) AttachedIn(name string) []string {
	var out []string
	for _, d := range m.open() {
		if d.cfg.Name != name {
			continue
		}
		d.mu.Lock()
		for _, img := range d.images {
			for _, a := range img.attached {
				if a.Mode != ModeMerging {
					out = append(out, a.Node)
				}
			}
			for n := range img.unsure {
				out = append(out, n)
			}
		}
		d.mu.Unlock()
	}
	slices.Sort(out)
	return slices.Compact(out)
}
