package e2e

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"
)

const portAdmin, portMetrics = 9811, 9809

// TestOnlyAPortForwardReachesTheAdminService: it listens inside of the controller's pod, and no address of
// the cluster leads there, not even for its administrator.
func TestOnlyAPortForwardReachesTheAdminService(t *testing.T) {
	r := newRig(t)
	leader := must(r.leader())(r)
	p := must(r.kube.CoreV1().Pods(system).Get(bg, leader, metav1.GetOptions{}))(r)
	r.start(pod{name: "stranger", node: p.Spec.NodeName})
	r.start(pod{name: "far", node: r.otherNode(p.Spec.NodeName)})
	for _, from := range []string{"stranger", "far"} {
		for _, host := range []string{p.Status.PodIP, "quarry-controller." + system + ".svc.cluster.local"} {
			ask := func(port int, path string) (string, error) {
				return r.tryShell(from, fmt.Sprintf(`printf 'GET %s HTTP/1.0\r\nHost: 127.0.0.1\r\nQuarry-Admin: 1\r\n\r\n' | nc -w 20 %s %d`, path, host, port))
			}
			r.wait(from+" to reach the controller at all", func() (bool, error) {
				out, err := ask(portMetrics, "/healthz")
				return err == nil && strings.Contains(out, " 200 "), err
			})
			out, err := ask(portAdmin, "/v1/domains")
			if err == nil || !strings.Contains(err.Error(), "refused") {
				r.Errorf("%s asks %s: %q, %v; nobody may listen there", from, host, out, err)
			}
		}
	}
	for resource, name := range map[string]string{"pods": leader, "services": "quarry-controller"} {
		ask := func(port int, path string) ([]byte, error) {
			return r.kube.CoreV1().RESTClient().Get().Namespace(system).Resource(resource).Name(fmt.Sprintf("%s:%d", name, port)).SubResource("proxy").
				Suffix(path).SetHeader("Quarry-Admin", "1").DoRaw(bg)
		}
		if out, err := ask(portAdmin, "v1/domains"); err == nil {
			r.Errorf("a proxy to %s answers %s", resource, out)
		}
		if resource == "services" {
			continue // it has no other port than the agents'
		}
		if out, err := ask(portMetrics, "healthz"); err != nil {
			r.Errorf("a proxy to %s does not work at all: %s, %v", resource, out, err)
		}
	}
	if out, err := r.program(r.quarry, "domains"); err != nil {
		r.Errorf("a port-forward: %s, %v", out, err)
	}
}

func (r *rig) otherNode(than string) string {
	for _, n := range r.nodes {
		if n != than {
			return n
		}
	}
	return ""
}

// TestAPortForwardNeedsRights: an account has none of its own; with those that docs/OPERATIONS.md names, and
// not with any less, it may ask.
func TestAPortForwardNeedsRights(t *testing.T) {
	r := newRig(t)
	const account = "operator"
	_, err := r.kube.CoreV1().ServiceAccounts(r.ns).Create(bg, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}, metav1.CreateOptions{})
	r.must(err)
	r.start(pod{name: "of-" + account, account: account})
	kubeconfig := r.kubeconfigOf(account)
	refused := func(when string, want ...string) {
		r.Helper()
		out, err := r.program(r.quarry, "--kubeconfig", kubeconfig, "domains")
		if err == nil {
			r.Fatalf("%s: it is answered %s", when, out)
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				r.Errorf("%s: %v; want %q in it", when, err, w)
			}
		}
	}
	refused("without rights", "list pods", "forbidden")
	leader := must(r.leader())(r)
	for _, verb := range []string{"get", "create"} {
		_, err := r.program(r.command, "kubectl", "--kubeconfig", kubeconfig, "auth", "can-i", verb, "pods/portforward", "-n", system)
		if err == nil {
			r.Errorf("an account without rights may %s pods/portforward", verb)
		}
	}
	if out, err := r.program(r.command, "kubectl", "--kubeconfig", kubeconfig, "-n", system, "port-forward", "pod/"+leader, ":9811"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		r.Errorf("kubectl port-forward: %s, %v", out, err)
	}
	if out, err := r.program(r.command, "kubectl", "--kubeconfig", kubeconfig, "-n", system, "exec", "pod/"+leader, "-c", "quarry", "--", "kubectl-quarry", "domains"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		r.Errorf("kubectl exec: %s, %v", out, err)
	}

	role := r.documentedRole()
	role.Name = "e2e-" + r.ns
	all := role.Rules
	role.Rules = nil
	for _, rule := range all {
		if rule.Resources[0] != "pods/portforward" {
			role.Rules = append(role.Rules, rule)
		}
	}
	if len(role.Rules) != len(all)-1 {
		r.Fatalf("the documented rules are %+v", all)
	}
	roles, bindings := r.kube.RbacV1().Roles(system), r.kube.RbacV1().RoleBindings(system)
	role, err = roles.Create(bg, role, metav1.CreateOptions{})
	r.must(err)
	r.Cleanup(func() { r.must(roles.Delete(bg, role.Name, metav1.DeleteOptions{})) })
	_, err = bindings.Create(bg, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: account, Namespace: r.ns}}}, metav1.CreateOptions{})
	r.must(err)
	r.Cleanup(func() { r.must(bindings.Delete(bg, role.Name, metav1.DeleteOptions{})) })
	r.wait("the role to count", func() (bool, error) {
		_, err := r.program(r.command, "kubectl", "--kubeconfig", kubeconfig, "auth", "can-i", "list", "pods", "-n", system)
		return err == nil, err
	})
	refused("with all rights but the port-forward", "pods/portforward", "forbidden")

	role.Rules = all
	_, err = roles.Update(bg, role, metav1.UpdateOptions{})
	r.must(err)
	r.wait("the documented rights to be enough", func() (bool, error) {
		_, err := r.program(r.quarry, "--kubeconfig", kubeconfig, "domains")
		return err == nil, err
	})
}

// documentedRole is the one in docs/OPERATIONS.md.
func (r *rig) documentedRole() *rbacv1.Role {
	r.Helper()
	page := string(must(os.ReadFile("../../docs/OPERATIONS.md"))(r))
	for _, block := range strings.Split(page, "```yaml\n")[1:] {
		text, _, _ := strings.Cut(block, "```")
		if strings.Contains(text, "kind: Role\n") {
			role := &rbacv1.Role{}
			r.must(yaml.UnmarshalStrict([]byte(text), role))
			return role
		}
	}
	r.Fatalf("docs/OPERATIONS.md has no Role")
	return nil
}

// kubeconfigOf an account in the scenario's namespace.
func (r *rig) kubeconfigOf(account string) string {
	r.Helper()
	p := must(r.tryPod("of-" + account))(r)
	config := map[string]any{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": r.config.Host, "certificate-authority-data": base64.StdEncoding.EncodeToString(r.config.CAData)}}},
		"users":    []any{map[string]any{"name": "c", "user": map[string]any{"token": r.tokenOf(r.ns, account, p)}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c", "user": "c"}}}}
	path := filepath.Join(r.TempDir(), "kubeconfig")
	r.must(os.WriteFile(path, must(yaml.Marshal(config))(r), 0o600))
	return path
}

// TestTheControllerIsAdmittedAsRestricted, by the API server itself, in a namespace that enforces that; the
// agent, which may do everything, is not.
func TestTheControllerIsAdmittedAsRestricted(t *testing.T) {
	r := newRig(t)
	ns := must(r.kube.CoreV1().Namespaces().Create(bg, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-restricted-",
		Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}}}, metav1.CreateOptions{}))(r)
	r.Cleanup(func() { r.must(r.kube.CoreV1().Namespaces().Delete(bg, ns.Name, metav1.DeleteOptions{})) })
	admitted := func(template corev1.PodTemplateSpec) error {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: template.Spec.ServiceAccountName}}
		_, err := r.kube.CoreV1().ServiceAccounts(ns.Name).Create(bg, account, metav1.CreateOptions{})
		r.must(err)
		template.GenerateName = "try-"
		_, err = r.kube.CoreV1().Pods(ns.Name).Create(bg, &corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	controller := must(r.kube.AppsV1().Deployments(system).Get(bg, "quarry-controller", metav1.GetOptions{}))(r)
	if err := admitted(controller.Spec.Template); err != nil {
		r.Errorf("the controller: %v", err)
	}
	node := must(r.kube.AppsV1().DaemonSets(system).Get(bg, "quarry-node", metav1.GetOptions{}))(r)
	if err := admitted(node.Spec.Template); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "violates PodSecurity \"restricted") {
		r.Errorf("the agent: %v; were it admitted, the profile would not be enforced", err)
	}
	root := controller.Spec.Template.DeepCopy()
	root.Spec.Containers[0].SecurityContext.AllowPrivilegeEscalation = ptr.To(true)
	root.Spec.ServiceAccountName = "another"
	if err := admitted(*root); !apierrors.IsForbidden(err) {
		r.Errorf("a controller that may gain privileges: %v", err)
	}
}
