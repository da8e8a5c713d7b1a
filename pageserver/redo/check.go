package redo

import (
	"bytes"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// checkConsistency is XLR_CHECK_CONSISTENCY: the record carries images of its
// pages as they are after it.
const checkConsistency = 0x02

// A MismatchError means that replay made another page than PostgreSQL did.
type MismatchError struct {
	Block     pg.BlockNumber
	Rel       pg.RelTag
	At        int // first byte that differs, after masking
	Have      byte
	Want      byte
	Different int // number of bytes that differ
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("block %d of %v differs from the record's image in %d bytes, first at %d: have %#02x, want %#02x",
		e.Block, e.Rel, e.Different, e.At, e.Have, e.Want)
}

// Check compares page, to which rec was applied, with the after-image that rec has
// of blk under wal_consistency_checking; what WAL does not determine, such as hint
// bits, is masked as PostgreSQL masks it. checked is false if rec has no such image
// or its kind of page cannot be masked here.
func Check(rec *walrec.Record, blk *walrec.Block, p []byte) (checked bool, err error) {
	mask := masks[rec.RmID]
	if rec.Info&checkConsistency == 0 || !blk.HasImage || blk.ApplyImage || mask == nil {
		return false, nil
	}
	if len(p) != pg.BlockSize {
		return false, wrap(rec, blk.Rel.String(), errPageSize)
	}
	var have, want [pg.BlockSize]byte
	copy(have[:], p)
	if err := blk.RestoreImage(want[:]); err != nil {
		return false, wrap(rec, blk.Rel.String(), err)
	}
	if page(have[:]).lsn() > rec.End {
		return false, nil // as checkXLogConsistency: the page has moved on
	}
	for _, b := range [...]page{have[:], want[:]} {
		if err := mask(b, uint32(blk.Block)); err != nil {
			return false, wrap(rec, fmt.Sprintf("block %d of %v", blk.Block, blk.Rel), err)
		}
	}
	if m := difference(have[:], want[:]); m != nil {
		m.Block, m.Rel = blk.Block, blk.Rel
		return true, wrap(rec, "its own image", m)
	}
	return true, nil
}

func difference(have, want []byte) *MismatchError {
	if bytes.Equal(have, want) { // nearly always
		return nil
	}
	var m *MismatchError
	for i := range have {
		if have[i] == want[i] {
			continue
		}
		if m == nil {
			m = &MismatchError{At: i, Have: have[i], Want: want[i]}
		}
		m.Different++
	}
	return m
}

// masks blank out what redo need not reproduce (rm_mask in rmgrlist.h, bufmask.c).
var masks = [256]func(p page, block uint32) error{
	rmHeap2:   maskHeap,
	rmHeap:    maskHeap,
	rmBtree:   maskBtree,
	rmHash:    maskHash,
	rmGIN:     maskGIN,
	rmGist:    maskGist,
	rmSeq:     maskStandard,
	rmBRIN:    maskBRIN,
	rmSPGist:  maskSPGist,
	rmGeneric: maskStandard,
}

// maskStandard blanks LSN, checksum and the hole between line pointers and tuples.
func maskStandard(p page, _ uint32) error {
	if err := p.sane(); err != nil {
		return err
	}
	clear(p[:offFlags])
	clear(p[p.lower():p.upper()])
	return nil
}

// maskHeader blanks LSN, checksum and the header's hints.
func maskHeader(p page) {
	clear(p[:offFlags])
	p.clearFlag(pdPageFull | pdHasFreeLines | pdAllVisible)
	clear(p[offPruneXid:headerSize])
}

// maskHints is maskStandard and blanks the hints in the header, too.
func maskHints(p page) error {
	maskHeader(p)
	return maskStandard(p, 0)
}

func maskHeap(p page, block uint32) error {
	if err := maskHints(p); err != nil {
		return err
	}
	const speculative = 0xFFFE // SpecTokenOffsetNumber
	for n := 1; n <= p.maxOffset(); n++ {
		item := p.rawItem(n)
		if item.len() == 0 {
			continue
		}
		t, err := p.storage(item)
		if err != nil {
			return fmt.Errorf("offset number %d: %w", n, err)
		}
		if end := min(item.off()+align8(len(t)), len(p)); item.flags() != lpUnused {
			clear(p[item.off()+len(t) : end]) // padding
		}
		if item.flags() != lpNormal || len(t) < tupHeader {
			continue
		}
		h := heapTuple(t)
		if h.infomask()&xminFrozen != xminFrozen {
			h.setInfomask(h.infomask() &^ xactMask)
		} else {
			h.setInfomask(h.infomask() &^ (xmaxInvalid | xmaxCommitted))
		}
		h.setXvac(0) // cmin and cmax are not in WAL
		if le.Uint16(h[tupCtid+4:]) == speculative {
			h.setCtid(block, uint16(n))
		}
	}
	return nil
}

func maskBtree(p page, _ uint32) error {
	if err := maskHints(p); err != nil {
		return err
	}
	q, err := p.btOpaque()
	if err != nil {
		return err
	}
	if q.flags()&btpLeaf != 0 { // LP_DEAD is a hint
		p.maskItemFlags()
	}
	q.clearFlags(btpHasGarbage | btpSplitEnd)
	q.setCycleID(0)
	return nil
}

// maskItemFlags blanks what line pointers say of their items (mask_lp_flags).
func (p page) maskItemFlags() {
	for n := 1; n <= p.maxOffset(); n++ {
		if item := p.rawItem(n); item.flags() != lpUnused {
			p.setItem(n, makeItem(item.off(), lpUnused, item.len()))
		}
	}
}
