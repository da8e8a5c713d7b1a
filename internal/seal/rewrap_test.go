package seal

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
)

func TestTheWrappedDEKOfAFileIsReplaced(t *testing.T) {
	c := Context{Purpose: PurposeSecret, Project: "p", Branch: "b", Object: "o"}
	raw := bytes.Repeat([]byte{7}, KeySize)
	var file bytes.Buffer
	k, err := NewKey(bytes.Clone(raw))
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(&file, k, []byte("the old form"), c)
	if err != nil {
		t.Fatal(err)
	}
	plain := bytes.Repeat([]byte("secret "), 5000) // more than a chunk
	if _, err := w.Write(plain); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	old := bytes.Clone(file.Bytes())
	changed, err := ReplaceWrappedDEK(file.Bytes(), []byte("another form, of another length"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(old, file.Bytes()) {
		t.Error("the file that was given was changed")
	}
	if got, err := WrappedDEK(changed); err != nil || string(got) != "another form, of another length" {
		t.Errorf("the new file has %q, %v", got, err)
	}
	r, err := NewReader(t.Context(), bytes.NewReader(changed), int64(len(changed)), c, func(_ context.Context, _ Context, wrapped []byte) (*Key, error) {
		if string(wrapped) != "another form, of another length" {
			t.Errorf("asked to open %q", wrapped)
		}
		return NewOpenKey(bytes.Clone(raw))
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size())); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, err := ReplaceWrappedDEK(file.Bytes(), nil); err == nil {
		t.Error("no wrapped DEK is taken")
	}
	if _, err := ReplaceWrappedDEK([]byte("no sealed file at all"), []byte("w")); !errors.Is(err, ErrDamaged) {
		t.Errorf("what is no sealed file: %v", err)
	}
}
