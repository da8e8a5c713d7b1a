package keymgr

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
)

// format1 is a document as it was written before keys of branches were.
const format1 = `{
  "format": 1,
  "project": "p1",
  "cmk": "dev",
  "current": 2,
  "keks": [
    {"version": 1, "wrapped": "AQI=", "cmk_version": "1"},
    {"version": 2, "wrapped": "AwQ=", "cmk_version": "3"}
  ]
}`

func testBucket(t *testing.T) *blobtest.Faulty {
	t.Helper()
	b, err := dirblob.Open(filepath.Join(t.TempDir(), "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	return blobtest.NewFaulty(b, nil)
}

func TestFormat1IsReadAndWrittenAsFormat2(t *testing.T) {
	store, id := testBucket(t), keyID{project: "p1"}
	blobtest.Put(t, store, id.document(), format1)
	d, err := loadDocument(t.Context(), store, id)
	if err != nil {
		t.Fatal(err)
	}
	want := []kekVersion{{Version: 1, CMK: "dev", CMKVersion: "1", Wrapped: []byte{1, 2}}, {Version: 2, CMK: "dev", CMKVersion: "3", Wrapped: []byte{3, 4}}}
	if diff := cmp.Diff(want, d.KEKs); diff != "" || !d.old {
		t.Errorf("old %v, KEKs %s", d.old, diff)
	}
	if _, err := updateDocument(t.Context(), store, id, func(*document) error { return nil }); err != nil {
		t.Fatal(err)
	}
	d, err = loadDocument(t.Context(), store, id)
	if err != nil || d.old {
		t.Fatalf("after an update: old %v, %v", d.old, err)
	}
	if diff := cmp.Diff(want, d.KEKs); diff != "" {
		t.Error(diff)
	}
	swaps := store.Calls(blobtest.OpSwap)
	if _, err := updateDocument(t.Context(), store, id, func(*document) error { return nil }); err != nil || store.Calls(blobtest.OpSwap) != swaps {
		t.Errorf("an update that changes nothing wrote, or failed: %v", err)
	}
}

// A write is lost, or applied and reported lost: either way the change is there once.
func TestUpdateSurvivesUncertainWrites(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.None, blobtest.Lost, blobtest.Unreported} {
		store, id := testBucket(t), keyID{"p1", "b1"}
		_, err := createDocument(t.Context(), store, &document{Project: "p1", Branch: "b1", CMK: "dev", Current: 1, KEKs: []kekVersion{{Version: 1, CMK: "dev", Wrapped: []byte{1}}}})
		if err != nil {
			t.Fatal(err)
		}
		store.FailNext(blobtest.OpSwap, id.document(), fault)
		add := func(d *document) error {
			if d.Current == 1 {
				d.KEKs = append(d.KEKs, kekVersion{Version: 2, CMK: "dev", Wrapped: []byte{2}})
				d.Current = 2
			}
			return nil
		}
		if _, err := updateDocument(t.Context(), store, id, add); err != nil {
			t.Errorf("fault %d: %v", fault, err)
		}
		d, err := loadDocument(t.Context(), store, id)
		if err != nil || d.Current != 2 || len(d.KEKs) != 2 {
			t.Errorf("fault %d: %+v, %v", fault, d, err)
		}
	}
}

func TestUpdateGivesItsChangesError(t *testing.T) {
	store, id := testBucket(t), keyID{project: "p1"}
	blobtest.Put(t, store, id.document(), format1)
	wrong := errors.New("not now")
	if _, err := updateDocument(t.Context(), store, id, func(*document) error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("got %v", err)
	}
	if _, err := updateDocument(t.Context(), store, keyID{project: "absent"}, func(*document) error { return nil }); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("an absent key: %v", err)
	}
	broken := func(d *document) error { d.Current = 9; return nil }
	if _, err := updateDocument(t.Context(), store, id, broken); err == nil || store.Calls(blobtest.OpSwap) != 0 {
		t.Errorf("a document that cannot be read again was written: %v", err)
	}
}

func TestDamagedDocumentsAreRefused(t *testing.T) {
	for name, edit := range map[string][2]string{
		"another project":  {`"p1"`, `"p2"`},
		"a branch's":       {`"cmk": "dev"`, `"branch": "b", "cmk": "dev"`},
		"later format":     {`"format": 1`, `"format": 3`},
		"unknown field":    {`"current"`, `"x": 1, "current"`},
		"no current":       {`"current": 2`, `"current": 7`},
		"versions twice":   {`{"version": 1`, `{"version": 2`},
		"nothing wrapped":  {`"AQI="`, `""`},
		"negative grace":   {`"current"`, `"grace_ms": -1, "current"`},
		"no CMK":           {`"cmk": "dev"`, `"cmk": ""`},
		"something behind": {"\n}", "\n} {}"},
	} {
		data := strings.Replace(format1, edit[0], edit[1], 1)
		if data == format1 {
			t.Errorf("%s: the edit changed nothing", name)
		}
		if _, err := parseDocument(keyID{project: "p1"}, []byte(data)); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
}

func FuzzParseDocument(f *testing.F) {
	f.Add([]byte(format1))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := parseDocument(keyID{project: "p1"}, data)
		if err != nil {
			return
		}
		out, err := d.marshal()
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := parseDocument(keyID{project: "p1"}, out)
		if err != nil {
			t.Fatal(err)
		}
		d.old, again.old = false, false
		if diff := cmp.Diff(d, again, cmp.AllowUnexported(document{})); diff != "" {
			t.Error(diff)
		}
	})
}

// While a re-wrapping is under way the key may be used only if each of its CMKs says yes.
func TestProbesAskEachCMK(t *testing.T) {
	d := &document{Current: 3, KEKs: []kekVersion{{Version: 1, CMK: "a"}, {Version: 2, CMK: "a"}, {Version: 3, CMK: "b"}}}
	var got []uint32
	for _, p := range d.probes() {
		got = append(got, p.Version)
	}
	if diff := cmp.Diff([]uint32{3, 2}, got); diff != "" {
		t.Error(diff)
	}
}

// What was read before a hold was written, and comes after it, does not end the hold.
func TestAnOldDocumentReplacesNoNewerOne(t *testing.T) {
	k := newKeyState(keyID{project: "p1"})
	held := &document{Revision: 2, Hold: &hold{Reason: "drill"}}
	k.take(held)
	if got := k.take(&document{Revision: 1}); got != held || k.known() != held {
		t.Errorf("revision %d took the place of revision 2", got.Revision)
	}
	if got := k.take(&document{Revision: 3}); got.Hold != nil {
		t.Error("a newer one was not taken")
	}
}

// A clone can be changed as a re-wrapping does, and what it was made of stays.
func TestCloneOfADocument(t *testing.T) {
	d := &document{Revision: 1, KEKs: []kekVersion{{Version: 1, CMK: "a"}}, Rewrap: &rewrapTarget{CMK: "b", Done: make([]uint32, 0, 1)}}
	c := d.clone()
	c.find(1).CMK = "b"
	c.Rewrap.Done = append(c.Rewrap.Done, 1)
	c.Rewrap.CMK = "c"
	if d.find(1).CMK != "a" || d.Rewrap.CMK != "b" || len(d.Rewrap.Done[:1]) != 1 || d.Rewrap.Done[:1][0] != 0 {
		t.Errorf("the original has become %+v", d)
	}
}

// A revision beyond which there is none would have every later document taken for an older one.
func TestARevisionThatCannotGrowIsDamage(t *testing.T) {
	id := keyID{project: "p1"}
	if _, err := parseDocument(id, []byte(`{"format": 2, "project": "p1", "revision": 18446744073709551615, "cmk": "dev", "current": 1,
		"keks": [{"version": 1, "cmk": "dev", "wrapped": "AA=="}]}`)); err == nil {
		t.Error("it was taken")
	}
}
