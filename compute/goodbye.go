package compute

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/compute/goodbye"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyloss"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// What Postgres's clients may still be told after the lease's end comes out of the kill time (K2).
const (
	goodbyeTime = 250 * time.Millisecond // for all clients together
	askTime     = 50 * time.Millisecond  // to ask the key manager why
)

// KeyLost tells whether err is about a key that cannot be used: this process's own lease, or what a
// page server or safekeeper said of theirs.
func KeyLost(err error) bool {
	switch rpc.Reason(err) {
	case pb.ErrorDetail_KEY_REVOKED, pb.ErrorDetail_KEY_UNREACHABLE:
		return true
	}
	return errors.Is(err, keyring.ErrRevoked) || errors.Is(err, keyring.ErrUnreachable)
}

// parting is what a postgres needs to part with its clients in words.
type parting struct {
	once sync.Once
	why  func(reason error) keyloss.Notice // nil: nobody knows
	life context.Context                   // the agent's
	log  *slog.Logger

	clients struct {
		sync.Mutex
		encrypted bool                    // there may be clients that must not be written to
		plain     map[netip.AddrPort]bool // clients that may be, in any case
	}
}

// goodbye tells the clients why they are about to be cut off. It takes goodbyeTime and askTime at
// most; Postgres serves nobody after it. Who comes second waits for the first.
func (p *postgres) goodbye(reason error) {
	p.parting.once.Do(func() {
		port, err := net.LookupPort("tcp", p.settings.Port())
		if p.parting.why == nil || err != nil {
			return
		}
		notice := p.parting.why(reason)
		began := time.Now()
		told := goodbye.Say(goodbye.Server{PID: p.PID(), Port: port, Plain: p.isPlain}, notice.Fatal(keyloss.AdminShutdown), goodbyeTime)
		p.parting.log.Info("clients were told that the key is gone", "clients", told.Clients, "in_our_words", told.Ours,
			"in_postgres_words", told.Theirs, "took", time.Since(began).Round(time.Millisecond).String())
	})
}

func (p *postgres) isPlain(client netip.AddrPort) bool {
	c := &p.parting.clients
	c.Lock()
	defer c.Unlock()
	return !c.encrypted || c.plain[client]
}

// encryption asks which connections are under TLS or GSSAPI encryption, and whether any may be.
const encryption = `SELECT pg_catalog.current_setting('ssl'), pg_catalog.bool_or(gss_enc), COALESCE(pg_catalog.string_agg(
client_addr::pg_catalog.text OPERATOR(pg_catalog.||) ' ' OPERATOR(pg_catalog.||) client_port::pg_catalog.text, ',') FILTER (WHERE NOT ssl AND NOT gss_enc), '')
FROM pg_catalog.pg_stat_get_activity(NULL) WHERE client_port OPERATOR(pg_catalog.>) 0`

// noteClients remembers which clients can be written to.
func (p *postgres) noteClients(ctx context.Context, conn *pgconn.PgConn) error {
	results, err := conn.Exec(ctx, encryption).ReadAll()
	if err != nil {
		return err
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 3 {
		return errors.New("asking which clients are encrypted: not one row of three columns")
	}
	row := results[0].Rows[0]
	plain := make(map[netip.AddrPort]bool)
	for client := range strings.SplitSeq(string(row[2]), ",") {
		addr, port, _ := strings.Cut(client, " ")
		if at, err := netip.ParseAddrPort(net.JoinHostPort(hostOf(addr), port)); err == nil {
			plain[netip.AddrPortFrom(at.Addr().Unmap(), at.Port())] = true
		}
	}
	c := &p.parting.clients
	c.Lock()
	defer c.Unlock()
	c.encrypted, c.plain = string(row[0]) != "off" || string(row[1]) == "t", plain
	return nil
}

// hostOf is an inet as text without its mask.
func hostOf(inet string) string { host, _, _ := strings.Cut(inet, "/"); return host }

// keyStatus asks the key manager for the state of the branch's key.
func (a *agent) keyStatus(ctx context.Context) (*pb.KeyStatusResponse, error) {
	return pb.NewKeyManagerClient(a.keyConn).KeyStatus(ctx, &pb.KeyStatusRequest{Project: a.cfg.Project, Branch: a.cfg.Branch})
}

// learnKey asks, while all is well, whose key it is: when it is gone, there may be nobody to ask.
func (a *agent) learnKey(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if st, err := a.keyStatus(ctx); err == nil {
		a.key.Store(st)
	}
}

// keyNotice is what to tell clients when the lease has ended for a reason.
func (a *agent) keyNotice(reason error) keyloss.Notice {
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	st, err := a.keyStatus(ctx)
	if err != nil {
		st = a.key.Load()
	}
	return keyloss.Of(a.cfg.Project, lost(st, reason))
}

// lost is a status that agrees with the reason for which a lease has ended: the key manager may have
// been asked before, or when all was well again.
func lost(st *pb.KeyStatusResponse, reason error) *pb.KeyStatusResponse {
	if st == nil {
		st = &pb.KeyStatusResponse{}
	}
	if st.State != "" && !pb.KeyUsable(st.State) {
		return st
	}
	st = proto.CloneOf(st)
	st.State, st.SinceUnixMs = pb.KeyUnreachable, 0
	if errors.Is(reason, keyring.ErrRevoked) || rpc.Reason(reason) == pb.ErrorDetail_KEY_REVOKED {
		st.State = pb.KeyRevoked
	}
	if by := keyring.ControlledBy(reason); by != "" {
		st.ControlledBy = by
	}
	return st
}

// tell writes an event for who started this process.
func tell(event string) error {
	return json.NewEncoder(os.Stdout).Encode(struct {
		Event string `json:"event"`
	}{event})
}
