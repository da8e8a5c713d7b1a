package boot

import (
	"fmt"
	"os"
	"syscall"
)

// chownLike gives a file to the owner of another.
func chownLike(name string, like os.FileInfo) error {
	st, ok := like.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("no owner is known of %s", like.Name())
	}
	return os.Chown(name, int(st.Uid), int(st.Gid))
}
