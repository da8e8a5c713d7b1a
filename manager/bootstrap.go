package manager

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/internal/seal"
)

const (
	superuser      = "postgres"
	firstEndpoint  = "main"
	passwordObject = "superuser"
)

// bootstrap makes the first project, branch and endpoint. Interrupted anywhere it begins
// again: a branch is in the document only when it was imported whole, and each try has a
// branch id of its own, so a half-made one is never used.
func (m *Manager) bootstrap(ctx context.Context) (*cluster, error) {
	c, err := updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		if len(c.Projects) == 0 {
			c.Projects = append(c.Projects, projectDoc{ID: newID(), CMK: m.cfg.CMK})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	project := c.Projects[0]
	if len(c.Branches) > 0 { // its key was made; endpoints that cannot use it now will wait for it
		return c, nil
	}
	m.cfg.Progress("checking the customer's key " + project.CMK)
	if _, err := m.keymgr.CreateProject(ctx, &pb.CreateProjectRequest{Project: project.ID, Cmk: project.CMK}, grpc.WaitForReady(true)); err != nil {
		return nil, fmt.Errorf("making the project's key under %s: %w", project.CMK, err)
	}
	branch := branchDoc{ID: newID(), Project: project.ID, Name: "main"}
	endpoint := endpointDoc{Name: firstEndpoint, Project: project.ID, Branch: branch.ID, Running: true,
		Listen: cmp.Or(m.cfg.EndpointListen, DefaultListen)}
	password, generated, err := m.firstPassword()
	if err != nil {
		return nil, err
	}
	if err := m.sealPassword(ctx, branch, password); err != nil {
		return nil, err
	}
	m.cfg.Progress("making the first branch (initdb)")
	if err := m.initBranch(ctx, endpoint, password); err != nil {
		return nil, fmt.Errorf("making the first branch: %w", err)
	}
	c, err = updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		if len(c.Branches) == 0 {
			c.Branches = append(c.Branches, branch)
			c.Endpoints = append(c.Endpoints, endpoint)
		}
		return nil
	})
	if err == nil && generated {
		m.cfg.Created(password)
	}
	return c, err
}

// newID is a random 64-bit id in hexadecimal.
func newID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

func (m *Manager) firstPassword() (password string, generated bool, err error) {
	if m.cfg.PasswordFile == "" {
		return rand.Text(), true, nil
	}
	data, err := os.ReadFile(m.cfg.PasswordFile)
	if err != nil {
		return "", false, fmt.Errorf("reading the superuser's password: %w", err)
	}
	password = strings.TrimRight(string(data), "\r\n")
	if password == "" || strings.ContainsAny(password, "\r\n\x00") {
		return "", false, fmt.Errorf("password file %s: want one line that is not empty", m.cfg.PasswordFile)
	}
	return password, false, nil
}

// initBranch runs initdb in a child, which imports what it made. The password goes over a
// pipe: arguments and environment can be read by others.
func (m *Manager) initBranch(ctx context.Context, endpoint endpointDoc, password string) error {
	dir := filepath.Join(m.cfg.ComputeDir, "initdb-"+endpoint.Branch)
	file := filepath.Join(m.cfg.Dir, "initdb.yaml")
	if err := config.Save(file, m.computeConfig(endpoint, dir)); err != nil {
		return err
	}
	defer removeDir(dir)
	defer os.Remove(file)
	runtime.LockOSThread() // the child's parent-death signal is tied to this thread
	defer runtime.UnlockOSThread()
	cmd := m.child("compute", "--init", "--config", file)
	cmd.Stdin = strings.NewReader(password + "\n")
	log := childLog{path: filepath.Join(m.cfg.LogDir, "initdb.log")}
	closeLog, err := log.attach(cmd)
	if err != nil {
		return err
	}
	defer closeLog()
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return errors.Join(log.explain(err), ctx.Err())
	}
	return nil
}

// adoptFirst applies what the user of `holdfast up` asks of the first endpoint.
func (m *Manager) adoptFirst(ctx context.Context) (*cluster, error) {
	return updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		e := c.endpoint(firstEndpoint)
		if e == nil {
			return nil
		}
		e.Running = true
		e.Listen = cmp.Or(m.cfg.EndpointListen, e.Listen)
		return nil
	})
}

// URL is where the first endpoint takes connections.
func (m *Manager) URL() (string, error) {
	s, err := m.find(firstEndpoint)
	if err != nil {
		return "", err
	}
	return s.status().Url, nil
}

func passwordKey(project, branch string) string {
	return "projects/" + project + "/branches/" + branch + "/superuser"
}

func passwordContext(project, branch string) seal.Context {
	return seal.Context{Purpose: seal.PurposeSecret, Project: project, Branch: branch, Object: passwordObject}
}

// sealPassword keeps the password for `holdfast psql`, under a DEK of its own: it can be
// read back only while the customer's key can be used.
func (m *Manager) sealPassword(ctx context.Context, b branchDoc, password string) error {
	sc := passwordContext(b.Project, b.ID)
	key, wrapped, err := m.cfg.Ring.Generate(ctx, sc)
	if err != nil {
		return fmt.Errorf("making a key for the superuser's password: %w", err)
	}
	var sealed bytes.Buffer
	w, err := seal.NewWriter(&sealed, key, wrapped, sc)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(w, password); err != nil {
		return err
	}
	if _, err := w.Finish(); err != nil {
		return err
	}
	_, err = m.cfg.Store.Create(ctx, passwordKey(b.Project, b.ID), &sealed, int64(sealed.Len()))
	return err
}

func (m *Manager) openPassword(ctx context.Context, project, branch string) (string, error) {
	sealed, _, err := m.cfg.Store.Get(ctx, passwordKey(project, branch))
	if err != nil {
		return "", fmt.Errorf("reading the superuser's sealed password: %w", err)
	}
	r, err := seal.NewReader(ctx, bytes.NewReader(sealed), int64(len(sealed)), passwordContext(project, branch), m.cfg.Ring.Open)
	if err != nil {
		return "", fmt.Errorf("opening the superuser's sealed password: %w", err)
	}
	plain, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err != nil {
		return "", fmt.Errorf("opening the superuser's sealed password: %w", err)
	}
	return string(plain), nil
}
