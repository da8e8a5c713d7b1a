package pageserver

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"
)

// An aux file is one that WAL does not describe. Its value has its path, since its key is
// only the path's hash: length of the path 2 | path | content.

const maxAuxPath = 1024

func marshalAux(name string, data []byte) []byte {
	b := make([]byte, 0, 2+len(name)+len(data))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name)))
	b = append(b, name...)
	return append(b, data...)
}

func parseAux(b []byte) (name string, data []byte, err error) {
	if len(b) < 2 || int(binary.LittleEndian.Uint16(b)) > len(b)-2 {
		return "", nil, fmt.Errorf("an aux file's value of %d bytes is too short for its path", len(b))
	}
	n := int(binary.LittleEndian.Uint16(b))
	name = string(b[2 : 2+n])
	return name, b[2+n:], checkPath(name)
}

// checkPath refuses paths that are not plain and relative to a data directory.
func checkPath(name string) error {
	if name == "" || len(name) > maxAuxPath || name != path.Clean(name) || path.IsAbs(name) ||
		name == ".." || strings.HasPrefix(name, "../") || strings.ContainsRune(name, 0) {
		return fmt.Errorf("%q is no path of a file in a data directory", name)
	}
	return nil
}
