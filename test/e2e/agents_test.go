package e2e

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/utils/ptr"

	"github.com/quarry-csi/quarry/pkg/agent"
	"github.com/quarry-csi/quarry/pkg/agent/agentpb"
)

const (
	agentAccount       = "quarry-node"
	portAgents         = 9810
	controllerHost     = "quarry-controller." + system + ".svc"
	controllerKnownBy  = "quarry-controller-ca"
	notAccepted        = "the API server does not accept its token"
	admittedButNoMove  = "no data is expected from or for node"
	unknownTicket      = "there is no such move"
	linksVersion       = 1
	tellsOfAConnection = "An agent has connected"
)

// TestNobodyButANodesAgentIsLetIn: whatever token somebody has who reaches the controller's port, he
// gets in nowhere, and nothing changes. Should the leader change meanwhile, nothing is known of either, and
// it is tried again.
func TestNobodyButANodesAgentIsLetIn(t *testing.T) {
	r := newRig(t)
	accounts := r.kube.CoreV1().ServiceAccounts(r.ns)
	for _, name := range []string{"stranger", agentAccount} {
		_, err := accounts.Create(bg, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		r.must(err)
		r.start(pod{name: "of-" + name, account: name, node: r.nodes[0]})
	}
	r.wait("a leader that stays", func() (bool, error) {
		before, err := r.leaderAt()
		if err != nil {
			return false, err
		}
		errs := r.intrude()
		if now, err := r.leaderAt(); err != nil || now != before {
			return false, fmt.Errorf("%s has led, and now %s does: %w", before, now, orNever(err))
		}
		for _, err := range errs {
			r.Error(err)
		}
		return true, nil
	})
	r.claim(claim{name: "data", class: classLocal, size: "64Mi"})
	r.start(pod{name: "user", claims: []string{"data"}, node: r.nodes[0]})
	r.write("user", "/data/file")
}

// leaderAt is the pod that leads, and how often it was started: one that lost the Lease ends.
func (r *rig) leaderAt() (string, error) {
	name, err := r.leader()
	if err != nil {
		return "", err
	}
	p, err := r.kube.CoreV1().Pods(system).Get(bg, name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == "quarry" {
			return fmt.Sprintf("%s, started %d times before", name, c.RestartCount), nil
		}
	}
	return "", fmt.Errorf("pod %s has no container quarry", name)
}

// intrude tries all tokens, and returns what is not as it should be.
func (r *rig) intrude() (errs []error) {
	r.Helper()
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	node, other := r.nodes[0], r.nodes[1]
	r.wait("the agents to be connected", r.settled)
	ours, theirs := must(r.agent(node))(r), must(r.agent(other))(r)
	right := r.tokenOf(system, agentAccount, ours, agent.Audience)
	key := r.signingKey()
	forger, err := rsa.GenerateKey(rand.Reader, 2048)
	r.must(err)
	inAnHour, anHourAgo := time.Now().Add(time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()

	stranger, namesake := must(r.tryPod("of-stranger"))(r), must(r.tryPod("of-"+agentAccount))(r)

	leader := must(r.leader())(r)
	before := r.logOf(leader)
	domains, err := r.domains()
	if err != nil {
		return append(errs, err)
	}
	agents := map[string]string{}
	for _, p := range []string{ours.Name, theirs.Name} {
		agents[p] = r.logOf(p)
	}
	at, roots := r.forward(leader, portAgents), r.knownBy()
	tries := []struct{ what, node, token, ticket, refused string }{
		// That the next two are told about their ticket shows that tokens made in this way would be good.
		{"the right token, for a move that nobody has asked for", node, right, unknownTicket, admittedButNoMove},
		{"the same signed again here, until in an hour", node, resign(r, right, key, map[string]any{"exp": inAnHour}), unknownTicket, admittedButNoMove},

		{"no token", node, "", "", "it has sent no token"},
		{"forged: no token at all", node, "let me in", "", notAccepted},
		{"forged: signed by another key", node, resign(r, right, forger, nil), "", notAccepted},
		{"forged: changed under its signature", other, swapNode(r, right, other), "", notAccepted},
		{"expired", node, resign(r, right, key, map[string]any{"exp": anHourAgo, "iat": anHourAgo - 3600, "nbf": anHourAgo - 3600}), "", notAccepted},
		{"of a pod that is gone", node, r.tokenOfOneThatIsGone(node), "", notAccepted},
		{"for the API server", node, r.tokenOf(system, agentAccount, ours), "", notAccepted},
		{"for somebody else", node, r.tokenOf(system, agentAccount, ours, "vault"), "", notAccepted},
		{"foreign: of another account", node, r.tokenOf(r.ns, "stranger", stranger, agent.Audience), "", "its token is of user \"system:serviceaccount:" + r.ns + ":stranger\""},
		{"foreign: of an account of that name elsewhere", node, r.tokenOf(r.ns, agentAccount, namesake, agent.Audience), "", "its token is of user \"system:serviceaccount:" + r.ns + ":quarry-node\""},
		{"foreign: of the controller", node, r.tokenOf(system, "quarry-controller", must(r.kube.CoreV1().Pods(system).Get(bg, leader, metav1.GetOptions{}))(r), agent.Audience), "", "its token is of user"},
		{"of no pod", node, r.tokenOf(system, agentAccount, nil, agent.Audience), "", "its token is not bound to a pod"},
		{"claiming the other node's name", other, right, "", "its token is of a pod on the node [\"" + node + "\"]"},
		{"claiming the name of a node that is none", "node99", right, "", "its token is of a pod on the node [\"" + node + "\"]"},
		{"the other node's, for a move", node, r.tokenOf(system, agentAccount, theirs, agent.Audience), unknownTicket, "its token is of a pod on the node [\"" + other + "\"]"},
	}
	for _, try := range tries {
		said, err := introduce(at, roots, &agentpb.Hello{Version: linksVersion, Node: try.node, Token: try.token, Release: "e2e", Ticket: try.ticket})
		switch {
		case err != nil:
			wrong("%s: %w", try.what, err)
		case !strings.Contains(said, try.refused):
			wrong("%s: it is told %q, want %q", try.what, said, try.refused)
		default:
			r.Logf("%s: %s", try.what, said)
		}
	}

	// The log says why, and shows no token.
	log := ""
	if err := r.poll(func() (bool, error) {
		all := r.logOf(leader)
		if !strings.HasPrefix(all, before) {
			return true, nil // of another process
		}
		log = all[len(before):]
		n := strings.Count(log, "An agent's connection has ended")
		return n >= len(tries), fmt.Errorf("%d of %d are there", n, len(tries))
	}); err != nil {
		wrong("the refusals in the log of %s: %w", leader, err)
	}
	for _, try := range tries {
		if why := strings.ReplaceAll(try.refused, `"`, `\"`); !strings.Contains(log, why) {
			wrong("%s: the controller's log does not say %q:\n%s", try.what, why, log)
		}
		if secret := signature(try.token); secret != "" && strings.Contains(log, secret) {
			wrong("%s: the token is in the controller's log", try.what)
		}
	}

	// Nothing has changed.
	if strings.Contains(log, tellsOfAConnection) {
		wrong("an agent has connected:\n%s", log)
	}
	for p, was := range agents {
		if more := strings.TrimPrefix(r.logOf(p), was); strings.Contains(more, "onnection to the controller") || strings.Contains(more, "Connected to") {
			wrong("the agent %s has lost its connection:\n%s", p, more)
		}
	}
	switch now, err := r.domains(); {
	case err != nil:
		return append(errs, err)
	case now != domains:
		wrong("the domains were\n%s\nand are\n%s", domains, now)
	}
	return errs
}

// settled: every domain of every node is open.
func (r *rig) settled() (bool, error) {
	out, err := r.program(r.quarry, "domains", "-o", "json")
	if err != nil {
		return false, err
	}
	var all []struct {
		ID, Problem string
		Open        bool
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return false, err
	}
	for _, d := range all {
		if !d.Open {
			return false, fmt.Errorf("domain %s is not open: %s", d.ID, d.Problem)
		}
	}
	return len(all) > 0, nil
}

// domains is everything about them that does not change by itself.
func (r *rig) domains() (string, error) {
	out, err := r.program(r.quarry, "domains", "-o", "json")
	if err != nil {
		return "", err
	}
	var all []struct {
		ID, Name, Scope, Node, Owner, Problem, Location string
		Open                                            bool
		Epoch                                           int64
		Volumes, Snapshots                              int
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return "", err
	}
	text, err := json.MarshalIndent(all, "", " ")
	return string(text), err
}

// logOf a pod of Quarry's is what its own container has said so far.
func (r *rig) logOf(pod string) string {
	r.Helper()
	return string(must(r.kube.CoreV1().Pods(system).GetLogs(pod, &corev1.PodLogOptions{Container: "quarry"}).DoRaw(bg))(r))
}

// tokenOf makes a token as the kubelet does.
func (r *rig) tokenOf(ns, account string, bound *corev1.Pod, audiences ...string) string {
	r.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences}}
	if bound != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: bound.Name, UID: bound.UID}
	}
	return must(r.kube.CoreV1().ServiceAccounts(ns).CreateToken(bg, account, request, metav1.CreateOptions{}))(r).Status.Token
}

// tokenOfOneThatIsGone was good as long as its pod was there.
func (r *rig) tokenOfOneThatIsGone(node string) string {
	r.Helper()
	pods := r.kube.CoreV1().Pods(system)
	p := must(pods.Create(bg, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-"}, Spec: corev1.PodSpec{ServiceAccountName: agentAccount, NodeName: node,
		TerminationGracePeriodSeconds: ptr.To(int64(0)),
		Containers:                    []corev1.Container{{Name: "main", Image: r.image, ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"sleep", "3600"}}}}}, metav1.CreateOptions{}))(r)
	token := r.tokenOf(system, agentAccount, p, agent.Audience)
	r.must(pods.Delete(bg, p.Name, metav1.DeleteOptions{GracePeriodSeconds: ptr.To(int64(0))}))
	r.gone("pod "+p.Name, func() error { _, err := pods.Get(bg, p.Name, metav1.GetOptions{}); return err })
	return token
}

// signingKey is what the cluster signs accounts' tokens with: the administrator of hack/cluster has it.
func (r *rig) signingKey() *rsa.PrivateKey {
	r.Helper()
	path := filepath.Join(filepath.Dir(os.Getenv("KUBECONFIG")), "pki", "sa.key")
	block, _ := pem.Decode(must(os.ReadFile(path))(r))
	if block == nil {
		r.Fatalf("%s holds no key", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	}
	r.must(err)
	rsaKey, ok := key.(*rsa.PrivateKey)
	if !ok {
		r.Fatalf("%s is a %T", path, key)
	}
	return rsaKey
}

// resign changes claims of a token and signs it.
func resign(r *rig, token string, key *rsa.PrivateKey, change map[string]any) string {
	r.Helper()
	head, claims, _ := split(r, token)
	for k, v := range change {
		claims[k] = v
	}
	text := head + "." + base64.RawURLEncoding.EncodeToString(must(json.Marshal(claims))(r))
	sum := sha256.Sum256([]byte(text))
	signed := must(rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:]))(r)
	return text + "." + base64.RawURLEncoding.EncodeToString(signed)
}

// swapNode claims to be on another node, with the signature that the token had.
func swapNode(r *rig, token, node string) string {
	r.Helper()
	head, claims, signature := split(r, token)
	about, _ := claims["kubernetes.io"].(map[string]any)
	on, _ := about["node"].(map[string]any)
	if on == nil || on["name"] == node {
		r.Fatalf("the token's claims are %v", claims)
	}
	on["name"] = node
	return head + "." + base64.RawURLEncoding.EncodeToString(must(json.Marshal(claims))(r)) + "." + signature
}

func split(r *rig, token string) (head string, claims map[string]any, signature string) {
	r.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		r.Fatalf("a token of %d parts", len(parts))
	}
	d := json.NewDecoder(bytes.NewReader(must(base64.RawURLEncoding.DecodeString(parts[1]))(r)))
	d.UseNumber()
	r.must(d.Decode(&claims))
	return parts[0], claims, parts[2]
}

// signature is the part of a token that makes it one.
func signature(token string) string {
	if i := strings.LastIndex(token, "."); i > 0 {
		return token[i+1:]
	}
	return ""
}

// knownBy is what agents know the controller by.
func (r *rig) knownBy() *x509.CertPool {
	r.Helper()
	config := must(r.kube.CoreV1().ConfigMaps(system).Get(bg, controllerKnownBy, metav1.GetOptions{}))(r)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(config.Data["ca.crt"])) {
		r.Fatalf("ConfigMap %s holds no certificate", controllerKnownBy)
	}
	return pool
}

// forward gives an address of this machine that leads to a port of a pod of Quarry's.
func (r *rig) forward(pod string, port int) string {
	r.Helper()
	transport, upgrader, err := spdy.RoundTripperFor(r.config)
	r.must(err)
	url := r.kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(system).Name(pod).SubResource("portforward").URL()
	stop, ready, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	f, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url), []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, os.Stderr)
	r.must(err)
	go func() { ended <- f.ForwardPorts() }()
	r.Cleanup(func() { close(stop) })
	select {
	case <-ready:
	case err := <-ended:
		r.Fatalf("port-forward to %s: %v", pod, err)
	}
	return fmt.Sprintf("127.0.0.1:%d", must(f.GetPorts())(r)[0].Local)
}

// introduce says hello as an agent does, and returns why it is refused. An error: it is not, or the
// connection does not end then.
func introduce(at string, roots *x509.CertPool, hello *agentpb.Hello) (string, error) {
	dialer := &net.Dialer{Timeout: patience}
	conn, err := tls.DialWithDialer(dialer, "tcp", at, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: controllerHost})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	b, err := proto.Marshal(hello)
	if err != nil {
		return "", err
	}
	if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return "", err
	}
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return "", fmt.Errorf("no answer: %w", err)
	}
	answer := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return "", fmt.Errorf("half an answer: %w", err)
	}
	welcome := &agentpb.Welcome{}
	if err := proto.Unmarshal(answer, welcome); err != nil {
		return "", err
	}
	if welcome.GetRefused() == "" {
		return "", fmt.Errorf("it is let in by %s", welcome.GetRelease())
	}
	if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil || os.IsTimeout(err) {
		return "", fmt.Errorf("it is refused (%s), and the connection stays: %d bytes, %w", welcome.GetRefused(), n, orNever(err))
	}
	return welcome.GetRefused(), nil
}
