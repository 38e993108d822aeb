package nfs_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/test/lab"
)

// TestCallsToTheServer counts what each verb asks of the server, in a domain that has some tags and slabs already: a
// call more in one of them is a round trip more in all that Quarry does.
func TestCallsToTheServer(t *testing.T) {
	server := lab.StartNFS(t)
	x := server.Export(t, "xfs")
	for _, c := range []struct {
		protocol
		most map[string]int
	}{
		{v3, map[string]int{"CreateTag": 14, "ListTags of 1": 14, "ListTags of 10": 50, "CreateSlab": 14, "AttachSlab": 12, "DeleteSlab": 8, "DeleteTag": 8}},
		{v4, map[string]int{"CreateTag": 14, "ListTags of 1": 16, "ListTags of 10": 60, "CreateSlab": 14, "AttachSlab": 12, "DeleteSlab": 8, "DeleteTag": 8}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := c.openAs(t, 0, c.params(x, "domain-"+c.name))
			defer func() { ok(t, e.Close()) }()
			block := engine.SlabSpec{ID: "before", Kind: engine.Block, Size: 1 << 20}
			ok(t, e.CreateSlab(t.Context(), block))
			ok(t, e.CreateTag(t.Context(), engine.Tag{Name: "e.1", Record: []byte("r")}))
			for i := range 10 {
				ok(t, e.CreateTag(t.Context(), engine.Tag{Name: fmt.Sprintf("i.before.%d", i), Record: []byte("r")}))
			}
			block.ID = "counted"
			for _, verb := range []struct {
				name string
				do   func() error
			}{
				{"CreateTag", func() error { return e.CreateTag(t.Context(), engine.Tag{Name: "i.counted.1", Record: []byte("r")}) }},
				{"ListTags of 1", func() error { _, err := e.ListTags(t.Context(), "e."); return err }},
				{"ListTags of 10", func() error { _, err := e.ListTags(t.Context(), "i.before."); return err }},
				{"CreateSlab", func() error { return e.CreateSlab(t.Context(), block) }},
				{"AttachSlab", func() error { _, err := e.AttachSlab(t.Context(), "counted", engine.AttachOptions{}); return err }},
				{"DeleteSlab", func() error { return e.DeleteSlab(t.Context(), "counted") }},
				{"DeleteTag", func() error { return e.DeleteTag(t.Context(), "i.counted.1") }},
			} {
				before := calls(t)
				ok(t, verb.do())
				made, sum := calls(t), 0
				for op, n := range before {
					if made[op] -= n; made[op] == 0 {
						delete(made, op)
					}
				}
				var words []string
				for _, op := range slices.Sorted(maps.Keys(made)) {
					sum += made[op]
					words = append(words, fmt.Sprintf("%d %s", made[op], op))
				}
				t.Logf("%-15s %2d calls: %s", verb.name, sum, strings.Join(words, ", "))
				if most := c.most[verb.name]; sum > most || sum == 0 {
					t.Errorf("%s made %d calls, at most %d were expected", verb.name, sum, most)
				}
			}
		})
	}
}

// calls counts, by their names, all calls of this machine's NFS mounts so far: see mountstats(8).
func calls(t *testing.T) map[string]int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountstats")
	ok(t, err)
	out := map[string]int{}
	perOp := false
	for line := range strings.Lines(string(text)) {
		switch name, counts, is := strings.Cut(strings.TrimSpace(line), ": "); {
		case strings.HasPrefix(line, "device "):
			perOp = false
		case strings.Contains(line, "per-op statistics"):
			perOp = true
		case perOp && is:
			n, err := strconv.Atoi(strings.Fields(counts)[0])
			ok(t, err)
			out[name] += n
		}
	}
	return out
}
