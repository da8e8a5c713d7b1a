package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/test/cluster"
)

// volumeBytes is the size of each role's file system, a sparse file.
const volumeBytes = 16 << 30

// roles measures what each role writes to the disk per byte of WAL: in a cluster of its own in
// which each role's folder is a file system of its own, of whose device the kernel counts the
// bytes. It says nothing of speed: these devices are files.
func (b *bench) roles(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("file systems in files need root")
	}
	dir := filepath.Join(b.dir, "roles")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	c, err := cluster.New(cluster.Options{Dir: dir, Separate: true, Settings: b.settings(), CacheBytes: b.cacheBytes})
	if err != nil {
		return err
	}
	volumes := []volume{{name: "safekeepers, all three"}, {name: "pageserver"}, {name: "bucket"}, {name: "compute"}}
	for id := 1; id <= 3; id++ {
		volumes[0].dirs = append(volumes[0].dirs, c.Dir(cluster.Safekeeper(id)))
	}
	volumes[1].dirs = []string{c.Dir(cluster.Pageserver)}
	volumes[2].dirs = []string{c.Dir("bucket")}
	volumes[3].dirs = []string{c.Dir("compute")}
	defer func() {
		errs := []error{err, c.KillAll()}
		for _, v := range volumes {
			errs = append(errs, v.unmount())
		}
		err = errors.Join(errs...)
	}()
	for _, v := range volumes {
		if err := v.mount(ctx, dir); err != nil {
			return err
		}
	}
	b.progress("starting a cluster in which each role has a file system of its own")
	if err := c.Start(ctx); err != nil {
		return err
	}
	s := system{"holdfast", c.Target()}
	err = b.writtenByRole(ctx, s, volumes, "pgbench -i", func() error {
		_, err := s.target.Run(ctx, "pgbench", "-i", "-q", "-s", strconv.Itoa(b.scale))
		return err
	})
	if err != nil {
		return err
	}
	return b.writtenByRole(ctx, s, volumes, "TPC-B, 8 clients", func() error {
		_, _, err := b.pgbench(ctx, s.target, 8)
		return err
	})
}

// writtenByRole reports what fn had the roles write. What is left in memory at its end counts, too.
func (b *bench) writtenByRole(ctx context.Context, s system, volumes []volume, what string, fn func() error) error {
	unix.Sync()
	from, err := lsn(ctx, s.target)
	if err != nil {
		return err
	}
	before := make([]uint64, len(volumes))
	for i, v := range volumes {
		if before[i], err = v.written(); err != nil {
			return err
		}
	}
	if err := fn(); err != nil {
		return err
	}
	to, err := lsn(ctx, s.target)
	if err != nil {
		return err
	}
	if err := s.target.Exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	unix.Sync()
	for i, v := range volumes {
		after, err := v.written()
		if err != nil {
			return err
		}
		b.report.add(row{what: fmt.Sprintf("written per byte of WAL, %s: %s", what, v.name), unit: "B/B",
			values: map[string]float64{"holdfast": float64(after-before[i]) / float64(to-from)}})
	}
	return nil
}

// A volume is the file systems of one kind of role.
type volume struct {
	name string
	dirs []string
}

func (v *volume) mount(ctx context.Context, images string) error {
	for _, dir := range v.dirs {
		image := filepath.Join(images, filepath.Base(dir)+".ext4")
		f, err := os.Create(image)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(volumeBytes), f.Close(), os.MkdirAll(dir, 0o711)); err != nil {
			return err
		}
		// Nothing of the file system is to be made later, while it is measured.
		for _, args := range [][]string{{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", image}, {"mount", "-o", "loop", image, dir}} {
			out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
			}
		}
		if err := errors.Join(os.Chmod(dir, 0o711), os.Remove(filepath.Join(dir, "lost+found"))); err != nil {
			return err
		}
	}
	return nil
}

func (v *volume) unmount() error {
	var errs []error
	for _, dir := range v.dirs {
		// An endpoint that was killed leaves its own, dead, mount inside.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

func (v *volume) written() (sum uint64, err error) {
	for _, dir := range v.dirs {
		n, err := diskWritten(dir)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
