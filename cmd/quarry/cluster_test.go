package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/quarry-csi/quarry/pkg/admin"
	"github.com/quarry-csi/quarry/pkg/fault"
)

// api is as much of a Kubernetes API server as quarry asks: a namespace, nodes, token
// reviews, Leases. The real one is asked in the cluster tests.
type api struct {
	*httptest.Server
	mu     sync.Mutex
	tokens map[string]string         // token: node
	leases map[string]map[string]any // by path; and Secrets and ConfigMaps
	count  int
	known  map[string]bool // nodes with the driver's label: ready
	// objects by path, as JSON; events as they were written, by reason.
	objects map[string]string
	events  map[string]map[string]any
}

func newAPI(t *testing.T) *api {
	a := &api{tokens: map[string]string{}, leases: map[string]map[string]any{}, known: map[string]bool{}, objects: map[string]string{}, events: map[string]map[string]any{}}
	a.Server = httptest.NewServer(a)
	t.Cleanup(a.Close)
	return a
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var body map[string]any
	if data, _ := io.ReadAll(r.Body); len(data) > 0 && r.Method != http.MethodPatch { // clients send Protobuf, and take JSON
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(data, nil, nil)
		if err != nil {
			panic(err)
		}
		data, _ = json.Marshal(object)
		_ = json.Unmarshal(data, &body)
	}
	answer := func(code int, v map[string]any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(v)
	}
	refuse := func(code int, reason string) {
		answer(code, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": reason + ": " + r.URL.Path})
	}
	object := func(kind, version, name string) map[string]any {
		return map[string]any{"kind": kind, "apiVersion": version, "metadata": map[string]any{"name": name, "uid": "uid-of-" + name}}
	}
	path := r.URL.Path
	switch {
	case path == "/api/v1/namespaces/kube-system":
		answer(http.StatusOK, object("Namespace", "v1", "kube-system"))
	case path == "/api/v1/nodes/n1" || path == "/api/v1/nodes/n2":
		answer(http.StatusOK, object("Node", "v1", filepath.Base(path)))
	case path == "/api/v1/nodes" && r.URL.Query().Get("labelSelector") == "csi.quarry.dev/node":
		items := []map[string]any{}
		for name, ready := range a.known {
			n := object("Node", "v1", name)
			n["metadata"].(map[string]any)["labels"] = map[string]any{"csi.quarry.dev/node": name}
			n["status"] = map[string]any{"conditions": []map[string]any{{"type": "Ready", "status": map[bool]string{true: "True", false: "Unknown"}[ready]}}}
			items = append(items, n)
		}
		answer(http.StatusOK, map[string]any{"kind": "NodeList", "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": "1"}, "items": items})
	case path == "/apis/authentication.k8s.io/v1/tokenreviews":
		spec := body["spec"].(map[string]any)
		node, ok := a.tokens[spec["token"].(string)]
		body["status"] = map[string]any{"authenticated": ok}
		if ok {
			body["status"] = map[string]any{"authenticated": true, "audiences": spec["audiences"], "user": map[string]any{
				"username": "system:serviceaccount:quarry:quarry-node",
				"extra": map[string]any{"authentication.kubernetes.io/node-name": []string{node},
					"authentication.kubernetes.io/pod-name": []string{"quarry-node-" + node}, "authentication.kubernetes.io/pod-uid": []string{"1"}}}}
		}
		answer(http.StatusCreated, body)
	case path == leases && r.Method == http.MethodPost:
		path = leases + "/" + body["metadata"].(map[string]any)["name"].(string)
		if a.leases[path] != nil {
			refuse(http.StatusConflict, "AlreadyExists")
			return
		}
		a.keep(path, body)
		answer(http.StatusCreated, body)
	case kept(path) && a.leases[path] == nil:
		refuse(http.StatusNotFound, "NotFound")
	case kept(path) && r.Method == http.MethodPut:
		if body["metadata"].(map[string]any)["resourceVersion"] != a.leases[path]["metadata"].(map[string]any)["resourceVersion"] {
			refuse(http.StatusConflict, "Conflict")
			return
		}
		a.keep(path, body)
		answer(http.StatusOK, body)
	case kept(path):
		answer(http.StatusOK, a.leases[path])
	case strings.HasSuffix(path, "/events") && r.Method == http.MethodPost:
		a.events[body["reason"].(string)] = body
		answer(http.StatusCreated, body)
	case a.objects[path] != "":
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, a.objects[path])
	default:
		refuse(http.StatusNotFound, "NotFound")
	}
}

const (
	leases  = "/apis/coordination.k8s.io/v1/namespaces/quarry/leases"
	secrets = "/api/v1/namespaces/quarry/secrets"
	configs = "/api/v1/namespaces/quarry/configmaps"
)

// kept are the paths of objects that are kept as they are written.
func kept(path string) bool {
	return strings.HasPrefix(path, leases+"/") || strings.HasPrefix(path, secrets+"/") || strings.HasPrefix(path, configs+"/")
}

func (a *api) get(path string) map[string]any {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.leases[path]
}

func (a *api) keep(path string, lease map[string]any) {
	a.count++
	lease["metadata"].(map[string]any)["resourceVersion"] = fmt.Sprint(a.count)
	a.leases[path] = lease
}

// cluster is a place with two controllers and two agents to be started.
type cluster struct {
	t *testing.T
	place
	api     *api
	ports   map[string]string // of controllers, by name
	address string            // at which they take agents
}

func newCluster(t *testing.T, domains string) *cluster {
	t.Helper()
	return newClusterAt(t, "127.0.0.1", domains)
}

// newClusterAt has controllers that take agents at an address of this machine.
func newClusterAt(t *testing.T, address, domains string) *cluster {
	t.Helper()
	c := &cluster{t: t, place: newPlace(t, domains), api: newAPI(t), ports: map[string]string{}, address: address}
	c.file("kubeconfig", "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: \""+c.api.URL+"\"}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	c.must(err)
	about := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "quarry"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.ParseIP(address)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	cert, err := x509.CreateCertificate(rand.Reader, about, about, &key.PublicKey, key)
	c.must(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	c.must(err)
	c.file("tls.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})))
	c.file("tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	return c
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *cluster) file(name, text string) {
	c.t.Helper()
	c.must(os.WriteFile(c.path(name), []byte(text), 0o600))
}

// freePort is one that nobody uses now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

// controller starts one. All take agents at the same address: only the leader does.
func (c *cluster) controller(name string, more ...string) *running {
	c.t.Helper()
	if c.ports["agents"] == "" {
		c.ports["agents"], c.ports["admin"] = freePort(c.t), freePort(c.t)
	}
	return begin(c.t, "Serving CSI", append([]string{"controller", "--domains", c.path("domains.yaml"), "--endpoint", c.path(name + ".sock"), "--admin-endpoint", c.path(name + "-admin.sock"),
		"--agents-endpoint", c.address + ":" + c.ports["agents"], "--tls-cert-file", c.path("tls.crt"), "--tls-private-key-file", c.path("tls.key"),
		"--kubeconfig", c.path("kubeconfig"), "--namespace", "quarry", "--leader-election-identity", name,
		"--admin-endpoint", "tcp://127.0.0.1:" + c.ports["admin"], "--leader-election-lease-duration", "10s", "--leader-election-renew-deadline", "8s", "--leader-election-retry-period", "200ms"}, more...)...) // a busy machine must not lose it
}

// certified makes and keeps its own certificate, and tells agents of it in a ConfigMap.
func (c *cluster) certified(name string) *running {
	c.t.Helper()
	if c.ports["agents"] == "" {
		c.ports["agents"] = freePort(c.t)
		for path, kind := range map[string]string{secrets + "/tls": "Secret", configs + "/ca": "ConfigMap"} {
			c.api.keep(path, map[string]any{"kind": kind, "apiVersion": "v1", "metadata": map[string]any{"name": filepath.Base(path), "namespace": "quarry"}})
		}
	}
	return begin(c.t, "Serving CSI", "controller", "--domains", c.path("domains.yaml"), "--endpoint", c.path(name+".sock"), "--admin-endpoint", c.path(name+"-admin.sock"),
		"--agents-endpoint", "127.0.0.1:"+c.ports["agents"], "--tls-secret", "tls", "--tls-ca-config-map", "ca", "--tls-host", "localhost",
		"--kubeconfig", c.path("kubeconfig"), "--namespace", "quarry", "--leader-election-identity", name)
}

// agent starts one, with a token of its node.
func (c *cluster) agent(node string) *running {
	c.t.Helper()
	return c.agentBy(node, func(cmd *exec.Cmd) {})
}

// ownStorage is a domain whose directory each agent started by agentOf has for itself.
const ownStorage = "domains:\n- name: local\n  engine: dir\n  params: {path: /proc/self/cwd/storage}\n"

// agentOf starts one that has a directory of its own.
func (c *cluster) agentOf(node string) *running {
	c.t.Helper()
	c.must(os.MkdirAll(c.path("of-"+node+"/storage"), 0o755))
	return c.agentBy(node, func(cmd *exec.Cmd) { cmd.Dir = c.path("of-" + node) })
}

func (c *cluster) agentBy(node string, change func(*exec.Cmd)) *running {
	c.t.Helper()
	token := rand.Text()
	c.api.mu.Lock()
	c.api.tokens[token] = node
	c.api.mu.Unlock()
	c.file(node+".token", token+"\n")
	c.must(os.MkdirAll(c.path("kubelet"), 0o755))
	controller := "localhost"
	if c.address != "127.0.0.1" { // known by that name
		controller = c.address
	}
	return beginBy(c.t, change, "Connected to the controller", "node", "--node-id", node, "--endpoint", c.path(node+".sock"), "--kubelet-dir", c.path("kubelet"),
		"--controller", controller+":"+c.ports["agents"], "--controller-ca-file", c.path("tls.crt"), "--token-file", c.path(node+".token"))
}

// at speaks CSI to a socket.
func (c *cluster) at(name string) *grpc.ClientConn {
	c.t.Helper()
	conn, err := grpc.NewClient("unix:"+c.path(name+".sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	c.must(err)
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// again makes a call until the answer is not that something may still be running.
func again[Q, A any](t *testing.T, method func(context.Context, Q, ...grpc.CallOption) (A, error), request Q) A {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		reply, err := method(t.Context(), request)
		switch code := status.Code(err); {
		case err == nil:
			return reply
		case code != codes.Unavailable && code != codes.Aborted && code != codes.DeadlineExceeded || time.Now().After(end):
			t.Fatalf("%T: %v", request, err)
		}
	}
}

func (c *cluster) ready(name string) bool {
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Second) // who waits takes half of it to answer
	defer cancel()
	r, err := csi.NewIdentityClient(c.at(name)).Probe(ctx, &csi.ProbeRequest{})
	if status.Code(err) == codes.DeadlineExceeded { // a busy machine
		return false
	}
	c.must(err)
	return r.GetReady().GetValue()
}

// leads wants operators to be answered by a controller, at the loopback address and its socket.
func (c *cluster) leads(name string) {
	c.t.Helper()
	for _, at := range []string{"tcp://127.0.0.1:" + c.ports["admin"], "unix://" + c.path(name+"-admin.sock")} {
		e, err := admin.ParseLoopback(at)
		c.must(err)
		v, err := admin.NewClient(e).Version(c.t.Context())
		if err != nil || v.Node != name {
			c.t.Errorf("%s answers %+v, %v: want %s", at, v, err, name)
		}
	}
	r, err := http.Get("http://127.0.0.1:" + c.ports["admin"] + "/v1/version") // as a web page would
	c.must(err)
	r.Body.Close()
	if r.StatusCode != http.StatusForbidden {
		c.t.Errorf("a web page gets %s", r.Status)
	}
}

func (c *cluster) wait(what string, is func() bool) {
	c.t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("waited for %s", what)
		}
	}
}

func blockWriter() *csi.VolumeCapability {
	return &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
}

// publish attaches a volume to a node and returns the device that a workload would get.
func (c *cluster) publish(controller, node, volume string) string {
	c.t.Helper()
	name := strings.ReplaceAll(volume, "/", "-")
	staging, target := c.path("kubelet/"+name+"-staging"), c.path("kubelet/"+name+"-target")
	c.must(os.MkdirAll(staging, 0o755))
	at := again(c.t, csi.NewControllerClient(c.at(controller)).ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: volume, NodeId: node, VolumeCapability: blockWriter()})
	n := csi.NewNodeClient(c.at(node))
	again(c.t, n.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: volume, PublishContext: at.GetPublishContext(), StagingTargetPath: staging, VolumeCapability: blockWriter()})
	again(c.t, n.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: volume, PublishContext: at.GetPublishContext(), StagingTargetPath: staging, TargetPath: target, VolumeCapability: blockWriter()})
	return target
}

func (c *cluster) unpublish(controller, node, volume string) {
	c.t.Helper()
	name := strings.ReplaceAll(volume, "/", "-")
	n := csi.NewNodeClient(c.at(node))
	again(c.t, n.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: c.path("kubelet/" + name + "-target")})
	again(c.t, n.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: c.path("kubelet/" + name + "-staging")})
	again(c.t, csi.NewControllerClient(c.at(controller)).ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: volume, NodeId: node})
}

// TestControllersAndAgents: two controllers, of which one leads and is killed; two agents
// that reach the same domain.
func TestControllersAndAgents(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, "domains:\n- {name: nas, engine: dir, scope: shared, params: {path: \"{STORAGE}\"}}\n")
	first := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	second := c.controller("c2")
	if c.ready("c2") {
		t.Fatal("two controllers lead")
	}
	c.leads("c1")
	_, err := csi.NewControllerClient(c.at("c2")).ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("who does not lead lists volumes: %v", err)
	}
	n1, n2 := c.agent("n1"), c.agent("n2")

	create := func(controller string, r *csi.CreateVolumeRequest) *csi.Volume {
		t.Helper()
		r.VolumeCapabilities, r.CapacityRange = []*csi.VolumeCapability{blockWriter()}, &csi.CapacityRange{RequiredBytes: 4 << 20}
		return again(t, csi.NewControllerClient(c.at(controller)).CreateVolume, r).GetVolume()
	}
	v := create("c1", &csi.CreateVolumeRequest{Name: "v", Parameters: map[string]string{"domain": "nas"}})
	device := c.publish("c1", "n1", v.GetVolumeId())
	content := bytes.Repeat([]byte("quarry! "), 512)
	write := func(path string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		c.must(err)
		_, err = f.WriteAt(content, 1<<20)
		c.must(errors.Join(err, f.Sync(), f.Close()))
	}
	holds := func(path string) {
		t.Helper()
		f, err := os.Open(path)
		c.must(err)
		defer f.Close()
		b := make([]byte, len(content))
		_, err = f.ReadAt(b, 1<<20)
		c.must(err)
		if !bytes.Equal(b, content) {
			t.Errorf("%s does not hold what was written", path)
		}
	}
	write(device)
	_, err = csi.NewControllerClient(c.at("c1")).ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: "n3", VolumeCapability: blockWriter()})
	if status.Code(err) != codes.NotFound {
		t.Errorf("attached to a node that does not exist: %v", err)
	}

	// The leader dies. The device stays in use, and the other controller goes on.
	c.must(first.cmd.Process.Kill())
	c.wait("c2 to lead", func() bool { return c.ready("c2") })
	c.leads("c2")
	holds(device)
	c.unpublish("c2", "n1", v.GetVolumeId())
	snapshot := again(t, csi.NewControllerClient(c.at("c2")).CreateSnapshot, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId()}).GetSnapshot().GetSnapshotId()
	clone := create("c2", &csi.CreateVolumeRequest{Name: "clone", Parameters: map[string]string{"domain": "nas"},
		VolumeContentSource: &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}})
	holds(c.publish("c2", "n2", clone.GetVolumeId()))

	// An agent is replaced while its node uses a volume.
	n2.stop(t)
	n2 = c.agent("n2")
	holds(c.publish("c2", "n2", clone.GetVolumeId()))
	c.unpublish("c2", "n2", clone.GetVolumeId())

	for _, id := range []string{v.GetVolumeId(), clone.GetVolumeId()} {
		again(t, csi.NewControllerClient(c.at("c2")).DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: id})
	}
	again(t, csi.NewControllerClient(c.at("c2")).DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
	second.stop(t)
	n1.stop(t)
	n2.stop(t)
	for _, r := range []*running{first, second, n1, n2} {
		for token := range c.api.tokens {
			if strings.Contains(r.said(), token) {
				t.Errorf("a token is in a log:\n%s", r.said())
			}
		}
	}
}

// TestADomainOfEachNode: it is opened when the node's agent has come, however late, and its
// volumes are that node's.
func TestADomainOfEachNode(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, oneDomain)
	controller := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	request := &csi.CreateVolumeRequest{Name: "pvc-u1", Parameters: map[string]string{"domain": "local", "csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/pvc/namespace": "shop"}, VolumeCapabilities: []*csi.VolumeCapability{blockWriter()}, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}}
	_, err := csi.NewControllerClient(c.at("c1")).CreateVolume(t.Context(), request)
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("a volume is asked for before any node has come: %v", err)
	}
	agent := c.agent("n1")
	c.api.mu.Lock()
	c.api.objects["/api/v1/namespaces/shop/persistentvolumeclaims/data"] = `{"kind":"PersistentVolumeClaim","apiVersion":"v1","metadata":{"namespace":"shop","name":"data","uid":"u1"}}`
	c.api.mu.Unlock()
	var v *csi.Volume
	c.wait("the node's domain to be open", func() bool {
		r, err := csi.NewControllerClient(c.at("c1")).CreateVolume(t.Context(), request)
		v = r.GetVolume()
		return err == nil
	})
	domain, _, _ := strings.Cut(v.GetVolumeId(), "/")
	c.api.mu.Lock()
	c.api.objects["/api/v1/persistentvolumes"] = `{"kind":"PersistentVolumeList","apiVersion":"v1","items":[{"metadata":{"name":"lost"},"spec":{"csi":{"driver":"csi.quarry.dev","volumeHandle":"` + domain + `/gone"}}},
		{"metadata":{"name":"pvc-u1"},"spec":{"csi":{"driver":"csi.quarry.dev","volumeHandle":"` + v.GetVolumeId() + `"}}}]}`
	c.api.mu.Unlock()
	c.wait("an event on the claim", func() bool {
		c.api.mu.Lock()
		defer c.api.mu.Unlock()
		e := c.api.events["QuarryCreated"]
		return e != nil && e["involvedObject"].(map[string]any)["uid"] == "u1" && strings.Contains(fmt.Sprint(e["message"]), "native: new slab")
	})
	e, err := admin.ParseEndpoint(c.path("c1-admin.sock"))
	c.must(err)
	checked, err := admin.NewClient(e).Check(t.Context(), "local")
	c.must(err)
	if len(checked.Findings) != 1 || checked.Findings[0].Object != "PersistentVolume/lost" || len(checked.Unchecked) > 0 {
		t.Errorf("checked against Kubernetes: %+v", checked)
	}
	if top := v.GetAccessibleTopology(); !strings.HasPrefix(v.GetVolumeId(), "local.") || len(top) != 1 || top[0].GetSegments()["csi.quarry.dev/node"] != "n1" {
		t.Errorf("the volume is %v", v)
	}
	again(t, csi.NewControllerClient(c.at("c1")).DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: v.GetVolumeId()})
	c.imports("c1", "n1")
	agent.stop(t)
	controller.stop(t)
}

// TestATakeoverWaitsForNodes: the next controller does not know what a node has for itself before
// that has connected. A volume that is asked for again is not made on another node meanwhile,
// and no list is without it; but a node that is not ready holds nobody up for long.
func TestATakeoverWaitsForNodes(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, ownStorage)
	c.api.known["n1"], c.api.known["n2"] = true, true
	first := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	n1, n2 := c.agentOf("n1"), c.agentOf("n2")
	on := func(nodes ...string) *csi.TopologyRequirement {
		r := &csi.TopologyRequirement{}
		for _, n := range nodes {
			r.Requisite = append(r.Requisite, &csi.Topology{Segments: map[string]string{"csi.quarry.dev/node": n}})
		}
		r.Preferred = r.Requisite
		return r
	}
	request := func(name string, nodes ...string) *csi.CreateVolumeRequest {
		return &csi.CreateVolumeRequest{Name: name, Parameters: map[string]string{"domain": "local"}, VolumeCapabilities: []*csi.VolumeCapability{blockWriter()},
			CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 20}, AccessibilityRequirements: on(nodes...)}
	}
	v := again(t, csi.NewControllerClient(c.at("c1")).CreateVolume, request("v", "n1")).GetVolume().GetVolumeId()
	n1.stop(t)
	c.must(first.cmd.Process.Kill())
	<-first.ended
	second := c.controller("c2")
	c.wait("c2 to lead", func() bool { return c.ready("c2") })
	to := csi.NewControllerClient(c.at("c2"))
	c.wait("n2 to have come", func() bool {
		r, err := to.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: map[string]string{"domain": "local"}, AccessibleTopology: on("n2").GetRequisite()[0]})
		return err == nil && r.GetAvailableCapacity() > 0
	})
	waits := func(what string, err error) {
		t.Helper()
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "n1") {
			t.Errorf("%s before n1 has come: %v", what, err)
		}
	}
	_, err := to.CreateVolume(t.Context(), request("v", "n2", "n1"))
	waits("a volume is made", err)
	_, err = to.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	waits("volumes are listed", err)
	_, err = to.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	waits("snapshots are listed", err)
	n1 = c.agentOf("n1")
	if got := again(t, to.CreateVolume, request("v", "n2", "n1")).GetVolume().GetVolumeId(); got != v {
		t.Errorf("the volume became %s, was %s", got, v)
	}
	if list := again(t, to.ListVolumes, &csi.ListVolumesRequest{}).GetEntries(); len(list) != 1 || list[0].GetVolume().GetVolumeId() != v {
		t.Errorf("listed are %v", list)
	}

	// n1 is lost, and with it the controller.
	n1.stop(t)
	second.stop(t)
	c.api.mu.Lock()
	c.api.known["n1"] = false
	c.api.mu.Unlock()
	third := c.controller("c3", "--node-wait", "1s")
	c.wait("c3 to lead", func() bool { return c.ready("c3") })
	to = csi.NewControllerClient(c.at("c3"))
	w := again(t, to.CreateVolume, request("w", "n2")).GetVolume().GetVolumeId()
	if list := again(t, to.ListVolumes, &csi.ListVolumesRequest{}).GetEntries(); len(list) != 1 || list[0].GetVolume().GetVolumeId() != w {
		t.Errorf("listed are %v", list)
	}
	_, err = to.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("what nobody can reach is deleted: %v", err)
	}
	third.stop(t)
	n2.stop(t)
}

// imports makes a volume of a file on a node, and reads it there.
func (c *cluster) imports(controller, node string) {
	c.t.Helper()
	e, err := admin.ParseEndpoint(c.path(controller + "-admin.sock"))
	c.must(err)
	content := bytes.Repeat([]byte("legacy! "), 1<<17)
	c.must(os.Mkdir(filepath.Join(c.storage, "import"), 0o755))
	c.must(os.WriteFile(filepath.Join(c.storage, "import", "disk.img"), content, 0o644))
	done, err := admin.NewClient(e).Import(c.t.Context(), admin.ImportRequest{Name: "legacy", Domain: "local", Source: "disk.img", Block: true})
	if err != nil || done.Node != node || done.Driver != "csi.quarry.dev" || done.Image.Size != 1<<20 {
		c.t.Fatalf("imported %+v, %v", done, err)
	}
	device := c.publish(controller, node, done.Image.Handle)
	f, err := os.Open(device)
	c.must(err)
	got, err := io.ReadAll(f)
	c.must(errors.Join(err, f.Close()))
	if !bytes.Equal(got, content) {
		c.t.Errorf("%d bytes were imported, and are not what was in the file", len(got))
	}
	c.unpublish(controller, node, done.Image.Handle)
	again(c.t, csi.NewControllerClient(c.at(controller)).DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: done.Image.Handle})
}

// TestARestoreOnAnotherNode: what n1 has for itself comes to n2 over connections of their own, between
// real processes.
func TestARestoreOnAnotherNode(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, ownStorage)
	controller := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	n1, n2 := c.agentOf("n1"), c.agentOf("n2")
	to := csi.NewControllerClient(c.at("c1"))
	const size = 4 << 20
	create := func(name, node string, source *csi.VolumeContentSource) string {
		t.Helper()
		where := []*csi.Topology{{Segments: map[string]string{"csi.quarry.dev/node": node}}}
		return again(t, to.CreateVolume, &csi.CreateVolumeRequest{Name: name, Parameters: map[string]string{"domain": "local"}, VolumeCapabilities: []*csi.VolumeCapability{blockWriter()},
			CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeContentSource: source, AccessibilityRequirements: &csi.TopologyRequirement{Requisite: where, Preferred: where}}).GetVolume().GetVolumeId()
	}
	slab := func(node, volume string) string {
		_, id, _ := strings.Cut(volume, "/")
		return c.path("of-" + node + "/storage/slabs/" + id)
	}
	v := create("v", "n1", nil)
	content := make([]byte, size)
	_, _ = rand.Read(content[size/2:])
	f, err := os.OpenFile(slab("n1", v), os.O_WRONLY, 0)
	c.must(err)
	_, err = f.WriteAt(content[size/2:], size/2)
	c.must(errors.Join(err, f.Close()))
	snapshot := again(t, to.CreateSnapshot, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: v}).GetSnapshot().GetSnapshotId()
	r := create("r", "n2", &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}})
	got, err := os.ReadFile(slab("n2", r))
	c.must(err)
	if !bytes.Equal(got, content) {
		t.Error("the restored volume holds something else")
	}
	n1.stop(t)
	n2.stop(t)
	controller.stop(t)
}

// TestAForgedAgentGetsInNowhere: a token that is none, and one of another node.
func TestAForgedAgentGetsInNowhere(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, oneDomain)
	controller := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	c.api.mu.Lock()
	c.api.tokens["that of n2"] = "n2"
	c.api.mu.Unlock()
	c.must(os.MkdirAll(c.path("kubelet"), 0o755))
	for what, token := range map[string]string{"forged": "forged", "foreign": "that of n2"} {
		c.file("token", token)
		r := begin(t, "does not let this agent in", "node", "--node-id", "n1", "--endpoint", c.path(what+".sock"), "--kubelet-dir", c.path("kubelet"),
			"--controller", "localhost:"+c.ports["agents"], "--controller-ca-file", c.path("tls.crt"), "--token-file", c.path("token"))
		if strings.Contains(r.said(), token+"\n") || strings.Contains(r.said(), `="`+token) {
			t.Errorf("the token is in the log:\n%s", r.said())
		}
		r.stop(t)
	}
	controller.stop(t)
}

// What nobody has to prepare: the leader makes a certificate, agents that know its CA
// connect, and the next leader has the same.
func TestAControllerMakesItsOwnCertificate(t *testing.T) {
	needRoot(t, "quarry node")
	c := newCluster(t, oneDomain)
	first := c.certified("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	known := func() string {
		data, _ := c.api.get(configs + "/ca")["data"].(map[string]any)
		text, _ := data["ca.crt"].(string)
		return text
	}
	ca := known()
	c.file("tls.crt", ca) // where agents look
	c.agent("n1").stop(t)
	first.stop(t)
	second := c.certified("c2")
	c.wait("c2 to lead", func() bool { return c.ready("c2") })
	if known() != ca {
		t.Error("the next leader has another authority")
	}
	c.agent("n2").stop(t)
	second.stop(t)
}

func TestAControllerNeedsOneCertificate(t *testing.T) {
	for want, flags := range map[string][]string{
		"--tls-cert-file and --tls-private-key-file are needed, or --tls-secret": {"--tls-cert-file", "c"},
		"--tls-secret, --tls-ca-config-map and --tls-host are needed together":   {"--tls-secret", "s", "--tls-host", "h"},
		"exclude --tls-secret, --tls-ca-config-map and --tls-host":               {"--tls-cert-file", "c", "--tls-private-key-file", "k", "--tls-secret", "s"},
	} {
		var stderr bytes.Buffer
		cmd := program(t.Context(), append([]string{"controller", "--namespace", "quarry"}, flags...)...)
		cmd.Stderr = &stderr
		if err := cmd.Run(); err == nil || !strings.Contains(stderr.String(), want) {
			t.Errorf("%q: %v, %s", flags, err, stderr.String())
		}
	}
}

// Only what is below the agent's own folder is made.
func TestAnAgentMakesDirectoriesBelowItsOwnOnly(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	for path, made := range map[string]bool{
		filepath.Join(base, "a"): true, filepath.Join(base, "b/c"): true, filepath.Join(base, "x/../../up"): false,
		filepath.Join(dir, "other"): false, base + "-beside": false, "relative": false, "": false,
	} {
		if err := makeBelow(base, path); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); (err == nil && info.IsDir()) != made {
			t.Errorf("%s: made %t, want %t", path, err == nil, made)
		}
	}
	if err := makeBelow("", filepath.Join(dir, "none")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("it makes directories without a folder of its own")
	}
	if err := os.WriteFile(filepath.Join(base, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := makeBelow(base, filepath.Join(base, "file/a")); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "--data-dir") {
		t.Error(err)
	}
}

func TestAControllerServesOperatorsAtLoopbackAddressesOnly(t *testing.T) {
	var stderr bytes.Buffer
	cmd := program(t.Context(), "controller", "--admin-endpoint", "tcp://0.0.0.0:9811", "--tls-cert-file", "c", "--tls-private-key-file", "k", "--namespace", "quarry")
	cmd.Stderr = &stderr
	const want = "quarry: --admin-endpoint: endpoint \"tcp://0.0.0.0:9811\": 0.0.0.0 is not a loopback address: whoever reaches it may delete images, so only 127.0.0.0/8 and [::1] are allowed\n"
	if err := cmd.Run(); err == nil || stderr.String() != want {
		t.Errorf("%v, %s", err, stderr.String())
	}
}

// TestTheDefaultsOfAControllerWork: what nobody gives must fit together.
func TestTheDefaultsOfAControllerWork(t *testing.T) {
	cmd := controllerCommand()
	if err := cmd.ParseFlags([]string{"--tls-cert-file", "c", "--tls-private-key-file", "k", "--namespace", "quarry"}); err != nil {
		t.Fatal(err)
	}
	o := &controllerOptions{}
	for _, f := range []string{"leader-election-lease-duration", "leader-election-renew-deadline", "leader-election-retry-period"} {
		d, err := cmd.Flags().GetDuration(f)
		if err != nil {
			t.Fatal(err)
		}
		switch f {
		case "leader-election-lease-duration":
			o.lease.LeaseDuration = d
		case "leader-election-renew-deadline":
			o.lease.RenewDeadline = d
		default:
			o.lease.RetryPeriod = d
		}
	}
	o.lease.Namespace, o.lease.Name, o.lease.Identity = "quarry", "quarry-controller", "c1"
	if err := o.lease.Check(); err != nil {
		t.Error(err)
	}
}
