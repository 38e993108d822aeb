package chart

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

// rights are "verb group/resource".
type rights map[string]bool

func rightsOf(rules []rbacv1.PolicyRule) rights {
	out := rights{}
	for _, rule := range rules {
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				for _, verb := range rule.Verbs {
					name := ""
					if len(rule.ResourceNames) > 0 {
						name = " " + strings.Join(rule.ResourceNames, ",")
					}
					out[fmt.Sprintf("%s %s/%s%s", verb, group, resource, name)] = true
				}
			}
		}
	}
	return out
}

func (r rights) without(other rights) []string {
	var out []string
	for right := range maps.Keys(r) {
		if !other[right] {
			out = append(out, right)
		}
	}
	slices.Sort(out)
	return out
}

// given are the rights of roles of a name.
func given(t *testing.T, r rendered, name string) rights {
	t.Helper()
	out := rights{}
	for _, o := range r.objects(t) {
		switch {
		case o.GetName() != name:
		case o.GetKind() == "ClusterRole":
			maps.Copy(out, rightsOf(into[rbacv1.ClusterRole](t, o).Rules))
		case o.GetKind() == "Role":
			maps.Copy(out, rightsOf(into[rbacv1.Role](t, o).Rules))
		}
	}
	return out
}

// Each sidecar has what its own deploy/kubernetes/rbac.yaml of that version says, which
// testdata/rbac has as it stands, but for what is said here and why.
func TestSidecarsHaveTheRightsTheyAskFor(t *testing.T) {
	lease := []string{ // they elect nobody
		"create coordination.k8s.io/leases", "delete coordination.k8s.io/leases", "get coordination.k8s.io/leases",
		"list coordination.k8s.io/leases", "update coordination.k8s.io/leases", "watch coordination.k8s.io/leases",
	}
	r := mustRender(t, release{apis: []string{snapshotAPI, groupAPI}})
	for sidecar, differs := range map[string]struct{ less, more []string }{
		// It reads the class that a claim names, which upstream's roles have forgotten.
		"provisioner": {less: lease, more: []string{"get storage.k8s.io/volumeattributesclasses"}},
		"attacher":    {less: lease},
		// It looks at pods for --handle-volume-inuse-error alone, which is off.
		"resizer":     {less: append([]string{"get /pods", "list /pods", "watch /pods"}, lease...)},
		"snapshotter": {less: lease},
	} {
		t.Run(sidecar, func(t *testing.T) {
			image := containers(t, r)["csi-"+sidecar].Image
			_, version, _ := strings.Cut(image, ":")
			asked := rights{}
			objects, err := parse(read(t, "test/chart/testdata/rbac/"+sidecar+"-"+version+".yaml"))
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range objects {
				switch o.GetKind() {
				case "ClusterRole":
					maps.Copy(asked, rightsOf(into[rbacv1.ClusterRole](t, o).Rules))
				case "Role":
					maps.Copy(asked, rightsOf(into[rbacv1.Role](t, o).Rules))
				}
			}
			for _, right := range differs.less {
				if !asked[right] {
					t.Errorf("upstream does not ask for %q", right)
				}
				delete(asked, right)
			}
			for _, right := range differs.more {
				asked[right] = true
			}
			has := given(t, r, "quarry-controller-"+sidecar)
			if missing, extra := asked.without(has), has.without(asked); len(missing)+len(extra) > 0 {
				t.Errorf("missing: %q\ntoo much: %q", missing, extra)
			}
		})
	}
}

// The controller has what docs/OPERATIONS.md says that it needs.
func TestQuarrysOwnRights(t *testing.T) {
	_, text, _ := strings.Cut(read(t, "docs/OPERATIONS.md"), "\n## What the controller may do in Kubernetes\n")
	_, text, _ = strings.Cut(text, "```yaml\n")
	text, _, _ = strings.Cut(text, "```")
	var rules []rbacv1.PolicyRule
	if err := yaml.UnmarshalStrict([]byte(text), &rules); err != nil {
		t.Fatal(err)
	}
	want := rightsOf(rules)
	if len(want) < 15 {
		t.Fatalf("docs/OPERATIONS.md: %v", want)
	}
	has := given(t, mustRender(t, release{}), "quarry-controller")
	if missing, extra := want.without(has), has.without(want); len(missing)+len(extra) > 0 {
		t.Errorf("missing: %q\ntoo much: %q", missing, extra)
	}
	for right := range given(t, mustRender(t, release{values: "tls: {secret: own}"}), "quarry-controller") {
		if strings.Contains(right, "secrets") || strings.Contains(right, "configmaps") {
			t.Errorf("the certificate is somebody else's: %s", right)
		}
	}
}

// All roles are bound, to the controller's account, and nothing is to that of agents.
func TestOnlyTheControllerHasRights(t *testing.T) {
	r := mustRender(t, release{values: everything})
	bound := map[string]bool{}
	for _, o := range r.objects(t) {
		var ref rbacv1.RoleRef
		var subjects []rbacv1.Subject
		switch o.GetKind() {
		case "ClusterRoleBinding":
			b := into[rbacv1.ClusterRoleBinding](t, o)
			ref, subjects = b.RoleRef, b.Subjects
		case "RoleBinding":
			b := into[rbacv1.RoleBinding](t, o)
			ref, subjects = b.RoleRef, b.Subjects
		default:
			continue
		}
		bound[ref.Kind+"/"+ref.Name] = true
		if len(subjects) != 1 || subjects[0].Kind != "ServiceAccount" || subjects[0].Name != "quarry-controller" || subjects[0].Namespace != "quarry" {
			t.Errorf("%s %s: %+v", o.GetKind(), o.GetName(), subjects)
		}
	}
	for _, kind := range []string{"ClusterRole", "Role"} {
		for _, name := range r.names(t, kind) {
			if !bound[kind+"/"+name] {
				t.Errorf("%s %s is bound to nobody", kind, name)
			}
			delete(bound, kind+"/"+name)
		}
	}
	for ref := range bound {
		t.Errorf("%s is bound and is not there", ref)
	}
	if got := mustRender(t, release{values: "rbac: {create: false}"}).names(t, "ClusterRole"); len(got) > 0 {
		t.Errorf("%v", got)
	}
}
