package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// logging is a pod that numbers its rounds. A round rewrites /data/block, 8192 lines that all have its number, and then
// adds a line with it to /data/log, both durable before the next one. So whatever moment of the volume one looks at: the log
// has the numbers from 1 to some n without a gap, and the block has nothing but n and n+1.
func logging(name, node, claim string) pod {
	return pod{name: name, node: node, claims: []string{claim}, script: `
		i=$(cat /data/log 2>/dev/null | wc -l)
		while :; do
			i=$((i+1))
			yes $(printf %07d $i) | head -n 8192 | dd of=/data/block conv=notrunc,fsync 2>/dev/null
			echo $i >>/data/log
			sync /data/log
		done`}
}

// logged checks a volume that a logging pod wrote and returns its n.
func (r *rig) logged(pod string) (int, error) {
	out, err := r.tryShell(pod, `
		awk '$0 != NR { print "line " NR " of the log is " $0; exit } END { print NR }' /data/log
		sort -u /data/block`)
	if err != nil {
		return 0, err
	}
	lines := strings.Fields(out)
	n, err := strconv.Atoi(lines[0])
	if err != nil {
		return 0, fmt.Errorf("pod %s: %s", pod, out)
	}
	for _, l := range lines[1:] {
		if v, err := strconv.Atoi(l); err != nil || v < n || v > n+1 {
			return 0, fmt.Errorf("pod %s: the log ends with %d, and the block has a %q", pod, n, l)
		}
	}
	return n, nil
}

// logsOn waits until a logging pod has got further by two rounds, and returns a number that is durable. Only the log is read:
// the pod changes the block meanwhile.
func (r *rig) logsOn(pod string) int {
	r.Helper()
	first, last := -1, 0
	r.wait("pod "+pod+" to go on", func() (bool, error) {
		out, err := r.tryShell(pod, "cat /data/log 2>/dev/null | wc -l")
		if err != nil {
			return false, err
		}
		if last, err = strconv.Atoi(strings.TrimSpace(out)); err == nil && first < 0 {
			first = last
		}
		return err == nil && last > first+1, err
	})
	p := must(r.tryPod(pod))(r)
	if p.Status.Phase != corev1.PodRunning || p.Status.ContainerStatuses[0].RestartCount > 0 {
		r.Fatalf("pod %s did not keep running: %+v", pod, p.Status)
	}
	return last - 1 // its last line may be in memory only
}

// imageOf is what kubectl quarry says of an image.
type imageOf struct {
	Handle, How, State string
	Slabs              []string
}

// chain asks Quarry for an image and its slabs, from head to base.
func (r *rig) chain(handle string) (imageOf, error) {
	out, err := r.program(r.quarry, "chain", handle, "-o", "json")
	if err != nil {
		return imageOf{}, err
	}
	var c struct{ Image imageOf }
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		return imageOf{}, fmt.Errorf("kubectl quarry chain says %q: %w", out, err)
	}
	return c.Image, nil
}

func (r *rig) volumeHandle(claim string) string { return r.bound(claim).Spec.CSI.VolumeHandle }

func (r *rig) snapshotHandle(name string) string {
	r.Helper()
	content := ptr.Deref(must(r.trySnapshot(name))(r).Status.BoundVolumeSnapshotContentName, "")
	return ptr.Deref(must(r.snapshots.SnapshotV1().VolumeSnapshotContents().Get(bg, content, metav1.GetOptions{}))(r).Status.SnapshotHandle, "")
}

// layered checks that a snapshot was made by a layer: it has the slab that the volume had, and the volume goes on in
// a new one over it.
func (r *rig) layered(snapshot, claim string, layers int) {
	r.Helper()
	s, v := must(r.chain(r.snapshotHandle(snapshot)))(r), must(r.chain(r.volumeHandle(claim)))(r)
	if s.How != "default: layer" || len(v.Slabs) != layers+1 || !slices.Equal(v.Slabs[1:], s.Slabs) {
		r.Fatalf("snapshot %+v of volume %+v: it must have been made by a layer, and the volume stand on %d", s, v, layers)
	}
	r.Logf("snapshot %s: %s; the volume's slabs %q", snapshot, s.How, v.Slabs)
}

// shorter waits until a volume stands on so many layers.
func (r *rig) shorter(claim string, layers int) {
	r.Helper()
	handle := r.volumeHandle(claim)
	r.wait(fmt.Sprintf("the volume of %s to stand on %d layers", claim, layers), func() (bool, error) {
		v, err := r.chain(handle)
		return err == nil && len(v.Slabs) == layers+1, orElse(err, "it has the slabs %q", v.Slabs)
	})
}

func orElse(err error, format string, args ...any) error {
	if err != nil {
		return err
	}
	return fmt.Errorf(format, args...)
}

// TestLayers: a pod writes while its volume is snapshotted by layers and cloned, while the agent is killed and
// upgraded, until its node loses its power, and while layers are merged back: contents are right all along.
func TestLayers(t *testing.T) {
	// Opening it loads the module, where there is one; that it is there says nothing.
	if f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0); err == nil {
		f.Close() // nothing was written
	} else {
		if os.Getenv("QUARRY_E2E_LAYERS") != "" {
			t.Fatal(err)
		}
		t.Skip("this kernel has no device-mapper: hack/e2e lab runs it in one that has")
	}
	r := newRig(t)
	node := r.nodes[0]
	r.claim(claim{name: "data", class: classLocal, size: "64Mi"})
	r.start(logging("writer", node, "data"))

	// cloned snapshots the volume while the pod writes, and returns how far a clone of that goes.
	cloned := func(snapshot, clone string, layers int) int {
		t.Helper()
		before := r.logsOn("writer")
		r.snapshot(snapshot, "data")
		after := r.logsOn("writer")
		r.layered(snapshot, "data", layers)
		r.claim(claim{name: clone, class: classLocal, size: "64Mi", from: fromSnapshot(snapshot)})
		r.start(pod{name: clone, claims: []string{clone}, node: node})
		n := must(r.logged(clone))(r)
		if n < before || n > after {
			r.Fatalf("the clone of snapshot %s goes up to %d; at the cut it was between %d and %d", snapshot, n, before, after)
		}
		r.sh(clone, "echo mine >/data/mine; sync")
		r.Logf("snapshot %s: cut after %d, between %d and %d", snapshot, n, before, after)
		return n
	}
	isStill := func(clone string, n int) {
		t.Helper()
		if now, err := r.logged(clone); err != nil || now != n {
			r.Fatalf("clone %s goes up to %d (%v), and it was %d", clone, now, err, n)
		}
		if got := r.sh(clone, "cat /data/mine"); got != "mine" {
			r.Fatalf("clone %s has %q", clone, got)
		}
	}
	first := cloned("s1", "c1", 1)

	old := must(r.agent(node))(r)
	r.must(r.kill(old.Name))
	r.logsOn("writer")
	r.agentIsBack(node, old.UID)
	r.logsOn("writer")
	r.upgradeAgents()
	second := cloned("s2", "c2", 2)
	isStill("c1", first)

	durable := r.logsOn("writer")
	r.hack("kill", "node", node)
	r.powerOn(node)
	for _, name := range []string{"writer", "c1", "c2"} {
		r.stop(name) // they have ended with the node, and are not started again
	}
	for _, name := range []string{"c1", "c2"} {
		r.start(pod{name: name, claims: []string{name}, node: node})
	}
	isStill("c1", first)
	isStill("c2", second)
	r.start(pod{name: "reader", claims: []string{"data"}, node: node})
	n := must(r.logged("reader"))(r)
	if n < durable {
		r.Fatalf("after the power cut the volume goes up to %d, and %d was durable", n, durable)
	}
	r.Logf("after the power cut: up to %d; %d was durable", n, durable)
	r.stop("reader")
	r.start(logging("writer", node, "data"))

	// What a deleted snapshot leaves over one image alone is merged into it, beneath the pod that writes.
	drop := func(snapshot, clone string) {
		t.Helper()
		r.stop(clone)
		r.deleteClaim(clone)
		r.deleteSnapshot(snapshot)
	}
	drop("s2", "c2")
	r.shorter("data", 1)
	r.logsOn("writer")
	isStill("c1", first)
	drop("s1", "c1")
	r.shorter("data", 0)
	durable = r.logsOn("writer")
	r.stop("writer")
	r.start(pod{name: "reader", claims: []string{"data"}, node: node})
	if n := must(r.logged("reader"))(r); n < durable {
		r.Fatalf("after the merges the volume goes up to %d, and %d was durable", n, durable)
	}
}
