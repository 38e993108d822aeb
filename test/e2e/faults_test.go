package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

const lease = "quarry-controller"

// leader is the pod that leads.
func (c *cluster) leader() (string, error) {
	l, err := c.kube.CoordinationV1().Leases(system).Get(bg, lease, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	name := ptr.Deref(l.Spec.HolderIdentity, "")
	if name == "" {
		return "", fmt.Errorf("nobody leads")
	}
	if _, err := c.kube.CoreV1().Pods(system).Get(bg, name, metav1.GetOptions{}); err != nil {
		return "", err
	}
	return name, nil
}

func (c *cluster) kill(pod string) error {
	return c.kube.CoreV1().Pods(system).Delete(bg, pod, metav1.DeleteOptions{GracePeriodSeconds: ptr.To(int64(0))})
}

// agent is the pod of quarry node on a node.
func (c *cluster) agent(node string) (*corev1.Pod, error) {
	pods, err := c.kube.CoreV1().Pods(system).List(bg, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=node", FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		return nil, err
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil {
			return &p, nil
		}
	}
	return nil, fmt.Errorf("node %s has no agent", node)
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// counting is a pod that counts into a file of its volume, each number durable.
func counting(name, node string, claims ...string) pod {
	return pod{name: name, node: node, claims: claims,
		script: `i=$(cat /data/n 2>/dev/null || echo 0); while :; do i=$((i+1)); echo $i >/data/new; sync /data/new; mv /data/new /data/n; sync /data; done`}
}

func (r *rig) count(pod string) (int, error) {
	out, err := r.tryShell(pod, "cat /data/n")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(out))
}

// counts waits until a counting pod has gone on.
func (r *rig) counts(pod string) int {
	r.Helper()
	first, last := -1, 0
	r.wait("pod "+pod+" to count on", func() (bool, error) {
		n, err := r.count(pod)
		if err == nil && first < 0 {
			first = n
		}
		last = n
		return err == nil && n > first, err
	})
	return last
}

// TestTheLeaderChangesTwentyTimes under a storm of claims, snapshots, clones and deletions: all of them end well.
func TestTheLeaderChangesTwentyTimes(t *testing.T) {
	r := newRig(t)
	over, stop := context.WithCancel(bg)
	defer stop()
	var storm sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	rounds := 0
	for w := range 4 {
		storm.Go(func() {
			for round := 0; over.Err() == nil; round++ {
				err := r.round(fmt.Sprintf("w%d-%d", w, round))
				mu.Lock()
				rounds++
				if err != nil {
					errs = append(errs, err)
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	for change := range 20 {
		before := ""
		r.wait("a leader", func() (bool, error) {
			var err error
			before, err = r.leader()
			return err == nil, err
		})
		time.Sleep(time.Duration(change%5) * time.Second) // into the work, at another moment each time
		r.must(r.kill(before))
		r.wait("another leader", func() (bool, error) {
			now, err := r.leader()
			return err == nil && now != before, err
		})
	}
	stop()
	storm.Wait()
	r.Logf("%d rounds of claim, snapshot, clone and deletion", rounds)
	for _, err := range errs {
		r.Error(err)
	}
	if rounds < 4 {
		r.Error("the storm was none")
	}
}

// round makes a claim, a snapshot and a clone of it, and deletes all.
func (r *rig) round(name string) error {
	claims := r.kube.CoreV1().PersistentVolumeClaims(r.ns)
	make := func(c claim) error {
		_, err := claims.Create(bg, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: c.name}, Spec: c.spec()}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		return r.poll(func() (bool, error) {
			now, err := r.tryClaim(c.name)
			return err == nil && now.Status.Phase == corev1.ClaimBound, err
		})
	}
	if err := make(claim{name: name, class: classShared, size: "16Mi"}); err != nil {
		return fmt.Errorf("claim %s: %w", name, err)
	}
	if err := r.trySnapshotOf(name, name); err != nil {
		return fmt.Errorf("snapshot %s: %w", name, err)
	}
	if err := make(claim{name: name + "-c", class: classShared, size: "16Mi", from: fromSnapshot(name)}); err != nil {
		return fmt.Errorf("claim %s-c: %w", name, err)
	}
	if err := r.snapshots.SnapshotV1().VolumeSnapshots(r.ns).Delete(bg, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	for _, c := range []string{name, name + "-c"} {
		if err := claims.Delete(bg, c, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// TestAnAgentIsKilledAndReplacedUnderIO: the volume stays in use, is snapshotted and unmounted by the new one.
func TestAnAgentIsKilledAndReplacedUnderIO(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "data", class: classXFS, size: "300Mi"})
	r.start(counting("writer", r.nodes[0], "data"))
	r.counts("writer")
	for range 3 {
		old := must(r.agent(r.nodes[0]))(r)
		r.must(r.kill(old.Name))
		r.counts("writer")
		r.agentIsBack(r.nodes[0], old.UID)
		r.counts("writer")
	}
	r.upgradeAgents()
	at := r.counts("writer")
	r.snapshot("s", "data")
	r.stop("writer")
	r.claim(claim{name: "restored", class: classXFS, size: "300Mi", from: fromSnapshot("s")})
	r.start(pod{name: "reader", claims: []string{"data", "restored"}})
	if n, err := r.count("reader"); err != nil || n < at {
		r.Fatalf("the volume has %d (%v), and %d was durable", n, err, at)
	}
	var n int
	fmt.Sscan(r.sh("reader", "cat /data1/n"), &n)
	if n < at {
		r.Fatalf("the snapshot has %d, and %d was durable before it", n, at)
	}
}

// upgradeAgents has the DaemonSet replace every agent, as a new image would.
func (r *rig) upgradeAgents() {
	r.Helper()
	old := must(r.agent(r.nodes[0]))(r)
	patch := fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"e2e/at":%q}}}}}`, time.Now().Format(time.RFC3339Nano))
	sets := must(r.kube.AppsV1().DaemonSets(system).List(bg, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=node"}))(r)
	if len(sets.Items) != 1 {
		r.Fatalf("%d DaemonSets are Quarry's", len(sets.Items))
	}
	set := sets.Items[0].Name
	_, err := r.kube.AppsV1().DaemonSets(system).Patch(bg, set, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
	r.must(err)
	r.wait("all agents to be new", func() (bool, error) {
		d, err := r.kube.AppsV1().DaemonSets(system).Get(bg, set, metav1.GetOptions{})
		return err == nil && rolledOut(d), err
	})
	r.agentIsBack(r.nodes[0], old.UID)
}

func rolledOut(d *appsv1.DaemonSet) bool {
	s := d.Status
	return s.ObservedGeneration >= d.Generation && s.UpdatedNumberScheduled == s.DesiredNumberScheduled && s.NumberReady == s.DesiredNumberScheduled
}

func (r *rig) agentIsBack(node string, not types.UID) {
	r.Helper()
	r.wait("the agent of "+node+" to be back", func() (bool, error) {
		p, err := r.agent(node)
		return err == nil && p.UID != not && isReady(p), err
	})
}

// hack runs hack/cluster.
func (r *rig) hack(args ...string) {
	r.Helper()
	_, err := r.program(r.command, args...)
	r.must(err)
}

// TestAKubeletIsRestarted.
func TestAKubeletIsRestarted(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "data", class: classLocal, size: "64Mi"})
	r.start(counting("writer", r.nodes[0], "data"))
	r.hack("restart", "kubelet", r.nodes[0])
	r.counts("writer")
	r.claim(claim{name: "next", class: classLocal, size: "64Mi"})
	r.start(pod{name: "next", claims: []string{"next"}, node: r.nodes[0]})
	r.stop("writer")
}

// TestTheAPIServerIsAway for a minute: what is in use stays in use, and all goes on afterwards.
func TestTheAPIServerIsAway(t *testing.T) {
	r := newRig(t)
	r.claim(claim{name: "data", class: classLocal, size: "64Mi"})
	r.start(counting("writer", r.nodes[0], "data"))
	before := r.counts("writer")
	r.hack("kill", "kube-apiserver")
	time.Sleep(time.Minute)
	r.hack("start", "kube-apiserver")
	r.wait("the apiserver", func() (bool, error) {
		_, err := r.kube.Discovery().ServerVersion()
		return err == nil, err
	})
	if now := r.counts("writer"); now <= before {
		r.Fatalf("the pod counted to %d, before to %d", now, before)
	}
	if p := must(r.tryPod("writer"))(r); p.Status.Phase != corev1.PodRunning || len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].RestartCount > 0 {
		r.Fatalf("the pod did not keep running: %+v", p.Status)
	}
	r.claim(claim{name: "next", class: classLocal, size: "64Mi"})
	r.start(pod{name: "next", claims: []string{"next"}})
	r.snapshot("s", "data")
}

// attach asks for an attachment of a claim's volume to a node, past the controllers that would not, and
// returns what the driver says of it.
func (r *rig) attach(pvName, node string) (*storagev1.VolumeAttachment, error) {
	name := "e2e-" + r.ns + "-" + node
	all := r.kube.StorageV1().VolumeAttachments()
	_, err := all.Create(bg, &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: storagev1.VolumeAttachmentSpec{
		Attacher: driver, NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &pvName}}}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	r.Cleanup(func() {
		if err := all.Delete(bg, name, metav1.DeleteOptions{}); err != nil {
			r.Log(err)
		}
	})
	var out *storagev1.VolumeAttachment
	r.wait("an answer to the attachment", func() (bool, error) {
		out, err = all.Get(bg, name, metav1.GetOptions{})
		return err == nil && (out.Status.Attached || out.Status.AttachError != nil), err
	})
	return out, nil
}

// TestANodeThatIsCutOffKeepsItsVolume: it may still write, so no other node gets the volume, however hard one asks.
func TestANodeThatIsCutOffKeepsItsVolume(t *testing.T) {
	r := newRig(t)
	r.twoNodes()
	cut, other := r.nodes[1], r.nodes[0]
	r.claim(claim{name: "data", class: classShared, size: "64Mi"})
	r.start(counting("writer", cut, "data"))
	r.counts("writer")
	pv := r.bound("data")
	r.hack("stop", "network", cut)
	tied := false
	tie := func() {
		if !tied {
			tied = true
			r.hack("start", "network", cut)
			r.nodeIs(cut, corev1.ConditionTrue)
		}
	}
	defer tie()
	r.nodeIs(cut, corev1.ConditionUnknown)
	r.must(r.kube.CoreV1().Pods(r.ns).Delete(bg, "writer", metav1.DeleteOptions{GracePeriodSeconds: ptr.To(int64(0))}))
	attachments := must(r.kube.StorageV1().VolumeAttachments().List(bg, metav1.ListOptions{}))(r)
	for _, a := range attachments.Items {
		if ptr.Deref(a.Spec.Source.PersistentVolumeName, "") == pv.Name { // a person who forces a detachment
			r.must(r.kube.StorageV1().VolumeAttachments().Delete(bg, a.Name, metav1.DeleteOptions{}))
		}
	}
	a := must(r.attach(pv.Name, other))(r)
	if a.Status.Attached || a.Status.AttachError == nil || !strings.Contains(a.Status.AttachError.Message, cut) {
		r.Fatalf("the second attachment: %+v; it must be refused, and name %s", a.Status, cut)
	}
	r.Logf("refused: %s", a.Status.AttachError.Message)
	tie()
	r.start(pod{name: "reader", claims: []string{"data"}, node: other}) // the cut-off node has let go by now
	if n, err := r.count("reader"); err != nil || n == 0 {
		r.Fatalf("the volume has %d: %v", n, err)
	}
}

func (r *rig) nodeIs(name string, want corev1.ConditionStatus) {
	r.Helper()
	r.wait("node "+name+" to be ready="+string(want), func() (bool, error) {
		n, err := r.kube.CoreV1().Nodes().Get(bg, name, metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				return c.Status == want, nil
			}
		}
		return false, nil
	})
}

// TestALostNodesVolumesMove once somebody has said that it is off, by the taint.
func TestALostNodesVolumesMove(t *testing.T) {
	r := newRig(t)
	r.twoNodes()
	lost, other := r.nodes[1], r.nodes[0]
	r.claim(claim{name: "data", class: classShared, size: "64Mi"})
	r.start(counting("writer", lost, "data"))
	at := r.counts("writer")
	r.hack("stop", "node", lost)
	defer func() {
		r.taint(lost, false)
		r.powerOn(lost)
	}()
	r.nodeIs(lost, corev1.ConditionUnknown)
	r.taint(lost, true)
	r.gone("pod writer", func() error { _, err := r.tryPod("writer"); return err })
	r.start(pod{name: "reader", claims: []string{"data"}, node: other})
	if n, err := r.count("reader"); err != nil || n < at {
		r.Fatalf("the volume has %d (%v), and %d was durable", n, err, at)
	}
}

// powerOn starts a node that was off and waits for a working agent.
func (r *rig) powerOn(node string) {
	r.Helper()
	r.hack("start", "node", node)
	// As its fstab would, if later than that. Until then the domain is refused, since the directory is not
	// what it was; the agent that has seen it so has to be replaced.
	r.hack("exec", node, "sh", "-ec", "mountpoint -q /var/lib/quarry/xfs || mount -o loop /var/lib/xfs.img /var/lib/quarry/xfs")
	r.nodeIs(node, corev1.ConditionTrue)
	var old types.UID
	if a, err := r.agent(node); err == nil {
		old = a.UID
		r.must(r.kill(a.Name))
	}
	r.agentIsBack(node, old)
}

func (r *rig) taint(node string, on bool) {
	r.Helper()
	nodes := r.kube.CoreV1().Nodes()
	r.wait("the taint of "+node, func() (bool, error) {
		n, err := nodes.Get(bg, node, metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		var taints []corev1.Taint
		for _, t := range n.Spec.Taints {
			if t.Key != corev1.TaintNodeOutOfService {
				taints = append(taints, t)
			}
		}
		if on {
			taints = append(taints, corev1.Taint{Key: corev1.TaintNodeOutOfService, Value: "nodeshutdown", Effect: corev1.TaintEffectNoExecute})
		}
		n.Spec.Taints = taints
		_, err = nodes.Update(bg, n, metav1.UpdateOptions{})
		return err == nil, err
	})
}
