// Package initdb makes a branch's first content: it runs PostgreSQL's initdb on a mount whose
// bytes rest sealed, so that not even a new database touches the disk in plaintext (K1), and
// gives the files to the page server.
package initdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/compute"
	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/compute/pgproc"
	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walclient"
)

const (
	timeout     = 5 * time.Minute
	importTries = 5
	importPause = time.Second
	importChunk = 512 << 10 // of the MiB that a request may carry
)

// InitBranch makes the branch's first content, with password as the superuser's, and gives
// the LSN at which its log starts. Done again, with what was made before, it changes nothing
// once the import has succeeded.
func InitBranch(ctx context.Context, cfg compute.Config, password string) (start pg.LSN, err error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return 0, err
	}
	if password == "" || strings.ContainsAny(password, "\n\r\x00") {
		return 0, errors.New("the superuser's password has to be one line that is not empty")
	}
	hardening.Apply(cfg.Logger)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	m, err := mount(cfg)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if err := m.run(ctx, password); err != nil {
		return 0, err
	}
	if start, err = importFiles(ctx, cfg, m.fs); err != nil {
		return 0, fmt.Errorf("importing the new database: %w", err)
	}
	client, err := walclient.New(cfg.Project, cfg.Branch, cfg.Safekeepers, cfg.Logger)
	if err != nil {
		return 0, err
	}
	defer client.Close()
	if err := client.CreateBranch(ctx, start); err != nil {
		return 0, fmt.Errorf("starting the branch's log at %v: %w", start, err)
	}
	return start, nil
}

// mounted is an empty data directory for initdb.
type mounted struct {
	fs     *pgfs.FS
	folder *compute.Folder
	user   pgproc.User
	failed chan error // takes one error of the local store
}

func mount(cfg compute.Config) (*mounted, error) {
	user, err := pgproc.FindUser()
	if err != nil {
		return nil, err
	}
	m := &mounted{user: user, failed: make(chan error, 1)}
	if m.folder, err = compute.OpenFolder(cfg.Dir, user); err != nil {
		return nil, err
	}
	store, err := scratch.Open(m.folder.Scratch, seal.Endless())
	if err != nil {
		return nil, err
	}
	m.fs, err = pgfs.New(pgfs.Config{Mountpoint: m.folder.Mount, Scratch: store, UID: user.UID, GID: user.GID, CacheBytes: cfg.CacheBytes, Log: cfg.Logger,
		Fail: func(err error) { m.failed <- err }})
	if err != nil {
		return nil, errors.Join(err, store.Wipe())
	}
	if err := m.fs.Mount(); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

func (m *mounted) close() error {
	return errors.Join(m.fs.Wipe(), m.fs.Unmount(), m.folder.Remove())
}

// run runs initdb. The password goes over a pipe: arguments, environment and files can be
// read by others.
func (m *mounted) run(ctx context.Context, password string) error {
	path, err := pgproc.Binary("initdb")
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer w.Close()
	// initdb opens the pipe by name, as its own user.
	if err := r.Chown(int(m.user.UID), int(m.user.GID)); err != nil {
		return fmt.Errorf("giving initdb the password's pipe: %w", err)
	}
	if _, err := io.WriteString(w, password+"\n"); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	var out pgproc.Log
	p, err := pgproc.Start(pgproc.Command{Path: path, User: m.user, Stdout: &out, Stderr: &out, Mount: m.folder.Mount, Extra: []*os.File{r}, Args: []string{
		"--pgdata=" + m.folder.Mount, "--username=" + boot.Superuser, "--pwfile=/dev/fd/3", "--auth-host=scram-sha-256", "--auth-local=reject",
		"--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"}})
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
	case err = <-m.failed:
	case <-m.fs.Done():
		err = errors.New("the mount under initdb has ended")
	case <-ctx.Done():
		err = fmt.Errorf("waiting for initdb: %w", ctx.Err())
	}
	if err != nil {
		p.Kill()
		<-p.Done()
		return err
	}
	if err := p.Err(); err != nil {
		return fmt.Errorf("initdb: %w; it said:\n%s", err, out.Startup())
	}
	return nil
}

// importFiles gives the files to the page server. A try that was cut short is made again
// from its beginning: the server keeps nothing of it.
func importFiles(ctx context.Context, cfg compute.Config, fs *pgfs.FS) (pg.LSN, error) {
	conn, err := rpc.Dial(cfg.PageServer)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	client := pb.NewPageServerClient(conn)
	for try := 1; ; try++ {
		lsn, err := importOnce(ctx, client, cfg, fs)
		if err == nil || try == importTries || status.Code(err) != codes.Unavailable {
			return lsn, err
		}
		cfg.Logger.Warn("importing the new database; trying again", "error", err)
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(importPause):
		}
	}
}

func importOnce(ctx context.Context, client pb.PageServerClient, cfg compute.Config, fs *pgfs.FS) (pg.LSN, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Import(ctx, grpc.WaitForReady(true))
	if err != nil {
		return 0, err
	}
	sendErr := send(stream, cfg, fs)
	resp, err := stream.CloseAndRecv() // says why the server ended a stream
	switch {
	case err != nil:
		return 0, err
	case sendErr != nil:
		return 0, sendErr
	}
	return pg.LSN(resp.Lsn), nil
}

func send(stream grpc.ClientStreamingClient[pb.ImportRequest, pb.ImportResponse], cfg compute.Config, fs *pgfs.FS) error {
	// The first request is the header: it names the branch, and no file.
	if err := stream.Send(&pb.ImportRequest{Project: cfg.Project, Branch: cfg.Branch}); err != nil {
		return err
	}
	err := fs.Walk(func(path string, size int64) error {
		for off := int64(0); ; off += importChunk {
			data := make([]byte, min(importChunk, size-off))
			if n, err := fs.ReadAt(path, data, off); err != nil && (err != io.EOF || n < len(data)) {
				return err
			}
			if err := stream.Send(&pb.ImportRequest{Path: path, Offset: uint64(off), Data: data}); err != nil {
				return err
			}
			if off+int64(len(data)) >= size {
				return nil
			}
		}
	})
	if err != nil {
		return err
	}
	return stream.Send(&pb.ImportRequest{Last: true})
}
