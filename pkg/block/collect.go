package block

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// detach takes a top down, what stands on it of ours, and what only it used.
func (d *Devices) detach(ctx context.Context, dev Device) error {
	unlock, w, m, err := d.claim(ctx, dev)
	if err != nil {
		return err
	}
	defer unlock()
	domains := w.domains(*dev.mapped)
	if m == nil {
		return d.collect(ctx, domains)
	}
	domains = append(domains, w.domains(*m)...)
	now, err := d.awake(ctx, w, *m) // what is suspended would be written out never
	if err != nil {
		return err
	}
	for _, upper := range w.above(number(now.Major, now.Minor)) {
		if upper, err = d.awake(ctx, w, upper); err != nil {
			return err
		}
		if upper.Open == 0 {
			if err := d.host().FlushDevice(ctx, upper.Path); err != nil {
				return err
			}
		}
		if err := d.host().RemoveMapped(ctx, upper); err != nil {
			return err
		}
		w.forget(upper.UUID)
		if now, err = d.again(ctx, w, now); err != nil {
			return err
		}
	}
	if now.Open == 0 { // else it fails below, soon
		if err := d.host().FlushDevice(ctx, now.Path); err != nil {
			return err
		}
	}
	if err := d.host().RemoveMapped(ctx, now); err != nil {
		return err
	}
	return d.collect(ctx, domains)
}

// Collect takes down the devices of a domain's slabs that no top uses, as a
// killed agent may leave them.
func (d *Devices) Collect(ctx context.Context, domain string) error {
	names := []string{domainHash(domain)}
	unlock, err := d.lockDomains(ctx, names)
	if err != nil {
		return err
	}
	defer unlock()
	return d.collect(ctx, names)
}

// Resume is what a starting agent calls before anything else: it resumes what a
// killed one left suspended, and returns the names of that. It waits for no storage: what
// does not go on at once is CollectAll's.
func (d *Devices) Resume(ctx context.Context) (resumed []string, err error) {
	if err := d.Layers(ctx); fault.KindOf(err) == fault.Unsupported && err != nil {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	left, err := d.host().ResumeLeft(ctx, uuidPrefix)
	for _, m := range left {
		resumed = append(resumed, m.Name)
	}
	return resumed, err
}

// CollectAll is Collect for every domain of which there is anything. They do not wait for each other.
func (d *Devices) CollectAll(ctx context.Context) error {
	w, err := d.look(ctx)
	if err != nil {
		return err
	}
	var domains []string
	for _, m := range w.mapped {
		domains = append(domains, domainOf(m.UUID))
	}
	for _, lp := range w.loops {
		domains = append(domains, domainOf(lp.Mark))
	}
	slices.Sort(domains)
	domains = slices.Compact(domains)
	errs := make([]error, len(domains))
	var all sync.WaitGroup
	for i, name := range domains {
		if name != "" {
			all.Go(func() { errs[i] = d.tidy(ctx, w, name) })
		}
	}
	all.Wait()
	return errors.Join(errs...)
}

// tidy wakes the devices of a domain that Resume could not, and takes down what no top uses.
func (d *Devices) tidy(ctx context.Context, w *world, domain string) error {
	unlock, err := d.lockDomains(ctx, []string{domain})
	if err != nil {
		return err
	}
	defer unlock()
	var errs []error
	for _, m := range w.mapped {
		if domainOf(m.UUID) != domain || !m.Suspended {
			continue
		}
		failed, err := d.failed(ctx, m)
		if failed {
			err = d.wake(ctx, m)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, d.collect(ctx, []string{domain}))...)
}

// collect removes the layers, pads and loop devices of domains, given by their hashes,
// that nobody holds: from the top down, until nothing more goes. They are locked.
func (d *Devices) collect(ctx context.Context, domains []string) error {
	for {
		w, err := d.look(ctx)
		if err != nil {
			return err
		}
		gone := 0
		for _, m := range w.mapped {
			if m.Open > 0 || !slices.Contains(domains, domainOf(m.UUID)) || domainOf(m.UUID) == "" || read(m).kind == "?" {
				continue // in use, another domain's, a top, or not as we make them
			}
			if err := d.host().RemoveMapped(ctx, m); err != nil && !errors.Is(err, fault.InUse) {
				return err
			} else if err == nil {
				gone++
			}
		}
		if gone > 0 {
			continue
		}
		for _, lp := range w.loops {
			if !slices.Contains(domains, domainOf(lp.Mark)) || len(w.users(lp)) > 0 {
				continue
			}
			if err := d.host().DetachLoop(ctx, lp); err != nil && !errors.Is(err, fault.InUse) {
				return err
			}
		}
		return nil
	}
}

// idle says whether a layer, pad or loop device of some domains, given by their hashes,
// has nothing above it.
func (w *world) idle(domains []string) bool {
	for _, m := range w.mapped {
		if slices.Contains(domains, domainOf(m.UUID)) && len(w.above(number(m.Major, m.Minor))) == 0 {
			return true
		}
	}
	return slices.ContainsFunc(w.loops, func(lp host.Loop) bool {
		return slices.Contains(domains, domainOf(lp.Mark)) && len(w.users(lp)) == 0
	})
}

// users are our devices that stand on a loop device.
func (w *world) users(lp host.Loop) []host.Mapped {
	return w.above(number(loopMajor, uint32(lp.Number)))
}
