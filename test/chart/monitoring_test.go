package chart

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Rules and dashboard ask for metrics that docs/OPERATIONS.md lists.
func TestRulesAndDashboardAskForWhatThereIs(t *testing.T) {
	r := mustRender(t, release{values: everything})
	dashboard := into[corev1.ConfigMap](t, r.one(t, "ConfigMap", "quarry-dashboard")).Data["quarry.json"]
	if !json.Valid([]byte(dashboard)) {
		t.Fatal("the dashboard is no JSON")
	}
	_, docs, _ := strings.Cut(read(t, "docs/OPERATIONS.md"), "\n## Metrics and logs\n")
	rules, err := json.Marshal(r.one(t, "PrometheusRule", "quarry").Object)
	if err != nil {
		t.Fatal(err)
	}
	asked := regexp.MustCompile(`quarry_[a-z_]+`).FindAllString(string(rules)+dashboard, -1)
	if len(asked) < 15 {
		t.Fatalf("%q", asked)
	}
	for _, metric := range asked {
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			metric = strings.TrimSuffix(metric, suffix)
		}
		if !strings.Contains(docs, "`"+metric+"`") {
			t.Errorf("%s is not in docs/OPERATIONS.md", metric)
		}
	}
	for _, text := range []string{"{{ $labels.domain }}", "{{ $value }}"} {
		if !strings.Contains(string(rules), text) {
			t.Errorf("the rules have lost %s", text)
		}
	}
}
