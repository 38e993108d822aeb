package kube

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"time"
)

// How long what is made is good, and when it is replaced. An authority is replaced
// long before what it signs could outlive it.
const (
	leafLife, leafRenew = 90 * 24 * time.Hour, 30 * 24 * time.Hour
	caLife, caRenew     = 10 * 365 * 24 * time.Hour, 365 * 24 * time.Hour
	clockSkew           = time.Hour
)

// pems are an authority and a server's certificate as they are kept.
type pems struct{ ca, caKey, leaf, leafKey []byte }

// issued are the same, read.
type issued struct {
	pems     pems
	ca, leaf *x509.Certificate
	pair     *tls.Certificate
}

// ensure gives a certificate for host that is good for a while: the one that is there,
// or a new one, from the authority that is there, or a new one.
func ensure(have pems, host string, now time.Time) (_ issued, changed bool, _ error) {
	ca, caKey := pair(have.ca, have.caKey)
	if ca == nil || !ca.IsCA || now.Add(caRenew).After(ca.NotAfter) {
		var err error
		if ca, caKey, err = sign(nil, nil, "quarry", "", now, caLife); err != nil {
			return issued{}, false, err
		}
		if have.ca, have.caKey, err = encode(ca, caKey); err != nil {
			return issued{}, false, err
		}
		have.leaf = nil
	}
	leaf, leafKey := pair(have.leaf, have.leafKey)
	if leaf == nil || leaf.VerifyHostname(host) != nil || leaf.CheckSignatureFrom(ca) != nil || now.Add(leafRenew).After(leaf.NotAfter) {
		var err error
		if leaf, leafKey, err = sign(ca, caKey, "quarry controller", host, now, leafLife); err != nil {
			return issued{}, false, err
		}
		if have.leaf, have.leafKey, err = encode(leaf, leafKey); err != nil {
			return issued{}, false, err
		}
		changed = true
	}
	return issued{pems: have, ca: ca, leaf: leaf,
		pair: &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: leafKey, Leaf: leaf}}, changed, nil
}

// sign makes a certificate for host, or an authority that signs itself if ca is nil.
func sign(ca *x509.Certificate, caKey *ecdsa.PrivateKey, name, host string, now time.Time, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	about := &x509.Certificate{Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-clockSkew), NotAfter: now.Add(life), BasicConstraintsValid: true}
	if ca == nil {
		about.IsCA, about.MaxPathLenZero, about.KeyUsage = true, true, x509.KeyUsageCertSign
		ca, caKey = about, key
	} else {
		about.DNSNames, about.KeyUsage, about.ExtKeyUsage = []string{host}, x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, about, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, nil, err
	}
	made, err := x509.ParseCertificate(der)
	return made, key, err
}

func encode(cert *x509.Certificate, key *ecdsa.PrivateKey) (certPEM, keyPEM []byte, err error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// pair reads a certificate and its key; nil if they are no such thing.
func pair(certPEM, keyPEM []byte) (*x509.Certificate, *ecdsa.PrivateKey) {
	both, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, nil
	}
	key, ok := both.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil
	}
	return both.Leaf, key
}

// withAuthority adds an authority to those that are known, unless it is there, and
// leaves out what has expired or is no certificate.
func withAuthority(known []byte, ca *x509.Certificate, now time.Time) []byte {
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
	for block, rest := pem.Decode(known); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err == nil && !bytes.Equal(cert.Raw, ca.Raw) && now.Before(cert.NotAfter) {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
		}
	}
	return out
}
