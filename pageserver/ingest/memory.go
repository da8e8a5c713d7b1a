package ingest

// memory gives out pieces of chunks that are used again after a reset, which wipes them: what
// is filed is the customer's data.
type memory struct {
	chunks [][]byte
	next   int    // chunk to take after free
	free   []byte // rest of the chunk in use
	large  [][]byte
}

const (
	chunkBytes = 256 << 10
	largeBytes = chunkBytes / 8
	keepChunks = 64
)

// alloc gives n zero bytes.
func (m *memory) alloc(n int) []byte {
	if n > largeBytes {
		p := make([]byte, n)
		m.large = append(m.large, p)
		return p
	}
	if len(m.free) < n {
		if m.next == len(m.chunks) {
			m.chunks = append(m.chunks, make([]byte, chunkBytes))
		}
		m.free = m.chunks[m.next]
		m.next++
	}
	p := m.free[:n:n]
	m.free = m.free[n:]
	return p
}

// reset takes everything back.
func (m *memory) reset() {
	for _, c := range m.chunks[:m.next] {
		clear(c)
	}
	for _, p := range m.large {
		clear(p)
	}
	if len(m.chunks) > keepChunks {
		m.chunks = m.chunks[:keepChunks:keepChunks]
	}
	m.next, m.free, m.large = 0, nil, nil
}
