package seal

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/boottime"
)

func boundKey(t testing.TB, term *Term) *Key {
	t.Helper()
	k, err := NewKey(make([]byte, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	k.Bind(term)
	return k
}

// Past its term a key neither seals nor opens, though nobody has wiped it.
func TestKeyIsOfNoUsePastItsTerm(t *testing.T) {
	c := Context{Purpose: PurposeWAL, Project: "p", Branch: "b", Object: "o"}
	term := NewTerm(boottime.Now() + time.Hour)
	k := boundKey(t, term)
	sealed, err := SealWAL(nil, k, c, 1, 2, 1, []byte("wal"))
	if err != nil {
		t.Fatal(err)
	}
	term.Extend(boottime.Now() - 1) // as time does
	if _, err := OpenWAL(nil, k, c, 1, 2, 1, sealed); !errors.Is(err, ErrWiped) {
		t.Errorf("opening past the term: %v, want ErrWiped", err)
	}
	if _, err := SealWAL(nil, k, c, 1, 2, 2, nil); !errors.Is(err, ErrWiped) {
		t.Errorf("sealing past the term: %v, want ErrWiped", err)
	}
	if term.Extend(boottime.Now() + time.Hour); term.Live() {
		t.Error("a term that had ended was extended")
	}
	ended := NewTerm(boottime.Now() + time.Hour)
	ended.End()
	if ended.Extend(boottime.Now() + time.Hour); ended.Live() {
		t.Error("a term that was ended was extended")
	}
	if !Endless().Live() {
		t.Error("an endless term has ended")
	}
}

// The check at each use, against sealing itself, of 4, 16 and 64 KiB.
func BenchmarkTerm(b *testing.B) {
	for _, size := range []int{4 << 10, 16 << 10, 64 << 10} {
		for name, term := range map[string]*Term{"unbound": Endless(), "bound": NewTerm(boottime.Now() + time.Hour)} {
			b.Run(fmt.Sprintf("%s/%dKiB", name, size>>10), func(b *testing.B) {
				k := boundKey(b, term)
				s := &scratch{}
				plain, dst := make([]byte, size), make([]byte, 0, size+TagSize)
				b.SetBytes(int64(size))
				for b.Loop() {
					if _, err := k.seal(dst, s, plain); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	b.Run("check", func(b *testing.B) {
		t := NewTerm(boottime.Now() + time.Hour)
		for b.Loop() {
			if t.expired() {
				b.Fatal("expired")
			}
		}
	})
	b.Run("exact check", func(b *testing.B) {
		t := NewTerm(boottime.Now() + time.Hour)
		for b.Loop() {
			if !t.Live() {
				b.Fatal("expired")
			}
		}
	})
}
