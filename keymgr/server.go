package keymgr

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// Config configures a Server.
type Config struct {
	Dir       string     // of the audit log; it must exist
	BlobStore blob.Store // keeps the wrapped KEKs
	Provider  Provider   // holds the CMKs
	// CMKs are the only CMKs that projects may have; empty: any. Which one a project has is told by
	// an object in the bucket, and who can write to the bucket is not to choose under whose key
	// data is sealed from then on (K3).
	CMKs          []string
	CheckInterval time.Duration // how old the last good check of a CMK may be; 0: 5 s
	LeaseTTL      time.Duration // how long a node may hold DEKs unrenewed; 0: 8 s
	// Grace is for how long keys without a grace of their own may be used after their KMS stopped
	// answering; nil: 10 minutes.
	Grace  *time.Duration
	Logger *slog.Logger // nil: none

	scrub func() // nil: scrubMemory; for tests
}

func (c *Config) ensureDefaults() {
	if c.CheckInterval == 0 {
		c.CheckInterval = 5 * time.Second
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = 8 * time.Second
	}
	if c.Grace == nil {
		grace := 10 * time.Minute
		c.Grace = &grace
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.scrub == nil {
		c.scrub = scrubMemory
	}
}

func (c *Config) validate() error {
	if c.Dir == "" || c.BlobStore == nil || c.Provider == nil {
		return errors.New("key manager: want a folder, a bucket and a KMS")
	}
	if c.CheckInterval < 0 || c.LeaseTTL < 0 || *c.Grace < 0 {
		return fmt.Errorf("key manager: check interval %v, lease time %v and grace %v cannot be negative", c.CheckInterval, c.LeaseTTL, *c.Grace)
	}
	return nil
}

const (
	// providerTimeout bounds one call to the KMS.
	providerTimeout = 4 * time.Second
	// callTimeout bounds a call of this service whose caller set no earlier bound.
	callTimeout = 15 * time.Second
	// closeTimeout bounds the keeping of receipts when the server is closed.
	closeTimeout = 2 * time.Second
	// maxBatch bounds the DEKs in one call.
	maxBatch = 1024
	// maxNode bounds the name of a node, in bytes.
	maxNode = 256
)

// Server implements pb.KeyManagerServer and pb.KeyAdminServer.
type Server struct {
	pb.UnimplementedKeyManagerServer
	pb.UnimplementedKeyAdminServer
	cfg      Config
	audit    *auditLog
	resolver *resolver
	watchers *watchers
	receipts *receiptBook
	services *serviceSlots
	began    time.Time
	rewraps  turns
	dirty    chan struct{} // of one place: memory is to be scrubbed
	stop     context.CancelFunc
	ctx      context.Context // ends with Close
	wg       sync.WaitGroup

	closing  sync.Once
	closeErr error

	mu struct {
		sync.Mutex
		machine *lease.Machine // reached by withMachine
		keys    map[keyID]*keyState
		// refused holds who was told no since the key's last check, so that the audit log
		// has it once.
		refused map[keyID]map[string]bool
		// checking holds the keys that tick is having checked.
		checking map[string]bool
	}
}

var (
	_ pb.KeyManagerServer = (*Server)(nil)
	_ pb.KeyAdminServer   = (*Server)(nil)
)

// New opens a key manager.
func New(cfg Config) (*Server, error) {
	cfg.ensureDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	audit, err := openAudit(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, audit: audit, resolver: newResolver(), watchers: newWatchers(), services: newServiceSlots(), began: time.Now(),
		dirty: make(chan struct{}, 1)}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.receipts = newReceiptBook(s)
	s.mu.machine = lease.New(cfg.times())
	s.mu.keys = make(map[keyID]*keyState)
	s.mu.refused = make(map[keyID]map[string]bool)
	s.mu.checking = make(map[string]bool)
	s.wg.Add(4)
	go s.tick()
	go s.keepScrubbed()
	go s.receipts.run()
	go s.keepRewrapping()
	return s, nil
}

// times are the lease machine's.
func (c *Config) times() lease.Config {
	return lease.Config{
		CheckInterval: c.CheckInterval,
		Lead:          c.CheckInterval / 5,
		TTL:           c.LeaseTTL,
		RetryGap:      min(c.CheckInterval/10, 500*time.Millisecond),
		MaxRetryGap:   c.CheckInterval / 2,
		Grace:         *c.Grace,
		Idle:          c.LeaseTTL + c.CheckInterval,
		Resume:        30 * time.Second,
		ResumeQuiet:   2 * time.Second,
	}
}

// Close wipes all keys. Calls that are under way fail. Closing again does nothing.
func (s *Server) Close() error {
	s.closing.Do(func() { s.closeErr = s.close() })
	return s.closeErr
}

func (s *Server) close() error {
	s.stop()
	s.wg.Wait()
	s.mu.Lock()
	for _, k := range s.mu.keys {
		k.wipe()
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	s.receipts.keepAll(ctx)
	return s.audit.Close()
}

// tick lets time pass: leases run out, keys in use are checked before the last answer is old,
// keys that nobody uses are forgotten.
func (s *Server) tick() {
	defer s.wg.Done()
	every := time.NewTicker(max(min(s.cfg.LeaseTTL, s.cfg.CheckInterval)/20, 10*time.Millisecond))
	defer every.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-every.C:
		}
		if err := s.tickOnce(); err != nil && s.ctx.Err() == nil {
			s.cfg.Logger.Error("the end of leases could not be audited", "err", err)
		}
	}
}

func (s *Server) tickOnce() error {
	var t lease.Ticked
	var forgotten []keyID
	s.withMachine(func(m *lease.Machine) {
		t = m.Tick(boottime.Now())
		for _, name := range t.Forget {
			if k := s.mu.keys[parseKeyID(name)]; k != nil && k.wipe() {
				forgotten = append(forgotten, k.id)
			}
		}
		for _, name := range t.Gone {
			delete(s.mu.keys, parseKeyID(name))
			delete(s.mu.refused, parseKeyID(name))
		}
	})
	if len(forgotten) > 0 {
		s.scrub()
	}
	for _, name := range t.Check {
		s.startCheck(name)
	}
	var events []Event
	for _, l := range t.Expired {
		events = append(events, parseKeyID(l.Key).event(Event{Event: "lease.expired", Outcome: "ok", Node: l.Node, Lease: l.ID}))
	}
	for _, id := range forgotten {
		events = append(events, id.event(Event{Event: "kek.forgotten", Outcome: "ok", Detail: "no lease and no fresh answer of the KMS"}))
	}
	if len(events) == 0 {
		return nil
	}
	return s.audit.append(s.ctx, events...)
}

func newLeaseID() string {
	id := make([]byte, 16)
	rand.Read(id)
	return hex.EncodeToString(id)
}
