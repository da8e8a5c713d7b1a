package walstate

import (
	"encoding/json"
	"fmt"
)

// image is the form of a State in a Raft snapshot. Chunks are no part of it: they are in
// entries that follow the snapshot, or kept elsewhere.
type image struct {
	Version  int
	Applied  uint64
	Last     uint32 `json:",omitempty"` // as in State; of branches that are there if absent
	Branches []*Branch
}

// imageVersion 1 had no index of DEKs: a program that knows only that one must not take a later
// snapshot, since it would serve wrapped forms that open no more.
const imageVersion = 2

// Snapshot writes the state down.
func (s *State) Snapshot() ([]byte, error) {
	return json.Marshal(image{Version: imageVersion, Applied: s.applied, Last: s.last, Branches: s.Branches()})
}

// Restore makes a State from what Snapshot wrote.
func Restore(data []byte) (*State, error) {
	var im image
	if err := json.Unmarshal(data, &im); err != nil {
		return nil, fmt.Errorf("snapshot of the branch table: %w", err)
	}
	if im.Version < 1 || im.Version > imageVersion {
		return nil, fmt.Errorf("snapshot of the branch table has version %d, this program reads 1 to %d", im.Version, imageVersion)
	}
	s := New()
	s.applied = im.Applied
	for _, b := range im.Branches {
		if b == nil || b.No == 0 || s.branches[b.No] != nil || s.byName[b.Name] != nil || b.End < b.Start || b.Durable > b.End ||
			b.Held != 0 && b.Held <= b.End {
			return nil, fmt.Errorf("snapshot of the branch table: a branch is damaged")
		}
		if n := len(b.Archive); im.Version == 1 && n > 0 {
			b.Unindexed = b.Archive[n-1].End
		}
		s.add(b)
	}
	s.last = max(s.last, im.Last)
	return s, nil
}
