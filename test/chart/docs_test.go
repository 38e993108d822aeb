package chart

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

// blocks of YAML in a document.
func blocks(t *testing.T, name string) []string {
	t.Helper()
	var out []string
	parts := strings.Split(read(t, name), "```yaml\n")
	for _, p := range parts[1:] {
		text, _, ok := strings.Cut(p, "```")
		if !ok {
			t.Fatalf("%s: a block without an end", name)
		}
		out = append(out, text)
	}
	return out
}

// The examples of docs/INSTALL.md are what they say: objects that Kubernetes would take,
// and values that the chart takes.
func TestTheExamplesOfINSTALLWork(t *testing.T) {
	var objects, values int
	for _, block := range blocks(t, "docs/INSTALL.md") {
		if strings.HasPrefix(block, "# values.yaml\n") {
			values++
			r := mustRender(t, release{values: block})
			if _, err := load(t, r, nil); err != nil {
				t.Error(err)
			}
			shared := into[storagev1.StorageClass](t, r.one(t, "StorageClass", "shared"))
			if _, has := shared.Parameters["csi.storage.k8s.io/fstype"]; has || *shared.VolumeBindingMode != storagev1.VolumeBindingImmediate {
				t.Errorf("%+v", shared)
			}
			continue
		}
		all, err := parse(block)
		if err != nil {
			t.Errorf("%v\n%s", err, block)
		}
		for _, o := range all {
			objects++
			switch o.GetKind() {
			case "PersistentVolumeClaim":
				into[corev1.PersistentVolumeClaim](t, o)
			case "Pod":
				into[corev1.Pod](t, o)
			}
		}
	}
	if objects < 4 || values != 1 {
		t.Errorf("%d objects, %d values", objects, values)
	}
}
