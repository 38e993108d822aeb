package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
)

const (
	// release is the name and the namespace of the chart's release.
	release, system = "quarry", "quarry-system"
	driver          = "csi.quarry.dev"
	// The classes of values.yaml: a node's own ext4 and XFS, and a directory that all nodes share.
	classLocal, classXFS, classShared, classDirectory = "quarry", "quarry-xfs", "quarry-shared", "quarry-directory"
	snapshotClass                                     = "quarry"

	every = 300 * time.Millisecond
)

// patience is how long anything may take on a busy machine: five minutes, or what $QUARRY_E2E_PATIENCE says.
var patience = func() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("QUARRY_E2E_PATIENCE")); err == nil {
		return d
	}
	return 5 * time.Minute
}()

// cluster is what all scenarios share.
type cluster struct {
	config    *rest.Config
	kube      *kubernetes.Clientset
	snapshots *snapshots.Clientset
	image     string // that has a shell
	nodes     []string
	command   string // hack/cluster
	quarry    string // kubectl-quarry
}

var connect = sync.OnceValues(func() (*cluster, error) {
	path := os.Getenv("KUBECONFIG")
	if path == "" {
		return nil, errors.New("$KUBECONFIG is not set: these tests need a cluster; run make e2e, or see docs/CLUSTER.md")
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, err
	}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return asksAgain{next} })
	config.QPS, config.Burst = 100, 200
	c := &cluster{config: config, command: os.Getenv("QUARRY_CLUSTER_COMMAND"), quarry: os.Getenv("QUARRY_KUBECTL")}
	if c.kube, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	if c.snapshots, err = snapshots.NewForConfig(config); err != nil {
		return nil, err
	}
	nodes, err := c.kube.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, n := range nodes.Items {
		c.nodes = append(c.nodes, n.Name)
		for _, image := range n.Status.Images {
			for _, name := range image.Names {
				if strings.Contains(name, "/busybox:") {
					c.image = name
				}
			}
		}
	}
	slices.Sort(c.nodes)
	if c.image == "" {
		return nil, errors.New("no node has an image named busybox")
	}
	return c, nil
})

// rig is one scenario: a namespace, with all in it gone at the end.
type rig struct {
	testing.TB
	*cluster
	ns string
}

// asksAgain repeats a question that no connection came to be for: an API server on an emulated processor may take longer
// for its handshake than client-go waits.
type asksAgain struct{ next http.RoundTripper }

func (a asksAgain) RoundTrip(q *http.Request) (*http.Response, error) {
	for tries := 1; ; tries++ {
		answer, err := a.next.RoundTrip(q)
		if err == nil || q.Method != http.MethodGet || tries == 10 || !strings.Contains(err.Error(), "TLS handshake timeout") {
			return answer, err
		}
	}
}

func newRig(t testing.TB) *rig {
	t.Helper()
	c, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := c.kube.CoreV1().Namespaces().Create(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		GenerateName: "e2e-", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{TB: t, cluster: c, ns: ns.Name}
	t.Cleanup(r.remove)
	return r
}

// twoNodes fails a scenario for which there are too few.
func (r *rig) twoNodes() {
	r.Helper()
	if len(r.nodes) < 2 {
		r.Fatalf("the cluster has the nodes %q: two are needed", r.nodes)
	}
}

// remove deletes the namespace, as a user would, and sees that the volumes go.
func (r *rig) remove() {
	if r.Failed() {
		r.tell()
	}
	ctx := context.Background()
	if err := r.kube.CoreV1().Namespaces().Delete(ctx, r.ns, metav1.DeleteOptions{}); err != nil {
		r.Error(err)
		return
	}
	r.gone("namespace "+r.ns, func() error {
		_, err := r.kube.CoreV1().Namespaces().Get(ctx, r.ns, metav1.GetOptions{})
		return err
	})
	if err := r.poll(func() (bool, error) {
		left, err := r.volumesLeft()
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("there are still %q", left)
		}
		return err == nil, err
	}); err != nil {
		r.Errorf("the volumes of namespace %s are not deleted: %v", r.ns, err)
	}
}

// volumesLeft are the PersistentVolumes that the namespace's claims had, unless they are retained.
func (r *rig) volumesLeft() (out []string, err error) {
	all, err := r.kube.CoreV1().PersistentVolumes().List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, pv := range all.Items {
		if c := pv.Spec.ClaimRef; c != nil && c.Namespace == r.ns && pv.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
			out = append(out, pv.Name)
		}
	}
	return out, nil
}

// tell logs what a person would look at.
func (r *rig) tell() {
	ctx := context.Background()
	events, err := r.kube.CoreV1().Events(r.ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		r.Log(err)
		return
	}
	for _, e := range events.Items {
		r.Logf("%s/%s: %s: %s (%d times)", strings.ToLower(e.InvolvedObject.Kind), e.InvolvedObject.Name, e.Reason, e.Message, max(1, e.Count))
	}
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// must is for calls with a result: must(f())(r).
func must[T any](v T, err error) func(*rig) T {
	return func(r *rig) T {
		r.Helper()
		r.must(err)
		return v
	}
}

// poll asks until it is so, or patience is over; then the last error says what was missing.
func (r *rig) poll(so func() (bool, error)) error {
	last := error(nil)
	for end := time.Now().Add(patience); ; time.Sleep(every) {
		yes, err := so()
		if yes {
			return nil
		}
		if err != nil {
			last = err
		}
		if time.Now().After(end) {
			return fmt.Errorf("after %s: %w", patience, orNever(last))
		}
	}
}

func orNever(err error) error {
	if err == nil {
		return errors.New("(nothing more is known)")
	}
	return err
}

// wait is poll for what a scenario cannot go on without.
func (r *rig) wait(what string, so func() (bool, error)) {
	r.Helper()
	if err := r.poll(so); err != nil {
		r.Fatalf("waiting for %s: %v", what, err)
	}
}

func (r *rig) gone(what string, get func() error) {
	r.Helper()
	if err := r.poll(func() (bool, error) {
		err := get()
		return apierrors.IsNotFound(err), err
	}); err != nil {
		r.Errorf("%s did not go: %v", what, err)
	}
}

// in runs a command in a pod and returns what it printed.
func (r *rig) in(pod string, command ...string) (string, error) {
	req := r.kube.CoreV1().RESTClient().Post().Resource("pods").Name(pod).Namespace(r.ns).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	e, err := remotecommand.NewWebSocketExecutor(r.config, "GET", req.URL().String())
	if err != nil {
		return "", err
	}
	var out, errOut bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &errOut}); err != nil {
		return out.String(), fmt.Errorf("in pod %s: %q: %w: %s", pod, command, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// sh is in with a shell, for what must work.
func (r *rig) sh(pod, script string) string {
	r.Helper()
	return strings.TrimSpace(must(r.tryShell(pod, script))(r))
}

func (r *rig) tryShell(pod, script string) (string, error) { return r.in(pod, "sh", "-ec", script) }

// program runs a program of this machine with the cluster's kubeconfig.
func (c *cluster) program(name string, args ...string) (string, error) {
	if name == "" {
		return "", fmt.Errorf("a program for %q is not named in the environment: see package e2e", args)
	}
	cmd := exec.Command(name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.MultiWriter(&errOut, os.Stderr)
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %q: %w: %s", name, args, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}
