package blob

import (
	"fmt"
	"strings"
)

// MaxKey bounds a key, in bytes.
const MaxKey = 512

// MaxDocument bounds what Get reads and Swap writes, in bytes.
const MaxDocument = 64 << 20

// CheckKey says what of a key is against the rules of this package.
func CheckKey(key string) error {
	if key == "" || len(key) > MaxKey {
		return fmt.Errorf("object key %.60q has %d bytes, want 1..%d", key, len(key), MaxKey)
	}
	for segment := range strings.SplitSeq(key, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return fmt.Errorf("object key %q has a segment %q", key, segment)
		}
		if len(segment) > 255 {
			return fmt.Errorf("object key %q has a segment of %d bytes, the most is 255", key, len(segment))
		}
		for _, c := range []byte(segment) {
			if !keyByte(c) {
				return fmt.Errorf("object key %q has byte %q, want only [a-zA-Z0-9._=-] and slashes", key, c)
			}
		}
	}
	return nil
}

func keyByte(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	return c == '.' || c == '_' || c == '=' || c == '-'
}
