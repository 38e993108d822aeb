package e2e

import (
	"fmt"
	"strings"
	"testing"

	groupv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// write puts a file of some size into a volume, durably, and returns its checksum.
func (r *rig) write(pod, file string) string {
	r.Helper()
	return r.sh(pod, fmt.Sprintf("head -c 3000000 /dev/urandom >%[1]s; sync; sha256sum <%[1]s", file))
}

func (r *rig) holds(pod, file, sum string) {
	r.Helper()
	if got := r.sh(pod, "sha256sum <"+file); got != sum {
		r.Fatalf("%s in pod %s has the checksum %s, want %s", file, pod, got, sum)
	}
}

func bytesOf(s string) int64 { q := resource.MustParse(s); return q.Value() }

// TestFromClaimToDataAndBack: a claim, a pod that writes, a snapshot of it in use, a larger restore, a clone,
// on each class of images.
func TestFromClaimToDataAndBack(t *testing.T) {
	for _, class := range []string{classLocal, classXFS, classShared} {
		t.Run(class, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			size, larger := "64Mi", "96Mi"
			if class == classXFS {
				size, larger = "300Mi", "400Mi" // XFS takes no less
			}
			r.claim(claim{name: "data", class: class, size: size})
			r.start(pod{name: "writer", claims: []string{"data"}})
			pv := r.bound("data")
			if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != driver {
				r.Fatalf("the volume is %+v", pv.Spec.PersistentVolumeSource)
			}
			sum := r.write("writer", "/data/file")

			s := r.snapshot("s", "data")
			if got := s.Status.RestoreSize; got == nil || got.Value() < bytesOf(size) {
				r.Fatalf("restoreSize is %v, want at least %s", got, size)
			}
			later := r.write("writer", "/data/file")

			r.claim(claim{name: "restored", class: class, size: larger, from: fromSnapshot("s")})
			r.start(pod{name: "restored", claims: []string{"restored"}})
			r.holds("restored", "/data/file", sum)
			var total int64
			fmt.Sscan(r.sh("restored", `df -B1 /data | awk 'END { print $2 }'`), &total)
			if total < bytesOf(size) {
				r.Fatalf("the restored filesystem has %d bytes: it did not grow to %s", total, larger)
			}
			r.write("restored", "/data/file")

			r.claim(claim{name: "clone", class: class, size: size, from: fromClaim("data")})
			r.start(pod{name: "clone", claims: []string{"clone"}})
			r.holds("clone", "/data/file", later)
			r.holds("writer", "/data/file", later)
			r.deleteSnapshot("s")
			r.holds("clone", "/data/file", later)
		})
	}
}

// TestRestoreIntoAnotherDomainAndClass: a node's own ext4 to its XFS, to what all nodes share, and back.
func TestRestoreIntoAnotherDomainAndClass(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "data", class: classLocal, size: "64Mi"})
	r.start(pod{name: "writer", claims: []string{"data"}})
	sum := r.write("writer", "/data/file")
	r.snapshot("s", "data")
	r.claim(claim{name: "shared", class: classShared, size: "64Mi", from: fromSnapshot("s")})
	r.start(pod{name: "shared", claims: []string{"shared"}})
	r.holds("shared", "/data/file", sum)
	r.snapshot("back", "shared")
	r.claim(claim{name: "local", class: classLocal, size: "80Mi", from: fromSnapshot("back")})
	r.start(pod{name: "local", claims: []string{"local"}})
	r.holds("local", "/data/file", sum)
}

// TestASnapshotOfOneNodeIsRestoredOnAnother: the storage of a node is reached by no other node.
func TestASnapshotOfOneNodeIsRestoredOnAnother(t *testing.T) {
	r := newRig(t)
	r.twoNodes()
	r.claim(claim{name: "data", class: classLocal, size: "64Mi"})
	r.start(pod{name: "writer", claims: []string{"data"}, node: r.nodes[0]})
	sum := r.write("writer", "/data/file")
	r.snapshot("s", "data")
	r.claim(claim{name: "moved", class: classLocal, size: "64Mi", from: fromSnapshot("s")})
	r.start(pod{name: "moved", claims: []string{"moved"}, node: r.nodes[1]})
	r.holds("moved", "/data/file", sum)
}

// TestAGroupSnapshotIsOneMoment: a writer that writes to one volume and then to the other never
// appears to have done so in the reverse order.
func TestAGroupSnapshotIsOneMoment(t *testing.T) {
	r := newRig(t)
	both := map[string]string{"group": r.ns}
	r.claim(claim{name: "a", class: classXFS, size: "300Mi", labels: both})
	r.claim(claim{name: "b", class: classXFS, size: "300Mi", labels: both})
	r.start(pod{name: "writer", claims: []string{"a", "b"},
		script: `i=0; while :; do i=$((i+1)); echo $i >/data/n; sync /data/n; echo $i >/data1/n; sync /data1/n; done`})
	r.wait("the writer to write", func() (bool, error) {
		out, err := r.tryShell("writer", "cat /data1/n")
		return strings.TrimSpace(out) > "", err
	})
	groups := r.snapshots.GroupsnapshotV1().VolumeGroupSnapshots(r.ns)
	_, err := groups.Create(bg, &groupv1.VolumeGroupSnapshot{ObjectMeta: metav1.ObjectMeta{Name: "g"}, Spec: groupv1.VolumeGroupSnapshotSpec{
		Source:                       groupv1.VolumeGroupSnapshotSource{Selector: &metav1.LabelSelector{MatchLabels: both}},
		VolumeGroupSnapshotClassName: ptr.To(snapshotClass)}}, metav1.CreateOptions{})
	r.must(err)
	r.wait("the group snapshot to be ready", func() (bool, error) {
		g, err := groups.Get(bg, "g", metav1.GetOptions{})
		if err == nil && g.Status != nil && g.Status.Error != nil && g.Status.Error.Message != nil {
			err = fmt.Errorf("%s", *g.Status.Error.Message)
		}
		return err == nil && g.Status != nil && g.Status.ReadyToUse != nil && *g.Status.ReadyToUse, err
	})
	members := must(r.snapshots.SnapshotV1().VolumeSnapshots(r.ns).List(bg, metav1.ListOptions{}))(r)
	if len(members.Items) != 2 {
		r.Fatalf("the group has %d snapshots, want 2", len(members.Items))
	}
	var names []string
	for _, m := range members.Items {
		source := ""
		for _, o := range []string{"a", "b"} {
			if pv := r.bound(o); m.Spec.Source.PersistentVolumeClaimName != nil && *m.Spec.Source.PersistentVolumeClaimName == o {
				source = o
			} else if c, err := r.snapshots.SnapshotV1().VolumeSnapshotContents().Get(bg, ptr.Deref(m.Status.BoundVolumeSnapshotContentName, ""), metav1.GetOptions{}); err == nil &&
				c.Spec.Source.VolumeHandle != nil && *c.Spec.Source.VolumeHandle == pv.Spec.CSI.VolumeHandle {
				source = o
			}
		}
		if source == "" {
			r.Fatalf("nobody knows of what %s is a snapshot", m.Name)
		}
		r.claim(claim{name: "of-" + source, class: classXFS, size: "300Mi", from: fromSnapshot(m.Name)})
		names = append(names, m.Name)
	}
	r.start(pod{name: "reader", claims: []string{"of-a", "of-b"}})
	var a, b int
	fmt.Sscan(r.sh("reader", "cat /data/n /data1/n"), &a, &b)
	if a != b && a != b+1 {
		r.Fatalf("the snapshots %q have %d and %d: no one moment", names, a, b)
	}
	r.stop("writer")
	r.must(groups.Delete(bg, "g", metav1.DeleteOptions{}))
	for _, name := range names {
		r.gone("snapshot "+name, func() error { _, err := r.trySnapshot(name); return err })
	}
}

// TestAVolumeGrowsInUse.
func TestAVolumeGrowsInUse(t *testing.T) {
	for _, c := range []claim{
		{name: "xfs", class: classXFS, size: "300Mi"},
		{name: "block", class: classLocal, size: "64Mi", block: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.claim(c)
			r.start(pod{name: "user", claims: []string{c.name}})
			measure := `df -B1 /data | awk 'END { print $2 }'`
			if c.block {
				measure = "blockdev --getsize64 /dev/data"
			}
			var before, after int64
			fmt.Sscan(r.sh("user", measure), &before)
			patch := `{"spec":{"resources":{"requests":{"storage":"1Gi"}}}}`
			_, err := r.kube.CoreV1().PersistentVolumeClaims(r.ns).Patch(bg, c.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
			r.must(err)
			r.wait("the claim to have 1Gi", func() (bool, error) {
				now, err := r.tryClaim(c.name)
				if err != nil {
					return false, err
				}
				have := now.Status.Capacity[corev1.ResourceStorage]
				return have.Value() >= bytesOf("1Gi"), fmt.Errorf("it has %s: %v", have.String(), now.Status.Conditions)
			})
			r.wait("the pod to see it", func() (bool, error) {
				out, err := r.tryShell("user", measure)
				fmt.Sscan(out, &after)
				return after >= bytesOf("1Gi")*9/10, err
			})
			if after <= before {
				r.Fatalf("%d bytes, %d before", after, before)
			}
		})
	}
}

// TestARawBlockVolume keeps what is written, and so do its snapshot and clone.
func TestARawBlockVolume(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "raw", class: classLocal, size: "64Mi", block: true})
	r.start(pod{name: "writer", claims: []string{"raw"}})
	const sum = "head -c 8388608 /dev/data | sha256sum"
	want := r.sh("writer", "dd if=/dev/urandom of=/dev/data bs=1M count=8 conv=fsync 2>/dev/null; "+sum)
	r.stop("writer") // without a native snapshot only what is detached can be copied
	r.snapshot("s", "raw")
	r.claim(claim{name: "copy", class: classLocal, size: "64Mi", block: true, from: fromSnapshot("s")})
	r.start(pod{name: "reader", claims: []string{"copy"}})
	if got := r.sh("reader", sum); got != want {
		r.Fatalf("the restored device has %s, want %s", got, want)
	}
}

// TestManyNodesWriteOneDirectory: ReadWriteMany, and each pod sees what the others wrote.
func TestManyNodesWriteOneDirectory(t *testing.T) {
	r := newRig(t)
	r.twoNodes()
	r.claim(claim{name: "all", class: classDirectory, size: "64Mi", mode: corev1.ReadWriteMany})
	for _, n := range r.nodes {
		r.start(pod{name: "on-" + n, claims: []string{"all"}, node: n})
		r.sh("on-"+n, "hostname >/data/"+n)
	}
	for _, n := range r.nodes {
		for _, by := range r.nodes {
			if got := r.sh("on-"+n, "cat /data/"+by); got != "on-"+by {
				r.Fatalf("%s reads %q in the file of %s", n, got, by)
			}
		}
	}
}

// TestManyReadOneSnapshot: ReadOnlyMany from a snapshot of a ReadWriteOnce volume. An image is read by two pods of one
// node, since all nodes of the test cluster have one kernel with one set of loop devices; a directory on all nodes.
func TestManyReadOneSnapshot(t *testing.T) {
	for _, class := range []string{classShared, classDirectory} {
		t.Run(class, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.twoNodes()
			r.claim(claim{name: "data", class: class, size: "64Mi"})
			r.start(pod{name: "writer", claims: []string{"data"}, node: r.nodes[0]})
			sum := r.write("writer", "/data/file")
			if class == classDirectory {
				r.stop("writer") // what is no point in time is refused
			}
			r.snapshot("s", "data")
			r.claim(claim{name: "read", class: class, size: "64Mi", mode: corev1.ReadOnlyMany, from: fromSnapshot("s")})
			for i, n := range r.nodes[:2] {
				if class == classShared {
					n = r.nodes[0]
				}
				name := fmt.Sprint("reader-", i)
				r.start(pod{name: name, claims: []string{"read"}, node: n, readOnly: true})
				r.holds(name, "/data/file", sum)
				if _, err := r.tryShell(name, "touch /data/new"); err == nil {
					r.Fatalf("%s may write", name)
				}
			}
		})
	}
}

// TestOnePodAlone: ReadWriteOncePod.
func TestOnePodAlone(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "mine", class: classLocal, size: "64Mi", mode: corev1.ReadWriteOncePod})
	r.start(pod{name: "first", claims: []string{"mine"}})
	r.makePod(pod{name: "second", claims: []string{"mine"}})
	r.wait("the second pod to be refused", func() (bool, error) {
		p, err := r.tryPod("second")
		if err != nil {
			return false, err
		}
		if p.Status.Phase != corev1.PodPending {
			r.Fatalf("the second pod is %s", p.Status.Phase)
		}
		return strings.Contains(r.why(p), "ReadWriteOncePod"), fmt.Errorf("%s", r.why(p))
	})
	r.stop("first")
	r.running("second")
}

// TestAnEphemeralVolumeGoesWithItsPod.
func TestAnEphemeralVolumeGoesWithItsPod(t *testing.T) {
	r := newRig(t)
	spec := claim{class: classLocal, size: "64Mi"}.spec()
	r.start(pod{name: "user", template: &spec})
	r.write("user", "/ephemeral/file")
	pv := r.bound("user-ephemeral")
	r.stop("user")
	r.gone("volume "+pv.Name, func() error { _, err := r.tryVolume(pv.Name); return err })
}

// TestAPreProvisionedSnapshot: a VolumeSnapshotContent that names an existing snapshot by its handle.
func TestAPreProvisionedSnapshot(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "data", class: classShared, size: "64Mi"})
	r.start(pod{name: "writer", claims: []string{"data"}})
	sum := r.write("writer", "/data/file")
	r.snapshot("s", "data")
	contents := r.snapshots.SnapshotV1().VolumeSnapshotContents()
	bound := ptr.Deref(must(r.trySnapshot("s"))(r).Status.BoundVolumeSnapshotContentName, "")
	handle := ptr.Deref(must(contents.Get(bg, bound, metav1.GetOptions{}))(r).Status.SnapshotHandle, "")
	name := "existing-" + r.ns
	_, err := contents.Create(bg, &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: snapshotv1.VolumeSnapshotContentSpec{
		DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain, Driver: driver, Source: snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
		VolumeSnapshotRef: corev1.ObjectReference{Namespace: r.ns, Name: "existing"}}}, metav1.CreateOptions{})
	r.must(err)
	defer func() { r.must(contents.Delete(bg, name, metav1.DeleteOptions{})) }()
	_, err = r.snapshots.SnapshotV1().VolumeSnapshots(r.ns).Create(bg, &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Name: "existing"},
		Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{VolumeSnapshotContentName: &name}}}, metav1.CreateOptions{})
	r.must(err)
	if s := r.ready("existing"); s.Status.RestoreSize == nil || s.Status.RestoreSize.Value() < bytesOf("64Mi") {
		r.Fatalf("restoreSize is %v", s.Status.RestoreSize)
	}
	r.claim(claim{name: "restored", class: classShared, size: "64Mi", from: fromSnapshot("existing")})
	r.start(pod{name: "reader", claims: []string{"restored"}})
	r.holds("reader", "/data/file", sum)
	r.deleteSnapshot("existing")
}

// TestDeletesInEveryOrder: source, snapshot and clone, all six orders; what is left keeps its data.
func TestDeletesInEveryOrder(t *testing.T) {
	for _, order := range []string{"vsc", "vcs", "svc", "scv", "cvs", "csv"} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.claim(claim{name: "v", class: classXFS, size: "300Mi"})
			r.start(pod{name: "writer", claims: []string{"v"}})
			sum := r.write("writer", "/data/file")
			r.snapshot("s", "v")
			r.claim(claim{name: "c", class: classXFS, size: "300Mi", from: fromSnapshot("s")})
			r.start(pod{name: "clone", claims: []string{"c"}})
			for _, what := range strings.Split(order, "") {
				switch what {
				case "v":
					r.stop("writer")
					r.deleteClaim("v")
					r.gone("claim v", func() error { _, err := r.tryClaim("v"); return err })
				case "s":
					r.deleteSnapshot("s")
				case "c":
					r.holds("clone", "/data/file", sum)
					r.stop("clone")
					r.deleteClaim("c")
					r.gone("claim c", func() error { _, err := r.tryClaim("c"); return err })
				}
			}
		})
	}
}
