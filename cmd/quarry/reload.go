package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// reloadEvery is how often the domains file is read. It is followed when it was the same
// twice: one that is just being written says anything.
const reloadEvery = 2 * time.Second

// reloader follows the domains file, and the files of secrets that it names.
type reloader struct {
	load func() ([]domain.Entry, error)
	// apply makes the entries those in force. What it returns could not be done yet: it is
	// told, and apply is called again.
	apply func(ctx context.Context, entries []domain.Entry) error
	// failed is told of a file that is not followed, and nil when all is well again; may be nil.
	failed func(err error)

	successful prometheus.Gauge
	time       prometheus.Gauge
	hup        chan os.Signal
}

// watch adds what it says of itself to the metrics, and lets SIGHUP, which ends a process that
// does not expect it, wait for run.
func (r *reloader) watch(m *metrics) {
	r.hup = make(chan os.Signal, 1)
	signal.Notify(r.hup, syscall.SIGHUP)
	r.successful = prometheus.NewGauge(prometheus.GaugeOpts{Name: "quarry_config_last_reload_successful", Help: "1 if the domains file is in force as it is now."})
	r.time = prometheus.NewGauge(prometheus.GaugeOpts{Name: "quarry_config_last_reload_success_timestamp_seconds", Help: "When the domains file in force was read."})
	m.registry.MustRegister(r.successful, r.time)
	r.successful.Set(1)
	r.time.SetToCurrentTime()
}

// run follows the file until ctx ends. inForce is what it said at the start. SIGHUP reads it at once.
func (r *reloader) run(ctx context.Context, inForce []domain.Entry) {
	log := klog.FromContext(ctx)
	defer signal.Stop(r.hup)
	tick := time.NewTicker(reloadEvery)
	defer tick.Stop()
	seen, told := inForce, ""
	say := func(err error) {
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text == told {
			return
		}
		told = text
		if r.failed != nil {
			r.failed(err)
		}
		if err == nil {
			r.successful.Set(1)
			r.time.SetToCurrentTime()
			log.Info("The domains file is in force")
			return
		}
		r.successful.Set(0)
		log.Error(err, "The domains file is not in force as it is: what was before stays")
	}
	for {
		at := false
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-r.hup:
			at = true
			log.Info("Reading the domains file, as asked by SIGHUP")
		}
		entries, err := r.load()
		if err != nil {
			say(err)
			continue
		}
		same := slices.EqualFunc(entries, seen, domain.Entry.Equal)
		seen = entries
		if !same && !at {
			continue
		}
		if slices.EqualFunc(entries, inForce, domain.Entry.Equal) {
			say(nil)
			continue
		}
		err = r.apply(ctx, entries)
		if err == nil {
			inForce = entries
		}
		if err == nil && told == "" {
			r.time.SetToCurrentTime()
			log.Info("The domains file has changed, and is in force", "domains", len(entries))
		}
		say(err)
	}
}

// difference between entries that are in force and those that are wanted.
// moved are those of the changed ones, as they are, that would be at another storage.
type difference struct{ added, changed, moved, removed []domain.Entry }

func compare(have, want []domain.Entry) (d difference) {
	named := func(list []domain.Entry, name string) int {
		return slices.IndexFunc(list, func(e domain.Entry) bool { return e.Name == name })
	}
	for _, e := range want {
		i := named(have, e.Name)
		switch {
		case i < 0:
			d.added = append(d.added, e)
		case have[i].Scope != e.Scope: // it is another domain, with another ID
			d.added, d.removed = append(d.added, e), append(d.removed, have[i])
		case !have[i].Equal(e):
			d.changed = append(d.changed, e)
			if have[i].Engine != e.Engine || have[i].Socket != e.Socket || !maps.Equal(have[i].Params, e.Params) {
				d.moved = append(d.moved, have[i])
			}
		}
	}
	for _, e := range have {
		if named(want, e.Name) < 0 {
			d.removed = append(d.removed, e)
		}
	}
	return d
}

// keep takes those entries out of the difference whose images are attached: they stay, and so does
// what would come in their place. It returns what is in force afterwards, and why that is
// not all that is wanted.
func (d *difference) keep(want []domain.Entry, attached func(name string) []string) (inForce []domain.Entry, err error) {
	inForce = slices.Clone(want)
	var kept []string
	d.removed = slices.DeleteFunc(d.removed, func(e domain.Entry) bool {
		nodes := attached(e.Name)
		if len(nodes) == 0 {
			return false
		}
		kept = append(kept, fmt.Sprintf("%s (attached to %s)", e.Name, strings.Join(nodes, ", ")))
		same := func(o domain.Entry) bool { return o.Name == e.Name }
		d.added = slices.DeleteFunc(d.added, same)
		inForce = append(slices.DeleteFunc(inForce, same), e)
		return true
	})
	for _, e := range d.moved { // at another storage its images would count as deleted
		if nodes := attached(e.Name); len(nodes) > 0 {
			kept = append(kept, fmt.Sprintf("%s (attached to %s)", e.Name, strings.Join(nodes, ", ")))
			same := func(o domain.Entry) bool { return o.Name == e.Name }
			d.changed = slices.DeleteFunc(d.changed, same)
			inForce = append(slices.DeleteFunc(inForce, same), e)
		}
	}
	if len(kept) > 0 {
		slices.Sort(kept)
		err = fault.New(fault.InUse, "domains that are not in the file any more, or have another scope, engine or parameters there, stay as they were until none of their images is attached: %s", strings.Join(kept, "; "))
	}
	return inForce, err
}
