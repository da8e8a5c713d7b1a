package redo

import "errors"

// errShort says that a record ended before the fields that its kind must have.
var errShort = errors.New("the record's data is too short for its kind")

// cursor reads fields from a record's data. Reading past the end gives zeros and
// makes err() report it, so that a parse needs one check at its end.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.b) {
		c.short, c.b = true, nil
		return nil
	}
	v := c.b[:n:n]
	c.b = c.b[n:]
	return v
}

func (c *cursor) u8() uint8 {
	if v := c.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (c *cursor) u16() uint16 {
	if v := c.take(2); v != nil {
		return le.Uint16(v)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if v := c.take(4); v != nil {
		return le.Uint32(v)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if v := c.take(8); v != nil {
		return le.Uint64(v)
	}
	return 0
}

// u16s reads n numbers into dst's storage.
func (c *cursor) u16s(n int, dst []uint16) []uint16 {
	v := c.take(2 * n)
	for i := 0; i+1 < len(v); i += 2 {
		dst = append(dst, le.Uint16(v[i:]))
	}
	return dst
}

func (c *cursor) err() error {
	if c.short {
		return errShort
	}
	return nil
}
