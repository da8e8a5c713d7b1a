// Package memscan searches the memory of running processes for what must not be there after
// a key was shredded: canaries that went through the database, and keys in every form
// in which a program holds them. A search that finds nothing proves something only if the
// same search found them before: callers do both.
//
// Searched is every page that a process has in memory or in swap, through /proc/PID/mem: heap,
// stacks, anonymous and file-backed mappings; and whole, once, what several processes share
// (shared memory, memfd), mapped or only open. Root is needed: roles may not be read by their own user.
//
// Out of reach, and so for callers to end in another way: the kernel's own memory (the page
// cache of a mount, buffers of sockets and pipes), registers of a running thread, and keys
// that no test can know, such as a compute's per-boot key: what was sealed under that is found by its canaries.
package memscan

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

const (
	// window is the shortest run of a canary that counts: so many random bytes are not found by chance.
	window = 8
	// keyRun is the run of a key's forms that counts: a round key, half of an AES-256 key.
	keyRun = 16
)

// needle is one run of bytes that must not be there.
type needle struct {
	name, form string
	run        []byte // window bytes or more
}

// Set is what is searched for. The zero Set is empty and ready.
type Set struct {
	byHead map[uint64][]needle // by their first 8 bytes
	// A bit for each hash of the first 4 bytes, small enough for a processor's nearest cache, and of
	// the first 8, which lets nearly nothing through.
	near *[1 << nearBits / 64]uint64
	far  *[1 << farBits / 64]uint64

	names []string
}

const nearBits, farBits = 18, 24

// Multiplicative hashing, Knuth's way: the high bits of a product with a large odd number.
func nearHash(head uint64) uint32 { return uint32(head) * 2654435761 >> (32 - nearBits) }
func farHash(head uint64) uint64  { return head * 0x9e3779b97f4a7c15 >> (64 - farBits) }

func (s *Set) add(n needle) {
	if s.byHead == nil {
		s.byHead, s.near, s.far = make(map[uint64][]needle), new([1 << nearBits / 64]uint64), new([1 << farBits / 64]uint64)
	}
	head := binary.LittleEndian.Uint64(n.run)
	for _, have := range s.byHead[head] {
		if bytes.Equal(have.run, n.run) {
			return
		}
	}
	s.byHead[head] = append(s.byHead[head], n)
	n1, n2 := nearHash(head), farHash(head)
	s.near[n1/64] |= 1 << (n1 % 64)
	s.far[n2/64] |= 1 << (n2 % 64)
}

// Names lists what was added.
func (s *Set) Names() []string { return slices.Clone(s.names) }

// AddCanary looks for any 8 consecutive bytes of text, as they are and in UTF-16.
func (s *Set) AddCanary(name, text string) error {
	if len(text) < window {
		return fmt.Errorf("canary %s has %d bytes, want %d or more", name, len(text), window)
	}
	s.names = append(s.names, name)
	var wide []byte
	for _, c := range []byte(text) {
		wide = append(wide, c, 0)
	}
	for i := 0; i+window <= len(text); i++ {
		s.add(needle{name, "raw", []byte(text[i : i+window])})
		s.add(needle{name, "UTF-16", wide[2*i : 2*(i+window)]})
	}
	return nil
}

// AddKey looks for an AES-256 key: raw, in base64 and hexadecimal, and each round key of its schedules,
// of which the first two are the raw key. One round key, 16 bytes, is enough.
func (s *Set) AddKey(name string, key []byte) error {
	if len(key) != 32 {
		return fmt.Errorf("key %s has %d bytes, want 32", name, len(key))
	}
	s.names = append(s.names, name)
	for _, r := range roundKeys([32]byte(key)) {
		s.add(needle{name, r.form, r.key[:]})
		s.add(needle{name, r.form + ", words turned", turnWords(r.key)})
	}
	for _, text := range []string{hex.EncodeToString(key), strings.ToUpper(hex.EncodeToString(key))} {
		for i := 0; i+keyRun <= len(text); i += keyRun {
			s.add(needle{name, "hexadecimal", []byte(text[i : i+keyRun])})
		}
	}
	for _, text := range base64Forms(key) {
		for i := 0; i+keyRun <= len(text); i += keyRun {
			s.add(needle{name, "base64", []byte(text[i : i+keyRun])})
		}
	}
	return nil
}

// base64Forms are the digits that key alone decides, wherever in a longer text it stands.
func base64Forms(key []byte) []string {
	var forms []string
	for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for before := range 3 {
			text := enc.EncodeToString(append(make([]byte, before), key...))
			begin := (before*8 + 5) / 6        // the first digit without a bit of what is before
			end := (before + len(key)) * 8 / 6 // the last one may have bits of what follows
			forms = append(forms, text[begin:end])
		}
	}
	return forms
}

// Hit is a place where something was found. It never holds what was.
type Hit struct {
	Name    string // as it was added
	Form    string // raw, base64, round key 3, ...: of the first run
	Runs    int    // that were found there, one after the other
	PID     int
	Command string
	Mapping string // permissions and name
	Address uint64 // of the process, or the offset in what is shared
	Hint    string // what stands around it
}

func (h Hit) String() string {
	return fmt.Sprintf("%s (%s, %d runs) in process %d (%.80s), %s at %#x, %s", h.Name, h.Form, h.Runs, h.PID, h.Command, h.Mapping, h.Address, h.Hint)
}

// search calls found for each needle in p.
func (s *Set) search(p []byte, found func(n needle, at int)) {
	if s.byHead == nil {
		return
	}
	for page := 0; page+window <= len(p); page += pageSize {
		begin, end := page, min(page+pageSize, len(p)-window+1)
		if page+pageSize <= len(p) && isZero(p[page:page+pageSize]) {
			begin = end - window // a run may begin with zeros of this page's end
		}
		s.searchFrom(p, max(begin, page), end, found)
	}
}

// searchFrom looks at what begins at p[begin:end]; window bytes more are there.
func (s *Set) searchFrom(p []byte, begin, end int, found func(n needle, at int)) {
	near, far := s.near, s.far
	for i := begin; i < end; i++ {
		head := binary.LittleEndian.Uint64(p[i:])
		if h := nearHash(head); near[h/64]&(1<<(h%64)) == 0 {
			continue
		}
		if h := farHash(head); far[h/64]&(1<<(h%64)) == 0 {
			continue
		}
		for _, n := range s.byHead[head] {
			if bytes.HasPrefix(p[i:], n.run) {
				found(n, i)
			}
		}
	}
}

var zeroPage [pageSize]byte

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:]) }

// markers are words that tell whose buffer it is; none is a secret.
var markers = []string{`"Plaintext"`, `"plaintext"`, `"ciphertext"`, `"value"`, "HTTP/1.1", "POST /", "content-type", "holdfast kek", "holdfast dek",
	"INSERT", "SELECT", "COPY", "postgres: "}

// hint describes the surroundings of p[at:at+n] in words that give nothing away.
func hint(p []byte, at, n int) string {
	before, after := p[max(at-32, 0):at], p[at+n:min(at+n+32, len(p))]
	text := fmt.Sprintf("between %s and %s", kindOf(before), kindOf(after))
	around := p[max(at-512, 0):min(at+n+512, len(p))]
	var near []string
	for _, m := range markers {
		if bytes.Contains(around, []byte(m)) {
			near = append(near, m)
		}
	}
	if len(near) > 0 {
		text += ", near " + strings.Join(near, " ")
	}
	return text
}

func kindOf(b []byte) string {
	printable, zeros := 0, 0
	for _, c := range b {
		switch {
		case c == 0:
			zeros++
		case 0x20 <= c && c < 0x7f:
			printable++
		}
	}
	switch {
	case len(b) == 0:
		return "an end"
	case zeros == len(b):
		return "zeros"
	case printable*4 >= len(b)*3:
		return "text"
	}
	return "binary"
}
