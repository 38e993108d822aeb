package chart

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestAnAgentSeesTheDirectoriesOfItsDomains(t *testing.T) {
	pod := daemonSet(t, mustRender(t, release{values: everything})).Spec.Template.Spec
	types := map[string]corev1.HostPathType{}
	volumes := map[string]string{}
	for _, v := range pod.Volumes {
		if v.HostPath != nil && v.HostPath.Type != nil {
			types[v.HostPath.Path] = *v.HostPath.Type
			volumes[v.Name] = v.HostPath.Path
		}
	}
	// What is not below dataDir must be there; a mount point of a disk that is missing
	// is not made.
	for path, want := range map[string]corev1.HostPathType{
		"/var/lib/quarry": corev1.HostPathDirectoryOrCreate, "/mnt/disk": corev1.HostPathDirectory, "/mnt/share": corev1.HostPathDirectory,
		"/run/example": corev1.HostPathDirectory, // of a socket
	} {
		if types[path] != want {
			t.Errorf("%s: %q", path, types[path])
		}
	}
	for _, m := range pod.Containers[0].VolumeMounts {
		path, ok := volumes[m.Name]
		if !ok || m.Name == "plugin" || m.Name == "registration" {
			continue
		}
		if m.MountPath != path {
			t.Errorf("%s is seen at %s", path, m.MountPath)
		}
		if slices.Contains([]string{"/var/lib/quarry", "/mnt/disk", "/mnt/share"}, path) && *m.MountPropagation != corev1.MountPropagationHostToContainer {
			t.Errorf("what is mounted on %s later is not seen", path)
		}
	}
}

func TestTheKubeletsFolderIsOneValue(t *testing.T) {
	pod := daemonSet(t, mustRender(t, release{values: "kubeletDir: /var/lib/k0s/kubelet"})).Spec.Template.Spec
	for _, path := range []string{"/var/lib/k0s/kubelet", "/var/lib/k0s/kubelet/plugins/csi.quarry.dev", "/var/lib/k0s/kubelet/plugins_registry"} {
		if !slices.Contains(hostPaths(&pod), path) {
			t.Errorf("%s is not mounted: %q", path, hostPaths(&pod))
		}
	}
	for _, arg := range []string{"--kubelet-dir=/var/lib/k0s/kubelet", "--kubelet-registration-path=/var/lib/k0s/kubelet/plugins/csi.quarry.dev/csi.sock"} {
		if !slices.Contains(pod.Containers[0].Args, arg) {
			t.Errorf("%s is missing: %q", arg, pod.Containers[0].Args)
		}
	}
	for _, m := range pod.Containers[0].VolumeMounts {
		if m.Name == "kubelet" && (m.MountPath != "/var/lib/k0s/kubelet" || *m.MountPropagation != corev1.MountPropagationBidirectional) {
			t.Errorf("%+v", m)
		}
	}
}

func TestLVMSharesTheHostsLocks(t *testing.T) {
	pod := daemonSet(t, mustRender(t, release{values: everything})).Spec.Template.Spec
	for _, path := range []string{"/run/lock/lvm", "/run/lvm", "/etc/lvm"} {
		if !slices.Contains(hostPaths(&pod), path) {
			t.Errorf("%s is not mounted", path)
		}
	}
}

// An agent is not replaced because of a domain whose directory it sees already.
func TestADomainBelowTheDataDirectoryReplacesNoAgent(t *testing.T) {
	before := daemonSet(t, mustRender(t, release{})).Spec.Template
	r := mustRender(t, release{values: `
domains:
- {name: local, engine: dir, params: {path: /var/lib/quarry/local}}
- {name: second, engine: dir, params: {path: /var/lib/quarry/second}}
`})
	after := daemonSet(t, r).Spec.Template
	if before.String() != after.String() {
		t.Errorf("the pods of agents differ:\n%s\n%s", before.String(), after.String())
	}
	if old, now := deployment(t, mustRender(t, release{})).Spec.Template, deployment(t, r).Spec.Template; old.String() != now.String() { // they follow the file
		t.Errorf("the pods of controllers differ:\n%s\n%s", old.String(), now.String())
	}
}
