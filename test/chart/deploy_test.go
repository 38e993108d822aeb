package chart

import (
	"cmp"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
)

//go:generate go test -count=1 -run TestDeployIsTheChart . -update

var update = flag.Bool("update", false, "write deploy/ anew")

const made = "# Made of charts/quarry by \"make generate\": change that.\n"

// namespace allows the agents to be privileged, and says if anything else is.
const namespace = `apiVersion: v1
kind: Namespace
metadata:
  name: quarry-system
  labels:
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/audit: privileged
    pod-security.kubernetes.io/warn: privileged
`

// deploy is what deploy/ holds: what "kubectl apply" may be given on a cluster that has
// no snapshot API, and what it may be given on one that has.
func deploy(t *testing.T) map[string]string {
	t.Helper()
	r := mustRender(t, release{namespace: "quarry-system", values: "snapshots: {enabled: true, groups: true}"})
	var files []string
	for name := range r {
		if strings.HasSuffix(name, ".yaml") {
			files = append(files, name)
		}
	}
	sort.Strings(files)
	var docs []string
	for _, file := range files {
		docs = append(docs, regexp.MustCompile(`(?m)^---\n`).Split(r[file], -1)...)
	}
	// What pods need comes before them, as Helm has it: else they begin with an error.
	slices.SortStableFunc(docs, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	out := map[string]string{"quarry.yaml": made + namespace}
	for _, doc := range docs {
		doc = regexp.MustCompile(`(?m)^ +(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n`).ReplaceAllString(doc, "")
		if doc = strings.TrimSpace(doc); doc == "" {
			continue
		}
		to := "quarry.yaml"
		switch {
		case strings.Contains(doc, "\nkind: VolumeSnapshotClass\n"):
			to = "snapshot-class.yaml"
		case strings.Contains(doc, "\nkind: VolumeGroupSnapshotClass\n"):
			to = "group-snapshot-class.yaml"
		}
		if out[to] == "" {
			out[to] = made + doc + "\n"
		} else {
			out[to] += "---\n" + doc + "\n"
		}
	}
	return out
}

// rank is 1 for what makes pods.
func rank(doc string) int {
	if strings.Contains(doc, "\nkind: Deployment\n") || strings.Contains(doc, "\nkind: DaemonSet\n") {
		return 1
	}
	return 0
}

func TestDeployIsTheChart(t *testing.T) {
	dir := filepath.Join(root, "deploy")
	want := deploy(t)
	if *update {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range want {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	found, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names, wanted []string
	for _, f := range found {
		names = append(names, f.Name())
	}
	for name := range want {
		wanted = append(wanted, name)
		if got := read(t, "deploy/"+name); got != want[name] {
			t.Errorf("deploy/%s is not what the chart gives: run make generate", name)
		}
	}
	sort.Strings(wanted)
	if !slices.Equal(names, wanted) {
		t.Errorf("deploy/ has %q, of which the chart gives %q", names, wanted)
	}
}

// All that is applied is there once, the namespace first.
func TestDeployCanBeApplied(t *testing.T) {
	objects, err := parse(read(t, "deploy/quarry.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if objects[0].GetKind() != "Namespace" {
		t.Errorf("it begins with a %s", objects[0].GetKind())
	}
	seen := map[string]bool{}
	for _, o := range objects {
		id := o.GetKind() + "/" + o.GetNamespace() + "/" + o.GetName()
		if seen[id] {
			t.Errorf("%s is there twice", id)
		}
		seen[id] = true
		if strings.Contains(o.GetAPIVersion(), "snapshot") {
			t.Errorf("%s needs an API that not every cluster has", id)
		}
	}
}
