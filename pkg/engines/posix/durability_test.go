package posix

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
)

const tracedDirectory = "QUARRY_TRACED_DIRECTORY"

// TestDurabilityOrder runs the verbs in a process of its own under strace, and
// checks that what is new is on the disk before its name is, and its name before
// the verb returns.
func TestDurabilityOrder(t *testing.T) {
	if path := os.Getenv(tracedDirectory); path != "" {
		callVerbs(t, path)
		return
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal("strace is needed to see the order of system calls: apt-get install strace")
	}
	dir := t.TempDir()
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-o", trace, "-e", "trace=mkdirat,openat,write,ftruncate,fallocate,fsync,linkat,renameat,unlinkat,flock",
		os.Args[0], "-test.run=^TestDurabilityOrder$", "-test.count=1")
	cmd.Env = append(os.Environ(), tracedDirectory+"="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	content, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	calls := byVerb(parseTrace(string(content), dir))
	for _, v := range tracedVerbs() {
		t.Run(v.name, func(t *testing.T) { checkOrder(t, calls[v.name], v.steps) })
	}
}

type verb struct {
	name  string
	do    func(t *testing.T, d *Directory) error
	steps []string
}

// tracedVerbs are the verbs that change something, in the order in which they
// are called, with the calls that must be seen, in this order. TMP is a name
// that was made in tmp/ or trash/.
func tracedVerbs() []verb {
	tag := func(name string) func(t *testing.T, d *Directory) error {
		return func(t *testing.T, d *Directory) error {
			return d.CreateTag(t.Context(), engine.Tag{Name: name, Slab: "a", Record: []byte("record")})
		}
	}
	slab := func(id string, k engine.Kind) func(t *testing.T, d *Directory) error {
		return func(t *testing.T, d *Directory) error {
			return d.CreateSlab(t.Context(), engine.SlabSpec{ID: id, Kind: k, Size: 1 << 20})
		}
	}
	resize := func(id string) func(t *testing.T, d *Directory) error {
		return func(t *testing.T, d *Directory) error { return d.ResizeSlab(t.Context(), id, 2<<20) }
	}
	remove := func(id string) func(t *testing.T, d *Directory) error {
		return func(t *testing.T, d *Directory) error { return d.DeleteSlab(t.Context(), id) }
	}
	return []verb{
		{"first tag of a class", tag("i.a.1"), []string{"mkdirat tags i", "fsync tags",
			"write tmp/TMP", "fsync tmp/TMP", "linkat tmp TMP tags/i i.a.1", "fsync tags/i", "unlinkat tmp TMP"}},
		{"tag", tag("i.a.2"), []string{"write tmp/TMP", "fsync tmp/TMP", "linkat tmp TMP tags/i i.a.2", "fsync tags/i", "unlinkat tmp TMP"}},
		{"tag after a lost reply", tag("i.a.2"), []string{"linkat tmp TMP tags/i i.a.2", "fsync tags/i"}},
		{"delete tag", func(t *testing.T, d *Directory) error { return d.DeleteTag(t.Context(), "i.a.2") }, []string{"unlinkat tags/i i.a.2", "fsync tags/i"}},
		{"delete tag again", func(t *testing.T, d *Directory) error { return d.DeleteTag(t.Context(), "i.a.2") }, []string{"fsync tags/i"}},
		{"block slab", slab("b", engine.Block), []string{"ftruncate tmp/TMP", "fsync tmp/TMP", "linkat tmp TMP slabs b", "fsync slabs", "unlinkat tmp TMP"}},
		{"block slab after a lost reply", slab("b", engine.Block), []string{"linkat tmp TMP slabs b", "fsync slabs"}},
		{"grow block slab", resize("b"), []string{"flock slabs/b", "fallocate slabs/b", "fsync slabs/b"}},
		{"delete block slab", remove("b"), []string{"unlinkat slabs b", "fsync slabs"}},
		{"tree slab", slab("t", engine.Tree), []string{"mkdirat tmp TMP", "mkdirat tmp/TMP data", "fsync tmp/TMP/data", "write tmp/TMP/spec",
			"fsync tmp/TMP/spec", "fsync tmp/TMP", "renameat tmp TMP slabs t", "fsync slabs"}},
		{"grow tree slab", resize("t"), []string{"flock slabs/t", "write tmp/TMP", "fsync tmp/TMP",
			"linkat tmp TMP slabs/t spec.1048576", "fsync slabs/t", "unlinkat tmp TMP"}},
		{"delete tree slab", remove("t"), []string{"renameat slabs t trash TMP", "fsync slabs", "unlinkat trash TMP"}},
	}
}

const marker = "verb: "

// callVerbs is the process that is traced. It marks in the trace where a verb
// begins and ends.
func callVerbs(t *testing.T, path string) {
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mark := func(text string) {
		if f, err := os.Open("/" + marker + text); err == nil {
			t.Fatal(f.Name())
		}
	}
	for _, v := range tracedVerbs() {
		mark(v.name)
		if err := v.do(t, d); err != nil {
			t.Fatalf("%s: %v", v.name, err)
		}
	}
	mark("end")
}

// parseTrace renders each call as "name what was named", without the directory
// and with random names as TMP. A call interrupted in the trace stands where it
// ended.
func parseTrace(trace, dir string) (calls []string) {
	var (
		line       = regexp.MustCompile(`^(\d+) +(.*)$`)
		resumed    = regexp.MustCompile(`^<\.\.\. \w+ resumed>(.*)$`)
		call       = regexp.MustCompile(`^(\w+)\((.*)\) += (-?\d+)`)
		argument   = regexp.MustCompile(`<([^>]*)>|"((?:[^"\\]|\\.)*)"`)
		random     = regexp.MustCompile(`[0-9a-f]{8}\.[A-Z2-7]{26}`)
		unfinished = map[string]string{}
	)
	for _, l := range strings.Split(trace, "\n") {
		m := line.FindStringSubmatch(l)
		if m == nil {
			continue
		}
		pid, text := m[1], m[2]
		if head, ok := strings.CutSuffix(text, " <unfinished ...>"); ok {
			unfinished[pid] = head
			continue
		}
		if r := resumed.FindStringSubmatch(text); r != nil {
			text = unfinished[pid] + r[1]
		}
		c := call.FindStringSubmatch(text)
		if c == nil {
			continue
		}
		name, words := c[1], []string{c[1]}
		for _, a := range argument.FindAllStringSubmatch(c[2], -1) {
			path := strings.TrimPrefix(strings.TrimPrefix(a[1]+a[2], dir), "/")
			words = append(words, random.ReplaceAllString(path, "TMP"))
			if name == "write" {
				break // not the content
			}
		}
		if name != "openat" || strings.Contains(text, marker) {
			calls = append(calls, strings.Join(words, " "))
		}
	}
	return calls
}

func byVerb(calls []string) map[string][]string {
	m, verb := map[string][]string{}, ""
	for _, c := range calls {
		if _, name, ok := strings.Cut(c, marker); ok {
			verb = name
			continue
		}
		m[verb] = append(m[verb], c)
	}
	return m
}

func checkOrder(t *testing.T, calls, steps []string) {
	next := 0
	for _, c := range calls {
		if next < len(steps) && c == steps[next] {
			next++
		}
	}
	if next < len(steps) {
		t.Errorf("%q is not there after %q; the calls were:\n%s", steps[next], steps[:next], strings.Join(calls, "\n"))
	}
	// One more than needed costs every volume a disk's latency.
	if have, want := count(calls, "fsync"), count(steps, "fsync"); have > want+slackFor(steps) {
		t.Errorf("%d calls of fsync, %d are needed:\n%s", have, want, strings.Join(calls, "\n"))
	}
}

func slackFor(steps []string) int {
	if strings.HasPrefix(steps[0], "linkat") {
		return 1 // the temporary file's, before the name was found to be taken
	}
	return 0
}

func count(calls []string, name string) (n int) {
	for _, c := range calls {
		if strings.HasPrefix(c, name+" ") {
			n++
		}
	}
	return n
}
