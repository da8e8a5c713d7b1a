package boot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/test/stock"
)

func testSettings(t *testing.T, listen string, extra map[string]string) *Settings {
	s := &Settings{Listen: listen, SocketDir: "/run/x", AgentUser: "root", Extra: extra}
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	return s
}

func testState(end, prev pg.LSN) *pb.StartupStateResponse {
	cp := pg.CheckPoint{NextXid: 1<<32 | 755, NextOid: 24576, NextMulti: 1, OldestXid: 717, OldestXidDB: 1, OldestMulti: 1,
		OldestMultiDB: 1, OldestActiveXid: 700, FullPageWrites: true}
	control := pg.ControlFile{SystemID: 7212345678901234567, State: pg.DBInProduction, MinRecoveryPoint: 77, UnloggedLSN: 5, WALLevel: 1, MaxConnections: 100}
	return &pb.StartupStateResponse{Lsn: uint64(end), PrevRecordLsn: uint64(prev), ControlFile: control.Marshal(), Checkpoint: cp.Marshal(),
		Databases: []uint32{1, 4, 5}, Files: []*pb.NamedFile{{Path: "base/5/PG_VERSION", Data: []byte("15\n")}, {Path: "pg_twophase/000002F3", Data: []byte("x")}}}
}

// positions are ends of logs: within a page, at a page's start, at a segment's start, where
// the record crosses into the next page, its header included, or into the next segment.
var positions = []pg.LSN{0x5000100, 0x5002000, 0x6000000, 0x5003FE8, 0x5003FA0, 0x5003F88, 0x5FFFFF8, 0x5FFFF80}

func TestMake(t *testing.T) {
	for _, end := range positions {
		for _, first := range [][]byte{nil, []byte("message"), make([]byte, 300), make([]byte, 2*pg.WALPageSize)} {
			testMake(t, end, first)
		}
	}
}

func testMake(t *testing.T, end pg.LSN, first []byte) {
	plan, err := Make(Input{End: end, State: testState(end, end-0x80), Settings: testSettings(t, "127.0.0.1:5432", nil), First: first, Now: time.Unix(1e9, 0)})
	if err != nil {
		t.Fatalf("%v: %v", end, err)
	}
	sc := walrec.NewScanner(end)
	sc.Feed(plan.WAL)
	rec, ok, err := sc.Next()
	if first != nil {
		parsed, perr := walrec.Parse(rec.Data, rec.LSN, rec.End)
		if perr != nil || err != nil || parsed.RmID != walrec.RmLogicalMsg || !bytes.Equal(parsed.MainData, first) || parsed.Prev != end-0x80 {
			t.Fatalf("%v: the message is %+v, %v, %v", end, parsed, perr, err)
		}
		message := rec.LSN
		rec, ok, err = sc.Next()
		if prev := pg.LSN(binary.LittleEndian.Uint64(rec.Data[8:])); prev != message {
			t.Errorf("%v: the checkpoint says that the record before it is at %v, not %v", end, prev, message)
		}
	}
	if err != nil || !ok || rec.LSN != plan.Checkpoint || rec.End != plan.End {
		t.Fatalf("%v: scanned %+v, %v, %v", end, rec, ok, err)
	}
	files := make(map[string][]byte)
	for _, f := range plan.Files {
		files[f.Path] = f.Data
	}
	control, err := pg.ParseControlFile(files["global/pg_control"])
	if err != nil {
		t.Fatal(err)
	}
	if control.State != pg.DBShutdowned || control.CheckPoint != plan.Checkpoint || control.CheckPointCopy.Redo != plan.Checkpoint ||
		control.MinRecoveryPoint != 0 || control.UnloggedLSN != firstNormalUnloggedLSN || control.CheckPointCopy.OldestActiveXid != 0 ||
		control.CheckPointCopy.FullPageWrites || control.MaxConnections != 100 || control.WALLevel != 1 {
		t.Errorf("%v: pg_control is %+v", end, control)
	}
	if last := plan.Files[len(plan.Files)-1].Path; last != "global/pg_control" {
		t.Errorf("the last file is %s", last)
	}
	segment := files["pg_wal/"+pg.WALFileName(end)]
	if h, err := pg.ParseWALPageHeader(segment, end.SegmentStart()); err != nil || h.SystemID != control.SystemID {
		t.Errorf("%v: first page of the segment: %+v, %v", end, h, err)
	}
	if len(segment)%pg.WALPageSize != 0 {
		t.Errorf("%v: the segment file has %d bytes", end, len(segment))
	}
	page := segment[end.PageStart()-end.SegmentStart():]
	if _, err := pg.ParseWALPageHeader(page, end.PageStart()); err != nil {
		t.Errorf("%v: the checkpoint's page: %v", end, err)
	}
	if !bytes.HasPrefix(page, plan.Page) || int(end-end.PageStart()) != len(plan.Page) {
		t.Errorf("%v: Page is not what stands in the file", end)
	}
	crosses := plan.End.SegmentStart() != end.SegmentStart()
	if _, ok := files["pg_wal/"+pg.WALFileName(plan.End)]; crosses && !ok {
		t.Errorf("%v: the record ends in the next segment, for which there is no file", end)
	}
}

// TestChangedParametersAreLogged: pg_control must not say that the settings of this start are
// those that WAL told last, or Postgres would not log them.
func TestChangedParametersAreLogged(t *testing.T) {
	settings := testSettings(t, "127.0.0.1:5432", map[string]string{"track_commit_timestamp": "on", "wal_level": "logical", "max_connections": "7"})
	plan, err := Make(Input{End: 0x5000100, State: testState(0x5000100, 0x5000080), Settings: settings})
	if err != nil {
		t.Fatal(err)
	}
	control, err := pg.ParseControlFile(plan.Files[len(plan.Files)-1].Data)
	if err != nil || control.TrackCommitTS || control.WALLevel != 1 || control.MaxConnections != 100 {
		t.Errorf("pg_control is %+v, %v", control, err)
	}
}

func TestMakeRefuses(t *testing.T) {
	const end = 0x5000100
	cases := map[string]func(*pb.StartupStateResponse){
		"control":    func(s *pb.StartupStateResponse) { s.ControlFile[100] ^= 1 },
		"short":      func(s *pb.StartupStateResponse) { s.Checkpoint = s.Checkpoint[:50] },
		"lsn":        func(s *pb.StartupStateResponse) { s.Lsn -= 8 },
		"prev":       func(s *pb.StartupStateResponse) { s.PrevRecordLsn = end },
		"zero xid":   func(s *pb.StartupStateResponse) { clear(s.Checkpoint) },
		"path":       func(s *pb.StartupStateResponse) { s.Files[0].Path = "base/../../etc/passwd" },
		"other path": func(s *pb.StartupStateResponse) { s.Files[0].Path = "/etc/passwd" },
		"checksums": func(s *pb.StartupStateResponse) {
			s.ControlFile = (&pg.ControlFile{ChecksumVersion: 1}).Marshal()
		},
	}
	for name, spoil := range cases {
		state := testState(end, end-0x80)
		spoil(state)
		if _, err := Make(Input{End: end, State: state, Settings: testSettings(t, "127.0.0.1:5432", nil)}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestSettings(t *testing.T) {
	refused := map[string]string{"fsync": "off", "FSYNC": "off", "Wal_Recycle": "on", "port": "1", "bad name": "1", "a=b": "1", "": "1",
		"wal_level": "minimal", "work_mem": "1MB\nfsync=off", "include": "x", "x\n": "1", "hba_file": "/tmp/x", "1a": "1"}
	for name, value := range refused {
		s := &Settings{Listen: "127.0.0.1:5432", AgentUser: "root", Extra: map[string]string{name: value}}
		if err := s.Validate(); err == nil {
			t.Errorf("%q = %q was accepted", name, value)
		}
	}
	for _, listen := range []string{"", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:x", "a,b:5432", "127.0.0.1:70000"} {
		if err := (&Settings{Listen: listen, AgentUser: "root"}).Validate(); err == nil {
			t.Errorf("listen address %q was accepted", listen)
		}
	}
	s := testSettings(t, "127.0.0.1:5432", map[string]string{"my.path": `a'b\c`, "Shared_Buffers": "1GB", "wal_level": "logical", "max_connections": "7"})
	conf := s.conf()
	for _, want := range []string{`my.path = 'a''b\\c'`, "shared_buffers = '1GB'", "jit = 'off'"} {
		if !strings.Contains(conf, want+"\n") {
			t.Errorf("postgresql.conf lacks %s", want)
		}
	}
	if strings.Contains(conf, "256MB") || strings.Contains(conf, "ssl") {
		t.Errorf("postgresql.conf: %s", conf)
	}
	if args := strings.Join(s.Args(), " "); !strings.Contains(args, "-c wal_level=logical") || !strings.Contains(args, "dynamic_shared_memory_type=mmap") {
		t.Errorf("arguments: %s", args)
	}
	if hba := s.hba(); strings.Contains(hba, "trust") || strings.Count(hba, "local") != 1 {
		t.Errorf("pg_hba.conf: %s", hba)
	}
	// Beyond this machine only TLS.
	far := testSettings(t, ":5432", nil)
	if hba := far.hba(); !strings.Contains(hba, "hostssl all all all") || strings.Contains(hba, "host all all all") {
		t.Errorf("pg_hba.conf: %s", hba)
	}
	if len(far.Files()) != 5 || !strings.Contains(far.conf(), "ssl = 'on'") {
		t.Error("no certificate for clients from elsewhere")
	}
}

// TestStockStarts starts a stock Postgres from fabricated files, over and over with the log's
// end at another kind of place, has it write, kills it, and has it recover from them.
func TestStockStarts(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s, err := stock.New(ctx, t.TempDir(), "data", map[string]string{"fsync": "off"})
	if err != nil {
		t.Skipf("no PostgreSQL to start: %v", err)
	}
	run := func(stmts ...string) {
		t.Helper()
		if err := s.Target().Exec(ctx, stmts...); err != nil {
			t.Fatal(err)
		}
	}
	restart := func(end func() error) {
		t.Helper()
		if err := errors.Join(end(), s.Start(ctx)); err != nil {
			out, _ := os.ReadFile(s.Log())
			t.Fatalf("%v\n%s", err, out)
		}
	}
	restart(func() error { return nil })
	run("CREATE TABLE t AS SELECT 0 AS i", "CREATE UNLOGGED TABLE u(i int)")
	count := 1
	expect := func() {
		t.Helper()
		run(fmt.Sprintf("DO $$ BEGIN IF (SELECT count(*) FROM t) <> %d THEN RAISE 'rows are missing'; END IF; END $$", count))
	}
	for _, at := range positions {
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		end := fabricate(t, s, at)
		restart(func() error { return nil })
		out, err := os.ReadFile(s.Log())
		if err != nil || !bytes.Contains(out, []byte("database system was shut down at")) {
			t.Fatalf("%v: not a clean start: %v\n%s", at, err, out)
		}
		expect()
		run("INSERT INTO t SELECT i FROM generate_series(1, 1000) i")
		count += 1000
		restart(s.Kill)
		expect()
		out, err = os.ReadFile(s.Log())
		if want := fmt.Sprintf("redo starts at %v", end.SkipPageHeader()); err != nil || !bytes.Contains(out, []byte(want)) {
			t.Fatalf("%v: no recovery from the fabricated record (%s): %v\n%s", at, want, err, out)
		}
		run("INSERT INTO t VALUES (0)")
		count++
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
}

// fabricate replaces the WAL and pg_control of a server that was shut down, as if its log
// ended at a place like at, and gives the fabricated record's end.
func fabricate(t *testing.T, s *stock.Server, at pg.LSN) pg.LSN {
	old, err := os.ReadFile(filepath.Join(s.Dir, "global/pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	control, err := pg.ParseControlFile(old)
	if err != nil {
		t.Fatal(err)
	}
	end := at // moved on by whole segments
	for end <= control.CheckPoint+0x1000 {
		end += pg.WALSegmentSize
	}
	cp := control.CheckPointCopy
	state := &pb.StartupStateResponse{Lsn: uint64(end), PrevRecordLsn: uint64(control.CheckPoint), ControlFile: old, Checkpoint: cp.Marshal()}
	settings := testSettings(t, fmt.Sprintf("127.0.0.1:%d", s.Port), nil)
	plan, err := Make(Input{End: end, State: state, Settings: settings, Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	wal, err := filepath.Glob(filepath.Join(s.Dir, "pg_wal/0*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(wal, s.Log()) {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range plan.Files {
		name := filepath.Join(s.Dir, f.Path)
		if err := os.WriteFile(name, f.Data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := chownLike(name, st); err != nil {
			t.Fatal(err)
		}
	}
	extra := make(map[string]string)
	for _, arg := range settings.Args() {
		if k, v, ok := strings.Cut(arg, "="); ok && k != "unix_socket_directories" {
			extra[k] = v
		}
	}
	if err := s.Configure(extra); err != nil {
		t.Fatal(err)
	}
	return plan.End
}

// Postgres does not name every setting that keeps it from starting.
func TestSuspectsByWhatPostgresSays(t *testing.T) {
	const auto = "ssl = 'on'\nhuge_pages = 'on'\nwork_mem = '5MB'\n"
	for said, want := range map[string]string{
		`FATAL:  could not load server certificate file "server.crt": No such file or directory`: "ssl",
		"FATAL:  could not map anonymous shared memory: Cannot allocate memory":                  "huge_pages",
	} {
		got := Suspects([]byte(auto), said)
		if len(got) != 1 || got[0].Name != want || !got[0].Named {
			t.Errorf("%s: %v, want %s, named", said, got, want)
		}
	}
}
