package hook

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const token = "a token of some length"

// checker records what is to be checked.
type checker struct{ calls chan []string }

func (c *checker) Notified(_ context.Context, source, what string, names []string, _ func(string) bool) ([]string, error) {
	c.calls <- append([]string{source, what}, names...)
	return nil, errors.New("as if the KMS did not answer")
}

type fixture struct {
	t       *testing.T
	hook    *Hook
	checker *checker
	client  *http.Client
	url     string
	token   string // the file
}

func start(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &checker{calls: make(chan []string, 1000)}
	cfg := Config{Listen: "127.0.0.1:0", TokenFile: file, Checker: c, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	h, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return &fixture{t: t, hook: h, checker: c, client: &http.Client{}, url: "http://" + h.Addr().String() + "/", token: file}
}

func (f *fixture) do(method, query, bearer, body string, header ...string) (int, string) {
	f.t.Helper()
	req, err := http.NewRequestWithContext(f.t.Context(), method, f.url+query, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := f.client.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func (f *fixture) want(what string, status int, got int, text string) {
	f.t.Helper()
	if got != status {
		f.t.Errorf("%s: status %d (%s), want %d", what, got, text, status)
	}
	if strings.Contains(text, token) {
		f.t.Errorf("%s: the answer has the token", what)
	}
}

func TestNoticesReachTheChecker(t *testing.T) {
	f := start(t, nil)
	status, text := f.do("POST", "", token, disableKey)
	f.want("EventBridge", http.StatusAccepted, status, text)
	if got := <-f.checker.calls; got[0] != "EventBridge" || got[1] != "DisableKey" || len(got) != 4 {
		t.Errorf("checked %v", got)
	}
	status, text = f.do("POST", "?token="+strings.ReplaceAll(token, " ", "+"), "", pubSub(logEntry))
	f.want("Pub/Sub, the token in the query", http.StatusAccepted, status, text)
	if got := <-f.checker.calls; got[0] != "Pub/Sub" {
		t.Errorf("checked %v", got)
	}
}

func TestHandshakes(t *testing.T) {
	f := start(t, nil)
	status, text := f.do("POST", "", token, validation)
	f.want("Event Grid", http.StatusOK, status, text)
	if strings.TrimSpace(text) != `{"validationResponse":"512d38b6"}` {
		t.Errorf("answer %s", text)
	}
	status, text = f.do("OPTIONS", "", token, "", "WebHook-Request-Origin", "eventgrid.azure.net")
	f.want("CloudEvents", http.StatusOK, status, text)
	if len(f.checker.calls) != 0 {
		t.Error("a handshake had keys checked")
	}
}

func TestStrangersAreRefused(t *testing.T) {
	f := start(t, nil)
	for _, given := range []string{"", "wrong", token + "x", token[:len(token)-1]} {
		status, text := f.do("POST", "", given, disableKey)
		f.want("token "+given, http.StatusUnauthorized, status, text)
		status, text = f.do("POST", "", given, validation)
		f.want("validation with token "+given, http.StatusUnauthorized, status, text)
	}
	status, text := f.do("GET", "", token, "")
	f.want("GET", http.StatusMethodNotAllowed, status, text)
	status, text = f.do("POST", "", token, "{}")
	f.want("no notice", http.StatusBadRequest, status, text)
	status, text = f.do("POST", "", token, strings.Repeat(" ", maxBody+1))
	f.want("too long", http.StatusRequestEntityTooLarge, status, text)
	// The token is another from now on.
	if err := os.WriteFile(f.token, []byte("another token, as long"), 0o600); err != nil {
		t.Fatal(err)
	}
	status, text = f.do("POST", "", token, disableKey)
	f.want("the old token", http.StatusUnauthorized, status, text)
	if err := os.Remove(f.token); err != nil {
		t.Fatal(err)
	}
	status, text = f.do("POST", "", "", disableKey)
	f.want("no token to compare with", http.StatusServiceUnavailable, status, text)
	if len(f.checker.calls) != 0 {
		t.Error("a stranger had keys checked")
	}
}

func TestRateIsBounded(t *testing.T) {
	b := bucket{tokens: rateBurst, last: time.Unix(0, 0)}
	took := 0
	for i := range 10_000 { // within ten seconds
		if b.take(time.Unix(0, int64(i)*int64(time.Millisecond))) {
			took++
		}
	}
	if want := rateBurst + 10*ratePerSecond; took < want-1 || took > want {
		t.Errorf("%d were taken, want %d", took, want)
	}
	f := start(t, nil)
	f.hook.limit.Lock()
	f.hook.limit.tokens, f.hook.limit.last = 0, time.Now().Add(time.Hour)
	f.hook.limit.Unlock()
	status, text := f.do("POST", "", token, disableKey)
	f.want("too many", http.StatusTooManyRequests, status, text)
}

func TestOffLoopbackNeedsTLS(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	short := filepath.Join(t.TempDir(), "short")
	if err := errors.Join(os.WriteFile(file, []byte(token), 0o600), os.WriteFile(short, []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]Config{
		"all addresses":  {Listen: "0.0.0.0:0", TokenFile: file},
		"no host":        {Listen: ":0", TokenFile: file},
		"no port":        {Listen: "127.0.0.1", TokenFile: file},
		"no token file":  {Listen: "127.0.0.1:0", TokenFile: file + "x"},
		"a short token":  {Listen: "127.0.0.1:0", TokenFile: short},
		"no certificate": {Listen: "127.0.0.1:0", TokenFile: file, CertFile: file, KeyFile: file},
	} {
		cfg.Logger = slog.New(slog.DiscardHandler)
		if h, err := Start(cfg); err == nil {
			h.Close()
			t.Errorf("%s: it listens", name)
		}
	}
}

// selfSigned makes a certificate for 127.0.0.1 and its key, in files.
func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hook"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	err = errors.Join(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func TestTLSAndClientCertificates(t *testing.T) {
	cert, key := selfSigned(t)
	f := start(t, func(c *Config) { c.CertFile, c.KeyFile, c.CAFile = cert, key, cert })
	data, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(data)
	f.url = strings.Replace(f.url, "http:", "https:", 1)
	f.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	req, err := http.NewRequestWithContext(t.Context(), "POST", f.url, strings.NewReader(disableKey))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if resp, err := f.client.Do(req); err == nil {
		resp.Body.Close()
		t.Errorf("without a client's certificate: %s", resp.Status)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	f.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}
	status, text := f.do("POST", "", token, disableKey)
	f.want("with one", http.StatusAccepted, status, text)
}
