package pageread

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// histories is a source that knows some keys.
type histories map[keyspace.Key]timeline.History

var errGone = errors.New("test: the source is gone")

func (h histories) Get(ctx context.Context, key keyspace.Key, _ pg.LSN) (timeline.History, error) {
	if h == nil {
		return timeline.History{}, errGone
	}
	return h[key], ctx.Err()
}

func tag(fork pg.ForkNumber) pg.RelTag {
	return pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 77}, Fork: fork}
}

func image(p []byte) *timeline.Value { return &timeline.Value{LSN: 10, Kind: timeline.Image, Data: p} }

func delta(data []byte) timeline.Value {
	return timeline.Value{LSN: 20, Kind: timeline.Delta, Data: data}
}

func follows(block pg.BlockNumber) timeline.Value {
	data := make([]byte, change.FollowSize)
	change.PutFollow(data, block)
	return delta(data)
}

func TestAPageWithoutVersionsIsZeros(t *testing.T) {
	page := []byte(strings.Repeat("x", pg.BlockSize))
	if err := Page(t.Context(), histories{}, keyspace.RelPage(tag(0), 3), 30, page); err != nil {
		t.Fatal(err)
	}
	if strings.Trim(string(page), "\x00") != "" {
		t.Error("the page is not zeros")
	}
}

func TestVisibilityBitsAreCleared(t *testing.T) {
	p := make([]byte, pg.BlockSize)
	p[15] = 1 // pd_upper: not new
	p[24] = 0xFF
	data := make([]byte, change.ClearVMSize)
	change.PutClearVM(data, 1, 3)
	key := keyspace.RelPage(tag(pg.VMFork), 0)
	page := make([]byte, pg.BlockSize)
	src := histories{key: {Base: image(p), Changes: []timeline.Value{delta(data)}}}
	if err := Page(t.Context(), src, key, 30, page); err != nil || page[24] != 0xF3 {
		t.Errorf("the map begins with %#02x, %v; want 0xf3", page[24], err)
	}
	if p[24] != 0xFF {
		t.Error("the image itself was changed")
	}
}

func TestErrorsNamePageAndRecord(t *testing.T) {
	key := keyspace.RelPage(tag(0), 3)
	page := make([]byte, pg.BlockSize)
	gin := &walrec.Record{LSN: 16, End: 80, Raw: walrec.Build(13, 0x20, 5, 8, []byte("data"))}
	raw := make([]byte, change.RecordHeader+len(gin.Raw))
	change.PutRecord(raw, gin)
	for name, h := range map[string]timeline.History{
		"missing":     {Base: &timeline.Value{LSN: 10, Kind: timeline.Init, Data: append([]byte{byte(change.Missing)}, "Gin/SPLIT"...)}},
		"wrong page":  {Changes: []timeline.Value{{LSN: 80, Kind: timeline.Delta, Data: raw}}},
		"no change":   {Changes: []timeline.Value{delta(nil)}},
		"short image": {Base: image(make([]byte, 100))},
		"wrong map":   {Changes: []timeline.Value{follows(3)}},
	} {
		err := Page(t.Context(), histories{key: h}, key, 30, page)
		var e *Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), "block 3 of 1663/5/77") {
			t.Errorf("%s: the error is %v", name, err)
		}
	}
	var unsupported *redo.UnsupportedError
	err := Page(t.Context(), histories{key: {Base: &timeline.Value{Kind: timeline.Init, Data: []byte("\x05Gin/SPLIT")}}}, key, 30, page)
	if !errors.As(err, &unsupported) || !strings.Contains(err.Error(), "Gin/SPLIT") {
		t.Errorf("the copy of a page without redo gives %v", err)
	}
}

func TestFreeSpaceFollowsTheHeap(t *testing.T) {
	heap := make([]byte, pg.BlockSize)
	le16 := func(at, v int) { heap[at], heap[at+1] = byte(v), byte(v>>8) }
	le16(12, 28)           // lower
	le16(14, 28+4+3200)    // upper: 3200 bytes free, a line pointer taken off
	le16(16, pg.BlockSize) // special
	fsm := keyspace.RelPage(tag(pg.FSMFork), 2)
	src := histories{
		fsm:                         {Changes: []timeline.Value{follows(7), follows(8)}},
		keyspace.RelPage(tag(0), 7): {Base: image(heap)},
		keyspace.RelPage(tag(0), 8): {Base: image(make([]byte, 10))}, // cannot be made
	}
	page := make([]byte, pg.BlockSize)
	if err := Page(t.Context(), src, fsm, 30, page); err != nil {
		t.Fatal(err)
	}
	slots := page[28+4095:]
	if slots[7] != 100 || slots[8] != 0 || page[28] != 100 {
		t.Errorf("slots 7 and 8 are %d and %d, the page's root is %d; want 100, 0, 100", slots[7], slots[8], page[28])
	}
}

// noting is a source that keeps notes.
type noting struct {
	histories
	notes map[keyspace.Key]int
	gets  map[keyspace.Key]int
}

func (n noting) Get(ctx context.Context, key keyspace.Key, lsn pg.LSN) (timeline.History, error) {
	n.gets[key]++
	return n.histories.Get(ctx, key, lsn)
}
func (n noting) Note(key keyspace.Key, _ pg.LSN, value int) { n.notes[key] = value }
func (n noting) Noted(_ context.Context, key keyspace.Key, _ pg.LSN) (int, bool) {
	v, ok := n.notes[key]
	return v, ok
}

// A heap page that was made already is not made again for its map; one of which nothing is known is, once.
func TestNotedFreeSpaceIsUsed(t *testing.T) {
	heap := make([]byte, pg.BlockSize)
	binary.LittleEndian.PutUint16(heap[12:], 28)
	binary.LittleEndian.PutUint16(heap[14:], 28+4+3200)
	binary.LittleEndian.PutUint16(heap[16:], pg.BlockSize)
	fsm, seven, eight := keyspace.RelPage(tag(pg.FSMFork), 2), keyspace.RelPage(tag(0), 7), keyspace.RelPage(tag(0), 8)
	src := noting{histories{
		fsm:   {Changes: []timeline.Value{follows(7), follows(8), follows(9)}},
		seven: {Base: image(heap)}, eight: {Base: image(heap)},
	}, map[keyspace.Key]int{}, map[keyspace.Key]int{}}
	page := make([]byte, pg.BlockSize)
	if err := Page(t.Context(), src, seven, 30, page); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Page(t.Context(), src, fsm, 30, page); err != nil {
			t.Fatal(err)
		}
		if slots := page[28+4095:]; slots[7] != 100 || slots[8] != 100 || slots[9] != 0 {
			t.Errorf("slots: %v", slots[7:10])
		}
	}
	if src.gets[seven] != 1 || src.gets[eight] != 1 {
		t.Errorf("the pages were made %d and %d times, want once", src.gets[seven], src.gets[eight])
	}
}

// What a slot follows must outlive the folding of the history that says so: the heap page
// changes on, and nobody notes it a second time.
func TestAFoldedMapStillFollowsTheHeap(t *testing.T) {
	heap := func(free int) *timeline.Value {
		p := make([]byte, pg.BlockSize)
		binary.LittleEndian.PutUint16(p[12:], 28)                   // lower
		binary.LittleEndian.PutUint16(p[14:], uint16(28+4+free))    // upper, a line pointer taken off
		binary.LittleEndian.PutUint16(p[16:], uint16(pg.BlockSize)) // special
		return image(p)
	}
	const bottom = 2 + 4070 + 3
	first := heapBlock(bottom, 0)
	fsm := keyspace.RelPage(tag(pg.FSMFork), bottom)
	h := timeline.History{Base: image(make([]byte, pg.BlockSize)), Changes: []timeline.Value{follows(first + 7), follows(first + 4068)}}
	for round, free := range []int{3200, 64, 6400} {
		data, err := Fold(fsm, &h)
		if err != nil {
			t.Fatal(err)
		}
		h = timeline.History{Base: image(data), Changes: []timeline.Value{follows(first + 9)}}
		src := histories{fsm: h}
		for _, b := range []pg.BlockNumber{7, 9, 4068} {
			src[keyspace.RelPage(tag(0), first+b)] = timeline.History{Base: heap(free)}
		}
		page := make([]byte, pg.BlockSize)
		if err := Page(t.Context(), src, fsm, 30, page); err != nil {
			t.Fatal(err)
		}
		for slot, got := range page[28+4095:] {
			want := 0
			if slot == 7 || slot == 9 || slot == 4068 {
				want = free / 32
			}
			if int(got) != want {
				t.Fatalf("round %d: slot %d is %d, want %d", round, slot, got, want)
			}
		}
	}
	wrong := append(make([]byte, pg.BlockSize+followersSize-1), 0xFF)
	for name, block := range map[string]pg.BlockNumber{"slots beyond the last": bottom, "an upper page's": 1} {
		if _, err := Fold(keyspace.RelPage(tag(pg.FSMFork), block), &timeline.History{Base: image(wrong)}); err == nil {
			t.Errorf("%s are accepted", name)
		}
	}
}

func TestHeapBlockOfASlot(t *testing.T) {
	for _, heap := range []pg.BlockNumber{0, 1, 4068, 4069, 4069*4069 - 1, 4069 * 4069, 0xFFFFFFF0} {
		bottom, slot := redo.FSMLocation(heap)
		if got := heapBlock(bottom, slot); got != heap {
			t.Errorf("map page %d, slot %d is of heap block %d, want %d", bottom, slot, got, heap)
		}
	}
}

func TestUpperLevelsOfTheMapLeadDown(t *testing.T) {
	for _, heap := range []pg.BlockNumber{0, 4068, 4069, 4069 * 4069, 0xFFFFFFF0} {
		bottom, _ := redo.FSMLocation(heap)
		if !isBottom(bottom) {
			t.Errorf("heap block %d: map page %d is taken for an upper one", heap, bottom)
		}
		for _, u := range FSMAbove(bottom) {
			key := keyspace.RelPage(tag(pg.FSMFork), u.Page)
			page := make([]byte, pg.BlockSize)
			if err := Page(t.Context(), histories{key: {Changes: []timeline.Value{follows(u.Child)}}}, key, 30, page); err != nil {
				t.Fatalf("heap block %d: %v", heap, err)
			}
			slot, err := upperSlot(u.Page, u.Child)
			if err != nil || page[28+4095+slot] != 255 {
				t.Errorf("heap block %d: slot %d of map page %d is %d", heap, slot, u.Page, page[28+4095+slot])
			}
		}
	}
	if _, err := upperSlot(0, 2); err == nil {
		t.Error("a bottom page is taken for the root's child")
	}
}

func TestAFailingSourceIsNotThePagesFault(t *testing.T) {
	h := timeline.History{Changes: []timeline.Value{follows(7)}}
	err := Build(t.Context(), histories(nil), keyspace.RelPage(tag(pg.FSMFork), 2), &h, 30, make([]byte, pg.BlockSize))
	var e *Error
	if !errors.Is(err, errGone) || errors.As(err, &e) {
		t.Errorf("the error is %v", err)
	}
}
