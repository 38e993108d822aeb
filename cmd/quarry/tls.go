package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// certificate is the controller's, read again when its files have changed: whoever
// renews it need not restart anything.
type certificate struct {
	cert, key string // files

	mu   sync.Mutex
	read time.Time // the later of the files' times
	have *tls.Certificate
}

// config for a listener. fault.Invalid: the files cannot be used.
func (c *certificate) config() (*tls.Config, error) {
	if _, err := c.get(nil); err != nil {
		return nil, err
	}
	return tlsConfig(c.get), nil
}

func tlsConfig(get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: get}
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var changed time.Time
	for _, path := range []string{c.cert, c.key} {
		info, err := os.Stat(path)
		if err != nil {
			return c.have, c.unusable(err)
		}
		if info.ModTime().After(changed) {
			changed = info.ModTime()
		}
	}
	if c.have != nil && changed.Equal(c.read) {
		return c.have, nil
	}
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return c.have, c.unusable(err)
	}
	c.have, c.read = &pair, changed
	return c.have, nil
}

// unusable is nil as long as there is a certificate from before: the files may be
// replaced just now.
func (c *certificate) unusable(err error) error {
	if c.have != nil {
		return nil
	}
	return fault.New(fault.Invalid, "--tls-cert-file %s and --tls-private-key-file %s: %w", c.cert, c.key, err)
}

// dialer connects to the controller that leads: of all addresses that its name has,
// the first that answers. The CA is read for each connection.
func dialer(address, caFile string) func(ctx context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fault.New(fault.Invalid, "--controller-ca-file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fault.New(fault.Invalid, "--controller-ca-file %s holds no certificate", caFile)
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, fault.Wrap(fault.Invalid, err)
		}
		all, err := net.DefaultResolver.LookupHost(ctx, host)
		if err != nil {
			return nil, fault.New(fault.Unavailable, "find the controller: %w", err)
		}
		var errs []error
		for _, at := range all {
			conn, err := dialOne(ctx, net.JoinHostPort(at, port), &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: host})
			if err == nil {
				return conn, nil
			}
			errs = append(errs, err)
		}
		return nil, fault.New(fault.Unavailable, "no controller answers at %s: %w", address, errors.Join(errs...))
	}
}

// dialLimit is how long one address may take.
const dialLimit = 5 * time.Second

func dialOne(ctx context.Context, address string, cfg *tls.Config) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	return (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", address)
}

// tokenFrom reads a projected token, which the kubelet renews.
func tokenFrom(file string) func() (string, error) {
	return func() (string, error) {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", fault.New(fault.Invalid, "--token-file: %w", err)
		}
		return strings.TrimSpace(string(b)), nil
	}
}
