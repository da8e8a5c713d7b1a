package keymgr

import (
	"context"
	"strings"
	"sync"

	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// withMachine is the one way to the lease machine. Changes of keys' states that come of it are
// told to who watches, and open and mend receipts. fn must not block.
func (s *Server) withMachine(fn func(m *lease.Machine)) {
	s.mu.Lock()
	fn(s.mu.machine)
	changes := s.mu.machine.Changes()
	lapsed := make([][]lease.Lease, len(changes))
	for i, c := range changes {
		if c.State == lease.StateUnreachable && c.Before != lease.StateUnreachable {
			lapsed[i] = s.mu.machine.Leases(boottime.Now(), c.Key)
		}
		s.watchers.tell(s.noticeLocked(c.Key, c.State))
	}
	s.mu.Unlock()
	for i, c := range changes {
		s.changed(c, lapsed[i])
	}
}

// changed logs a change and does what it means for receipts.
func (s *Server) changed(c lease.Change, lapsed []lease.Lease) {
	id := parseKeyID(c.Key)
	s.cfg.Logger.Info("a key's state is another", "key", c.Key, "state", string(c.State), "before", string(c.Before))
	switch {
	case len(lapsed) > 0:
		s.receipts.open(s.key(id), causeUnreachable, lapsed, false)
	case c.Before == lease.StateUnreachable && (c.State == lease.Active || c.State == lease.Resuming):
		s.receipts.recovered(id)
	}
}

// alive tells whether a lease lives.
func (s *Server) alive(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.mu.machine.Use(boottime.Now(), id)
	return ok
}

// startCheck has a key checked that nobody waits for. One key's KMS, however slow, delays no
// other's: each key has at most one such check, and each service its own places.
func (s *Server) startCheck(name string) {
	s.mu.Lock()
	busy := s.mu.checking[name]
	s.mu.checking[name] = true
	s.mu.Unlock()
	if busy {
		return
	}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		s.checkDue(name)
		s.mu.Lock()
		delete(s.mu.checking, name)
		s.mu.Unlock()
	}()
}

func (s *Server) checkDue(name string) {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	k, doc, err := s.known(ctx, parseKeyID(name))
	if err == nil {
		leave, waitErr := s.services.enter(ctx, doc.CMK)
		if err = waitErr; err == nil {
			defer leave()
			err = s.check(ctx, k, func() (due bool) {
				s.withMachine(func(m *lease.Machine) { due = m.Due(boottime.Now(), name) })
				return due
			})
		}
	}
	if err != nil && s.ctx.Err() == nil {
		s.cfg.Logger.Warn("a key could not be checked: its leases run out if that goes on", "key", name, "err", err)
	}
}

// serviceSlots bounds the checks under way at each KMS.
type serviceSlots struct {
	sync.Mutex
	slots map[string]chan struct{}
}

// slotsPerService times the checks that take providerTimeout each are 512 keys a second of a service that
// does not answer: keys of 2,500 projects are each tried within the check interval.
const slotsPerService = 2048

func newServiceSlots() *serviceSlots { return &serviceSlots{slots: make(map[string]chan struct{})} }

// serviceOf is the part of a CMK's name that says whose service holds it: all but the last element.
func serviceOf(cmk string) string {
	if i := strings.LastIndexAny(cmk, ":/"); i >= 0 {
		return cmk[:i]
	}
	return ""
}

func (s *serviceSlots) enter(ctx context.Context, cmk string) (leave func(), err error) {
	s.Lock()
	service := serviceOf(cmk)
	slots := s.slots[service]
	if slots == nil {
		slots = make(chan struct{}, slotsPerService)
		s.slots[service] = slots
	}
	s.Unlock()
	select {
	case slots <- struct{}{}:
		return func() { <-slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
