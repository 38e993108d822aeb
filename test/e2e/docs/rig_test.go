package docs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	// patience is how long anything may take on a busy machine.
	patience = 5 * time.Minute
	every    = 500 * time.Millisecond
	// commandLimit: one of them builds an image.
	commandLimit = 30 * time.Minute
	// nodesFolder is one that all nodes share.
	nodesFolder = "/srv/shared"
)

// reader is somebody who follows a page, in a checkout of his own.
type reader struct {
	testing.TB
	checkout string
	programs string // a folder of them
	env      []string
	machine  string // process whose files are this reader's
	cluster  string // hack/cluster
	nodes    []string
}

func newReader(t testing.TB) *reader {
	t.Helper()
	r := &reader{TB: t, cluster: os.Getenv("QUARRY_CLUSTER_COMMAND"), checkout: filepath.Join(t.TempDir(), "quarry")}
	if r.cluster == "" {
		t.Fatal("$QUARRY_CLUSTER_COMMAND is not set: run hack/e2e docs")
	}
	top, err := filepath.Abs("../../..")
	r.must(err)
	r.must(os.MkdirAll(r.checkout, 0o755))
	_, err = sh(top, nil, "git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -d -t "+r.checkout)
	r.must(err)
	r.programs = filepath.Join(t.TempDir(), "bin")
	r.must(os.MkdirAll(r.programs, 0o755))
	r.link("kubectl")
	_, err = sh(top, nil, "CGO_ENABLED=0 go build -buildvcs=false -o "+r.programs+"/ ./cmd/kubectl-quarry")
	r.must(err)
	home := t.TempDir()
	r.env = append(os.Environ(), "PATH="+r.programs+":"+os.Getenv("PATH"), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECACHEDIR="+home)
	return r
}

// link puts a program of hack/cluster's on the PATH.
func (r *reader) link(name string) {
	r.Helper()
	path := strings.TrimSpace(r.must1(sh("", nil, r.cluster+" path "+name)))
	r.must(os.Symlink(path, filepath.Join(r.programs, name)))
}

// onACluster is newReader for somebody who has one, without Quarry.
func onACluster(t testing.TB) *reader {
	t.Helper()
	if os.Getenv("KUBECONFIG") == "" {
		t.Fatal("$KUBECONFIG is not set: this needs a cluster of its own; run hack/e2e docs")
	}
	r := newReader(t)
	r.link("helm")
	r.nodes = strings.Fields(r.sh("kubectl get nodes -o jsonpath='{.items[*].metadata.name}'"))
	slices.Sort(r.nodes)
	if len(r.nodes) < 2 {
		t.Fatalf("the cluster has the nodes %q, two are needed at least", r.nodes)
	}
	return r
}

// onAMachine is newReader for somebody who has a machine for himself, as far as the files below /srv,
// /etc and /run go.
func onAMachine(t testing.TB) *reader {
	t.Helper()
	r := newReader(t)
	disk := filepath.Join(t.TempDir(), "disk")
	r.sh("truncate -s 2G " + disk + " && mkfs.ext4 -q " + disk)
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec",
		"mount -o loop "+disk+" /srv; mkdir -p /srv/etc /srv/above /srv/work; mount -t overlay overlay -o lowerdir=/etc,upperdir=/srv/above,workdir=/srv/work /etc; mount -t tmpfs run /run; echo ready; exec sleep infinity")
	out, err := cmd.StdoutPipe()
	r.must(err)
	cmd.Stderr = os.Stderr
	r.must(cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if _, err := io.ReadFull(out, make([]byte, len("ready"))); err != nil {
		t.Fatalf("no machine: %v", err)
	}
	r.machine = fmt.Sprint(cmd.Process.Pid)
	return r
}

func (r *reader) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *reader) must1(out string, err error) string {
	r.Helper()
	r.must(err)
	return out
}

// sh runs a script in a folder, and returns what it prints.
func sh(dir string, env []string, script string, in ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	words := append(in, "bash", "-euo", "pipefail", "-c", script)
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	var out, errOut bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, env, &out, io.MultiWriter(&errOut, os.Stderr)
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", script, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

func (r *reader) try(script string) (string, error) {
	if r.machine == "" {
		return sh(r.checkout, r.env, script)
	}
	return sh(r.checkout, r.env, script, "nsenter", "--mount", "--target", r.machine, "--wd="+r.checkout)
}

// sh in the checkout, for what must work.
func (r *reader) sh(script string) string {
	r.Helper()
	return r.must1(r.try(script))
}

// on runs a script as on a node.
func (r *reader) on(node, script string) string {
	r.Helper()
	out, err := exec.Command(r.cluster, "exec", node, "sh", "-ec", script).CombinedOutput()
	if err != nil {
		r.Fatalf("on %s: %s: %v: %s", node, script, err, out)
	}
	return string(out)
}

// bring a file of the checkout to all nodes.
func (r *reader) bring(name string) {
	r.Helper()
	data, err := os.ReadFile(filepath.Join(r.checkout, name))
	r.must(err)
	r.must(os.WriteFile(filepath.Join(filepath.Dir(os.Getenv("KUBECONFIG")), "shared", name), data, 0o644))
}

// apply gives objects to the cluster.
func (r *reader) apply(objects string) {
	r.Helper()
	path := filepath.Join(r.TempDir(), "objects.yaml")
	r.must(os.WriteFile(path, []byte(objects), 0o600))
	r.sh("kubectl apply -f " + path)
}

func (r *reader) wait(what string, so func() error) {
	r.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(every) {
		err := so()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			r.Fatalf("waited for %s: %v", what, err)
		}
	}
}

// says waits until a command says something.
func (r *reader) says(want, script string) {
	r.Helper()
	r.wait(fmt.Sprintf("%q of %s", want, script), func() error {
		out, err := r.try(script)
		if err == nil && !strings.Contains(out, want) {
			err = errors.New(out)
		}
		return err
	})
}

// given is what the commands of a page need beside the page. Every key must be a command of it.
type given struct {
	// before a command: what a reader is said to have, or to have done; after it: what the page says is so then.
	before map[string]func()
	after  map[string]func(said string)
	// other is run in place of a command, and why.
	other map[string][2]string
	// onNodes are commands that the page says are run on each node. They find what the reader has brought
	// to nodesFolder.
	onNodes []string
	// not run, and why not.
	not map[string]string
	// blocks that are no named file, by their beginning, and what they are.
	blocks map[string]string
	// last are sections that come after all others, in this order.
	last []string
	// none of these sections' commands is run here: and why.
	sections map[string]string
}

// follow runs a page.
func (r *reader) follow(path string, g given) {
	r.Helper()
	parts, blocks, err := read(filepath.Join(r.checkout, path))
	r.must(err)
	r.known(path, parts, blocks, g)
	order := func(p part) int { return slices.Index(g.last, p.section) } // -1: as they stand
	slices.SortStableFunc(parts, func(a, b part) int { return order(a) - order(b) })
	said := map[string]bool{}
	ran := 0
	for _, p := range parts {
		at := fmt.Sprintf("%s:%d", path, p.line)
		switch {
		case g.sections[p.section] != "":
			continue
		case p.name != "":
			r.must(os.WriteFile(filepath.Join(r.checkout, p.name), []byte(p.text), 0o600))
			continue
		case g.not[p.command] != "":
			r.Logf("%s: not run: %s: %s", at, p.command, g.not[p.command])
			continue
		case p.inText && said[p.command], p.inText && begins(parts, p.command):
			continue // it is said of a command that is run
		}
		said[p.command] = true
		if b := g.before[p.command]; b != nil {
			b()
		}
		script := p.command
		if o, ok := g.other[p.command]; ok {
			script = o[0]
			r.Logf("%s: instead of %s, because %s:", at, p.command, o[1])
		}
		var out string
		r.Logf("%s: %s", at, script)
		if slices.Contains(g.onNodes, p.command) {
			for _, n := range r.nodes {
				out += r.on(n, "cd "+nodesFolder+"; "+script)
			}
		} else if out, err = r.try(script); err != nil {
			r.Fatalf("%s: %v", at, err)
		}
		ran++
		if p.says != "" && !strings.Contains(shape(out), shape(p.says)) {
			r.Errorf("%s: it says\n%s\nand the page\n%s", at, out, p.says)
		}
		if a := g.after[p.command]; a != nil {
			a(out)
		}
	}
	r.Logf("%s: %d commands were run", path, ran)
}

// ids are different each time.
var ids = regexp.MustCompile(`[0-9a-f]{8,}`)

func shape(said string) string { return ids.ReplaceAllString(strings.TrimSpace(said), "ID") }

// begins says whether a command that is run begins so: the text names it, and means that one.
func begins(parts []part, words string) bool {
	return slices.ContainsFunc(parts, func(p part) bool { return !p.inText && strings.HasPrefix(p.command, words+" ") })
}

// known sees that everything on the page is accounted for, and nothing that is not on it.
func (r *reader) known(path string, parts, blocks []part, g given) {
	r.Helper()
	sections, commands := map[string]bool{}, map[string]bool{}
	for _, p := range parts {
		sections[p.section], commands[p.command] = true, true
	}
	for _, named := range [][]string{slices.Collect(maps.Keys(g.before)), slices.Collect(maps.Keys(g.after)), slices.Collect(maps.Keys(g.other)), g.onNodes, slices.Collect(maps.Keys(g.not))} {
		for _, c := range named {
			if !commands[c] {
				r.Errorf("%s does not say %q any more", path, c)
			}
		}
	}
	for _, s := range append(slices.Clone(g.last), slices.Collect(maps.Keys(g.sections))...) {
		if !sections[s] {
			r.Errorf("%s has no commands under %q any more", path, s)
		}
	}
	for _, b := range blocks {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(g.blocks)), func(beginning string) bool { return strings.HasPrefix(b.text, beginning) }) {
			r.Errorf("%s:%d: a block that nobody uses: name its file in a comment, or say what it is", path, b.line)
		}
	}
	if r.Failed() {
		r.FailNow()
	}
}
