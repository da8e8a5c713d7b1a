package keyring

import (
	"container/list"
	"weak"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// maxCached is how many opened keys a lease keeps at hand.
const maxCached = 4096

// keySet is the keys of one lease. The newest that were opened are kept at hand; of all that
// were given out it knows those that are still in use, without keeping them alive, so that
// wipe reaches them too.
type keySet struct {
	byName map[string]*list.Element // of *cachedKey
	recent *list.List               // most recently used first
	out    []weak.Pointer[seal.Key]
	sweep  int // sweep out when it has grown to this
}

type cachedKey struct {
	name string
	key  *seal.Key
}

func newKeySet() *keySet {
	return &keySet{byName: make(map[string]*list.Element), recent: list.New(), sweep: 1024}
}

// keyName tells keys apart by all that they are bound to.
func keyName(c seal.Context, wrapped []byte) string {
	return string(append(c.AppendTo(nil), wrapped...))
}

func (s *keySet) get(name string) *seal.Key {
	e := s.byName[name]
	if e == nil {
		return nil
	}
	s.recent.MoveToFront(e)
	return e.Value.(*cachedKey).key
}

// track knows a key without keeping it.
func (s *keySet) track(k *seal.Key) {
	s.out = append(s.out, weak.Make(k))
	if len(s.out) < s.sweep {
		return
	}
	alive := s.out[:0]
	for _, p := range s.out {
		if p.Value() != nil {
			alive = append(alive, p)
		}
	}
	clear(s.out[len(alive):])
	s.out, s.sweep = alive, 2*len(alive)+1024
}

// put keeps an opened key. The one that is pushed out is not wiped: somebody may be using it.
func (s *keySet) put(name string, k *seal.Key) {
	s.track(k)
	s.byName[name] = s.recent.PushFront(&cachedKey{name, k})
	if s.recent.Len() > maxCached {
		e := s.recent.Back()
		s.recent.Remove(e)
		delete(s.byName, e.Value.(*cachedKey).name)
	}
}

// wipe wipes all that are in use, and tells how many that were.
func (s *keySet) wipe() (wiped int) {
	for _, p := range s.out {
		if k := p.Value(); k != nil {
			k.Wipe()
			wiped++
		}
	}
	*s = *newKeySet()
	return wiped
}
