// Package hook is where a cloud's event service tells, over HTTP, that something was done to a
// key: EventBridge with CloudTrail's records, Event Grid, and Pub/Sub with Cloud Audit Logs. A
// notice is only a hint to check the key at once; what the KMS then says decides. So a forged
// notice costs one call of the KMS, and a lost one costs time: the key is checked anyway.
//
// A notice bears a token, in the header Authorization ("Bearer TOKEN") or, for services that
// cannot set one, in the query (?token=TOKEN). Without TLS the hook listens on loopback or a
// Unix socket alone.
package hook

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// Checker has keys checked. It is the key manager.
type Checker interface {
	// Notified checks the keys whose CMK matches, and tells which they are.
	Notified(ctx context.Context, source, what string, names []string, matches func(cmk string) bool) ([]string, error)
}

// Config configures a hook.
type Config struct {
	Listen    string // HOST:PORT or unix:/path
	TokenFile string // read for each notice
	CertFile  string // TLS, with KeyFile; required off loopback
	KeyFile   string
	CAFile    string // authorities of clients' certificates, which are then wanted; empty: none
	Checker   Checker
	Logger    *slog.Logger
}

const (
	maxBody     = 512 << 10 // bytes of a notice: the services' own limit is 256 KiB, before base64
	minToken    = 16        // bytes
	maxToken    = 4096
	maxConns    = 64
	queueLength = 256 // notices that wait; past it a service is told to try again
	checkers    = 4   // notices that are worked on at once
	checkLimit  = 15 * time.Second

	// ratePerSecond and rateBurst bound the notices that are taken; past it a service is told to
	// try again later, which all three do.
	ratePerSecond = 20
	rateBurst     = 100
)

// Hook listens until it is closed.
type Hook struct {
	cfg    Config
	server *http.Server
	addr   net.Addr
	ctx    context.Context // ends with Close
	stop   context.CancelFunc
	wg     sync.WaitGroup
	queue  chan Notice
	limit  bucket
}

// Start begins to listen.
func Start(cfg Config) (*Hook, error) {
	if _, err := readToken(cfg.TokenFile); err != nil {
		return nil, err
	}
	conf, err := tlsConfig(cfg)
	if err != nil {
		return nil, err
	}
	l, err := listen(cfg.Listen, conf != nil)
	if err != nil {
		return nil, err
	}
	h := &Hook{cfg: cfg, addr: l.Addr(), queue: make(chan Notice, queueLength), limit: bucket{tokens: rateBurst, last: time.Now()}}
	h.ctx, h.stop = context.WithCancel(context.Background())
	h.server = &http.Server{Handler: http.HandlerFunc(h.serve), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(cfg.Logger.Handler(), slog.LevelDebug)}
	l = &limitListener{Listener: l, places: make(chan struct{}, maxConns)}
	if conf != nil {
		l = tls.NewListener(l, conf)
	}
	for range checkers {
		h.wg.Go(h.work)
	}
	h.wg.Go(func() {
		if err := h.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			cfg.Logger.Error("the hook for notices of keys has stopped: keys are checked on time, but not at once", "err", err)
		}
	})
	return h, nil
}

// Addr is where the hook listens.
func (h *Hook) Addr() net.Addr { return h.addr }

// Close ends it; notices that wait are dropped.
func (h *Hook) Close() error {
	h.stop()
	err := h.server.Close()
	h.wg.Wait()
	return err
}

func tlsConfig(cfg Config) (*tls.Config, error) {
	if cfg.CertFile == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("hook: %w", err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if cfg.CAFile == "" {
		return conf, nil
	}
	pem, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("hook: %w", err)
	}
	conf.ClientCAs, conf.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !conf.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("hook: ca_file %s has no certificate", cfg.CAFile)
	}
	return conf, nil
}

func listen(addr string, secure bool) (net.Listener, error) {
	if path, isUnix := strings.CutPrefix(addr, "unix:"); isUnix {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("hook: removing the stale socket: %w", err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			return nil, fmt.Errorf("hook: %w", err)
		}
		return l, os.Chmod(path, 0o600)
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("hook: address %q: want HOST:PORT or unix:/path: %w", addr, err)
	}
	if ip := net.ParseIP(host); !secure && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("hook: address %q is not on loopback: set cert_file and key_file, since the token would travel in the clear", addr)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("hook: %w", err)
	}
	return l, nil
}

func readToken(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("hook: token_file: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if len(token) < minToken || len(token) > maxToken {
		return nil, fmt.Errorf("hook: token_file %s has a token of %d bytes, want %d..%d", file, len(token), minToken, maxToken)
	}
	return []byte(token), nil
}

// authorized compares tokens in a time that does not depend on what they are, nor on how long.
func (h *Hook) authorized(r *http.Request) (bool, error) {
	want, err := readToken(h.cfg.TokenFile)
	if err != nil {
		return false, err
	}
	given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		given = r.URL.Query().Get("token")
	}
	a, b := sha256.Sum256(want), sha256.Sum256([]byte(given))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1, nil
}

func (h *Hook) serve(w http.ResponseWriter, r *http.Request) {
	ok, err := h.authorized(r)
	switch {
	case err != nil:
		h.cfg.Logger.Error("a notice of a key could not be taken", "err", err)
		http.Error(w, "the token cannot be read here", http.StatusServiceUnavailable)
	case !ok:
		http.Error(w, "the token is missing or wrong", http.StatusUnauthorized)
	case r.Method == http.MethodOptions && r.Header.Get("WebHook-Request-Origin") != "":
		// CloudEvents' way to ask whether this is the right address.
		w.Header().Set("WebHook-Allowed-Origin", r.Header.Get("WebHook-Request-Origin"))
		w.WriteHeader(http.StatusOK)
	case r.Method != http.MethodPost:
		http.Error(w, "want POST", http.StatusMethodNotAllowed)
	case !h.limit.take(time.Now()):
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many notices: try again", http.StatusTooManyRequests)
	default:
		h.take(w, r)
	}
}

func (h *Hook) take(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		http.Error(w, "the body is too long, or did not come", http.StatusRequestEntityTooLarge)
		return
	}
	n, err := Parse(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if n.Validation != "" {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"validationResponse": n.Validation}) // a lost answer is asked for again
		return
	}
	select {
	case h.queue <- n:
		w.WriteHeader(http.StatusAccepted)
	default:
		http.Error(w, "too many notices wait: try again", http.StatusServiceUnavailable)
	}
}

// work checks keys. The services wait for no check: some give up after 5 s.
func (h *Hook) work() {
	for {
		select {
		case n := <-h.queue:
			h.check(n)
		case <-h.ctx.Done():
			return
		}
	}
}

func (h *Hook) check(n Notice) {
	ctx, cancel := context.WithTimeout(h.ctx, checkLimit)
	defer cancel()
	keys, err := h.cfg.Checker.Notified(ctx, n.Source, n.What, n.Names, n.Matches)
	log := h.cfg.Logger.With("source", n.Source, "what", n.What, "names", n.Names, "keys", keys)
	if err != nil {
		log.Warn("a notice of a key: not all that it names could be checked", "err", err)
		return
	}
	log.Info("a notice of a key: what it names was checked")
}

// bucket lets through rateBurst, and ratePerSecond on the long run.
type bucket struct {
	sync.Mutex
	tokens float64
	last   time.Time
}

func (b *bucket) take(now time.Time) bool {
	b.Lock()
	defer b.Unlock()
	b.tokens = min(rateBurst, b.tokens+ratePerSecond*max(0, now.Sub(b.last).Seconds()))
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// limitListener bounds the connections that are open.
type limitListener struct {
	net.Listener
	places chan struct{}
}

type limitConn struct {
	net.Conn
	once  sync.Once
	leave func()
}

// Accept closes at once what is too much: a place may not come free while Accept waits for it.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.places <- struct{}{}:
			return &limitConn{Conn: c, leave: func() { <-l.places }}, nil
		default:
			c.Close()
		}
	}
}

func (c *limitConn) Close() error {
	c.once.Do(c.leave)
	return c.Conn.Close()
}
