package main

import (
	"archive/tar"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// source is PostgreSQL's source tree, of the version that is installed, with its test
// programs built. Nothing of it is part of this project.
type source struct {
	dir     string
	version string // of Debian's package
}

// packageVersion is the version of the installed server's package.
func packageVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", "postgresql-15").Output()
	if err != nil {
		return "", fmt.Errorf("asking for the version of Debian's package postgresql-15: %w; the suites come from the same source package, and need it installed", err)
	}
	return string(out), nil
}

// fetchSource downloads and builds what is not in the cache already.
func fetchSource(ctx context.Context, cache string) (*source, error) {
	version, err := packageVersion(ctx)
	if err != nil {
		return nil, err
	}
	s := &source{dir: filepath.Join(cache, "postgresql-"+strings.NewReplacer("/", "_", ":", "_").Replace(version)), version: version}
	if _, err := os.Stat(filepath.Join(s.dir, "built")); err == nil {
		return s, nil
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, err
	}
	fmt.Printf("fetching the source of postgresql-15 %s from Debian, and building its test programs in %s\n", version, s.dir)
	archive, err := s.download(ctx)
	if err != nil {
		return nil, fmt.Errorf("fetching PostgreSQL's source: %w", err)
	}
	if err := unpack(archive, s.dir); err != nil {
		return nil, fmt.Errorf("unpacking %s: %w", archive, err)
	}
	if err := s.build(ctx); err != nil {
		return nil, fmt.Errorf("building PostgreSQL's test programs: %w", err)
	}
	return s, os.WriteFile(filepath.Join(s.dir, "built"), nil, 0o644)
}

// download has apt fetch and verify the source package, from where its binary packages
// come from.
func (s *source) download(ctx context.Context) (archive string, err error) {
	apt := filepath.Join(s.dir, "apt")
	for _, d := range []string{"sources.d", "lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(apt, d), 0o755); err != nil {
			return "", err
		}
	}
	if err := sourcesFor(filepath.Join(apt, "sources.d")); err != nil {
		return "", err
	}
	options := []string{"-q", "-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=" + filepath.Join(apt, "sources.d"),
		"-o", "Dir::State::lists=" + filepath.Join(apt, "lists"), "-o", "Dir::Cache=" + filepath.Join(apt, "cache"), "-o", "APT::Sandbox::User=root"}
	for _, args := range [][]string{{"update"}, {"source", "--download-only", "postgresql-15=" + s.version}} {
		cmd := exec.CommandContext(ctx, "apt-get", append(append([]string{}, options...), args...)...)
		cmd.Dir = s.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("apt-get %s: %w:\n%s", args[0], err, out)
		}
	}
	found, err := filepath.Glob(filepath.Join(s.dir, "postgresql-15_*.orig.tar.bz2"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("apt-get source left %v, want one original archive (%v)", found, err)
	}
	return found[0], nil
}

var binaryLine = regexp.MustCompile(`(?m)^deb\s`)
var binaryType = regexp.MustCompile(`(?m)^Types:.*$`)

// sourcesFor writes the system's list of package sources as one of source packages.
func sourcesFor(dir string) error {
	files := []string{"/etc/apt/sources.list"}
	for _, pattern := range []string{"/etc/apt/sources.list.d/*.list", "/etc/apt/sources.list.d/*.sources"} {
		more, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		files = append(files, more...)
	}
	written := 0
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(text), "debian") && !strings.Contains(string(text), "postgresql") {
			continue // other vendors' lists have nothing for us
		}
		changed := binaryType.ReplaceAll(binaryLine.ReplaceAll(text, []byte("deb-src ")), []byte("Types: deb-src"))
		name := filepath.Base(f)
		if filepath.Ext(name) != ".list" && filepath.Ext(name) != ".sources" {
			name += ".list"
		}
		if err := os.WriteFile(filepath.Join(dir, name), changed, 0o644); err != nil {
			return err
		}
		written++
	}
	if written == 0 {
		return errors.New("apt's configuration names no Debian or PostgreSQL archive to take the source from")
	}
	return nil
}

// unpack extracts the archive without its topmost folder.
func unpack(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for r := tar.NewReader(bzip2.NewReader(f)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		_, name, ok := strings.Cut(h.Name, "/")
		if !ok || name == "" {
			continue
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(filepath.Clean(name), 0o755)
		case tar.TypeReg:
			err = extract(root, filepath.Clean(name), os.FileMode(h.Mode)&0o755|0o644, r)
		}
		if err != nil {
			return err
		}
	}
}

func extract(root *os.Root, name string, mode os.FileMode, r io.Reader) error {
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// build makes pg_regress, isolationtester and the C functions that the suites load. The
// server and its modules are the installed ones.
func (s *source) build(ctx context.Context) error {
	configure := exec.CommandContext(ctx, "./configure", "--without-readline", "--without-zlib", "--with-system-tzdata=/usr/share/zoneinfo")
	steps := []*exec.Cmd{configure}
	for _, args := range [][]string{{"src/backend", "generated-headers"}, {"src/interfaces/libpq", "all"}, {"src/test/regress", "all"}, {"src/test/isolation", "all"}} {
		steps = append(steps, exec.CommandContext(ctx, "make", "-s", "-C", args[0], args[1]))
	}
	for _, cmd := range steps {
		cmd.Dir = s.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w:\n%s", strings.Join(cmd.Args, " "), err, out)
		}
	}
	return nil
}
