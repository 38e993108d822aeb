package dir

import (
	"os"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/host"
)

// newDirectory makes a directory for a domain, which is gone when the test ends.
func newDirectory(t testing.TB, filesystem string) string {
	t.Helper()
	path, err := os.MkdirTemp(filesystem, "domain")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(path); err != nil {
			t.Error(err)
		}
	})
	return path
}

// opener opens the domain in a directory.
func opener(path string) func(t testing.TB) engine.Engine {
	return func(t testing.TB) engine.Engine {
		t.Helper()
		e, err := Open(t.Context(), map[string]string{"path": path}, host.Exec{})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
}
