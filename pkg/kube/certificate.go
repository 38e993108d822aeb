package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Keys in the Secret and in the ConfigMap.
const (
	keyCA          = "ca.crt"
	keyCAKey       = "ca.key"
	keyCertificate = "tls.crt"
	keyPrivate     = "tls.key"
)

// checkCertificate is how often a certificate is looked at: far less than the time it
// has left when it is renewed.
const checkCertificate = time.Hour

// CertificateConfig says where a server's own certificate is kept.
type CertificateConfig struct {
	Namespace string
	// Secret has the certificate, its key, and those of the authority that signs it.
	Secret string
	// ConfigMap has the authority's certificate alone, for those who connect: they need
	// not be able to read the Secret.
	ConfigMap string
	// Host is the name that they connect to.
	Host string
}

// Certificate is a server's, made by itself: nobody has to bring one or to renew it.
// Secret and ConfigMap must exist; they may be empty.
type Certificate struct {
	client *Client
	cfg    CertificateConfig
	now    func() time.Time
	have   atomic.Pointer[tls.Certificate]
}

// NewCertificate makes a Certificate; there is none in it before Renew. fault.Invalid:
// a field is empty.
func NewCertificate(client *Client, cfg CertificateConfig) (*Certificate, error) {
	if err := filled("Namespace", cfg.Namespace, "Secret", cfg.Secret, "ConfigMap", cfg.ConfigMap, "Host", cfg.Host); err != nil {
		return nil, err
	}
	return &Certificate{client: client, cfg: cfg, now: time.Now}, nil
}

// Get is for tls.Config.GetCertificate.
func (c *Certificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if cert := c.have.Load(); cert != nil {
		return cert, nil
	}
	return nil, fault.New(fault.Unavailable, "the certificate of %s has not been read yet", c.cfg.Host)
}

// Keep renews the certificate in time until ctx ends.
func (c *Certificate) Keep(ctx context.Context) {
	tick := time.NewTicker(checkCertificate)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := c.Renew(ctx); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "The certificate for agents could not be looked after; it is tried again", "after", checkCertificate)
			}
		case <-ctx.Done():
			return
		}
	}
}

// Renew reads the certificate, and makes or replaces what is missing or will soon
// expire. Of several that do so at once one wins, and the others take what it made.
func (c *Certificate) Renew(ctx context.Context) error {
	var err error
	for range 3 {
		if err = c.renew(ctx); !apierrors.IsConflict(err) {
			break
		}
	}
	if err != nil {
		return failed(err, "the certificate of %s", c.cfg.Host)
	}
	return nil
}

func (c *Certificate) renew(ctx context.Context) error {
	secrets, configs := c.client.api.CoreV1().Secrets(c.cfg.Namespace), c.client.api.CoreV1().ConfigMaps(c.cfg.Namespace)
	// With -v=8 client-go logs what it sends and receives: here, keys.
	quiet := klog.NewContext(ctx, klog.Logger{})
	secret, err := secrets.Get(quiet, c.cfg.Secret, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the Secret %s/%s: %w", c.cfg.Namespace, c.cfg.Secret, err)
	}
	made, changed, err := ensure(keysIn(secret), c.cfg.Host, c.now())
	if err != nil {
		return fault.Wrap(fault.Internal, err)
	}
	if changed {
		made.into(secret)
		if _, err := secrets.Update(quiet, secret, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("write the Secret %s/%s: %w", c.cfg.Namespace, c.cfg.Secret, err)
		}
		klog.FromContext(ctx).Info("A certificate for agents was made", "host", c.cfg.Host, "until", made.leaf.NotAfter, "secret", klog.KRef(c.cfg.Namespace, c.cfg.Secret))
	}
	config, err := configs.Get(ctx, c.cfg.ConfigMap, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the ConfigMap %s/%s: %w", c.cfg.Namespace, c.cfg.ConfigMap, err)
	}
	// An earlier authority stays known: what it has signed may still be in use.
	if bundle := withAuthority([]byte(config.Data[keyCA]), made.ca, c.now()); !bytes.Equal(bundle, []byte(config.Data[keyCA])) {
		if config.Data == nil {
			config.Data = map[string]string{}
		}
		config.Data[keyCA] = string(bundle)
		if _, err := configs.Update(ctx, config, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("write the ConfigMap %s/%s: %w", c.cfg.Namespace, c.cfg.ConfigMap, err)
		}
	}
	c.have.Store(made.pair)
	return nil
}

func keysIn(s *corev1.Secret) pems {
	return pems{ca: s.Data[keyCA], caKey: s.Data[keyCAKey], leaf: s.Data[keyCertificate], leafKey: s.Data[keyPrivate]}
}

func (i issued) into(s *corev1.Secret) {
	if s.Data == nil {
		s.Data = map[string][]byte{}
	}
	s.Data[keyCA], s.Data[keyCAKey] = i.pems.ca, i.pems.caKey
	s.Data[keyCertificate], s.Data[keyPrivate] = i.pems.leaf, i.pems.leafKey
}
