package chart

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

func evaluator(t *testing.T) policy.Evaluator {
	t.Helper()
	e, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func restricted() api.LevelVersion {
	return api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
}

func TestTheControllerPassesTheRestrictedProfile(t *testing.T) {
	for _, values := range []string{"", everything, "tls: {secret: own}"} {
		pod := deployment(t, mustRender(t, release{values: values, apis: []string{snapshotAPI, groupAPI}})).Spec.Template
		for _, result := range evaluator(t).EvaluatePod(restricted(), &pod.ObjectMeta, &pod.Spec) {
			if !result.Allowed {
				t.Errorf("%s: %s", result.ForbiddenReason, result.ForbiddenDetail)
			}
		}
		for _, c := range pod.Spec.Containers {
			if c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
				t.Errorf("container %s can write its root file system", c.Name)
			}
		}
		for _, v := range pod.Spec.Volumes {
			if v.HostPath != nil {
				t.Errorf("volume %s is the host's", v.Name)
			}
		}
	}
}

// The profile is one that finds something: the agent, which may do everything, fails it.
func TestTheAgentIsPrivilegedAndSeesNoMoreThanItNeeds(t *testing.T) {
	pod := daemonSet(t, mustRender(t, release{})).Spec.Template
	var refused int
	for _, result := range evaluator(t).EvaluatePod(restricted(), &pod.ObjectMeta, &pod.Spec) {
		if !result.Allowed {
			refused++
		}
	}
	if refused == 0 {
		t.Error("a privileged pod passes: the check checks nothing")
	}
	if pod.Spec.HostNetwork || pod.Spec.HostPID || pod.Spec.HostIPC || *pod.Spec.AutomountServiceAccountToken {
		t.Errorf("%+v", pod.Spec)
	}
	if got, want := hostPaths(&pod.Spec), []string{
		"/dev", "/lib/modules", "/var/lib/kubelet", "/var/lib/kubelet/plugins/csi.quarry.dev", "/var/lib/kubelet/plugins_registry", "/var/lib/quarry",
	}; !slices.Equal(got, want) {
		t.Errorf("the host's %q", got)
	}
}

func hostPaths(pod *corev1.PodSpec) []string {
	var out []string
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			out = append(out, v.HostPath.Path)
		}
	}
	slices.Sort(out)
	return out
}

func TestTheAgentsTokenIsForTheControllerAlone(t *testing.T) {
	pod := daemonSet(t, mustRender(t, release{})).Spec.Template.Spec
	for _, v := range pod.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ServiceAccountToken == nil || s.ServiceAccountToken.Audience != "quarry-controller" {
				t.Errorf("%+v", s)
			}
		}
		return
	}
	t.Error("it has no token")
}

func TestTheAgentSeesNoKeyOfTheController(t *testing.T) {
	for _, values := range []string{"", "tls: {secret: own}", "tls: {certManager: {enabled: true, issuerRef: {name: a}}}"} {
		for _, v := range daemonSet(t, mustRender(t, release{values: values})).Spec.Template.Spec.Volumes {
			if v.Secret != nil && (len(v.Secret.Items) != 1 || v.Secret.Items[0].Key != "ca.crt") {
				t.Errorf("volume %s: %+v", v.Name, v.Secret)
			}
		}
	}
}
