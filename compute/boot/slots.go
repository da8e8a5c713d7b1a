package boot

import (
	"fmt"
	"path"
	"strings"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// OldestNeeded is from where on the branch's replication slots need its WAL; 0 if there are none.
func OldestNeeded(state *pb.StartupStateResponse) pg.LSN { return readSlots(state.Files).oldest }

// slots is what the replication slots need.
type slots struct {
	oldest  pg.LSN // WAL from here on; 0: none
	logical pg.LSN // files of logical decoding from here on; 0: none
	dead    map[string]bool
	broken  []error // why some of the dead cannot be read
}

func readSlots(files []*pb.NamedFile) slots {
	s := slots{dead: make(map[string]bool)}
	for _, f := range files {
		if !strings.HasPrefix(f.Path, auxfile.Slots+"/") {
			continue
		}
		slot, err := pg.ParseReplicationSlot(f.Data)
		switch {
		case err != nil:
			// Postgres would not start with it.
			s.dead[f.Path], s.broken = true, append(s.broken, fmt.Errorf("%s: %w", f.Path, err))
		case slot.Persistency != pg.SlotPersistent:
			s.dead[f.Path] = true // its making did not come to its end
		case slot.Restart == pg.InvalidLSN:
		default:
			s.oldest = least(s.oldest, slot.Restart)
			if slot.Database != 0 {
				s.logical = least(s.logical, slot.Restart)
			}
		}
	}
	return s
}

func least(a, b pg.LSN) pg.LSN {
	if a == pg.InvalidLSN {
		return b
	}
	return min(a, b)
}

// stale tells of files that no slot needs any more: Postgres removes them at a checkpoint.
func (s slots) stale(name string) bool {
	var hi, lo, a, b uint32
	dir, base := path.Split(name)
	switch dir {
	case auxfile.Snapshots + "/":
		if _, err := fmt.Sscanf(base, "%X-%X.snap", &hi, &lo); err != nil {
			return false
		}
	case auxfile.Mappings + "/":
		if _, err := fmt.Sscanf(base, "map-%x-%x-%X_%X-", &a, &b, &hi, &lo); err != nil {
			return false
		}
	default:
		return s.dead[name]
	}
	return s.logical == pg.InvalidLSN || pg.LSN(hi)<<32|pg.LSN(lo) < s.logical
}
