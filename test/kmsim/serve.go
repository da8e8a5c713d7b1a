package kmsim

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"strings"
	"time"
)

// maxBody is more than any call to a KMS has.
const maxBody = 64 << 10

// Server is a Sim that listens.
type Server struct {
	*Sim
	Addr  string // HOST:PORT
	CAPEM []byte // the authority that signed its certificate
	http  *http.Server
	done  chan struct{}
}

// Listen serves at addr, such as 127.0.0.1:0, with a certificate for its host from an
// authority that is made for this server alone.
func Listen(addr string) (*Server, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("kmsim: %w", err)
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("kmsim: address %q: %w", addr, err)
	}
	cert, ca, err := newCertificate(host)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("kmsim: making a certificate: %w", err)
	}
	s := &Server{Sim: New(), Addr: l.Addr().String(), CAPEM: ca, done: make(chan struct{})}
	s.http = &http.Server{
		Handler:           s.Sim.handler(),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}},
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0), // clients that hang up are what tests do
	}
	go func() {
		defer close(s.done)
		_ = s.http.ServeTLS(l, "", "") // ends with Close
	}()
	return s, nil
}

// URL is the server's address for HTTP clients.
func (s *Server) URL() string { return "https://" + s.Addr }

// Close ends the server and every connection.
func (s *Server) Close() error {
	s.Sim.Close()
	err := s.http.Close()
	<-s.done
	return err
}

func newCertificate(host string) (cert tls.Certificate, caPEM []byte, err error) {
	now := time.Now()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kmsim authority"}, NotBefore: now.Add(-time.Hour),
		NotAfter: now.AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return cert, nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, nil, err
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kmsim"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{"localhost"}}
	if ip := net.ParseIP(host); ip != nil {
		leaf.IPAddresses = []net.IP{ip}
	} else if host != "" {
		leaf.DNSNames = append(leaf.DNSNames, host)
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), caKey)
	if err != nil {
		return cert, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: leafKey}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), nil
}

// request is one call of a protocol over HTTP.
type request struct {
	*http.Request
	id    string
	fault Fault
	body  []byte
	entry Entry
}

// answer is what a protocol says: its error code if it refuses, and a body.
type answer struct {
	status int
	code   string // empty: ok
	header map[string]string
	body   any // JSON, or a string as it is
}

// handler tells the protocols apart by what only their clients send.
func (s *Sim) handler() http.Handler {
	grpcServer := s.newGoogle()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		isIdentity := r.Header.Get("X-Amz-Target") == "" && isIdentityPath(r)
		fault, latency := s.faultNow()
		if !isIdentity && !s.survives(w, r, fault, latency) {
			return
		}
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			grpcServer.ServeHTTP(w, r)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		req := &request{Request: r, id: newID(), fault: fault, body: body}
		var a answer
		switch {
		case r.Header.Get("X-Amz-Target") != "":
			a = s.answerAWS(req)
		case strings.HasPrefix(r.URL.Path, "/v1/"):
			a = s.answerTransit(req)
		case isIdentity:
			a = s.answerIdentity(req)
		case strings.HasPrefix(r.URL.Path, "/keys/"):
			a = s.answerAzure(req)
		default:
			a = answer{status: http.StatusNotFound, code: "NoSuchProtocol", body: "no protocol of this server has this path\n"}
		}
		s.send(w, req, a)
	})
}

// survives is false if the fault has dealt with the call.
func (s *Sim) survives(w http.ResponseWriter, r *http.Request, fault Fault, latency time.Duration) bool {
	switch fault {
	case BlackHole:
		s.swallowed <- struct{}{}
		s.hold(r.Context(), nil)
		return false
	case Impostor:
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "<html><body>Access denied by the proxy.</body></html>\n")
		return false
	case Latency:
		timer := time.NewTimer(latency)
		defer timer.Stop()
		return s.hold(r.Context(), timer.C)
	}
	return true
}

// hold waits; it is false if the caller gave up or the server closes.
func (s *Sim) hold(ctx context.Context, until <-chan time.Time) bool {
	select {
	case <-ctx.Done():
	case <-s.closed:
	case <-until:
		return true
	}
	return false
}

func (s *Sim) send(w http.ResponseWriter, r *request, a answer) {
	body, isText := a.body.(string)
	if !isText {
		data, err := json.Marshal(a.body)
		if err != nil {
			panic(fmt.Sprintf("kmsim: an answer that is no JSON: %v", err)) // of types of this package
		}
		body = string(data)
	}
	for name, value := range a.header {
		w.Header().Set(name, value)
	}
	if a.status == 0 {
		a.status = http.StatusOK
	}
	if r.entry.Protocol != "" {
		r.entry.RequestID, r.entry.Outcome = r.id, "ok"
		if a.code != "" {
			r.entry.Outcome = a.code
		}
		s.record(r.entry)
	}
	w.WriteHeader(a.status)
	_, _ = io.WriteString(w, body) // a client that went away
}

func decode(data []byte, into any) error {
	if len(data) == 0 {
		return errors.New("empty body")
	}
	return json.Unmarshal(data, into)
}
