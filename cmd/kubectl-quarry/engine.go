package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/quarry-csi/quarry/cmd/internal/engines"
	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// suiteLimit is how long the conformance suite may take.
const suiteLimit = 15 * time.Minute

// rule is one line of the report. It fails when any of its parts does.
type rule struct {
	Mode   string   `json:"mode"` // "native" or "minimal": with every capability hidden
	Rule   string   `json:"rule"`
	Result string   `json:"result"` // "PASS", "FAIL" or "SKIP"
	Took   string   `json:"took"`
	Said   []string `json:"said,omitempty"`
}

// report of an engine check.
type report struct {
	Engine       string              `json:"engine"`
	Location     string              `json:"location"`
	Capabilities []engine.Capability `json:"capabilities"`
	Notes        []string            `json:"notes,omitempty"`
	Rules        []rule              `json:"rules"`
}

func (c *cli) engineCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "engine", Short: "Work on engines", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	var params, expect []string
	check := &cobra.Command{
		Use: "check ENGINE --param NAME=VALUE...", Short: "Try a real storage against every rule of the engine contract",
		Long: `Try a real storage against every rule of the engine contract: first with all
that the engine can do natively, then with all of that hidden. It needs no
running Quarry. Everything happens in a new sub-directory, which is removed
afterwards; what else is in the directory is not touched.

This version checks engines that keep a domain in a directory: ` + strings.Join(checkable(), ", ") + `. An
engine behind a socket comes in a later version.

Exit status: 0, every rule is kept; 2, one is not; 1, it could not be tried.`,
		Example: `  kubectl quarry engine check dir --param path=/mnt/try
  kubectl quarry engine check dir --param path=/mnt/xfs --expect clone,snapshot,meter`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.engineCheck(cmd.Context(), args[0], params, expect)
		},
	}
	check.Flags().StringArrayVar(&params, "param", nil, "a parameter of the domain, NAME=VALUE; may be repeated")
	check.Flags().StringSliceVar(&expect, "expect", nil, "fail unless the engine has exactly these capabilities here")
	suite := &cobra.Command{
		Use: "run-suite ENGINE SCRATCH EXPECT", Hidden: true, Args: cobra.MinimumNArgs(3),
		Run: func(_ *cobra.Command, args []string) { runSuite(args[0], args[1], args[2], args[3:]) },
	}
	cmd.AddCommand(check, suite)
	return cmd
}

// checkable names the engines that keep a domain in a directory.
func checkable() []string {
	reg := engines.Registry(host.Exec{})
	return slices.DeleteFunc(reg.Engines(), func(name string) bool { return reg[name].Directory == "" })
}

func parseParams(said []string) (map[string]string, error) {
	out := map[string]string{}
	for _, p := range said {
		name, value, ok := strings.Cut(p, "=")
		if _, twice := out[name]; !ok || name == "" || twice {
			return nil, fault.New(fault.Invalid, "--param %q: must be NAME=VALUE, once for each name", p)
		}
		out[name] = value
	}
	return out, nil
}

func (c *cli) engineCheck(ctx context.Context, name string, said, expect []string) (err error) {
	reg := engines.Registry(host.Exec{})
	params, err := parseParams(said)
	if err != nil {
		return err
	}
	if err := reg.CheckParams(name, params); err != nil {
		return err
	}
	where := reg[name].Directory
	if where == "" {
		return fault.New(fault.Unsupported, "engine %q does not keep a domain in a directory: this version checks %s", name, strings.Join(checkable(), ", "))
	}
	if !filepath.IsAbs(params[where]) {
		return fault.New(fault.Invalid, "--param %s=%q: the absolute path of an existing directory is needed", where, params[where])
	}
	scratch, err := os.MkdirTemp(params[where], "quarry-engine-check-")
	if err != nil {
		return fault.New(fault.Invalid, "a directory to check in: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()

	r := report{Engine: name}
	if err := r.describe(ctx, reg, params, where, scratch); err != nil {
		return err
	}
	// What vanishes between two openings is a failure too.
	args := append([]string{"engine", "run-suite", "--", name, scratch, strings.Join(r.have(), ",")}, said...)
	// The suite runs in a process of its own: it is made for Go's test runner,
	// which ends its process, and an engine under test may do anything.
	result, runErr := host.Exec{}.Run(ctx, host.Command{Name: "/proc/self/exe", Args: args, Timeout: suiteLimit})
	r.Rules = append(r.expected(expect), parseReport(string(result.Stdout))...)
	failed := slices.DeleteFunc(slices.Clone(r.Rules), func(r rule) bool { return r.Result != "FAIL" })
	var exit *host.ExitError
	if runErr != nil && !errors.As(runErr, &exit) {
		return runErr
	}
	if err := c.print(r, func(w io.Writer, _ bool) error { return r.write(w) }); err != nil {
		return err
	}
	// Go's test runner ends with 0 or 1; anything else is an end before the last rule.
	if result.ExitCode > 1 || len(r.Rules) == 0 {
		return fault.New(fault.Internal, "the suite broke off before its last rule: %v\n%s", runErr, result.Stderr)
	}
	if len(failed) > 0 {
		return needsPerson{fmt.Sprintf("%d of %d rules are broken.", len(failed), len(r.Rules))}
	}
	return nil
}

// describe opens a domain once to learn what it is.
func (r *report) describe(ctx context.Context, reg domain.Registry, params map[string]string, where, scratch string) error {
	dir, err := os.MkdirTemp(scratch, "domain-")
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	e, err := openAt(ctx, reg, r.Engine, params, where, dir)
	if err != nil {
		return err
	}
	d, err := e.Describe(ctx)
	r.Location, r.Notes, r.Capabilities = d.Location, d.Notes, engine.Discover(e).List()
	return errors.Join(err, e.Close())
}

func (r *report) have() []string {
	out := []string{}
	for _, c := range r.Capabilities {
		out = append(out, string(c))
	}
	slices.Sort(out)
	return out
}

// expected compares the capabilities with what a person expects, if anything.
func (r *report) expected(want []string) []rule {
	if len(want) == 0 {
		return nil
	}
	slices.Sort(want)
	out := rule{Mode: "native", Rule: "CapabilitiesAsGiven", Result: "PASS", Took: "0.00s"}
	if !slices.Equal(r.have(), want) {
		out.Result, out.Said = "FAIL", []string{fmt.Sprintf("there are %v, expected were %v", r.have(), want)}
	}
	return []rule{out}
}

// openAt opens a domain with params, but in dir.
func openAt(ctx context.Context, reg domain.Registry, name string, params map[string]string, where, dir string) (engine.Engine, error) {
	at := maps.Clone(params)
	at[where] = dir
	return reg.Open(ctx, domain.Entry{Name: "check", Engine: name, Params: at})
}

// runSuite is the child process: Go's test runner, which ends it.
func runSuite(name, scratch, expect string, said []string) {
	reg := engines.Registry(host.Exec{})
	where := reg[name].Directory
	h := enginetest.Harness{Domain: func(t testing.TB) func(testing.TB) engine.Engine {
		params, err := parseParams(said)
		if err != nil {
			t.Fatal(err)
		}
		dir, err := os.MkdirTemp(scratch, "domain-")
		if err != nil {
			t.Fatal(err)
		}
		return func(t testing.TB) engine.Engine {
			e, err := openAt(context.Background(), reg, name, params, where, dir)
			if err != nil {
				t.Fatal(err)
			}
			return e
		}
	}}
	for _, c := range strings.FieldsFunc(expect, func(r rune) bool { return r == ',' }) {
		h.Expect = append(h.Expect, engine.Capability(c))
	}
	testing.Init()
	if err := flag.CommandLine.Parse([]string{"-test.v"}); err != nil {
		panic(err) // flags of this very line
	}
	testing.Main(func(string, string) (bool, error) { return true, nil },
		[]testing.InternalTest{{Name: "rules", F: func(t *testing.T) { enginetest.Run(t, h) }}}, nil, nil)
}

var (
	ended = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): rules/(native|minimal)/([^/ ]+)(/\S+)? \(([0-9.]+s)\)$`)
	begun = regexp.MustCompile(`^=== (?:RUN|NAME|CONT|PAUSE)\s+rules(?:/(native|minimal)/([^/ ]+)(/\S+)?)?`)
)

// parseReport reads what Go's test runner prints with -test.v: what a test says
// comes after the line that names it, its result at the end.
func parseReport(out string) []rule {
	var rules []rule
	said := map[string][]string{}
	current := ""
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		if m := begun.FindStringSubmatch(line); m != nil {
			current = m[1] + "/" + m[2]
			continue
		}
		if m := ended.FindStringSubmatch(line); m != nil {
			if m[4] == "" {
				rules = append(rules, rule{Mode: m[2], Rule: m[3], Result: m[1], Took: m[5]})
			}
			current = m[2] + "/" + m[3]
			continue
		}
		if text := strings.TrimSpace(line); text != "" && current != "" && !strings.HasPrefix(text, "--- ") && text != "PASS" && text != "FAIL" {
			said[current] = append(said[current], text)
		}
	}
	for n := range rules {
		if rules[n].Result != "PASS" {
			rules[n].Said = said[rules[n].Mode+"/"+rules[n].Rule]
		}
	}
	return rules
}

func (r report) write(w io.Writer) error {
	fmt.Fprintf(w, "Engine %s on %s\n", r.Engine, r.Location)
	caps := none
	if len(r.Capabilities) > 0 {
		caps = strings.Join(r.have(), ", ")
	}
	fmt.Fprintf(w, "Native capabilities: %s\n", caps)
	for _, n := range r.Notes {
		fmt.Fprintf(w, "  %s\n", n)
	}
	fmt.Fprintln(w)
	t := newTable("RESULT", "MODE", "RULE", "TOOK")
	kept := 0
	for _, rule := range r.Rules {
		t.add(rule.Result, rule.Mode, words(rule.Rule), rule.Took)
		if rule.Result == "PASS" {
			kept++
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	for _, rule := range r.Rules {
		if rule.Result != "PASS" {
			fmt.Fprintf(w, "\n%s: %s (%s)\n", rule.Result, words(rule.Rule), rule.Mode)
			for _, s := range rule.Said {
				fmt.Fprintf(w, "  %s\n", s)
			}
		}
	}
	_, err := fmt.Fprintf(w, "\n%d of %d rules kept.\n", kept, len(r.Rules))
	return err
}

// words turns a test's name into a sentence: "TagIsExclusive", "tag is exclusive".
func words(name string) string {
	var b strings.Builder
	for n, r := range name {
		if r >= 'A' && r <= 'Z' && n > 0 {
			b.WriteByte(' ')
		}
		b.WriteRune(r)
	}
	return strings.ToLower(b.String())
}
