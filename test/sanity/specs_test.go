package sanity

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	csisanity "github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
)

// caseVariable holds the case that a child process has to run. Ginkgo runs one
// suite per process, so every case gets a process of its own.
const caseVariable = "QUARRY_SANITY_CASE"

// focusVariable may hold a regular expression: only the specs that it matches
// run then. It is for looking into failures; such a run says that it is one.
const focusVariable = "QUARRY_SANITY_FOCUS"

// suiteLimit is for the kernel lab, whose processor may be emulated.
const suiteLimit = 6 * time.Hour

// specCase is what one run of the suite needs to know.
type specCase struct {
	Address    string            // of the driver
	Domain     string            // ID of an open domain
	Access     string            // "mount" or "block"
	Parameters map[string]string // of the storage class
	Size       int64             // of volumes, in bytes; 0: the suite's own
	Dir        string            // for staging and target paths
	Report     string            // file for the JSON report
}

func TestMain(m *testing.M) {
	if text := os.Getenv(caseVariable); text != "" {
		os.Exit(runSpecs(text))
	}
	os.Exit(m.Run())
}

// verdict is the part of testing.T that Ginkgo asks for.
type verdict struct{ failed bool }

// Fail implements ginkgo.GinkgoTestingT.
func (v *verdict) Fail() { v.failed = true }

func runSpecs(text string) int {
	var c specCase
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	cfg := csisanity.NewTestConfig()
	cfg.Address = c.Address
	cfg.TestVolumeAccessType = c.Access
	cfg.TestVolumeParameters = c.Parameters
	cfg.TestVolumeMutableParameters = map[string]string{"chainLimit": "4", "quiesceLimit": "5s"}
	if c.Size > 0 {
		cfg.TestVolumeSize, cfg.TestVolumeExpandSize = c.Size, 2*c.Size
	}
	cfg.StagingPath = filepath.Join(c.Dir, "staging")
	cfg.TargetPath = filepath.Join(c.Dir, "target")
	cfg.IDGen = handles{c.Domain}

	suite := csisanity.GinkgoTest(&cfg)
	defer suite.Finalize()
	gomega.RegisterFailHandler(ginkgo.Fail)
	specs, reporter := ginkgo.GinkgoConfiguration()
	reporter.JSONReport, reporter.NoColor, reporter.Succinct = c.Report, true, true
	specs.Timeout = suiteLimit
	if focus := os.Getenv(focusVariable); focus != "" {
		specs.FocusStrings = []string{focus}
	}
	v := &verdict{}
	if ok := ginkgo.RunSpecs(v, "csi-sanity", specs, reporter); !ok || v.failed {
		return 1
	}
	return 0
}

// handles makes IDs that are well formed and name nothing, in a domain that is
// open: what the driver has to look for. The invalid ones cannot be parsed.
type handles struct{ domain string }

// GenerateUniqueValidVolumeID implements sanity.IDGenerator.
func (h handles) GenerateUniqueValidVolumeID() string { return h.domain + "/" + unique() }

// GenerateInvalidVolumeID implements sanity.IDGenerator.
func (h handles) GenerateInvalidVolumeID() string { return "fake-vol-id" }

// GenerateUniqueValidNodeID implements sanity.IDGenerator.
func (h handles) GenerateUniqueValidNodeID() string { return "node-" + unique() }

// GenerateInvalidNodeID implements sanity.IDGenerator.
func (h handles) GenerateInvalidNodeID() string { return "fake-node-id" }

func unique() string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return fmt.Sprintf("%x", b)
}
