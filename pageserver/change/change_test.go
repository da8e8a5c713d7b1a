package change

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

func TestDecodeIsTheReverse(t *testing.T) {
	rec := &walrec.Record{LSN: 0x1000, End: 0x1100, Raw: []byte("a record")}
	record := make([]byte, RecordHeader+len(rec.Raw))
	PutRecord(record, rec)
	clearVM, follow := make([]byte, ClearVMSize), make([]byte, FollowSize)
	PutClearVM(clearVM, 70000, 2)
	PutFollow(follow, 0xFFFFFFFE)
	for _, c := range []struct {
		data []byte
		want Change
	}{
		{record, Change{Kind: Record, LSN: 0x1000, Raw: rec.Raw}},
		{clearVM, Change{Kind: ClearVM, Block: 70000, Bits: 2}},
		{follow, Change{Kind: Follow, Block: 0xFFFFFFFE}},
		{ZeroPage, Change{Kind: Zero}},
		{append([]byte{byte(Missing)}, "Gin/INSERT"...), Change{Kind: Missing, Name: "Gin/INSERT"}},
	} {
		have, err := Decode(c.data, 0x1100)
		if d := cmp.Diff(c.want, have); err != nil || d != "" {
			t.Errorf("%x: %v\n(-want +have) %s", c.data, err, d)
		}
	}
}

func TestDecodeRefusesWhatIsNoChange(t *testing.T) {
	for _, data := range [][]byte{nil, {0}, {1, 0, 0, 0, 0}, {2, 1, 2, 3, 4}, {3, 1}, {4, 0}, {99, 1, 2, 3}} {
		if c, err := Decode(data, pg.LSN(8)); err == nil {
			t.Errorf("%x is read as %+v", data, c)
		}
	}
}
