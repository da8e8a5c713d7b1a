package pgfs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const benchSeconds = 3

var tpsLine = regexp.MustCompile(`tps = ([0-9.]+)`)

// cpu is the processor time of the server's processes that have ended, and, for a mount, of
// this process, which serves it.
func (s *server) cpu(withMount bool) time.Duration {
	s.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	var total time.Duration
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')'):]))
	for _, f := range fields[12:16] { // utime, stime, cutime, cstime, in ticks of 10 ms
		ticks, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			s.t.Fatal(err)
		}
		total += time.Duration(ticks) * 10 * time.Millisecond
	}
	if withMount {
		var own syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &own)
		total += time.Duration(own.Utime.Nano() + own.Stime.Nano())
	}
	return total
}

func (s *server) tps(args ...string) float64 {
	s.t.Helper()
	m := tpsLine.FindStringSubmatch(s.run("pgbench", append([]string{"-n", "-T", strconv.Itoa(benchSeconds)}, args...)...))
	if m == nil {
		s.t.Fatal("pgbench told no TPS")
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// BenchmarkPgbench compares a mount on which everything is local, and fsync costs nothing,
// with the plain disk under fsync=off: what is left is the cost of the mount. Runs are
// interleaved, the figures are medians of five: transactions per second, and processor time
// per transaction, which other work on the machine disturbs less.
func BenchmarkPgbench(b *testing.B) {
	cred := needPostgres(b)
	fs := mounted(b, Config{UID: cred.Uid, GID: cred.Gid})
	plain := filepath.Join(openDir(b), "data")
	if err := os.Mkdir(plain, 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.Chown(plain, int(cred.Uid), int(cred.Gid)); err != nil {
		b.Fatal(err)
	}
	servers := []struct {
		name string
		*server
	}{{"mount", newServer(b, cred, fs.cfg.Mountpoint)}, {"disk", newServer(b, cred, plain)}}
	for _, s := range servers {
		s.start("shared_buffers=128MB", "fsync=off", "max_wal_size=4GB")
		s.run("pgbench", "-i", "-q", "-s", "30")
		s.sql("vacuum freeze analyze")
		s.sql("checkpoint")
	}
	runs := []struct {
		name string
		args []string
	}{
		{"tpcb-1", []string{"-c", "1"}}, {"tpcb-8", []string{"-c", "8", "-j", "2"}},
		{"select-8", []string{"-S", "-c", "8", "-j", "2"}},
	}
	for b.Loop() {
		for _, run := range runs {
			results, costs := map[string][]float64{}, map[string][]float64{}
			for range 5 {
				for _, s := range servers {
					before := s.cpu(s.name == "mount")
					tps := s.tps(run.args...)
					for s.sql("select count(*) from pg_stat_activity where application_name = 'pgbench'") != "0" {
						time.Sleep(10 * time.Millisecond)
					}
					time.Sleep(100 * time.Millisecond) // until they are reaped
					used := s.cpu(s.name == "mount") - before
					results[s.name] = append(results[s.name], tps)
					costs[s.name] = append(costs[s.name], float64(used.Microseconds())/(tps*benchSeconds))
				}
			}
			for name, r := range results {
				slices.Sort(r)
				b.ReportMetric(r[len(r)/2], fmt.Sprintf("%s-%s-tps", run.name, name))
				slices.Sort(costs[name])
				b.ReportMetric(costs[name][len(r)/2], fmt.Sprintf("%s-%s-cpu-us", run.name, name))
			}
		}
	}
}

// BenchmarkRequest is the cost of one 8 KiB read or write through the kernel and back, past
// the kernel's page cache for reads.
func BenchmarkRequest(b *testing.B) {
	fs := mounted(b, Config{})
	path := filepath.Join(fs.cfg.Mountpoint, "f")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	page := make([]byte, 8192)
	const pages = 4096
	for i := range pages {
		page[0], page[1], page[5000] = 1, byte(i), byte(i>>8)
		if _, err := unix.Pwrite(fd, page, int64(i)*8192); err != nil {
			b.Fatal(err)
		}
	}
	bench := func(name string, fn func(i int) error) {
		b.Run(name, func(b *testing.B) {
			var before, after syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			for i := 0; b.Loop(); i++ {
				if err := fn(i % pages); err != nil {
					b.Fatal(err)
				}
			}
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
			b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op") // of both sides: caller and mount
		})
	}
	bench("write", func(i int) error {
		_, err := unix.Pwrite(fd, page, int64(i)*8192)
		return err
	})
	bench("read", func(i int) error {
		if err := unix.Fadvise(fd, int64(i)*8192, 8192, unix.FADV_DONTNEED); err != nil {
			return err
		}
		_, err := unix.Pread(fd, page, int64(i)*8192)
		return err
	})
}
