package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/compute/pgproc"
	"github.com/holdfastdb/holdfast/internal/config"
)

// replicas is the number of safekeepers of an embedded cluster: the fewest that outlive
// the loss of one.
const replicas = 3

// cmk is the name of the key that an embedded cluster makes in its development KMS.
const cmk = "dev"

// layout is where an embedded cluster keeps what.
type layout struct{ dir string }

func layoutOf(cmd *cobra.Command) (layout, error) {
	dir, err := cmd.Flags().GetString("data")
	if err != nil {
		return layout{}, err
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return layout{}, fmt.Errorf("data directory %q: %w", dir, err)
	}
	return layout{dir: abs}, nil
}

func (l layout) path(elem ...string) string {
	return filepath.Join(append([]string{l.dir}, elem...)...)
}

func (l layout) bucket() string   { return l.path("bucket") }
func (l layout) localKMS() string { return l.path("kms", "keys.json") }

// maxRunDir leaves room for a socket's name within what the kernel takes for a socket path.
const maxRunDir = 90

// runDir holds the sockets: in the data directory, or, where that path is too long for a
// socket, in a private folder for temporary files whose name follows from it.
func (l layout) runDir() string {
	if dir := l.path("run"); len(dir) <= maxRunDir {
		return dir
	}
	sum := sha256.Sum256([]byte(l.dir))
	return filepath.Join(os.TempDir(), "holdfast-"+strconv.Itoa(os.Getuid())+"-"+hex.EncodeToString(sum[:6]))
}

// elsewhere is where the endpoints' folders are if they cannot be in the data directory. Only
// root needs and only root makes it.
const elsewhere = "/var/lib/holdfast"

// computeDir holds the endpoints' folders, in which nothing is durable: in the data directory,
// unless Postgres's user may not pass through to it, as below root's home. why is empty then.
func (l layout) computeDir() (dir, why string) {
	user, err := pgproc.FindUser()
	if err == nil {
		dir, err = filepath.EvalSymlinks(l.dir) // as the kernel calls a mount there
	}
	if err == nil {
		err = user.MayEnter(dir)
	}
	var refused *pgproc.NoPassageError
	if !errors.As(err, &refused) {
		return l.path("compute"), "" // what else is wrong is said where it matters
	}
	sum := sha256.Sum256([]byte(l.dir))
	dir = filepath.Join(elsewhere, "compute-"+hex.EncodeToString(sum[:6]))
	return dir, fmt.Sprintf("endpoints' local files, none of them durable, are in %s, since user %s may not pass through %s", dir, refused.User, refused.Dir)
}

// makeElsewhere makes a folder of elsewhere that others may pass through, whatever the umask.
func makeElsewhere(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("making the endpoints' folder: %w", err)
	}
	for _, d := range []string{elsewhere, dir} {
		var st unix.Stat_t
		if err := unix.Lstat(d, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: d, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != 0 {
			return fmt.Errorf("the endpoints' folder: %s is not a directory of root's: move it away", d)
		}
		if err := os.Chmod(d, 0o711); err != nil {
			return err
		}
	}
	return nil
}

func (l layout) socket(role string) string { return "unix:" + filepath.Join(l.runDir(), role) }

func (l layout) safekeeper(id uint64) string { return "safekeeper" + strconv.FormatUint(id, 10) }

func (l layout) peers() map[uint64]string {
	peers := make(map[uint64]string, replicas)
	for id := uint64(1); id <= replicas; id++ {
		peers[id] = l.socket(l.safekeeper(id))
	}
	return peers
}

func (l layout) safekeeperAddrs() []string {
	addrs := make([]string, 0, replicas)
	for id := uint64(1); id <= replicas; id++ {
		addrs = append(addrs, l.socket(l.safekeeper(id)))
	}
	return addrs
}

func (l layout) keymgrConfig() *config.Keymgr {
	return &config.Keymgr{Listen: l.socket("keymgr"), Dir: l.path("keymgr"), Bucket: l.bucket(), LocalKMS: l.localKMS()} // any CMK: all that its development KMS has are the user's own
}

func (l layout) safekeeperConfig(id uint64) *config.Safekeeper {
	name := l.safekeeper(id)
	return &config.Safekeeper{ID: id, Listen: l.socket(name), Dir: l.path(name), Bucket: l.bucket(), Keymgr: l.socket("keymgr"), Peers: l.peers()}
}

func (l layout) pageserverConfig() *config.Pageserver {
	return &config.Pageserver{Node: "pageserver", Listen: l.socket("pageserver"), Dir: l.path("pageserver"), Bucket: l.bucket(),
		Keymgr: l.socket("keymgr"), Safekeepers: l.safekeeperAddrs()}
}

func (l layout) managerConfig(f upFlags, computeDir string) *config.Manager {
	return &config.Manager{Listen: l.socket("manager"), Dir: l.path("manager"), ComputeDir: computeDir, LogDir: l.path("log"),
		Bucket: l.bucket(), Keymgr: l.socket("keymgr"), Safekeepers: l.safekeeperAddrs(), Pageserver: l.socket("pageserver"),
		CMK: cmk, EndpointListen: f.listen, PasswordFile: f.passwordFile, Settings: f.settings, CacheBytes: f.cacheBytes}
}
