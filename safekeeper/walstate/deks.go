package walstate

import (
	"bytes"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// DEK is one data key under which WAL of a branch is sealed, and the newest form in which it is
// wrapped. An append carries the form that its DEK had when it was proposed; once the KEK was
// rotated it is this one that opens.
type DEK struct {
	Object     string
	Wrapped    []byte
	Begin, End pg.LSN // the stretch that is sealed under it: one, since a DEK is one leader's
}

// Rewrap replaces the wrapped form of one DEK, if it still is what it was.
type Rewrap struct {
	Object     []byte
	Old, Fresh []byte
}

// MaxRewraps bounds a Rewrap command: it then has some 60 KB.
const MaxRewraps = 256

func appendRewraps(dst []byte, list []Rewrap) []byte {
	dst = le.AppendUint16(dst, uint16(len(list)))
	for _, r := range list {
		dst = appendField(appendField(appendField(dst, r.Object), r.Old), r.Fresh)
	}
	return dst
}

func (d *decoder) rewraps() (list []Rewrap) {
	n := int(le.Uint16(d.take(2)))
	if n > MaxRewraps {
		d.short = true
	}
	for range n {
		if d.short {
			return nil
		}
		list = append(list, Rewrap{Object: d.field(), Old: d.field(), Fresh: d.field()})
	}
	return list
}

// noteDEK takes an accepted append's DEK into the index. The form that the index has stays: the
// leader may go on to send the one from before a Rewrap.
func (b *Branch) noteDEK(c Command) {
	if n := len(b.DEKs); n > 0 && b.DEKs[n-1].Object == string(c.Object) {
		b.DEKs[n-1].End = c.End
		return
	}
	b.DEKs = append(b.DEKs, DEK{Object: string(c.Object), Wrapped: bytes.Clone(c.WrappedDEK), Begin: c.Begin, End: c.End})
}

// rewrap changes the forms that are still what the command takes them for. A DEK whose WAL is
// not needed any more is passed over.
func (b *Branch) rewrap(list []Rewrap) (changed int) {
	for _, r := range list {
		for i := range b.DEKs {
			if d := &b.DEKs[i]; d.Object == string(r.Object) && bytes.Equal(d.Wrapped, r.Old) {
				d.Wrapped = bytes.Clone(r.Fresh)
				changed++
			}
		}
	}
	return changed
}

// cutDEKs takes back what pieces of a record that was never whole brought into the index.
func (b *Branch) cutDEKs() {
	n := len(b.DEKs)
	for n > 0 && b.DEKs[n-1].Begin >= b.End {
		n--
	}
	b.DEKs = b.DEKs[:n:n]
	if n > 0 {
		b.DEKs[n-1].End = min(b.DEKs[n-1].End, b.End)
	}
}

// forgetDEKs drops the DEKs of WAL that is in layers and not in the Raft log any more.
func (b *Branch) forgetDEKs() {
	kept := b.Durable
	if len(b.Chunks) > 0 {
		kept = min(kept, b.Chunks[0].Begin)
	}
	n := 0
	for n < len(b.DEKs) && b.DEKs[n].End <= kept {
		n++
	}
	if n > 0 {
		b.DEKs = slices.Clone(b.DEKs[n:])
	}
	if b.Unindexed <= b.Durable {
		b.Unindexed = 0
	}
}

// Wrapped is the newest wrapped form of the DEK of an object that seals WAL at lsn; nil if the
// index does not have it, and the append's own form is the newest.
func (b *Branch) Wrapped(object string, lsn pg.LSN) []byte {
	i, found := slices.BinarySearchFunc(b.DEKs, lsn, func(d DEK, at pg.LSN) int {
		switch {
		case d.End <= at:
			return -1
		case d.Begin > at:
			return 1
		}
		return 0
	})
	if !found || b.DEKs[i].Object != object {
		return nil
	}
	return b.DEKs[i].Wrapped
}
