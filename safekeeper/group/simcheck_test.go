package group

import (
	"hash/crc32"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

// check looks at the result of one entry on one node.
func (s *sim) check(n *simNode, r *walstate.Result) {
	if r.Command.Kind == walstate.KindOpenEpoch && r.Err == nil {
		key := epochOf{r.Command.Branch, r.Epoch}
		if end, ok := s.epochEnd[key]; ok && end != r.End {
			s.fail("epoch %v opened at %v and at %v", key, end, r.End)
		}
		s.epochEnd[key] = r.End
	}
	if r.Command.Kind != walstate.KindAppend {
		return
	}
	if r.Err != nil {
		s.rejected++
		if n.term != 0 { // as a Leadership ends
			n.term = 0
		}
	}
}

// checkApplied compares what a node applied with what any other did.
func (s *sim) checkApplied(n *simNode) {
	n.core.View(func(st *walstate.State) {
		s.maxTerm = max(s.maxTerm, n.core.Status().Term)
		for i := st.Applied(); i > 0; i-- {
			e, err := n.core.Store().Entry(i)
			if err != nil {
				break // compacted: it was checked before that
			}
			crc := crc32.ChecksumIEEE(e.GetData())
			had, ok := s.applied[i]
			if ok && had != crc {
				s.fail("node %d applied another entry %d than its peers", n.id, i)
			}
			if ok {
				break
			}
			s.applied[i] = crc
		}
		for no := uint32(1); no <= 2; no++ {
			if b := st.Branch(no); b != nil {
				s.checkBranch(n, b)
			}
		}
	})
}

func (s *sim) checkBranch(n *simNode, b *walstate.Branch) {
	known := &s.chunks[b.No]
	from := pg.LSN(8)
	var epoch uint64
	if k := len(*known); k > 0 {
		from, epoch = (*known)[k-1].end, (*known)[k-1].epoch
	}
	at, ok := b.Find(from)
	if !ok {
		return
	}
	for _, c := range b.Chunks[at:] {
		e, err := n.core.Store().Entry(c.Index)
		if err != nil {
			s.fail("node %d: entry %d of branch %d: %v", n.id, c.Index, b.No, err)
		}
		cmd, err := walstate.Decode(e.GetData())
		if err != nil || cmd.Begin != c.Begin || cmd.End != c.End || cmd.Branch != b.No {
			s.fail("node %d: entry %d is not the chunk %v of branch %d: %v", n.id, c.Index, c, b.No, err)
		}
		if c.Begin != from {
			s.fail("W3: chunk %v of branch %d begins after %v", c, b.No, from)
		}
		if cmd.Epoch < epoch {
			s.fail("W2: chunk %v of epoch %d follows epoch %d", c, cmd.Epoch, epoch)
		}
		if end, ok := s.epochEnd[epochOf{b.No, cmd.Epoch + 1}]; ok && c.End > end {
			s.fail("W2: chunk %v of epoch %d lies beyond %v, where the next epoch began", c, cmd.Epoch, end)
		}
		from, epoch = c.End, cmd.Epoch
		*known = append(*known, simChunk{c.Begin, c.End, cmd.Epoch, c.Index, crc32.ChecksumIEEE(cmd.Ciphertext)})
		s.accepted++
	}
}

// settle ends all faults and checks that every node comes to hold everything.
func (s *sim) settle() {
	s.calm = true
	s.cut = [simNodes + 1][simNodes + 1]bool{}
	for _, n := range s.nodes {
		n.fs.SetFree(-1)
		if n.core == nil {
			s.open(n)
		}
	}
	for range 200_000 {
		s.act()
		if s.step++; s.settled() {
			break
		}
	}
	for _, n := range s.nodes {
		if !n.core.Joined() {
			for _, o := range s.nodes {
				s.t.Logf("node %d: %+v, %+v, joining %+v", o.id, o.core.Status(), o.core.id, o.core.join)
			}
			s.fail("node %d has not joined", n.id)
		}
		s.checkHolds(n)
	}
}

// settled: all have applied all that anybody had applied when the faults ended.
func (s *sim) settled() bool {
	var top uint64
	for i := range s.applied {
		top = max(top, i)
	}
	for _, n := range s.nodes {
		if !n.core.Joined() || n.core.Status().Applied+50 < top || n.core.Status().Lead == 0 {
			return false
		}
	}
	return s.step > *simSteps+3000
}

// checkHolds is W1: all that was ever accepted is still there, or below what is durable elsewhere.
func (s *sim) checkHolds(n *simNode) {
	n.core.View(func(st *walstate.State) {
		for no := uint32(1); no <= 2; no++ {
			b := st.Branch(no)
			if b == nil {
				continue
			}
			for _, k := range s.chunks[no] {
				if k.index > st.Applied() || k.end <= b.Durable {
					continue
				}
				i, ok := b.Find(k.begin)
				if !ok {
					s.fail("W1: node %d lacks %v to %v of branch %d (durable %v, end %v)", n.id, k.begin, k.end, no, b.Durable, b.End)
				}
				e, err := n.core.Store().Entry(b.Chunks[i].Index)
				if err != nil {
					s.fail("W1: node %d: %v", n.id, err)
				}
				cmd, err := walstate.Decode(e.GetData())
				if err != nil || crc32.ChecksumIEEE(cmd.Ciphertext) != k.crc {
					s.fail("W1: node %d holds other WAL at %v: %v", n.id, k.begin, err)
				}
			}
		}
	})
}
