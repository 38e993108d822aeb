package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/pkg/engine/remote"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// suiteLimit is how long the conformance suite may take.
const suiteLimit = 15 * time.Minute

// rule is one line of the report. It fails when any of its parts does.
type rule struct {
	// Mode is "native"; "socket": the same behind one; "minimal": with every capability hidden;
	// "protocol": what the engine protocol asks for.
	Mode   string   `json:"mode"`
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
	var said, expect []string
	s := subject{}
	check := &cobra.Command{
		Use: "check [ENGINE] [--socket PATH] --param NAME=VALUE...", Short: "Try a real storage against every rule of the engine contract",
		Long: `Try a real storage against every rule of the engine contract: with all that the
engine can do natively, and with all of that hidden. It needs no running Quarry.

With --socket the engine is the process that listens there, in whatever language it
is written, and what the engine protocol asks for is tried as well. It has to run on
this machine, since slabs are written where it attaches them. ENGINE is then the type
that it is expected to be, if given. Without --socket it is one of Quarry's own that
keep a domain in a directory: ` + strings.Join(checkable(), ", ") + `.

The suite needs many new, empty domains. Where a parameter is a directory
(--directory), all happens in a new sub-directory of it, which is removed afterwards;
what else is in the directory is not touched. Or write {} into the value of a
parameter, for which each domain gets another name: the engine has to make such a
domain when it is opened, and is left with it, empty. Nothing is tried in a domain
that is not empty when it is opened under a new name.

Exit status: 0, every rule is kept; 2, one is not; 1, it could not be tried.`,
		Example: `  kubectl quarry engine check dir --param path=/mnt/try
  kubectl quarry engine check dir --param path=/mnt/xfs --expect clone,snapshot,meter
  kubectl quarry engine check --socket /run/example/engine.sock --param path=/mnt/try
  kubectl quarry engine check --socket /run/san/engine.sock --param pool=try-{} --secrets-file keys.yaml`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s.Engine = strings.Join(args, "")
			return c.engineCheck(cmd.Context(), s, said, expect)
		},
	}
	f := check.Flags()
	f.StringVar(&s.Socket, "socket", "", "the Unix socket at which the engine's process listens")
	f.StringArrayVar(&said, "param", nil, "a parameter of the domain, NAME=VALUE; may be repeated")
	f.StringVar(&s.Directory, "directory", "path", "with --socket: the parameter that is a directory, if there is one of that name")
	f.StringVar(&s.SecretsFile, "secrets-file", "", "with --socket: secrets of the domain, as the domains file takes them")
	f.StringSliceVar(&expect, "expect", nil, "fail unless the engine has exactly these capabilities here")
	suite := &cobra.Command{
		Use: "run-suite SUBJECT EXPECT", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error { return runSuite(args[0], args[1]) },
	}
	cmd.AddCommand(check, suite)
	return cmd
}

func (c *cli) engineCheck(ctx context.Context, s subject, said, expect []string) (err error) {
	if s.Params, err = parseParams(said); err != nil {
		return err
	}
	remove, err := s.prepare()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()

	r := report{Engine: s.Engine}
	if err := r.describe(ctx, s); err != nil {
		return err
	}
	told, err := json.Marshal(s)
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	// What vanishes between two openings is a failure too.
	args := []string{"engine", "run-suite", "--", string(told), strings.Join(r.have(), ",")}
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
	if result.ExitCode > 1 || len(r.Rules) == 0 || result.ExitCode == 1 && len(failed) == 0 {
		return fault.New(fault.Internal, "the suite broke off before its last rule: %v\n%s", runErr, result.Stderr)
	}
	if len(failed) > 0 {
		return needsPerson{fmt.Sprintf("%d of %d rules are broken.", len(failed), len(r.Rules))}
	}
	return nil
}

// describe opens a domain once to learn what it is.
func (r *report) describe(ctx context.Context, s subject) error {
	params, end, err := s.domain(ctx)
	if err != nil {
		return err
	}
	e, about, err := s.open(ctx, params, "check")
	if err != nil {
		return err // there is nothing to end
	}
	r.Engine = about
	d, err := e.Describe(ctx)
	r.Location, r.Notes, r.Capabilities = d.Location, d.Notes, engine.Discover(e).List()
	return errors.Join(err, e.Close(), end())
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

// runSuite is the child process: Go's test runner, which ends it.
func runSuite(told, expect string) error {
	var s subject
	if err := json.Unmarshal([]byte(told), &s); err != nil {
		return fault.Wrap(fault.Invalid, err)
	}
	newDomain := func(t testing.TB) map[string]string {
		params, end, err := s.domain(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := end(); err != nil {
				t.Error(err)
			}
		})
		return params
	}
	h := enginetest.Harness{Behind: s.Socket != "", Domain: func(t testing.TB) func(testing.TB) engine.Engine {
		params, opened := newDomain(t), 0
		return func(t testing.TB) engine.Engine {
			opened++
			e, _, err := s.open(context.Background(), params, fmt.Sprintf("check-%d", opened))
			if err != nil {
				t.Fatal(err)
			}
			return e
		}
	}}
	for _, c := range strings.FieldsFunc(expect, func(r rune) bool { return r == ',' }) {
		h.Expect = append(h.Expect, engine.Capability(c))
	}
	all := func(t *testing.T) {
		enginetest.Run(t, h)
		if s.Socket != "" {
			secrets, err := s.secrets()
			if err != nil {
				t.Fatal(err)
			}
			t.Run("protocol", func(t *testing.T) {
				enginetest.RunProtocol(t, enginetest.Protocol{Dial: remote.Socket(s.Socket), Params: newDomain, Secrets: secrets})
			})
		}
	}
	testing.Init()
	if err := flag.CommandLine.Parse([]string{"-test.v"}); err != nil {
		panic(err) // flags of this very line
	}
	testing.Main(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "rules", F: all}}, nil, nil)
	return nil
}

var (
	ended = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): rules/(native|socket|minimal|protocol)/([^/ ]+)(/\S+)? \(([0-9.]+s)\)$`)
	begun = regexp.MustCompile(`^=== (?:RUN|NAME|CONT|PAUSE)\s+rules(?:/(native|socket|minimal|protocol)/([^/ ]+)(/\S+)?)?`)
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
