package kube

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/quarry-csi/quarry/pkg/fault"
)

const host = "quarry-controller.quarry.svc"

// kept is a cluster with an empty Secret and ConfigMap, and a clock.
type kept struct {
	t   *testing.T
	api *fake.Clientset
	now time.Time
}

func newKept(t *testing.T) *kept {
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "quarry", Name: name} }
	return &kept{t: t, now: time.Now(), api: fake.NewClientset(
		&corev1.Secret{ObjectMeta: meta("tls")}, &corev1.ConfigMap{ObjectMeta: meta("ca"), Data: map[string]string{"other": "stays"}})}
}

func (k *kept) certificate() *Certificate {
	k.t.Helper()
	c, err := NewCertificate(New(k.api), CertificateConfig{Namespace: "quarry", Secret: "tls", ConfigMap: "ca", Host: host})
	if err != nil {
		k.t.Fatal(err)
	}
	c.now = func() time.Time { return k.now }
	return c
}

func (k *kept) renew(c *Certificate) *tls.Certificate {
	k.t.Helper()
	if err := c.Renew(k.t.Context()); err != nil {
		k.t.Fatal(err)
	}
	got, err := c.Get(nil)
	if err != nil {
		k.t.Fatal(err)
	}
	return got
}

func (k *kept) secret() *corev1.Secret {
	k.t.Helper()
	s, err := k.api.CoreV1().Secrets("quarry").Get(k.t.Context(), "tls", metav1.GetOptions{})
	if err != nil {
		k.t.Fatal(err)
	}
	return s
}

func (k *kept) ca() string {
	k.t.Helper()
	m, err := k.api.CoreV1().ConfigMaps("quarry").Get(k.t.Context(), "ca", metav1.GetOptions{})
	if err != nil {
		k.t.Fatal(err)
	}
	return m.Data["ca.crt"]
}

// trusted makes a TLS connection as an agent does.
func (k *kept) trusted(cert *tls.Certificate, ca, name string) error {
	k.t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(ca)) {
		k.t.Fatalf("no certificate: %q", ca)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		k.t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			_ = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13}).Handshake()
			_ = conn.Close()
		}
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		k.t.Fatal(err)
	}
	defer raw.Close()
	return tls.Client(raw, &tls.Config{RootCAs: pool, ServerName: name, MinVersion: tls.VersionTLS13, Time: func() time.Time { return k.now }}).Handshake()
}

func TestAControllerMakesACertificateThatAgentsTrust(t *testing.T) {
	k := newKept(t)
	c := k.certificate()
	if _, err := c.Get(nil); !errors.Is(err, fault.Unavailable) {
		t.Fatalf("before it was read: %v", err)
	}
	cert := k.renew(c)
	if err := k.trusted(cert, k.ca(), host); err != nil {
		t.Fatal(err)
	}
	if err := k.trusted(cert, k.ca(), "evil.example.com"); err == nil {
		t.Fatal("it is good for another name")
	}
	if strings.Contains(k.ca(), "PRIVATE") {
		t.Fatal("the ConfigMap has a key")
	}
	if m, _ := k.api.CoreV1().ConfigMaps("quarry").Get(t.Context(), "ca", metav1.GetOptions{}); m.Data["other"] != "stays" {
		t.Fatalf("%v", m.Data)
	}
}

func TestTheNextLeaderTakesTheSameCertificate(t *testing.T) {
	k := newKept(t)
	first := k.renew(k.certificate())
	k.now = k.now.Add(leafLife - leafRenew - time.Hour)
	if next := k.renew(k.certificate()); !next.Leaf.Equal(first.Leaf) {
		t.Fatal("it has made another one")
	}
}

func TestACertificateIsRenewedInTimeByTheSameAuthority(t *testing.T) {
	k := newKept(t)
	c := k.certificate()
	first, ca := k.renew(c), k.ca()
	k.now = k.now.Add(leafLife - leafRenew + time.Hour)
	next := k.renew(c)
	if next.Leaf.Equal(first.Leaf) {
		t.Fatal("it goes on with one that expires")
	}
	if k.ca() != ca {
		t.Fatal("agents would have to learn another authority")
	}
	if err := k.trusted(next, ca, host); err != nil {
		t.Fatal(err)
	}
}

func TestAnAuthorityIsReplacedBesideTheOldOne(t *testing.T) {
	k := newKept(t)
	c := k.certificate()
	first := k.renew(c)
	k.now = k.now.Add(caLife - caRenew + time.Hour)
	next := k.renew(c)
	if err := k.trusted(next, k.ca(), host); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(k.ca(), "BEGIN CERTIFICATE"); n != 2 {
		t.Fatalf("%d authorities", n)
	}
	if next.Leaf.AuthorityKeyId != nil && bytes.Equal(next.Leaf.AuthorityKeyId, first.Leaf.AuthorityKeyId) {
		t.Fatal("it is signed by the old authority")
	}
	k.now = k.now.Add(caRenew)
	k.renew(c)
	if n := strings.Count(k.ca(), "BEGIN CERTIFICATE"); n != 1 {
		t.Fatalf("%d authorities, of which one has expired", n)
	}
}

// What is lost or spoilt is made again.
func TestDamageIsMended(t *testing.T) {
	spoil := func(key string, value []byte) func(*corev1.Secret) {
		return func(s *corev1.Secret) {
			if s.Data[key] = value; value == nil {
				delete(s.Data, key)
			}
		}
	}
	other, key, err := sign(nil, nil, "other", "", time.Now(), caLife)
	if err != nil {
		t.Fatal(err)
	}
	otherCA, otherKey, err := encode(other, key)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func(*corev1.Secret){
		"no certificate":       spoil("tls.crt", nil),
		"no key":               spoil("tls.key", nil),
		"a key of another one": spoil("tls.key", otherKey),
		"no CA":                spoil("ca.crt", nil),
		"no CA key":            spoil("ca.key", nil),
		"another CA": func(s *corev1.Secret) {
			s.Data["ca.crt"], s.Data["ca.key"] = otherCA, otherKey
		},
		"no text": spoil("tls.crt", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
		"all":     func(s *corev1.Secret) { s.Data = nil },
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			k.renew(k.certificate())
			s := k.secret()
			damage(s)
			if _, err := k.api.CoreV1().Secrets("quarry").Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := k.trusted(k.renew(k.certificate()), k.ca(), host); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestTheConfigMapIsFilledAgain(t *testing.T) {
	k := newKept(t)
	cert := k.renew(k.certificate())
	m, err := k.api.CoreV1().ConfigMaps("quarry").Get(t.Context(), "ca", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.Data = nil
	if _, err := k.api.CoreV1().ConfigMaps("quarry").Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if again := k.renew(k.certificate()); !again.Leaf.Equal(cert.Leaf) {
		t.Fatal("another certificate")
	}
	if err := k.trusted(cert, k.ca(), host); err != nil {
		t.Fatal(err)
	}
}

// Of two that write at once the second takes what the first has made.
func TestTwoAtOnceAgree(t *testing.T) {
	k := newKept(t)
	winner, _, err := ensure(pems{}, host, k.now)
	if err != nil {
		t.Fatal(err)
	}
	once := true
	k.api.PrependReactor("update", "secrets", func(a k8stesting.Action) (bool, runtime.Object, error) {
		if !once {
			return false, nil, nil
		}
		once = false
		other := a.(k8stesting.UpdateAction).GetObject().(*corev1.Secret).DeepCopy()
		winner.into(other)
		if err := k.api.Tracker().Update(a.GetResource(), other, other.Namespace); err != nil {
			t.Error(err)
		}
		return true, nil, apierrors.NewConflict(schema.GroupResource{Resource: "secrets"}, "tls", errors.New("changed"))
	})
	if got := k.renew(k.certificate()); !got.Leaf.Equal(winner.leaf) {
		t.Fatal("they have different certificates")
	}
}

func TestWhatIsMissingIsSaid(t *testing.T) {
	c, err := NewCertificate(New(fake.NewClientset()), CertificateConfig{Namespace: "quarry", Secret: "tls", ConfigMap: "ca", Host: host})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Renew(t.Context()); !errors.Is(err, fault.NotFound) || !strings.Contains(err.Error(), "Secret quarry/tls") {
		t.Fatal(err)
	}
	if _, err := NewCertificate(New(fake.NewClientset()), CertificateConfig{Namespace: "quarry", Secret: "tls", ConfigMap: "ca"}); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "Host") {
		t.Fatal(err)
	}
}
