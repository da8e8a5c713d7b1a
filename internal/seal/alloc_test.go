//go:build !race

// sync.Pool drops items on purpose under the race detector.

package seal

import "testing"

func TestSteadyStateAllocatesNothing(t *testing.T) {
	b, err := NewBox(Endless())
	if err != nil {
		t.Fatal(err)
	}
	plain, sealed, opened := pattern(8192), make([]byte, 0, 8192), make([]byte, 0, 8192)
	if n := testing.AllocsPerRun(200, func() {
		out, tag := b.Seal(sealed, 1, plain)
		if _, err := b.Open(opened, 1, out, tag); err != nil {
			t.Fatal(err)
		}
	}); n >= 1 {
		t.Errorf("sealing and opening a slot allocates %v times", n)
	}
	k, counter, dst := testKey(t), uint64(0), make([]byte, 0, 10000)
	if n := testing.AllocsPerRun(200, func() {
		counter++
		if _, err := SealWAL(dst, k, walContext, 1, 2, counter, plain); err != nil {
			t.Fatal(err)
		}
	}); n >= 1 {
		t.Errorf("sealing WAL allocates %v times", n)
	}
}
