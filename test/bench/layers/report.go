package main

import (
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/quarry-csi/quarry/test/bench/rig"
)

// Names of candidates that goals are about.
const (
	lvmOwn   = "LVM's own, with a snapshot"
	lvmClone = "LVM's own, the snapshot"
)

type key struct {
	family, candidate string
	phase             phase
	shape             string
}

// results are bytes per second, one for each round.
type results struct{ rates map[key][]float64 }

func newResults() *results { return &results{rates: map[key][]float64{}} }

func (r *results) add(f family, c *candidate, p phase, s shape, rate float64) {
	k := key{f.name, c.name, p, s.String()}
	r.rates[k] = append(r.rates[k], rate)
}

// ratios are those of a candidate to some others' mean, one for each round.
func (r *results) ratios(f family, p phase, s shape, candidate string, to ...string) []float64 {
	var out []float64
	for round, rate := range r.rates[key{f.name, candidate, p, s.String()}] {
		sum := 0.0
		for _, name := range to {
			sum += r.rates[key{f.name, name, p, s.String()}][round]
		}
		out = append(out, rate/(sum/float64(len(to))))
	}
	return out
}

// print shows the medians of the ratios to the bare device, and says which goals
// are met.
func (r *results) print(f family, o options) error {
	bare := []string{f.candidates[0].name, f.candidates[1].name}
	loads := shapes(o.long)
	phases := []phase{below, above, first, later}
	for _, p := range phases {
		fmt.Printf("\n%s, %s: ratio to the bare device\n", f.name, p)
		t := tabwriter.NewWriter(rig.Out(), 0, 0, 2, ' ', 0)
		for _, s := range loads {
			fmt.Fprintf(t, "\t%s", s)
		}
		fmt.Fprint(t, "\nbare, MiB/s")
		for _, s := range loads {
			fmt.Fprintf(t, "\t%.1f", rig.Quantile(r.rates[key{f.name, bare[0], p, s.String()}], 0.5)/float64(mib))
		}
		fmt.Fprintln(t)
		for _, c := range f.candidates[1:] {
			fmt.Fprint(t, c.name)
			for _, s := range loads {
				to := bare
				if c.name == bare[1] {
					to = bare[:1]
				}
				fmt.Fprintf(t, "\t%s", show(r.ratios(f, p, s, c.name, to...)))
			}
			fmt.Fprintln(t)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	fmt.Println()
	reads, every := []phase{below, above}, phases
	r.goal(f, loads, every, "depth 0", 0.95, bare...)
	r.goal(f, loads, reads, "depth 1", 0.85, bare...)
	r.goal(f, loads, []phase{later}, "depth 1", 0.8, bare...)
	for _, own := range []string{lvmOwn, lvmClone} {
		if slices.ContainsFunc(f.candidates, func(c *candidate) bool { return c.name == own }) {
			r.goal(f, loads, every, "depth 1", 1, own)
		}
	}
	return nil
}

// show is the median, and the least and the most where there are several.
func show(ratios []float64) string {
	text := fmt.Sprintf("%.2f", rig.Quantile(ratios, 0.5))
	if len(ratios) > 1 {
		text += fmt.Sprintf(" (%.2f-%.2f)", slices.Min(ratios), slices.Max(ratios))
	}
	return text
}

// goal says with which loads a candidate reaches a part of what others do.
func (r *results) goal(f family, loads []shape, phases []phase, name string, least float64, to ...string) {
	if !slices.ContainsFunc(f.candidates, func(c *candidate) bool { return c.name == name }) {
		return
	}
	var missed []string
	for _, p := range phases {
		for _, s := range loads {
			if got := r.ratios(f, p, s, name, to...); rig.Quantile(got, 0.5) < least {
				missed = append(missed, fmt.Sprintf("%s %s: %s", p, s, show(got)))
			}
		}
	}
	fmt.Printf("goal: %s at %.2f of %s, %s: met with %d of %d loads\n", name, least, to[0], f.name, len(phases)*len(loads)-len(missed), len(phases)*len(loads))
	for _, m := range missed {
		fmt.Printf("  missed by %s\n", m)
	}
}
