package enginetest_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
)

// asChild says to the process that a test starts of itself that it is that one.
const asChild = "QUARRY_ENGINETEST_CHILD"

// TestACapabilityThatVanishedFailsAndDoesNotPanic: every rule is still checked,
// and the report says what is missing.
func TestACapabilityThatVanishedFailsAndDoesNotPanic(t *testing.T) {
	expected := []engine.Capability{engine.CapSnapshot, engine.CapClone, engine.CapCopy, engine.CapMeter, engine.CapQuota}
	if os.Getenv(asChild) != "" {
		enginetest.Run(t, enginetest.Harness{Expect: expected, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
			s := simple{t.TempDir()}
			return func(testing.TB) engine.Engine { return s }
		}})
		return
	}
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	child.Env = append(os.Environ(), asChild+"=1")
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 { // a panic's is 2
		t.Errorf("ended with %v, want status 1", err)
	}
	for _, c := range expected {
		if say := fmt.Sprintf("capability %q is expected (Harness.Expect), but the engine does not declare it: it declares []", c); !strings.Contains(string(out), say) {
			t.Errorf("it does not say %q", say)
		}
	}
	if passed := "--- PASS: " + t.Name() + "/minimal"; !strings.Contains(string(out), passed) {
		t.Errorf("it does not say %q: the suite did not come to its end", passed)
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}
