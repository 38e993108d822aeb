package chart

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
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

// The FUSE processes of an agent outlive its pod, and the next agent takes their mounts down everywhere.
func TestGlusterOutlivesThePod(t *testing.T) {
	with := daemonSet(t, mustRender(t, release{values: `
domains:
- {name: local, engine: dir, params: {path: /var/lib/quarry/local}}
- {name: gluster, engine: gluster, params: {servers: "g1,g2", volume: vol}}
`})).Spec.Template.Spec
	without := daemonSet(t, mustRender(t, release{})).Spec.Template.Spec
	if !with.HostPID || without.HostPID {
		t.Errorf("hostPID is %v with a domain of gluster, and %v without", with.HostPID, without.HostPID)
	}
	if !slices.Contains(hostPaths(&with), "/run/quarry/mounts") || slices.Contains(hostPaths(&without), "/run/quarry/mounts") {
		t.Errorf("paths of the host: %q, and %q without gluster", hostPaths(&with), hostPaths(&without))
	}
	for _, m := range with.Containers[0].VolumeMounts {
		if m.Name == "mounts" && (m.MountPropagation == nil || *m.MountPropagation != corev1.MountPropagationBidirectional) {
			t.Errorf("%+v", m)
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

// TestMountsOverTheNetworkOutliveThePod: the kernel's connection to a server lives in the network of
// who mounted.
func TestMountsOverTheNetworkOutliveThePod(t *testing.T) {
	nfs := "domains: [{name: nas, engine: nfs4, scope: shared, params: {server: nas, export: /k8s}}]\nclasses: [{name: quarry, parameters: {domain: nas}}]\n"
	for name, c := range map[string]struct {
		values string
		host   bool
	}{
		"a directory":           {"", false},
		"an export":             {nfs, true},
		"switched off":          {nfs + "node: {hostNetwork: false}", false},
		"switched on":           {"node: {hostNetwork: true}", true},
		"another's own process": {"domains: [{name: local, socket: /run/example/engine.sock, engine: nfs4}]", false},
	} {
		t.Run(name, func(t *testing.T) {
			r := mustRender(t, release{values: c.values})
			pod := daemonSet(t, r).Spec.Template.Spec
			if pod.HostNetwork != c.host || (pod.DNSPolicy == corev1.DNSClusterFirstWithHostNet) != c.host {
				t.Errorf("host network %t, DNS %q", pod.HostNetwork, pod.DNSPolicy)
			}
			// No selector of pods finds one that has the node's address.
			policy := into[networkingv1.NetworkPolicy](t, r.one(t, "NetworkPolicy", "quarry-controller"))
			if open := len(policy.Spec.Ingress[0].From) == 0; open != c.host {
				t.Errorf("agents are let in from %+v", policy.Spec.Ingress[0].From)
			}
		})
	}
}
