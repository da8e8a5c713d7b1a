package seal

import (
	"bytes"
	"fmt"
)

// WrappedDEK gives the wrapped DEK in the header of a sealed file of that many bytes.
func WrappedDEK(file []byte) ([]byte, error) {
	h, err := readHeader(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		return nil, fmt.Errorf("looking for the wrapped DEK of a sealed file: %w", err)
	}
	return h.wrapped, nil
}

// ReplaceWrappedDEK gives a copy of a sealed file with another wrapped form of its DEK in the
// header. What is sealed stays as it is, and opens nothing more nor less: no chunk's AAD has the
// wrapped form.
func ReplaceWrappedDEK(file, wrapped []byte) ([]byte, error) {
	h, err := readHeader(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		return nil, fmt.Errorf("replacing the wrapped DEK of a sealed file: %w", err)
	}
	if len(wrapped) == 0 || len(wrapped) > MaxWrapped {
		return nil, fmt.Errorf("replacing the wrapped DEK of a sealed file: it has %d bytes, want 1..%d", len(wrapped), MaxWrapped)
	}
	body := file[h.size():]
	h.wrapped = wrapped
	return append(h.marshal(), body...), nil
}
