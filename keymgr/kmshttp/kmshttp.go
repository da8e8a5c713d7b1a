// Package kmshttp is how the adapters of key management services reach them: over verified
// TLS and nothing else, so that what answers is the service, and never by a connection that
// outlives the call that it failed.
package kmshttp

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"os"
)

// TLS trusts the authorities in caFile and no others, or the system's if it is empty.
func TLS(caFile string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile == "" {
		return c, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("the KMS's authorities (ca_file): %w", err)
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("the KMS's authorities: %s holds no certificate in PEM", caFile)
	}
	return c, nil
}

// Client follows no redirect, since an answer from elsewhere is none of the service's. It speaks
// HTTP/1.1, where a call that runs out of time takes its connection with it; HTTP/2 would
// send the next call into the same dead connection.
func Client(caFile string) (*http.Client, error) {
	conf, err := TLS(caFile)
	if err != nil {
		return nil, err
	}
	t := http.DefaultTransport.(*http.Transport).Clone() // which is of this type: net/http
	t.TLSClientConfig = conf
	t.ForceAttemptHTTP2 = false
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	track(t)
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

// CheckURL refuses what is not https://HOST[:PORT][/PATH].
func CheckURL(what, s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("%s %q: %w", what, s, err)
	}
	if u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%s %q: want https://HOST, with a port if need be: a KMS is reached over TLS only", what, s)
	}
	return nil
}

// NewID names a call for services that let the caller do it.
func NewID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails: crypto/rand
	return "holdfast-" + hex.EncodeToString(b)
}
