package canary

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/holdfastdb/holdfast/test/pgtools"
)

// Settings are what the workload needs of a server. Everything that a client says goes to
// the server's log: what rests includes that log.
func Settings() map[string]string {
	return map[string]string{"max_prepared_transactions": "5", "log_statement": "all", "log_min_messages": "info",
		"log_line_prefix": "%m %u %a ", "shared_buffers": "4MB", "logging_collector": "off", "autovacuum_naptime": "1s"}
}

// Workload is the canaries and the sessions that keep them alive.
type Workload struct {
	Canaries map[string]string // by kind
	sessions []*pgx.Conn
}

func (w *Workload) canary(kind string) string {
	c := NewCanary()
	w.Canaries[kind] = c
	return c
}

// Close ends the sessions: temporary tables and files go.
func (w *Workload) Close() {
	for _, c := range w.sessions {
		_ = c.Close(context.Background()) // a killed server's connections are broken
	}
}

// Run puts canaries through every path. The sessions stay open until Close.
func Run(ctx context.Context, t pgtools.Target) (*Workload, error) {
	w := &Workload{Canaries: make(map[string]string)}
	for _, step := range []func(context.Context, *pgx.Conn) error{
		w.tables, w.toast, w.objects, w.rolledBack, w.refused, w.prepared, w.temporary, w.spilledSort, w.notify,
	} {
		conn, err := t.Connect(ctx)
		if err != nil {
			w.Close()
			return nil, err
		}
		w.sessions = append(w.sessions, conn)
		if err := step(ctx, conn); err != nil {
			w.Close()
			return nil, err
		}
	}
	return w, t.Exec(ctx, "CHECKPOINT")
}

func exec(ctx context.Context, c *pgx.Conn, statements ...string) error {
	for _, s := range statements {
		if _, err := c.Exec(ctx, s); err != nil {
			return fmt.Errorf("%.100s: %w", s, err)
		}
	}
	return nil
}

func (w *Workload) tables(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c,
		"CREATE TABLE t (k text PRIMARY KEY, v text)",
		"CREATE INDEX t_expression ON t ((v || '"+w.canary("index expression")+"'))",
		"INSERT INTO t VALUES ('"+w.canary("index key")+"', '"+w.canary("table")+"')",
		// More than shared_buffers: a checkpoint does not write unlogged pages.
		"CREATE UNLOGGED TABLE u AS SELECT '"+w.canary("unlogged table")+"' || repeat('z', 500) FROM generate_series(1, 16000)",
		"CREATE TABLE g (v tsvector)", "CREATE INDEX g_gin ON g USING gin (v)",
		"INSERT INTO g VALUES (to_tsvector('simple', '"+strings.ToLower(w.lower("gin index"))+"'))",
		"SELECT lo_from_bytea(0, '"+w.canary("large object")+"'::bytea)",
		"VACUUM t")
}

// lower is a canary that survives a text search parser.
func (w *Workload) lower(kind string) string {
	c := strings.ToLower(NewCanary())
	w.Canaries[kind] = c
	return c
}

func (w *Workload) toast(ctx context.Context, c *pgx.Conn) error {
	pad := func(kind string) string { return "'" + w.canary(kind) + "' || repeat('abcdefghij', 2000)" }
	return exec(ctx, c,
		"CREATE TABLE toasted (plain text, pglz text, lz4 text)",
		"ALTER TABLE toasted ALTER plain SET STORAGE EXTERNAL, ALTER pglz SET COMPRESSION pglz, ALTER lz4 SET COMPRESSION lz4",
		"INSERT INTO toasted (plain) VALUES ("+pad("TOAST, not compressed")+")",
		// Compressed to some hundred bytes these stay in the table: random text makes them leave it.
		"INSERT INTO toasted (pglz) SELECT "+pad("TOAST, pglz")+" || string_agg(md5(i::text), '') FROM generate_series(1, 400) i",
		"INSERT INTO toasted (lz4) SELECT "+pad("TOAST, lz4")+" || string_agg(md5(i::text), '') FROM generate_series(1, 400) i")
}

func (w *Workload) objects(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c,
		"CREATE ROLE clerk LOGIN PASSWORD '"+w.canary("role password")+"'",
		"COMMENT ON TABLE t IS '"+w.canary("comment")+"'",
		"CREATE TABLE \""+w.canary("table name")+"\" (i int)",
		"CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$ SELECT '"+w.canary("function body")+"'::text $$",
		"ALTER SYSTEM SET cluster_name = '"+w.canary("ALTER SYSTEM")+"'",
		"ANALYZE t",
		"SET application_name = '"+w.canary("application name")+"'", "SELECT 1")
}

func (w *Workload) rolledBack(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c, "BEGIN", "CREATE TABLE r AS SELECT '"+w.canary("rolled back")+"' || i FROM generate_series(1, 100) i", "ROLLBACK")
}

// refused has the server write a row's content into its log.
func (w *Workload) refused(ctx context.Context, c *pgx.Conn) error {
	key := w.canary("duplicate key in the server log")
	if err := exec(ctx, c, "CREATE TABLE d (k text PRIMARY KEY)", "INSERT INTO d VALUES ('"+key+"')"); err != nil {
		return err
	}
	_, err := c.Exec(ctx, "INSERT INTO d VALUES ('"+key+"')")
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || !strings.Contains(pgErr.Detail, key) {
		return fmt.Errorf("a duplicate key was answered with %v", err)
	}
	return nil
}

func (w *Workload) prepared(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c, "CREATE TABLE p (v text)", "BEGIN", "INSERT INTO p VALUES ('"+w.canary("row of a prepared transaction")+"')",
		"PREPARE TRANSACTION '"+w.canary("name of a prepared transaction")+"'")
}

// temporary fills more than temp_buffers, so that its pages are written.
func (w *Workload) temporary(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c, "SET temp_buffers = '800kB'",
		"CREATE TEMP TABLE tmp AS SELECT '"+w.canary("temporary table")+"' || repeat('x', 500) AS v FROM generate_series(1, 8000)",
		"SELECT count(*) FROM tmp")
}

// spilledSort leaves a sort that is on disk open.
func (w *Workload) spilledSort(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c, "SET work_mem = '64kB'", "BEGIN",
		"DECLARE spilled CURSOR FOR SELECT '"+w.canary("spilled sort")+"' || md5(i::text) AS v FROM generate_series(1, 200000) i ORDER BY v",
		"FETCH 1 FROM spilled")
}

// notify fills more than the buffers of pg_notify for a listener that does not listen.
func (w *Workload) notify(ctx context.Context, c *pgx.Conn) error {
	return exec(ctx, c, "LISTEN news", "BEGIN",
		"SELECT pg_notify('news', '"+w.canary("NOTIFY")+"' || i || repeat('y', 7000)) FROM generate_series(1, 60) i", "COMMIT")
}
