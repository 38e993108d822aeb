package chart

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func TestEverythingRenders(t *testing.T) {
	r := mustRender(t, release{values: everything})
	for _, kind := range []string{"ServiceMonitor", "PrometheusRule", "SnapshotMetadataService", "NetworkPolicy", "PodDisruptionBudget"} {
		if len(r.names(t, kind)) == 0 {
			t.Errorf("there is no %s", kind)
		}
	}
}

// Mistakes are refused before anything is sent, in words that name them.
func TestMistakesAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		values string
		says   []string
	}{
		"an unknown value":            {"clases: []", []string{"clases"}},
		"an unknown field of a class": {"classes: [{name: a, fsType: ext4}]", []string{"/classes/0", "fsType"}},
		"an unknown filesystem":       {"classes: [{name: a, fstype: zfs}]", []string{"/classes/0/fstype", "ext4"}},
		"a parameter that is no text": {"classes: [{name: a, parameters: {encrypted: true}}]", []string{"/classes/0/parameters/encrypted", "want string"}},
		"no domain":                   {"domains: []", []string{"/domains"}},
		"an unknown engine":           {"domains: [{name: a, engine: zfs}]", []string{"/domains/0/engine", "dir"}},
		"an unknown field of a domain": {
			"domains: [{name: a, engine: dir, path: /a}]", []string{"/domains/0", "path"}},
		"no engine at all":           {"domains: [{name: a}]", []string{"/domains/0", "engine"}},
		"a relative socket":          {"domains: [{name: a, socket: run/x.sock}]", []string{"/domains/0/socket"}},
		"a socket and a process":     {"domains: [{name: a, socket: /run/x.sock, process: true}]", []string{"/domains/0/process"}},
		"a domain's bad name":        {"domains: [{name: A_b, engine: dir, params: {path: /a}}]", []string{"/domains/0/name"}},
		"bytes that lose precision":  {"domains: [{name: local, engine: dir, params: {path: /a}, capacityLimit: 107374182400}]", []string{"/domains/0/capacityLimit", "want string"}},
		"a directory without a path": {"domains: [{name: local, engine: dir}]", []string{`"local"`, "params.path"}},
		"two domains of one name": {
			"domains: [{name: local, engine: dir, params: {path: /a}}, {name: local, engine: dir, params: {path: /b}}]", []string{`"local"`, "two domains"}},
		"an alias that is a name": {
			"domains: [{name: local, engine: dir, params: {path: /a}}, {name: b, engine: dir, params: {path: /b}, aliases: [local]}]", []string{`"local"`, "two domains"}},
		"a class of no domain":          {"classes: [{name: a, parameters: {domain: nas}}]", []string{`"nas"`, "the domains are local"}},
		"one of a list":                 {"classes: [{name: a, parameters: {domains: 'local, nas'}}]", []string{`"nas"`}},
		"two classes of one name":       {"classes: [{name: a}, {name: a}]", []string{`"a"`, "twice"}},
		"a directory with a filesystem": {"classes: [{name: a, fstype: ext4, parameters: {layout: directory}}]", []string{`"a"`, "fstype"}},
		"a filesystem as a parameter":   {"classes: [{name: a, parameters: {csi.storage.k8s.io/fstype: xfs}}]", []string{`"a"`, "fstype"}},
		"a secret of no domain":         {"secrets: {nas: {secretName: a}}", []string{`"nas"`, "the domains are local"}},
		"a secret twice": {
			"domains: [{name: local, engine: dir, params: {path: /a}, secretsFile: a}]\nsecrets: {local: {secretName: a}}", []string{`"local"`, "secretsFile"}},
		"two certificates":     {"tls: {secret: a, certManager: {enabled: true}}", []string{"tls.secret", "certManager"}},
		"metadata without TLS": {"snapshotMetadata: {enabled: true}", []string{"tlsSecret", "caBundle"}},
		"a relative path":      {"kubeletDir: var/lib/kubelet", []string{"/kubeletDir"}},
		"replicas of none":     {"controller: {replicas: 0}", []string{"/controller/replicas"}},
		"snapshots perhaps":    {"snapshots: {enabled: perhaps}", []string{"/snapshots/enabled", "auto"}},
		"a digest that is none": {
			"image: {digest: abc}", []string{"/image/digest"}},
	} {
		t.Run(name, func(t *testing.T) { refused(t, c.values, c.says...) })
	}
}

// The table of README.md has every value of values.yaml, with its default, and no other.
func TestTheREADMEHasEveryValue(t *testing.T) {
	values := map[string]any{}
	if err := yaml.Unmarshal([]byte(read(t, "charts/quarry/values.yaml")), &values); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	flatten("", values, want)
	row := regexp.MustCompile("(?m)^\\| `([^`]+)` \\| `([^`]*)` \\| (.*) \\|$")
	got := map[string]bool{}
	for _, m := range row.FindAllStringSubmatch(read(t, "charts/quarry/README.md"), -1) {
		name, def := m[1], m[2]
		got[name] = true
		var a, b any
		if err := json.Unmarshal([]byte(def), &a); err != nil {
			t.Errorf("%s: default %q is no JSON: %v", name, def, err)
		}
		if want[name] == "" {
			t.Errorf("%s: there is no such value", name)
			continue
		}
		if err := json.Unmarshal([]byte(want[name]), &b); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Errorf("%s: the default is %s, README.md says %s", name, want[name], def)
		}
		if strings.TrimSpace(m[3]) == "" {
			t.Errorf("%s: README.md does not say what it is", name)
		}
	}
	for name := range want {
		if !got[name] {
			t.Errorf("%s is not in README.md", name)
		}
	}
}

// flatten lists values by their paths. What belongs together stays together.
func flatten(path string, v any, out map[string]string) {
	m, ok := v.(map[string]any)
	last := path[strings.LastIndex(path, ".")+1:]
	if !ok || len(m) == 0 || slices.Contains([]string{"resources", "nodeSelector", "labels", "image"}, last) {
		data, _ := json.Marshal(v)
		out[path] = string(data)
		return
	}
	for name, value := range m {
		flatten(strings.TrimPrefix(path+"."+name, "."), value, out)
	}
}

// The schema knows every default, and every object in it is closed but those that are
// Kubernetes' own.
func TestTheSchemaIsStrict(t *testing.T) {
	var schema map[string]any
	if err := json.Unmarshal([]byte(read(t, "charts/quarry/values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	open := []string{"resources", "affinity", "tolerations", "extraEnv", "extraRules", "metricsFrom", "allowedTopologies", "global"}
	var walk func(path string, node map[string]any)
	walk = func(path string, node map[string]any) {
		if node["type"] == "object" && node["additionalProperties"] == nil && !slices.ContainsFunc(open, func(o string) bool { return strings.Contains(path, "."+o) }) {
			t.Errorf("%s takes anything", path)
		}
		if props, ok := node["properties"].(map[string]any); ok {
			for name, p := range props {
				walk(path+"."+name, p.(map[string]any))
			}
		}
		if items, ok := node["items"].(map[string]any); ok {
			walk(path+"[]", items)
		}
	}
	walk("", schema)
}
