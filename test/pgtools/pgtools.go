// Package pgtools runs PostgreSQL's own client programs against a server, and finds the
// server's programs. Tests and benchmarks use it for stock servers and for Holdfast alike,
// so that both are judged by the same tools.
package pgtools

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Major is the PostgreSQL release that Holdfast runs.
const Major = 15

// Dir is the folder of PostgreSQL's programs: $HOLDFAST_PGBIN, Debian's, or that of the
// pg_config in the path.
func Dir() (string, error) {
	candidates := []string{os.Getenv("HOLDFAST_PGBIN"), fmt.Sprintf("/usr/lib/postgresql/%d/bin", Major)}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		candidates = append(candidates, strings.TrimSpace(string(out)))
	}
	for _, dir := range candidates {
		if dir == "" {
			continue
		}
		out, err := exec.Command(filepath.Join(dir, "postgres"), "--version").Output()
		if err == nil && strings.Contains(string(out), fmt.Sprintf(" %d.", Major)) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no PostgreSQL %d found: install it (`make setup`) or name its folder in HOLDFAST_PGBIN", Major)
}

// Target is a server and how to log in to it.
type Target struct {
	Host     string
	Port     int
	User     string
	Password string
	Database string
}

// ParseTarget takes a postgres:// URL apart.
func ParseTarget(raw, password string) (Target, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return Target{}, err
	}
	host, portText, err := net.SplitHostPort(u.Host)
	if err != nil {
		return Target{}, fmt.Errorf("URL %s: %w", raw, err)
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return Target{}, fmt.Errorf("URL %s: %w", raw, err)
	}
	return Target{Host: host, Port: port, User: u.User.Username(), Password: password, Database: strings.TrimPrefix(u.Path, "/")}, nil
}

// InDatabase is the same server, another database.
func (t Target) InDatabase(name string) Target { t.Database = name; return t }

// dialTimeout bounds one attempt to connect.
const dialTimeout = 5 * time.Second

// Config is the target for pgx.
func (t Target) Config() (*pgx.ConnConfig, error) {
	u := url.URL{Scheme: "postgres", User: url.UserPassword(t.User, t.Password), Host: net.JoinHostPort(t.Host, strconv.Itoa(t.Port)),
		Path: "/" + t.Database, RawQuery: "sslmode=disable"}
	cfg, err := pgx.ParseConfig(u.String())
	if err != nil {
		return nil, err
	}
	cfg.ConnectTimeout = dialTimeout
	return cfg, nil
}

// Connect opens one connection.
func (t Target) Connect(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := t.Config()
	if err != nil {
		return nil, err
	}
	return pgx.ConnectConfig(ctx, cfg)
}

// WaitConnect tries to connect until it succeeds or ctx ends.
func (t Target) WaitConnect(ctx context.Context) (*pgx.Conn, error) {
	for {
		conn, err := t.Connect(ctx)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connecting to %s:%d: %w", t.Host, t.Port, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Exec runs statements over one connection of its own.
func (t Target) Exec(ctx context.Context, statements ...string) error {
	conn, err := t.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, s := range statements {
		if _, err := conn.Exec(ctx, s); err != nil {
			return fmt.Errorf("%.80s: %w", s, err)
		}
	}
	return nil
}

// Env is the environment by which libpq's programs reach the target.
func (t Target) Env() []string {
	return append(os.Environ(), "PGHOST="+t.Host, "PGPORT="+strconv.Itoa(t.Port), "PGUSER="+t.User,
		"PGPASSWORD="+t.Password, "PGDATABASE="+t.Database, "PGCONNECT_TIMEOUT=10", "LC_ALL=C")
}

// Command prepares one of PostgreSQL's client programs against the target.
func (t Target) Command(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(dir, program), args...)
	cmd.Env = t.Env()
	return cmd, nil
}

// Run runs a client program and returns its standard output; its error holds what the
// program said.
func (t Target) Run(ctx context.Context, program string, args ...string) (string, error) {
	cmd, err := t.Command(ctx, program, args...)
	if err != nil {
		return "", err
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s%s", program, strings.Join(args, " "), errors.Join(err, ctx.Err()), tail(out.String()), tail(errOut.String()))
	}
	return out.String(), nil
}

func tail(s string) string {
	const most = 4000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}

// Amcheck has pg_amcheck read every heap and btree: each index entry is looked up from the
// heap, and each child from its parent.
func (t Target) Amcheck(ctx context.Context) error {
	_, err := t.Run(ctx, "pg_amcheck", "--install-missing", "--heapallindexed", "--parent-check", "--database", t.Database)
	return err
}

// Dump writes a pg_dump of the target's database to a file, without what differs between
// two dumps of the same content: the tool's random restrict key, and where sequences stand
// (PostgreSQL skips up to 32 values at a crash).
func (t Target) Dump(ctx context.Context, file string, options ...string) error {
	out, err := t.Run(ctx, "pg_dump", append(append([]string{"--no-sync"}, options...), t.Database)...)
	if err != nil {
		return err
	}
	var b strings.Builder
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, `\restrict `) || strings.HasPrefix(line, `\unrestrict `) || strings.HasPrefix(line, "SELECT pg_catalog.setval(") {
			continue
		}
		b.WriteString(line)
	}
	return os.WriteFile(file, []byte(b.String()), 0o600)
}

// FirstDifference tells where two text files part; it is empty when they are equal.
func FirstDifference(a, b string) (string, error) {
	x, err := os.ReadFile(a)
	if err != nil {
		return "", err
	}
	y, err := os.ReadFile(b)
	if err != nil {
		return "", err
	}
	if bytes.Equal(x, y) {
		return "", nil
	}
	xs, ys := strings.Split(string(x), "\n"), strings.Split(string(y), "\n")
	for i := range max(len(xs), len(ys)) {
		var l, r string
		if i < len(xs) {
			l = xs[i]
		}
		if i < len(ys) {
			r = ys[i]
		}
		if l != r || i >= len(xs) || i >= len(ys) {
			return fmt.Sprintf("line %d of %d and %d:\n- %.300s\n+ %.300s", i+1, len(xs), len(ys), l, r), nil
		}
	}
	return "files differ", nil
}

// FreePort is a TCP port on loopback that was free a moment ago.
func FreePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
