// Package chart tests charts/quarry as Helm renders it, and deploy/ as what is made of it.
package chart

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

const (
	root     = "../.."
	chartDir = root + "/charts/quarry"
)

// APIs that a cluster may have beside Kubernetes' own.
const (
	snapshotAPI = "snapshot.storage.k8s.io/v1"
	groupAPI    = "groupsnapshot.storage.k8s.io/v1"
)

// release is what is installed where.
type release struct {
	name, namespace string
	values          string   // YAML
	apis            []string // beside Kubernetes' own
}

// rendered are the files of a release, by their names in templates/.
type rendered map[string]string

// render does what "helm install" does before it sends anything.
func render(r release) (rendered, error) {
	chrt, err := loader.Load(chartDir)
	if err != nil {
		return nil, err
	}
	values := map[string]any{}
	if err := yaml.Unmarshal([]byte(r.values), &values); err != nil {
		return nil, err
	}
	caps := common.DefaultCapabilities.Copy()
	version, err := common.ParseKubeVersion("v1.37.1")
	if err != nil {
		return nil, err
	}
	caps.KubeVersion = *version
	caps.APIVersions = append(append(common.VersionSet{}, caps.APIVersions...), r.apis...)
	if r.name == "" {
		r.name = "quarry"
	}
	if r.namespace == "" {
		r.namespace = "quarry"
	}
	top, err := util.ToRenderValues(chrt, values, common.ReleaseOptions{Name: r.name, Namespace: r.namespace, Revision: 1, IsInstall: true}, caps)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(chrt, top)
	if err != nil {
		return nil, err
	}
	out := rendered{}
	for name, text := range files {
		out[path.Base(name)] = text
	}
	return out, nil
}

func mustRender(t *testing.T, r release) rendered {
	t.Helper()
	out, err := render(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// refused wants an installation to be refused with all of some words.
func refused(t *testing.T, values string, words ...string) {
	t.Helper()
	_, err := render(release{values: values, apis: []string{snapshotAPI}})
	if err == nil {
		t.Fatalf("this was taken:\n%s", values)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v\ndoes not say %q", err, w)
		}
	}
}

// objects of all files but NOTES.txt, in the order of files and documents.
func (r rendered) objects(t *testing.T) []*unstructured.Unstructured {
	t.Helper()
	var names []string
	for name := range r {
		if strings.HasSuffix(name, ".yaml") {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	var out []*unstructured.Unstructured
	for _, name := range names {
		all, err := parse(r[name])
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, r[name])
		}
		out = append(out, all...)
	}
	return out
}

func parse(text string) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	reader := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	for {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		object := map[string]any{}
		if err := yaml.UnmarshalStrict(doc, &object); err != nil {
			return nil, err
		}
		if len(object) == 0 {
			continue
		}
		u := &unstructured.Unstructured{Object: object}
		if u.GetAPIVersion() == "" || u.GetKind() == "" || u.GetName() == "" {
			return nil, fmt.Errorf("an object without apiVersion, kind or name:\n%s", doc)
		}
		out = append(out, u)
	}
}

// one object, which must be there once.
func (r rendered) one(t *testing.T, kind, name string) *unstructured.Unstructured {
	t.Helper()
	var found *unstructured.Unstructured
	for _, o := range r.objects(t) {
		if o.GetKind() == kind && o.GetName() == name {
			if found != nil {
				t.Fatalf("%s %s is there twice", kind, name)
			}
			found = o
		}
	}
	if found == nil {
		t.Fatalf("there is no %s %s", kind, name)
	}
	return found
}

// names of the objects of a kind.
func (r rendered) names(t *testing.T, kind string) []string {
	t.Helper()
	out := []string{}
	for _, o := range r.objects(t) {
		if o.GetKind() == kind {
			out = append(out, o.GetName())
		}
	}
	sort.Strings(out)
	return out
}

// into reads an object as its type.
func into[T any](t *testing.T, o *unstructured.Unstructured) *T {
	t.Helper()
	data, err := yaml.Marshal(o.Object)
	if err != nil {
		t.Fatal(err)
	}
	var out T
	if err := yaml.UnmarshalStrict(data, &out); err != nil {
		t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
	}
	return &out
}

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
