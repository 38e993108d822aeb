package sanity

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/onsi/ginkgo/v2/types"

	"github.com/quarry-csi/quarry/pkg/host/hosttest"
)

// fsSize of the sparse file systems: the suite's volumes have 10 GiB, and about
// ten of them exist at a time.
const fsSize = 256 << 30

// The specs that may be skipped, and why.
var maySkip = map[string]string{
	"should fail when publishing more volumes than the node max attach limit": "Quarry has no limit of attached volumes",
	"should succeed when creating a snapshot with accessibility requirements": "a snapshot has no topology of its own",
}

// leastSpecs that a run must have passed: what csi-test 5.6.0 has for a driver
// with every capability. One that lost a capability would skip, one that lost a
// whole service would not even do that.
const leastSpecs = 100

func TestSanity(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting file systems needs root")
	}
	binary := build(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		everyAccess(t, fs, func(t *testing.T, c specCase) { run(t, binary, fs, directory, c) })
	}
	everyAccess(t, "sharedfs", func(t *testing.T, c specCase) { run(t, binary, "xfs", sharedDirectory, c) })
}

// everyAccess runs a test for each way of using volumes.
func everyAccess(t *testing.T, name string, run func(t *testing.T, c specCase)) {
	t.Run(name+"/mount", func(t *testing.T) { run(t, specCase{Access: "mount"}) })
	t.Run(name+"/block", func(t *testing.T) { run(t, specCase{Access: "block"}) })
	t.Run(name+"/directory", func(t *testing.T) {
		run(t, specCase{Access: "mount", Parameters: map[string]string{"layout": "directory"}})
	})
}

func run(t *testing.T, binary, fs string, entry func(path string) string, c specCase) {
	root := hosttest.Filesystem(t, fs, fsSize)
	c.Dir = t.TempDir()
	domain := filepath.Join(root, "domain")
	if err := os.Mkdir(domain, 0o755); err != nil {
		t.Fatal(err)
	}
	d := start(t, binary, c.Dir, entry(domain))
	c.Domain = d.openDomain(t)
	d.suite(t, c)
	d.nothingIsLeft(t, domain)
	d.stop(t)
	nothingIsInUse(t, root+"/", c.Dir+"/", c.Domain+"/")
	if t.Failed() {
		t.Logf("the end of quarry's log:\n%s", d.LastLog(80))
	}
}

// suite runs the suite in a process of its own, and tells what it found.
func (d *driver) suite(t *testing.T, c specCase) {
	t.Helper()
	c.Report = filepath.Join(t.TempDir(), "report.json")
	c.Address = d.Endpoint()
	c.Parameters = with(c.Parameters, "domain", "local")
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), self)
	child.Env = append(os.Environ(), caseVariable+"="+string(text))
	began := time.Now()
	out, err := child.CombinedOutput()
	took := time.Since(began).Round(time.Millisecond)
	t.Logf("%s in %v", verify(t, c.Report), took)
	if err != nil {
		t.Errorf("the suite failed: %v", err)
		t.Logf("the suite said:\n%s", tail(out, 8000))
	}
}

// nothingIsInUse looks for mounts and loop devices whose lines in the kernel's
// tables have one of these marks: others may be at work on this machine.
func nothingIsInUse(t *testing.T, marks ...string) {
	t.Helper()
	ours := func(line string) bool {
		return slices.ContainsFunc(marks, func(m string) bool { return strings.Contains(line, m) })
	}
	for _, m := range mounts(t) {
		if ours(m) {
			t.Errorf("a mount is left behind: %s", m)
		}
	}
	for _, l := range loops(t) {
		if ours(l) {
			t.Errorf("a loop device is left behind: %s", l)
		}
	}
}

// verify reads Ginkgo's report and sums it up.
func verify(t *testing.T, report string) string {
	t.Helper()
	raw, err := os.ReadFile(report)
	if err != nil {
		t.Errorf("the suite left no report: %v", err)
		return "no report"
	}
	var suites []types.Report
	if err := json.Unmarshal(raw, &suites); err != nil {
		t.Errorf("the suite's report: %v", err)
		return "no report"
	}
	var passed, pending, skipped, failed int
	focused := os.Getenv(focusVariable) != ""
	for _, s := range suites {
		for _, spec := range s.SpecReports {
			if spec.LeafNodeType != types.NodeTypeIt {
				continue
			}
			switch spec.State {
			case types.SpecStatePassed:
				passed++
			case types.SpecStatePending: // csi-test's own
				pending++
			case types.SpecStateSkipped:
				skipped++
				if maySkip[spec.LeafNodeText] == "" && (!focused || spec.Failure.Message != "") {
					t.Errorf("skipped: %s: %s", spec.FullText(), spec.Failure.Message)
				}
			default:
				failed++
				t.Errorf("%s: %s: %s", spec.State, spec.FullText(), spec.Failure.Message)
			}
		}
	}
	if passed < leastSpecs && !focused {
		t.Errorf("%d specs passed, %d at least were expected", passed, leastSpecs)
	}
	text := fmt.Sprintf("%d specs passed, %d failed, %d skipped as they may, %d pending in csi-test itself", passed, failed, skipped, pending)
	if focused {
		text += " (" + focusVariable + " is set: only a part was run)"
	}
	return text
}
