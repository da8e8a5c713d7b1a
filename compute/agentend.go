package compute

import (
	"errors"
	"fmt"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/keyring"
)

// shred is what the ring calls when the lease is over. It waits until end has dropped everything: the
// report to the key manager says what that was.
func (a *agent) shred(reason error) (dropped []string) {
	a.kill(fmt.Errorf("the lease on the project's keys has ended: %w", reason))
	<-a.shredded
	return a.dropped
}

// guard is what ends this process if it cannot; nil: nothing does.
func (a *agent) guard() keyring.Guard {
	if a.cfg.Guard == nil {
		return nil
	}
	return a.cfg.Guard
}

// live tells whether the endpoint may answer from what it holds.
func (a *agent) live() error { return a.ring.Live(a.cfg.Project, a.cfg.Branch) }

// end closes what start opened. Postgres first, and at once: whatever the reason, nothing
// may run over a mount that goes away. Then the keys of all that is local are forgotten, and
// that is reported, if it was because the lease had ended.
func (a *agent) end() error {
	a.kill(errStopped) // if nothing else did
	a.tellVerified()
	errs := []error{a.endPostgres(), a.endMount()}
	if a.appender != nil {
		a.appender.Close()
	}
	if a.wal != nil {
		errs = append(errs, a.wal.Close())
	}
	if a.history != nil {
		a.history.Wipe()
	}
	if a.auxLife != nil {
		a.auxLife.Wipe()
	}
	a.drop("WAL on its way to the safekeepers")
	close(a.shredded)
	if a.noShred != nil {
		a.noShred()
	}
	if a.ring != nil {
		a.ring.Close()
	}
	for _, conn := range []*grpc.ClientConn{a.keyConn, a.pageConn} {
		if conn != nil {
			errs = append(errs, conn.Close())
		}
	}
	if a.folder != nil {
		errs = append(errs, a.folder.Remove())
	}
	return errors.Join(errs...)
}

func (a *agent) drop(what string) { a.dropped = append(a.dropped, what) }

func (a *agent) endPostgres() error {
	if a.postgres == nil {
		return nil
	}
	if !a.postgres.kill() {
		a.drop(fmt.Sprintf("Postgres (process %d) did not die within %v of SIGKILL", a.postgres.PID(), killWait))
		return fmt.Errorf("the endpoint's Postgres (process %d) did not die within %v of SIGKILL", a.postgres.PID(), killWait)
	}
	a.drop("Postgres, its shared memory and its backends")
	return nil
}

func (a *agent) endMount() error {
	if a.fs == nil {
		return nil
	}
	wiped := a.fs.Wipe()
	a.drop("the per-boot key, and with it all pages, WAL and temporary files on the local disk")
	unmounted := a.fs.Unmount()
	if unmounted == nil {
		a.drop("the mount, and the kernel's cache of it")
	}
	return errors.Join(wiped, unmounted)
}
