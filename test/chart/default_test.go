package chart

import (
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

// everything switches on what is off, for tests of all that can be rendered.
const everything = `
defaultClass: true
imagePullSecrets: [{name: mirror}]
installation: here
domains:
- {name: local, engine: dir, scope: node, params: {path: /var/lib/quarry/local}}
- {name: disk, engine: dir, params: {path: /mnt/disk}, overcommit: 1.5, capacityLimit: 100Gi, backgroundRate: 50Mi, defaults: native-only, aliases: [old]}
- {name: share, engine: sharedfs, params: {path: /mnt/share}}
- {name: vg, engine: lvm, params: {vg: data, thinPool: pool}}
- {name: far, socket: /run/example/engine.sock, params: {pool: a}}
- {name: own, engine: dir, process: true, params: {path: /var/lib/quarry/own}}
secrets:
  vg: {secretName: vg-keys}
classes:
- {name: quarry, parameters: {domain: local}}
- {name: shared, parameters: {domains: "share,disk", layout: directory}, reclaimPolicy: Retain, volumeBindingMode: Immediate}
- {name: fast, fstype: xfs, parameters: {domain: vg, requireNative: snapshot}, mountOptions: [noatime]}
- {name: former, parameters: {domain: old}, annotations: {a: b}}
snapshots: {enabled: true, groups: true}
snapshotClasses:
- {name: quarry}
- {name: inexact, deletionPolicy: Retain, parameters: {inexact: allow}}
snapshotMetadata: {enabled: true, tlsSecret: metadata-tls, caBundle: "-----BEGIN CERTIFICATE-----"}
controller: {podLabels: {a: b}, podAnnotations: {a: b}, extraArgs: [--vmodule=a=1], extraEnv: [{name: A, value: b}], tolerations: [{operator: Exists}], affinity: {nodeAffinity: {}}}
node: {hostNetwork: true, podLabels: {a: b}, podAnnotations: {a: b}, extraArgs: [--vmodule=a=1], extraEnv: [{name: A, value: b}], maxUnavailable: 1}
rbac: {extraRules: [{apiGroups: [""], resources: [pods], verbs: [get]}]}
serviceAccounts: {controllerAnnotations: {a: b}, nodeAnnotations: {a: b}}
networkPolicy: {metricsFrom: [{namespaceSelector: {}}]}
monitoring: {serviceMonitor: {enabled: true, labels: {a: b}}, rules: {enabled: true, labels: {a: b}}, dashboard: {enabled: true}}
`

func TestWithoutValuesThereIsAWorkingClass(t *testing.T) {
	r := mustRender(t, release{apis: []string{snapshotAPI, groupAPI}})
	class := into[storagev1.StorageClass](t, r.one(t, "StorageClass", "quarry"))
	switch {
	case class.Provisioner != "csi.quarry.dev",
		*class.VolumeBindingMode != storagev1.VolumeBindingWaitForFirstConsumer,
		!*class.AllowVolumeExpansion,
		class.Parameters["domain"] != "local",
		class.Parameters["csi.storage.k8s.io/fstype"] != "ext4":
		t.Errorf("%+v", class)
	}
	if len(class.Annotations) > 0 {
		t.Errorf("it makes itself something special: %v", class.Annotations)
	}
	driver := into[storagev1.CSIDriver](t, r.one(t, "CSIDriver", "csi.quarry.dev")).Spec
	if !*driver.AttachRequired || !*driver.StorageCapacity || *driver.SELinuxMount || *driver.PodInfoOnMount ||
		*driver.FSGroupPolicy != storagev1.ReadWriteOnceWithFSTypeFSGroupPolicy ||
		!slices.Equal(driver.VolumeLifecycleModes, []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent}) {
		t.Errorf("%+v", driver)
	}
	for _, kind := range []string{"VolumeSnapshotClass", "VolumeGroupSnapshotClass"} {
		if got := r.names(t, kind); !slices.Equal(got, []string{"quarry"}) {
			t.Errorf("%s: %v", kind, got)
		}
	}
	for _, kind := range []string{"ServiceMonitor", "PrometheusRule", "SnapshotMetadataService", "Certificate", "Namespace"} {
		if got := r.names(t, kind); len(got) > 0 {
			t.Errorf("%s %v that nobody asked for", kind, got)
		}
	}
}

func TestTheDefaultClassIsTheClustersOnlyWhenAskedFor(t *testing.T) {
	r := mustRender(t, release{values: everything})
	for name, want := range map[string]string{"quarry": "true", "shared": "", "fast": "", "former": ""} {
		if got := r.one(t, "StorageClass", name).GetAnnotations()["storageclass.kubernetes.io/is-default-class"]; got != want {
			t.Errorf("class %s: %q", name, got)
		}
	}
}

func TestDirectoriesCarryNoFilesystem(t *testing.T) {
	r := mustRender(t, release{values: everything})
	for name, want := range map[string]string{"quarry": "ext4", "fast": "xfs", "former": "ext4"} {
		if got := into[storagev1.StorageClass](t, r.one(t, "StorageClass", name)).Parameters["csi.storage.k8s.io/fstype"]; got != want {
			t.Errorf("class %s: %q", name, got)
		}
	}
	shared := into[storagev1.StorageClass](t, r.one(t, "StorageClass", "shared"))
	if _, ok := shared.Parameters["csi.storage.k8s.io/fstype"]; ok {
		t.Errorf("%v", shared.Parameters)
	}
	for _, args := range containers(t, r) {
		for _, arg := range args.Args {
			if strings.HasPrefix(arg, "--default-fstype") {
				t.Error("a claim for a directory would get a filesystem: " + arg)
			}
		}
	}
}

func TestSnapshotsAreThereWhereTheirAPIIs(t *testing.T) {
	for name, c := range map[string]struct {
		release
		snapshots, groups bool
	}{
		"no API":          {release{}, false, false},
		"the API":         {release{apis: []string{snapshotAPI}}, true, false},
		"both":            {release{apis: []string{snapshotAPI, groupAPI}}, true, true},
		"switched off":    {release{values: "snapshots: {enabled: false}", apis: []string{snapshotAPI, groupAPI}}, false, false},
		"switched on":     {release{values: "snapshots: {enabled: true}"}, true, false},
		"groups on":       {release{values: "snapshots: {enabled: true, groups: true}"}, true, true},
		"groups off":      {release{values: "snapshots: {groups: false}", apis: []string{snapshotAPI, groupAPI}}, true, false},
		"groups for none": {release{values: "snapshots: {enabled: false, groups: true}"}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := mustRender(t, c.release)
			snapshotter, ok := containers(t, r)["csi-snapshotter"]
			if ok != c.snapshots || len(r.names(t, "VolumeSnapshotClass")) > 0 != c.snapshots {
				t.Errorf("snapshotter %t, classes %v", ok, r.names(t, "VolumeSnapshotClass"))
			}
			if len(r.names(t, "VolumeGroupSnapshotClass")) > 0 != c.groups || ok && slices.Contains(snapshotter.Args, "--feature-gates=CSIVolumeGroupSnapshot=true") != c.groups {
				t.Errorf("classes %v, arguments %q", r.names(t, "VolumeGroupSnapshotClass"), snapshotter.Args)
			}
			if strings.Contains(r["NOTES.txt"], "Snapshots are off") == c.snapshots {
				t.Error(r["NOTES.txt"])
			}
		})
	}
}

// containers of the controller's pod by name.
func containers(t *testing.T, r rendered) map[string]corev1.Container {
	t.Helper()
	out := map[string]corev1.Container{}
	for _, c := range deployment(t, r).Spec.Template.Spec.Containers {
		out[c.Name] = c
	}
	return out
}

func deployment(t *testing.T, r rendered) *appsv1.Deployment {
	t.Helper()
	return into[appsv1.Deployment](t, r.one(t, "Deployment", "quarry-controller"))
}

func daemonSet(t *testing.T, r rendered) *appsv1.DaemonSet {
	t.Helper()
	return into[appsv1.DaemonSet](t, r.one(t, "DaemonSet", "quarry-node"))
}

func TestTheSidecarsWaitInsteadOfElecting(t *testing.T) {
	for name, c := range containers(t, mustRender(t, release{values: everything})) {
		for _, arg := range c.Args {
			if name != "quarry" && strings.HasPrefix(arg, "--leader-election") {
				t.Errorf("%s has a Lease of its own: %s", name, arg)
			}
		}
	}
}

// Everything that is said by a name in one object is found by that name in another.
func TestTheObjectsFindEachOther(t *testing.T) {
	for _, rel := range []release{{}, {values: everything}, {name: "prod", namespace: "storage"}, {values: "fullnameOverride: q\ndriverName: csi.example.com"}} {
		r := mustRender(t, rel)
		have := map[string]bool{}
		for _, o := range r.objects(t) {
			have[o.GetKind()+"/"+o.GetName()] = true
		}
		for _, o := range r.objects(t) {
			var pod corev1.PodSpec
			switch o.GetKind() {
			case "Deployment":
				pod = into[appsv1.Deployment](t, o).Spec.Template.Spec
			case "DaemonSet":
				pod = into[appsv1.DaemonSet](t, o).Spec.Template.Spec
			default:
				continue
			}
			if !have["ServiceAccount/"+pod.ServiceAccountName] {
				t.Errorf("%s: there is no ServiceAccount %s", o.GetName(), pod.ServiceAccountName)
			}
			volumes := map[string]bool{}
			for _, v := range pod.Volumes {
				volumes[v.Name] = true
				if v.ConfigMap != nil && !have["ConfigMap/"+v.ConfigMap.Name] {
					t.Errorf("%s: there is no ConfigMap %s", o.GetName(), v.ConfigMap.Name)
				}
			}
			for _, c := range pod.Containers {
				for _, m := range c.VolumeMounts {
					if !volumes[m.Name] {
						t.Errorf("%s: container %s mounts volume %s, which is not there", o.GetName(), c.Name, m.Name)
					}
				}
				for _, arg := range c.Args {
					name, value, _ := strings.Cut(arg, "=")
					kind := map[string]string{"--agent-service-account": "ServiceAccount", "--tls-secret": "Secret", "--tls-ca-config-map": "ConfigMap"}[name]
					if kind != "" && !have[kind+"/"+value] {
						t.Errorf("%s: %s: there is none", o.GetName(), arg)
					}
					if name == "--controller" || name == "--tls-host" {
						service, _, _ := strings.Cut(value, ".")
						if !have["Service/"+service] {
							t.Errorf("%s: %s: there is no such Service", o.GetName(), arg)
						}
					}
				}
			}
		}
		for _, o := range r.objects(t) {
			if ns := o.GetNamespace(); ns != "" && ns != "quarry" && ns != rel.namespace {
				t.Errorf("%s %s is in namespace %s", o.GetKind(), o.GetName(), ns)
			}
		}
	}
}
