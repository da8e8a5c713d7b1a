package pgfs

import "github.com/holdfastdb/holdfast/internal/pg"

// Seen is what a poll tells for the comparison of pages (Config.Past), beside what Advance
// is told: other witnesses of what still runs than the rule has.
type Seen struct {
	// Oldest: all transactions before it, but prepared ones, have ended. It is asked after what
	// Advance is told.
	Oldest pg.TransactionID
	// VacuumsBefore and VacuumsAfter name what ran that can need a btree's vacuum cycle, before
	// and after what Advance is told was asked.
	VacuumsBefore, VacuumsAfter []string
}

// proof is what is known of who can need what WAL lacks.
type proof struct {
	known  bool
	oldest pg.TransactionID
	// vacuum is the generation at whose end the oldest vacuum was seen that still ran; 0: none.
	vacuum uint32
}

// Saw is to be told before Advance, in the same poll.
func (fs *FS) Saw(s Seen) {
	e := &fs.cache
	e.mu.Lock()
	defer e.mu.Unlock()
	closing := e.gen.Load()
	before := map[string]uint32{}
	for _, v := range s.VacuumsBefore {
		before[v] = closing
		if first := e.mu.vacuums[v]; first != 0 {
			before[v] = first
		}
	}
	e.mu.vacuums = before
	e.mu.saw = proof{known: true, oldest: s.Oldest}
	for _, v := range s.VacuumsAfter {
		if first := before[v]; first != 0 && (e.mu.saw.vacuum == 0 || first < e.mu.saw.vacuum) {
			e.mu.saw.vacuum = first
		}
	}
}

func (e *evictor) proven() proof {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.proof
}

// ended tells whether a transaction has certainly ended.
func (p proof) ended(xid pg.TransactionID) bool {
	return p.known && int32(uint32(xid)-uint32(p.oldest)) < 0
}

// noVacuum tells that no vacuum still runs that ran when pages of a generation were written.
// The rule waits for those of the poll that ended the generation after it.
func (p proof) noVacuum(gen uint32) bool {
	return p.known && (p.vacuum == 0 || p.vacuum > gen+1)
}
