package memscan

import (
	"crypto/rand"
	"io"
	"reflect"
	"testing"
)

// tell writes to a process and waits for what it says.
func tell(t *testing.T, in io.Writer, out io.Reader, msg []byte, want string) {
	t.Helper()
	if _, err := in.Write(msg); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(out, got); err != nil || string(got) != want {
		t.Fatalf("the process says %q, %v; want %q", got, err, want)
	}
}

// wipe clears what a pointer in an interface points to.
func wipe(v any) { reflect.ValueOf(v).Elem().SetZero() }

// BenchmarkSearch is the worst case: 1,000 keys, and no page of zeros.
func BenchmarkSearch(b *testing.B) {
	s := &Set{}
	for range 1000 {
		key := make([]byte, 32)
		rand.Read(key)
		if err := s.AddKey("key", key); err != nil {
			b.Fatal(err)
		}
	}
	p := make([]byte, 16<<20)
	rand.Read(p)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		s.search(p, func(needle, int) {})
	}
}
