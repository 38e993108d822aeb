package dir

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
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

func TestTheModeOfANewTreeIsAsked(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	e := opener(newDirectory(t, ""))(t)
	for _, mode := range []string{"0777", "2770", "1777", "755"} {
		spec := engine.SlabSpec{ID: "m" + mode, Kind: engine.Tree, Size: 1 << 20, Params: map[string]string{"mode": mode}}
		for range 2 {
			if err := e.CreateSlab(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
		}
		a, err := e.AttachSlab(t.Context(), spec.ID, engine.AttachOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(a.Path, &st); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%04o", st.Mode&0o7777); got != mode && got != "0"+mode {
			t.Errorf("mode %s was asked for, and the directory has %s", mode, got)
		}
	}
	for _, bad := range []string{"", "7", "77", "08", "0788", "rwx", "00777", "17777", "-755", "+755", "0x7", "0o7"} {
		err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Kind: engine.Tree, Size: 1 << 20, Params: map[string]string{"mode": bad}})
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "octal") {
			t.Errorf("mode %q: %v", bad, err)
		}
	}
	err := e.CreateSlab(t.Context(), engine.SlabSpec{ID: "bad", Kind: engine.Block, Size: 1 << 20, Params: map[string]string{"mode": "0777"}})
	if fault.KindOf(err) != fault.Invalid {
		t.Errorf("a file with a mode: %v", err)
	}
}
