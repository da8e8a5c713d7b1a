package walstate

import (
	"errors"
	"fmt"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Errors of Results.
var (
	ErrNoBranch    = errors.New("branch does not exist")
	ErrOtherStart  = errors.New("branch exists with another start")
	ErrFenced      = errors.New("a higher epoch was opened")
	ErrGap         = errors.New("append does not continue the log")
	ErrBadInterval = errors.New("interval is outside of the branch's log")
)

// A Chunk is one accepted append.
type Chunk struct {
	Begin, End pg.LSN
	Index      uint64 // the Raft entry that holds it
}

// Archived is a stretch of the log that an object in the bucket holds.
type Archived struct {
	Begin, End pg.LSN
	Bytes      uint64 // the object's size
}

// Branch is one branch's log.
// Invariant (W3): Chunks, and the archive before them, are contiguous and end at End, where a
// record ends.
type Branch struct {
	No      uint32
	Name    Name
	Epoch   uint64 // the only one that may append; 0: none was opened
	Start   pg.LSN
	End     pg.LSN
	Durable pg.LSN // below it, WAL is in layers in the bucket
	Archive []Archived
	// DEKs are those of the WAL that the Raft log or the archive holds, ascending. A replica whose
	// log is shorter knows fewer.
	DEKs []DEK `json:",omitempty"`
	// Unindexed is up to where archived WAL may have DEKs that are not in DEKs: it is from before
	// there was that index. 0: none has.
	Unindexed pg.LSN `json:",omitempty"`
	// Held is where the pieces end of a record that is not whole yet; 0: there are none. They are
	// no part of the log: a new epoch, or a record from End on, forgets them.
	Held pg.LSN `json:",omitempty"`

	Chunks []Chunk `json:"-"` // those that the Raft log still holds, ascending
	Pieces []Chunk `json:"-"` // of Held, likewise
}

// Released is where what the Raft log must keep of the branch begins: below it, WAL is in
// layers or in the archive.
func (b *Branch) Released() pg.LSN {
	r := max(b.Durable, b.Start)
	if n := len(b.Archive); n > 0 {
		r = max(r, b.Archive[n-1].End)
	}
	return r
}

// Find is the position in Chunks of the chunk that holds lsn; false if none does.
func (b *Branch) Find(lsn pg.LSN) (int, bool) {
	i, found := slices.BinarySearchFunc(b.Chunks, lsn, func(c Chunk, at pg.LSN) int {
		switch {
		case c.End <= at:
			return -1
		case c.Begin > at:
			return 1
		}
		return 0
	})
	return i, found
}

// State is all branches of one Raft group. It is not safe for concurrent use.
type State struct {
	branches map[uint32]*Branch
	byName   map[Name]*Branch
	last     uint32 // the highest number that a branch was ever given
	applied  uint64
}

// New makes an empty state.
func New() *State {
	return &State{branches: map[uint32]*Branch{}, byName: map[Name]*Branch{}}
}

// Applied is the index of the last entry that was applied.
func (s *State) Applied() uint64 { return s.applied }

// Branch finds a branch by its number.
func (s *State) Branch(no uint32) *Branch { return s.branches[no] }

// Lookup finds a branch by its name.
func (s *State) Lookup(n Name) *Branch { return s.byName[n] }

// Branches are all branches, by number.
func (s *State) Branches() []*Branch {
	all := make([]*Branch, 0, len(s.branches))
	for _, b := range s.branches {
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b *Branch) int { return int(a.No) - int(b.No) })
	return all
}

// Result is what applying a command did.
type Result struct {
	Command Command
	Branch  *Branch // nil if there is none
	Err     error   // one of this package's errors: the command changed nothing
	// OpenEpoch: what the branch was at that point of the log.
	Epoch      uint64
	Start, End pg.LSN
	// Durable, DeleteBranch: what of the archive is not needed any more.
	Dropped []Archived
}

// Apply applies the entry at index. An empty entry (a new leader's first) changes nothing
// and gives a zero Result. An error means that the entry cannot be understood: the
// replica must stop.
func (s *State) Apply(index uint64, data []byte) (Result, error) {
	if index <= s.applied {
		return Result{}, fmt.Errorf("entry %d was applied before: %d is", index, s.applied)
	}
	s.applied = index
	if len(data) == 0 {
		return Result{}, nil
	}
	c, err := Decode(data)
	if err != nil {
		return Result{}, fmt.Errorf("entry %d: %w", index, err)
	}
	r := Result{Command: c}
	if c.Kind == KindCreateBranch {
		r.Branch, r.Err = s.createBranch(c)
		return r, nil
	}
	b := s.branches[c.Branch]
	if b == nil {
		r.Err = ErrNoBranch
		return r, nil
	}
	r.Branch = b
	switch c.Kind {
	case KindOpenEpoch:
		b.Epoch++
		b.dropPieces()
		r.Epoch, r.Start, r.End = b.Epoch, b.Start, b.End
	case KindAppend:
		r.Err = b.append(c, index)
	case KindPiece:
		r.Err = b.addPiece(c, index)
	case KindDropPieces:
		if c.Begin == b.Held {
			b.dropPieces()
		}
	case KindDurable:
		r.Dropped, r.Err = b.setDurable(c.Begin)
	case KindArchived:
		r.Err = b.addArchived(c)
	case KindRewrap:
		b.rewrap(c.Rewraps)
	case KindDeleteBranch:
		delete(s.branches, b.No)
		delete(s.byName, b.Name)
		r.Dropped = b.Archive
	}
	return r, nil
}

func (s *State) createBranch(c Command) (*Branch, error) {
	if b := s.byName[c.Name]; b != nil {
		if b.Start != c.Begin {
			return b, ErrOtherStart
		}
		return b, nil
	}
	b := &Branch{No: s.last + 1, Name: c.Name, Start: c.Begin, End: c.Begin, Durable: c.Begin}
	s.add(b)
	return b, nil
}

func (s *State) add(b *Branch) {
	s.branches[b.No], s.byName[b.Name] = b, b
	s.last = max(s.last, b.No)
}

func (b *Branch) append(c Command, index uint64) error {
	switch {
	case c.Epoch != b.Epoch:
		return ErrFenced
	case c.End <= c.Begin:
		return ErrGap
	case c.Begin == b.End: // pieces that went before begin anew, or never
		b.dropPieces()
	case b.Held != 0 && c.Begin == b.Held:
		b.Chunks = append(b.Chunks, b.Pieces...)
		b.Held, b.Pieces = 0, nil
	default:
		return ErrGap
	}
	b.End = c.End
	b.noteDEK(c)
	b.Chunks = append(b.Chunks, Chunk{Begin: c.Begin, End: c.End, Index: index})
	return nil
}

func (b *Branch) addPiece(c Command, index uint64) error {
	switch {
	case c.Epoch != b.Epoch:
		return ErrFenced
	case c.End <= c.Begin:
		return ErrGap
	case c.Begin == b.End: // of a new leader, to which the record is sent again
		b.dropPieces()
	case b.Held == 0 || c.Begin != b.Held:
		return ErrGap
	}
	b.Held = c.End
	b.noteDEK(c)
	b.Pieces = append(b.Pieces, Chunk{Begin: c.Begin, End: c.End, Index: index})
	return nil
}

func (b *Branch) dropPieces() {
	if b.Held != 0 {
		b.Held, b.Pieces = 0, nil
		b.cutDEKs()
	}
}

func (b *Branch) setDurable(lsn pg.LSN) (dropped []Archived, err error) {
	if lsn > b.End {
		return nil, ErrBadInterval
	}
	if lsn <= b.Durable {
		return nil, nil
	}
	b.Durable = lsn
	for len(b.Archive) > 0 && b.Archive[0].End <= lsn {
		dropped, b.Archive = append(dropped, b.Archive[0]), b.Archive[1:]
	}
	b.forgetDEKs()
	return dropped, nil
}

// addArchived takes an object into the archive. A second leader may have archived the same
// stretch, cut at other places: what does not continue the archive is refused.
func (b *Branch) addArchived(c Command) error {
	if c.End <= c.Begin || c.Begin < b.Start || c.End > b.End {
		return ErrBadInterval
	}
	if c.Begin > b.Released() || c.End <= b.Released() {
		return ErrGap
	}
	b.Archive = append(b.Archive, Archived{Begin: c.Begin, End: c.End, Bytes: c.Bytes})
	return nil
}

// Forget drops the index of chunks in entries up to index, which the Raft log is about to
// let go.
func (s *State) Forget(index uint64) {
	for _, b := range s.branches {
		had := len(b.Chunks)
		b.Chunks, b.Pieces = after(b.Chunks, index), after(b.Pieces, index)
		if len(b.Chunks) < had {
			b.forgetDEKs()
		}
	}
}

// after is the chunks in entries after index.
func after(chunks []Chunk, index uint64) []Chunk {
	n, _ := slices.BinarySearchFunc(chunks, index+1, func(c Chunk, i uint64) int {
		switch {
		case c.Index < i:
			return -1
		case c.Index > i:
			return 1
		}
		return 0
	})
	if n == 0 {
		return chunks
	}
	return slices.Clone(chunks[n:])
}

// Pinned gives a branch of which entries up to index hold pieces of a record that is not whole
// yet, which are kept nowhere else and must stay; nil if there is none.
func (s *State) Pinned(index uint64) *Branch {
	for _, b := range s.Branches() {
		if len(b.Pieces) > 0 && b.Pieces[0].Index <= index {
			return b
		}
	}
	return nil
}

// Needs tells whether the Raft log's entries up to index hold WAL that is kept nowhere
// else: a branch, and the stretch [from, to) of it, or nil.
func (s *State) Needs(index uint64) (b *Branch, from, to pg.LSN) {
	for _, b := range s.Branches() {
		n := 0
		for n < len(b.Chunks) && b.Chunks[n].Index <= index {
			n++
		}
		if n > 0 && b.Chunks[n-1].End > b.Released() {
			return b, b.Released(), b.Chunks[n-1].End
		}
	}
	return nil, 0, 0
}
