package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWhatRanAndWhatDidNot(t *testing.T) {
	dir := t.TempDir()
	it := func(driver, name, state, why string) string {
		return `{"ContainerHierarchyTexts": ["` + driver + `", "[Testpattern: P] s"], "LeafNodeType": "It", "LeafNodeText": "` + name +
			`", "State": "` + state + `", "Failure": {"Message": ` + why + `}}`
	}
	const ours = "External Storage [Driver: csi.quarry.dev]"
	parallel := []string{
		it(ours, "works", "passed", `""`), it(ours, "breaks", "failed", `"no"`), it(ours, "hangs", "timedout", `"no"`),
		it(ours, "cannot", "skipped", `"Driver \"csi.quarry.dev\" does not support RWX - skipping\nat a line"`),
		it(ours, "restarts", "skipped", `""`), it(ours, "labels", "skipped", `""`), it("[sig-node] Pods", "other", "skipped", `""`),
		`{"ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite", "State": "passed", "Failure": {}}`,
	}
	serial := []string{
		it(ours, "works", "skipped", `""`), it(ours, "cannot", "skipped", `""`), it(ours, "restarts", "passed", `""`), it(ours, "labels", "skipped", `""`),
	}
	for name, text := range map[string]string{
		"dir-parallel.json": `[{"SpecReports": [` + strings.Join(parallel, ",") + `]}]`,
		"dir-serial.json":   `[{"SpecReports": [` + strings.Join(serial, ",") + `]}]`,
		"dir-patterns.log":  "I said\nSkipping registration: [Testpattern: Q] topology [Driver: csi.quarry.dev] - Driver csi.quarry.dev doesn't support it\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	outcomes, patterns, err := read(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	tell(&out, outcomes, patterns)
	want := `| definition | pass | ran | passed | failed | skipped themselves |
|---|---|---|---|---|---|
| dir | parallel | 3 | 1 | 2 | 1 |
| dir | serial | 1 | 1 | 0 | 0 |

| reason | spec | with |
|---|---|---|
| does not support RWX | [Testpattern: P] s cannot | dir |
| left out by hack/e2e | [Testpattern: P] s labels | dir |

| reason | suite: pattern | with |
|---|---|---|
| doesn't support it | topology: Q | dir |
`
	if out.String() != want {
		t.Errorf("it says\n%s\nnot\n%s", out.String(), want)
	}
}
