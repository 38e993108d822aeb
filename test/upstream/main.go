// Command upstream prints, as tables for docs/CONFORMANCE.md, what the reports of hack/e2e upstream say: how many
// specs of the external-storage suite ran with each driver definition, and which did not and why.
//
//	go run ./test/upstream FOLDER
//
// FOLDER holds DEFINITION-PASS.json, Ginkgo's reports, and DEFINITION-patterns.log, where the suite
// says which patterns it has no specs for.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// report is what is read of Ginkgo's.
type report struct {
	SpecReports []spec
}

type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	Failure                 struct{ Message string }
}

const suite = "External Storage"

// name is the spec's without what all of them have.
func (s spec) name() string {
	return strings.Join(append(slices.Clone(s.ContainerHierarchyTexts[1:]), s.LeafNodeText), " ")
}

func (s spec) ours() bool {
	return s.LeafNodeType == "It" && len(s.ContainerHierarchyTexts) > 0 && strings.HasPrefix(s.ContainerHierarchyTexts[0], suite)
}

// counts of one pass.
type counts struct{ passed, failed, skipped int }

// outcome is what became of one definition's specs: reasons has one for each that ran in no pass.
type outcome struct {
	passes  map[string]counts
	reasons map[string]string
	ran     map[string]bool
}

const leftOut = "left out by hack/e2e"

func (o *outcome) add(pass string, r report) {
	var n counts
	for _, s := range r.SpecReports {
		if !s.ours() {
			continue
		}
		name := s.name()
		switch {
		case s.State == "passed":
			n.passed++
			o.ran[name] = true
		case s.State == "skipped" && s.Failure.Message != "":
			n.skipped++
			o.reasons[name] = reason(s.Failure.Message)
		case s.State == "skipped" || s.State == "pending": // another pass may have it
			o.reasons[name] = cmp.Or(o.reasons[name], leftOut)
		default:
			n.failed++
			o.ran[name] = true
		}
	}
	o.passes[pass] = n
}

var (
	noise    = regexp.MustCompile(`^[Dd]river:? "?csi\.quarry\.dev"? ?|,? *-+ *[Ss]kipping\.?$`)
	pattern  = regexp.MustCompile(`Skipping registration: \[Testpattern: (.*?)\] (.*) \[Driver: csi\.quarry\.dev\] - (.*)`)
	repeated = regexp.MustCompile(`\s+`)
)

func reason(message string) string {
	first, _, _ := strings.Cut(strings.TrimSpace(message), "\n")
	return strings.TrimSpace(noise.ReplaceAllString(repeated.ReplaceAllString(first, " "), ""))
}

// unregistered reads the suites and patterns for which there are no specs, with the reason.
func unregistered(log string) map[string]string {
	out := map[string]string{}
	for _, m := range pattern.FindAllStringSubmatch(log, -1) {
		out[m[2]+": "+m[1]] = reason(m[3])
	}
	return out
}

func read(folder string) (outcomes map[string]*outcome, patterns map[string]map[string]string, err error) {
	outcomes, patterns = map[string]*outcome{}, map[string]map[string]string{}
	files, err := filepath.Glob(filepath.Join(folder, "*.json"))
	if err != nil {
		return nil, nil, err
	}
	if len(files) == 0 {
		return nil, nil, fmt.Errorf("%s holds no report", folder)
	}
	for _, f := range files {
		base := strings.TrimSuffix(filepath.Base(f), ".json")
		i := strings.LastIndex(base, "-")
		if i < 0 {
			return nil, nil, fmt.Errorf("%s is not named DEFINITION-PASS.json", f)
		}
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, nil, err
		}
		var reports []report
		if err := json.Unmarshal(b, &reports); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", f, err)
		}
		definition, pass := base[:i], base[i+1:]
		o := outcomes[definition]
		if o == nil {
			o = &outcome{passes: map[string]counts{}, reasons: map[string]string{}, ran: map[string]bool{}}
			outcomes[definition] = o
			b, err := os.ReadFile(filepath.Join(folder, definition+"-patterns.log"))
			if err != nil {
				return nil, nil, err
			}
			patterns[definition] = unregistered(string(b))
		}
		for _, r := range reports {
			o.add(pass, r)
		}
	}
	return outcomes, patterns, nil
}

func tell(w io.Writer, outcomes map[string]*outcome, patterns map[string]map[string]string) {
	fmt.Fprintln(w, "| definition | pass | ran | passed | failed | skipped themselves |\n|---|---|---|---|---|---|")
	skipped, absent := map[string]map[string][]string{}, map[string]map[string][]string{}
	note := func(to map[string]map[string][]string, definition, name, reason string) {
		if to[reason] == nil {
			to[reason] = map[string][]string{}
		}
		to[reason][name] = append(to[reason][name], definition)
	}
	for _, d := range slices.Sorted(maps.Keys(outcomes)) {
		o := outcomes[d]
		for _, p := range slices.Sorted(maps.Keys(o.passes)) {
			n := o.passes[p]
			fmt.Fprintf(w, "| %s | %s | %d | %d | %d | %d |\n", d, p, n.passed+n.failed, n.passed, n.failed, n.skipped)
		}
		for name, reason := range o.reasons {
			if !o.ran[name] {
				note(skipped, d, name, reason)
			}
		}
		for name, reason := range patterns[d] {
			note(absent, d, name, reason)
		}
	}
	list(w, "spec", skipped)
	list(w, "suite: pattern", absent)
}

// list is a table of reasons, then of names; equal lists of definitions are written once.
func list(w io.Writer, what string, reasons map[string]map[string][]string) {
	fmt.Fprintf(w, "\n| reason | %s | with |\n|---|---|---|\n", what)
	for _, reason := range slices.Sorted(maps.Keys(reasons)) {
		with := map[string][]string{}
		for name, definitions := range reasons[reason] {
			key := strings.Join(definitions, ", ")
			with[key] = append(with[key], name)
		}
		for _, key := range slices.Sorted(maps.Keys(with)) {
			slices.Sort(with[key])
			fmt.Fprintf(w, "| %s | %s | %s |\n", reason, strings.Join(with[key], "<br>"), key)
		}
	}
}

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: go run ./test/upstream FOLDER")
	}
	outcomes, patterns, err := read(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	tell(os.Stdout, outcomes, patterns)
}
