package e2e

import (
	"context"
	"fmt"
	"strings"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

var bg = context.Background()

// claim describes a PersistentVolumeClaim.
type claim struct {
	name, class, size string
	mode              corev1.PersistentVolumeAccessMode // "": ReadWriteOnce
	block             bool
	from              *corev1.TypedLocalObjectReference
	volume            string // a PersistentVolume that exists
	labels            map[string]string
}

func fromClaim(name string) *corev1.TypedLocalObjectReference {
	return &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: name}
}

func fromSnapshot(name string) *corev1.TypedLocalObjectReference {
	return &corev1.TypedLocalObjectReference{APIGroup: ptr.To(snapshotv1.GroupName), Kind: "VolumeSnapshot", Name: name}
}

func (c claim) spec() corev1.PersistentVolumeClaimSpec {
	spec := corev1.PersistentVolumeClaimSpec{
		StorageClassName: &c.class, DataSource: c.from, VolumeName: c.volume,
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(c.size)}},
	}
	if c.mode != "" {
		spec.AccessModes[0] = c.mode
	}
	if c.block {
		spec.VolumeMode = ptr.To(corev1.PersistentVolumeBlock)
	}
	return spec
}

func (r *rig) claim(c claim) {
	r.Helper()
	_, err := r.kube.CoreV1().PersistentVolumeClaims(r.ns).Create(bg, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: c.name, Labels: c.labels}, Spec: c.spec()}, metav1.CreateOptions{})
	r.must(err)
}

func (r *rig) getClaim(name string) *corev1.PersistentVolumeClaim {
	r.Helper()
	return must(r.tryClaim(name))(r)
}

func (r *rig) tryClaim(name string) (*corev1.PersistentVolumeClaim, error) {
	return r.kube.CoreV1().PersistentVolumeClaims(r.ns).Get(bg, name, metav1.GetOptions{})
}

// bound waits for a claim's volume.
func (r *rig) bound(name string) *corev1.PersistentVolume {
	r.Helper()
	r.wait("claim "+name+" to be bound", func() (bool, error) {
		c, err := r.tryClaim(name)
		return err == nil && c.Status.Phase == corev1.ClaimBound, err
	})
	return must(r.tryVolume(r.getClaim(name).Spec.VolumeName))(r)
}

func (r *rig) tryVolume(name string) (*corev1.PersistentVolume, error) {
	return r.kube.CoreV1().PersistentVolumes().Get(bg, name, metav1.GetOptions{})
}

func (r *rig) deleteClaim(name string) {
	r.Helper()
	r.must(r.kube.CoreV1().PersistentVolumeClaims(r.ns).Delete(bg, name, metav1.DeleteOptions{}))
}

// pod describes one that uses claims at /data, /data1, ... or, as devices, at /dev/data...
type pod struct {
	name     string
	claims   []string
	node     string // "": anywhere
	script   string // "": it waits for commands
	readOnly bool
	template *corev1.PersistentVolumeClaimSpec // of a generic ephemeral volume at /ephemeral
	labels   map[string]string
	account  string // a ServiceAccount
}

func at(prefix string, i int) string {
	if i == 0 {
		return prefix
	}
	return fmt.Sprint(prefix, i)
}

func (r *rig) makePod(p pod) {
	r.Helper()
	r.must(r.tryMakePod(p))
}

func (r *rig) tryMakePod(p pod) error {
	container := corev1.Container{Name: "main", Image: r.image, ImagePullPolicy: corev1.PullIfNotPresent,
		Command:         []string{"sh", "-ec", "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done"},
		SecurityContext: &corev1.SecurityContext{Privileged: ptr.To(true)}}
	spec := corev1.PodSpec{RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: ptr.To(int64(5)),
		AutomountServiceAccountToken: ptr.To(false), ServiceAccountName: p.account}
	if p.script != "" {
		container.Command = []string{"sh", "-ec", p.script}
	}
	if p.node != "" {
		spec.NodeSelector = map[string]string{corev1.LabelHostname: p.node}
	}
	for i, name := range p.claims {
		volume := at("data", i)
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name, ReadOnly: p.readOnly}}})
		used, err := r.tryClaim(name)
		if err != nil {
			return err
		}
		if m := used.Spec.VolumeMode; m != nil && *m == corev1.PersistentVolumeBlock {
			container.VolumeDevices = append(container.VolumeDevices, corev1.VolumeDevice{Name: volume, DevicePath: at("/dev/data", i)})
		} else {
			container.VolumeMounts = append(container.VolumeMounts, corev1.VolumeMount{Name: volume, MountPath: at("/data", i), ReadOnly: p.readOnly})
		}
	}
	if p.template != nil {
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: "ephemeral", VolumeSource: corev1.VolumeSource{
			Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{Spec: *p.template}}}})
		container.VolumeMounts = append(container.VolumeMounts, corev1.VolumeMount{Name: "ephemeral", MountPath: "/ephemeral"})
	}
	spec.Containers = []corev1.Container{container}
	_, err := r.kube.CoreV1().Pods(r.ns).Create(bg, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.name, Labels: p.labels}, Spec: spec}, metav1.CreateOptions{})
	return err
}

// start makes a pod and waits until it runs, or has done its work.
func (r *rig) start(p pod) {
	r.Helper()
	r.makePod(p)
	r.running(p.name)
}

// tryStart is start for what runs beside the scenario.
func (r *rig) tryStart(p pod) error {
	if err := r.tryMakePod(p); err != nil {
		return err
	}
	return r.poll(func() (bool, error) {
		now, err := r.tryPod(p.name)
		if err != nil {
			return false, err
		}
		return now.Status.Phase == corev1.PodRunning, fmt.Errorf("pod %s is %s", p.name, now.Status.Phase)
	})
}

func (r *rig) running(name string) {
	r.Helper()
	r.wait("pod "+name+" to run", func() (bool, error) {
		p, err := r.tryPod(name)
		if err != nil {
			return false, err
		}
		if p.Status.Phase == corev1.PodFailed {
			r.Fatalf("pod %s failed: %s", name, p.Status.Message)
		}
		return p.Status.Phase == corev1.PodRunning || p.Status.Phase == corev1.PodSucceeded, fmt.Errorf("it is %s: %s", p.Status.Phase, r.why(p))
	})
}

// why a pod does not run, in the newest words about it.
func (r *rig) why(p *corev1.Pod) string {
	var out []string
	for _, c := range p.Status.Conditions {
		if c.Status != corev1.ConditionTrue && c.Message != "" {
			out = append(out, c.Message)
		}
	}
	for _, e := range r.events("Pod", p.Name) {
		if e.Type == corev1.EventTypeWarning {
			out = append(out, e.Reason+": "+e.Message)
		}
	}
	return strings.Join(out, "; ")
}

func (r *rig) events(kind, name string) []corev1.Event {
	list, err := r.kube.CoreV1().Events(r.ns).List(bg, metav1.ListOptions{FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name})
	if err != nil {
		return nil // what is missing then is only a reason
	}
	return list.Items
}

func (r *rig) tryPod(name string) (*corev1.Pod, error) {
	return r.kube.CoreV1().Pods(r.ns).Get(bg, name, metav1.GetOptions{})
}

// stop deletes a pod and waits until it is gone.
func (r *rig) stop(name string) {
	r.Helper()
	r.must(r.kube.CoreV1().Pods(r.ns).Delete(bg, name, metav1.DeleteOptions{}))
	r.gone("pod "+name, func() error { _, err := r.tryPod(name); return err })
}

func (r *rig) tryStop(name string) error {
	if err := r.kube.CoreV1().Pods(r.ns).Delete(bg, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	return r.poll(func() (bool, error) {
		_, err := r.tryPod(name)
		return apierrors.IsNotFound(err), err
	})
}

// snapshot makes a VolumeSnapshot of a claim and waits until it can be used.
func (r *rig) snapshot(name, source string) *snapshotv1.VolumeSnapshot {
	r.Helper()
	if err := r.trySnapshotOf(name, source); err != nil {
		r.Fatalf("snapshot %s: %v", name, err)
	}
	return must(r.trySnapshot(name))(r)
}

func (r *rig) trySnapshotOf(name, source string) error {
	_, err := r.snapshots.SnapshotV1().VolumeSnapshots(r.ns).Create(bg, &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &source}, VolumeSnapshotClassName: ptr.To(snapshotClass)}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	return r.poll(func() (bool, error) { return r.isReady(name) })
}

func (r *rig) ready(name string) *snapshotv1.VolumeSnapshot {
	r.Helper()
	r.wait("snapshot "+name+" to be ready", func() (bool, error) { return r.isReady(name) })
	return must(r.trySnapshot(name))(r)
}

func (r *rig) isReady(name string) (bool, error) {
	s, err := r.trySnapshot(name)
	if err != nil {
		return false, err
	}
	if s.Status != nil && s.Status.Error != nil && s.Status.Error.Message != nil {
		err = fmt.Errorf("%s", *s.Status.Error.Message)
	}
	return s.Status != nil && s.Status.ReadyToUse != nil && *s.Status.ReadyToUse, err
}

func (r *rig) trySnapshot(name string) (*snapshotv1.VolumeSnapshot, error) {
	return r.snapshots.SnapshotV1().VolumeSnapshots(r.ns).Get(bg, name, metav1.GetOptions{})
}

func (r *rig) deleteSnapshot(name string) {
	r.Helper()
	r.must(r.snapshots.SnapshotV1().VolumeSnapshots(r.ns).Delete(bg, name, metav1.DeleteOptions{}))
	r.gone("snapshot "+name, func() error { _, err := r.trySnapshot(name); return err })
}
