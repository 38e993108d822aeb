// Package reachtest is as much of a cluster as a person's program asks for: pods, a Lease,
// and port-forwards to addresses of the test. The real one is asked in the cluster tests.
package reachtest

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	constants "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Pod of the controller.
type Pod struct {
	Namespace, Name string
	// Phase; "" is Running.
	Phase string
	// AdminPort is that of a container port named admin; 0: none is named.
	AdminPort int
	// Serves maps ports to addresses of the test.
	Serves map[string]string
}

// Cluster is one. Its fields may be changed between requests.
type Cluster struct {
	*httptest.Server
	Pods   []Pod
	Holder string // of the Lease; "": there is no Lease
	// Forbidden requests, as "METHOD path".
	Forbidden map[string]bool
	// Old: it knows no port-forward over WebSockets.
	Old bool
	// Token that it wants.
	Token string

	mu       sync.Mutex
	forwards []string
}

// New makes a cluster, and a kubeconfig for it, whose path is returned.
func New(t *testing.T) (*Cluster, string) {
	t.Helper()
	c := &Cluster{Forbidden: map[string]bool{}, Token: "the person's"}
	c.Server = httptest.NewTLSServer(c)
	t.Cleanup(c.CloseClientConnections)
	t.Cleanup(c.Close)
	config := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: here\nclusters:\n- name: c\n  cluster: {server: %q, insecure-skip-tls-verify: true}\nusers:\n- name: u\n  user: {token: %q}\ncontexts:\n- name: here\n  context: {cluster: c, user: u, namespace: mine}\n- name: stranger\n  context: {cluster: c}\n", c.URL, c.Token)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return c, config
}

// Forwards lists the port-forwards that were made: "POD PORT by websocket" or "by SPDY".
func (c *Cluster) Forwards() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.forwards...)
}

// ServeHTTP implements http.Handler.
func (c *Cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refuse := func(code int, reason string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": reason + ": " + r.URL.Path})
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case r.Header.Get("Authorization") != "Bearer "+c.Token:
		refuse(http.StatusUnauthorized, "Unauthorized")
	case c.Forbidden[r.Method+" "+r.URL.Path]:
		refuse(http.StatusForbidden, "Forbidden")
	case r.URL.Path == "/api/v1/pods":
		c.list(w, r, "")
	case len(parts) == 5 && parts[4] == "pods":
		c.list(w, r, parts[3])
	case strings.HasSuffix(r.URL.Path, "/leases/quarry-controller") && c.Holder != "":
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Lease", "apiVersion": "coordination.k8s.io/v1", "spec": map[string]any{"holderIdentity": c.Holder}})
	case len(parts) == 7 && parts[6] == "portforward":
		for _, p := range c.Pods {
			if p.Namespace == parts[3] && p.Name == parts[5] {
				c.forward(w, r, p)
				return
			}
		}
		refuse(http.StatusNotFound, "NotFound")
	default:
		refuse(http.StatusNotFound, "NotFound")
	}
}

func (c *Cluster) list(w http.ResponseWriter, r *http.Request, namespace string) {
	items := []any{}
	for _, p := range c.Pods {
		if namespace != "" && p.Namespace != namespace || r.URL.Query().Get("labelSelector") == "" {
			continue
		}
		phase := p.Phase
		if phase == "" {
			phase = "Running"
		}
		ports := []any{}
		if p.AdminPort > 0 {
			ports = append(ports, map[string]any{"name": "admin", "containerPort": p.AdminPort})
		}
		items = append(items, map[string]any{"metadata": map[string]any{"name": p.Name, "namespace": p.Namespace},
			"spec": map[string]any{"containers": []any{map[string]any{"ports": ports}}}, "status": map[string]any{"phase": phase}})
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "PodList", "apiVersion": "v1", "items": items})
}

// forward upgrades a request to a port-forward.
func (c *Cluster) forward(w http.ResponseWriter, r *http.Request, p Pod) {
	pairs := &pairs{cluster: c, pod: p, reasons: map[string]httpstream.Stream{}}
	var conn httpstream.Connection
	switch {
	case websocket.IsWebSocketUpgrade(r) && !c.Old:
		up := websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }, Subprotocols: []string{constants.WebsocketsSPDYTunnelingPortForwardV1}}
		ws, err := up.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		pairs.by = "websocket"
		if conn, err = spdy.NewServerConnection(portforward.NewTunnelingConnection("server", ws), pairs.take); err != nil {
			_ = ws.Close()
			return
		}
	case httpstream.IsUpgradeRequest(r) && r.Method == http.MethodPost:
		if _, err := httpstream.Handshake(r, w, []string{constants.PortForwardV1Name}); err != nil {
			return
		}
		pairs.by = "SPDY"
		if conn = spdy.NewResponseUpgrader().UpgradeResponse(w, r, pairs.take); conn == nil {
			return
		}
	default:
		http.Error(w, "Upgrade request required", http.StatusBadRequest)
		return
	}
	defer conn.Close()
	<-conn.CloseChan()
}

// pairs of streams of one port-forward: what the kubelet does with them.
type pairs struct {
	cluster *Cluster
	pod     Pod
	by      string
	mu      sync.Mutex
	reasons map[string]httpstream.Stream
}

func (p *pairs) take(s httpstream.Stream, _ <-chan struct{}) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	id := s.Headers().Get(corev1.PortForwardRequestIDHeader)
	if s.Headers().Get(corev1.StreamType) == corev1.StreamTypeError {
		p.reasons[id] = s
		return nil
	}
	reason := p.reasons[id]
	if reason == nil {
		return fmt.Errorf("the data of request %s came before its error stream", id)
	}
	port := s.Headers().Get(corev1.PortHeader)
	p.cluster.mu.Lock()
	p.cluster.forwards = append(p.cluster.forwards, p.pod.Name+" "+port+" by "+p.by)
	p.cluster.mu.Unlock()
	go serve(s, reason, p.pod.Serves[port], port)
	return nil
}

func serve(data, reason httpstream.Stream, address, port string) {
	defer reason.Close()
	defer data.Close()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		_, _ = fmt.Fprintf(reason, "failed to connect to localhost:%s inside namespace: connection refused", port)
		return
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, data)
		_ = conn.Close()
	}()
	_, _ = io.Copy(data, conn)
}
