package boot

import (
	"errors"
	"fmt"
	"net"
	"regexp"
	"sort"
	"strconv"
	"strings"
)

// Superuser is the database role that initdb makes and as which the agent connects.
const Superuser = "postgres"

// Settings are what Postgres is started with: configuration files and arguments.
type Settings struct {
	// Listen is the host:port for clients. An empty host is every address.
	Listen string
	// SocketDir is the private folder of the agent's own connection.
	SocketDir string
	// AgentUser is the operating system's user that the agent runs as: on the private socket
	// it, and nobody else, may connect as the superuser, by peer authentication.
	AgentUser string
	// PrivateShm tells that /dev/shm is one that ends with Postgres. If it is not, dynamic
	// shared memory goes to files in the (sealed) data directory: what processes that were
	// killed leave in a shared /dev/shm would outlive the keys (K2).
	PrivateShm bool
	// Extra are the user's settings.
	Extra map[string]string

	host string
	port string
	tls  *serverCert // nil: clients are on this machine
}

// defaults are settings that fit this storage, and that a user may change. Checkpoints are
// cheap (no relation is synced) and nothing is ever replayed from them; what they bound is
// the local WAL.
var defaults = map[string]string{
	"shared_buffers":             "256MB",
	"wal_buffers":                "16MB",
	"max_wal_size":               "2GB",
	"checkpoint_timeout":         "15min",
	"jit":                        "off",
	"effective_io_concurrency":   "16",
	"maintenance_io_concurrency": "16",
	"timezone":                   "UTC",
	"log_timezone":               "UTC",
	"datestyle":                  "iso, mdy",
	"log_line_prefix":            "%m [%p] %e ", // the agent looks for the SQLSTATE of a PANIC
	"lc_messages":                "C",
	"lc_monetary":                "C",
	"lc_numeric":                 "C",
	"lc_time":                    "C",
	"default_text_search_config": "pg_catalog.english",
}

// fixed are settings on which what we promise depends. They are given as arguments, which
// win over every file, postgresql.auto.conf (ALTER SYSTEM) included.
var fixed = map[string]string{
	// W1: a commit is flushed, by fdatasync(2), before it is reported.
	"fsync": "on", "wal_sync_method": "fdatasync", "full_page_writes": "off",
	// The mount takes whole WAL files under their final names.
	"wal_init_zero": "off", "wal_recycle": "off", "archive_mode": "off",
	"checkpoint_flush_after": "0", "bgwriter_flush_after": "0", "backend_flush_after": "0",
	// A crashed Postgres ends; the agent starts again with a new epoch.
	"restart_after_crash": "off",
	// K1: messages hold users' data. They go to the agent's pipe, which seals them.
	"log_destination": "stderr", "logging_collector": "off",
	"unix_socket_permissions": "0700", "unix_socket_group": "", "shared_memory_type": "mmap",
	"allow_in_place_tablespaces": "off", "bonjour": "off",
}

// ours are settings that the agent makes up itself.
var ours = map[string]bool{
	"listen_addresses": true, "port": true, "unix_socket_directories": true, "dynamic_shared_memory_type": true,
	"data_directory": true, "config_file": true, "hba_file": true, "ident_file": true, "external_pid_file": true,
}

var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*$`)

// Validate checks the settings and completes them. It has to be called once, first.
func (s *Settings) Validate() error {
	var err error
	if s.host, s.port, err = net.SplitHostPort(s.Listen); err != nil {
		return fmt.Errorf("listen address %q: want HOST:PORT: %w", s.Listen, err)
	}
	if n, err := strconv.ParseUint(s.port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("listen address %q: port %q is not a number from 1 to 65535", s.Listen, s.port)
	}
	if strings.ContainsAny(s.host+s.SocketDir, ",'\"\\\n\r\x00") {
		return fmt.Errorf("listen address %q, socket folder %q: a character there cannot be given to Postgres", s.Listen, s.SocketDir)
	}
	if strings.ContainsAny(s.AgentUser, "\"\n\r\x00") || s.AgentUser == "" {
		return fmt.Errorf("the agent's user name %q cannot be written to pg_ident.conf", s.AgentUser)
	}
	for _, name := range sortedKeys(s.Extra) {
		if err := checkExtra(name, s.Extra[name]); err != nil {
			return err
		}
	}
	if !isLoopback(s.host) {
		if s.tls, err = newServerCert(s.host); err != nil {
			return fmt.Errorf("making the server's certificate: %w", err)
		}
	}
	return nil
}

func checkExtra(name, value string) error {
	lower := strings.ToLower(name)
	switch want, isFixed := fixed[lower]; {
	case !settingName.MatchString(name):
		return fmt.Errorf("setting %q: that is no name of a setting", name)
	case strings.ContainsAny(value, "\n\r\x00"):
		return fmt.Errorf("setting %s: the value has more than one line", name)
	case isFixed:
		return fmt.Errorf("setting %s cannot be changed: it is always %q here", name, want)
	case ours[lower]:
		return fmt.Errorf("setting %s cannot be changed: it follows from the endpoint's configuration", name)
	case lower == "wal_level" && value != "replica" && value != "logical":
		return fmt.Errorf("setting wal_level = %q: want replica or logical (with less, pages could not be made from the log)", value)
	case lower == "include" || lower == "include_dir" || lower == "include_if_exists":
		return errors.New("settings cannot include other files")
	}
	return nil
}

// Port is the port for clients; it is part of the private socket's name, too.
func (s *Settings) Port() string { return s.port }

// Args are the arguments of the postgres program, after the data directory.
func (s *Settings) Args() []string {
	addrs := s.host
	if addrs == "" {
		addrs = "*"
	}
	all := map[string]string{
		"listen_addresses": addrs, "port": s.port, "unix_socket_directories": s.SocketDir,
		"dynamic_shared_memory_type": "mmap", "wal_level": s.get("wal_level", "replica"),
	}
	if s.PrivateShm {
		all["dynamic_shared_memory_type"] = "posix"
	}
	for k, v := range fixed {
		all[k] = v
	}
	var args []string
	for _, name := range sortedKeys(all) {
		args = append(args, "-c", name+"="+all[name])
	}
	return args
}

// Files are the configuration files.
func (s *Settings) Files() []File {
	files := []File{
		{Path: "postgresql.conf", Data: []byte(s.conf())},
		{Path: "pg_hba.conf", Data: []byte(s.hba())},
		{Path: "pg_ident.conf", Data: fmt.Appendf(nil, "%s\nholdfast \"%s\" %s\n", madeHere, s.AgentUser, Superuser)},
	}
	if s.tls != nil {
		files = append(files, File{Path: "server.crt", Data: s.tls.cert}, File{Path: "server.key", Data: s.tls.key})
	}
	return files
}

const madeHere = "# Made by Holdfast at each start of the endpoint."

func (s *Settings) conf() string {
	all := make(map[string]string, len(defaults)+len(s.Extra))
	for k, v := range defaults {
		all[k] = v
	}
	if s.tls != nil {
		all["ssl"] = "on"
	}
	for k, v := range s.Extra {
		all[strings.ToLower(k)] = v
	}
	var b strings.Builder
	b.WriteString(madeHere + "\n")
	quote := strings.NewReplacer(`\`, `\\`, `'`, `''`)
	for _, name := range sortedKeys(all) {
		fmt.Fprintf(&b, "%s = '%s'\n", name, quote.Replace(all[name]))
	}
	return b.String()
}

// hba lets the agent in on the private socket, and clients with a password: over TLS, if
// they are not on this machine (K1).
func (s *Settings) hba() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nlocal all %s peer map=holdfast\n", madeHere, Superuser)
	if s.tls == nil {
		b.WriteString("host all all all scram-sha-256\n")
		return b.String()
	}
	b.WriteString("host all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\nhostssl all all all scram-sha-256\n")
	return b.String()
}

func (s *Settings) get(name, otherwise string) string {
	for k, v := range s.Extra {
		if strings.EqualFold(k, name) {
			return v
		}
	}
	return otherwise
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
